"""A protected lab with hands on every process, a link of the tests' own, and the witness as judge.

What a test may claim after a fault is in `FaultRig.trial`: guests unharmed, replication live again by itself, every
checkpoint that is listed a true prefix, none of a time in which the order was not proven."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from drctl.appliance.client import Client
from drctl.errors import DrctlError
from drctl.lab import lab, layout, process, site
from drctl.lab.judge import judge
from drctl.lab.protocol import AckLog, read_log
from drctl.model.group import GroupSpec, Retention
from drctl.store.group_store import GroupStore
from drctl.wire.ring import Word

GROUP = "web"
#: The law of design.md: no single fault stalls a guest for longer. What an overloaded machine adds is measured by a
#: control window of the same lab just before, and allowed on top.
STALL_SECONDS = 2.0
#: A mark is dated by the source's clock, corrected by an offset that the link measured to some milliseconds.
CLOCK_SECONDS = 0.1
LIVE_SECONDS = 60.0
#: Checkpoints judged right after a fault; judging one takes 0.1 to 0.4 s on an idle core.
JUDGED = 5


def _readable(sockets: list[socket.socket], seconds: float) -> list[socket.socket]:
    """Those that have something to read. By poll(2): select(2) knows no descriptor above 1023."""
    poll = select.poll()
    by_descriptor = {each.fileno(): each for each in sockets}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(seconds * 1000)]


class Relay:
    """A TCP relay between the sites, so that the tests can cut the link. One thread."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(16)
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        #: `open`, `cut` (connections are reset, new ones too) or `silent` (nothing passes, nothing ends).
        self.mode = "open"
        #: Bytes a second in both directions together; 0: as fast as it goes.
        self.rate = 0
        self._ended = False
        threading.Thread(target=self._run, name="relay", daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            self.mode = "cut"
            self._drop_all()

    def silence(self) -> None:
        self.mode = "silent"

    def restore(self) -> None:
        """Pass again; connections that were silent meanwhile go on."""
        self.mode = "open"

    def close(self) -> None:
        self._ended = True
        self.cut()
        self._listener.close()

    def _drop_all(self) -> None:
        for each in list(self._pairs):
            # A reset, as of a router that lost its table: neither side may take it for an orderly end.
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()
        self._pairs.clear()

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                known = [each for each in self._pairs if each.fileno() >= 0]
            if self.mode == "silent":
                time.sleep(0.02)
                continue
            try:
                ready = _readable([self._listener, *known], 0.02)
            except (OSError, ValueError):
                continue
            with self._lock:
                for each in ready:
                    self._take(each)

    def _take(self, each: socket.socket) -> None:
        try:
            if each is self._listener:
                self._accept()
            elif each in self._pairs:
                data = each.recv(1 << 14 if self.rate else 1 << 18)
                if not data:
                    raise ConnectionResetError
                if self.rate:
                    time.sleep(len(data) / self.rate)
                self._pairs[each].sendall(data)
        except OSError:
            other = self._pairs.pop(each, None)
            if other is not None:
                self._pairs.pop(other, None)
                other.close()
                each.close()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self.mode == "cut":
            near.close()
            return
        try:
            far = socket.create_connection(self._target, timeout=5)
        except OSError:
            near.close()
            raise
        self._pairs[near], self._pairs[far] = far, near


class OrderLog(threading.Thread):
    """Notes from the ring's own header when order was proven: between two looks of 10 ms, whatever the product says."""

    def __init__(self, ring: Path) -> None:
        super().__init__(name="order-log", daemon=True)
        self._ring = ring
        self._stop_it = threading.Event()
        #: Moments (wall seconds) at which the order was seen not to be proven, in order of time.
        self.unordered: list[float] = []

    def run(self) -> None:
        while not self._stop_it.wait(0.01):
            before = time.time()
            if not self._ordered():
                self.unordered.append(before)

    def _ordered(self) -> bool:
        try:
            with self._ring.open("rb") as file:
                words = memoryview(file.read(64 * 8)).cast("Q")
                return bool(words[Word.ORDER_STAMP] == words[Word.ORDERED_STAMP])
        except (OSError, IndexError, ValueError, TypeError):
            return False

    def was_unordered(self, moment: float) -> bool:
        """Whether order was missing all around a moment, by more than clocks may differ."""
        first = bisect_left(self.unordered, moment - CLOCK_SECONDS)
        last = bisect_right(self.unordered, moment + CLOCK_SECONDS)
        around = self.unordered[first:last]
        return len(around) > 10 and around[0] < moment - CLOCK_SECONDS / 2 and around[-1] > moment + CLOCK_SECONDS / 2

    def close(self) -> None:
        self._stop_it.set()
        self.join(5)


@dataclass
class Outcome:
    """What a trial saw, for assertions and for the report."""

    fault: str
    stall: float = 0.0
    control: float = 0.0
    live_after: float = 0.0
    judged: int = 0
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.fault}: longest stall {self.stall * 1e3:.0f} ms (control {self.control * 1e3:.0f} ms), "
            f"live after {self.live_after:.1f} s, {self.judged} checkpoints judged"
        )


@dataclass
class FaultRig:
    """One protected group. `rig` is conftest's LabRig."""

    rig: Any
    spec: GroupSpec
    relay: Relay
    order: OrderLog
    outcomes: list[Outcome] = field(default_factory=list)
    _judged: dict[tuple[int, float], str] = field(default_factory=dict)
    _control: float = 0.0

    # -- places -----------------------------------------------------------------------------------------------------

    @property
    def alpha(self) -> layout.Site:
        return self.rig.layout.site("alpha")

    @property
    def beta(self) -> layout.Site:
        return self.rig.layout.site("beta")

    def call(self, name: str, method: str, timeout: float = 60.0, **params: Any) -> Any:
        client = Client(f"unix:{self.rig.layout.site(name).control}")
        return client.call(method, {"group": GROUP, **params}, timeout=timeout)

    def status(self) -> dict[str, Any]:
        return dict(self.call("alpha", "group.status"))

    def checkpoints(self) -> list[dict[str, Any]]:
        return list(self.call("beta", "checkpoint.list"))

    def pid(self, what: str) -> int:
        """tap, shipper, watchdog, supervisor, libvirtd of alpha; receiver and maintenance of beta; `view-ID` of beta."""
        if what in ("supervisor", "libvirtd", "beta-supervisor"):
            state = layout.load(self.rig.directory)
            assert state is not None
            name = {"supervisor": "alpha/appliance", "beta-supervisor": "beta/appliance"}.get(what, "alpha/libvirtd")
            known = state.process(name)
            assert known is not None
            return known.pid
        place = self.beta if what == "receiver" or what.startswith("view-") else self.alpha
        name = f"{what}-{GROUP}" if what in ("tap", "shipper") else what
        return int(json.loads((place.appliance_run / "pids" / f"{name}.json").read_text())["pid"])

    def qemu_pid(self, guest: str) -> int:
        return int((self.alpha.run / "r" / "libvirt/qemu/run" / f"{guest}.pid").read_text())

    def kill(self, what: str, number: signal.Signals = signal.SIGKILL) -> int:
        pid = self.pid(what)
        os.kill(pid, number)
        return pid

    def up(self) -> None:
        """What systemd would do: start what has ended."""
        lab.up(self.rig.directory)

    def monitor(self, guest: str, execute: str, **arguments: Any) -> Any:
        sent = json.dumps({"execute": execute, "arguments": arguments})
        return json.loads(self.rig.virsh("alpha", "qemu-monitor-command", guest, sent))

    # -- waiting ----------------------------------------------------------------------------------------------------

    def await_(self, reached: Callable[[], Any], what: str, timeout: float = LIVE_SECONDS) -> Any:
        """The first true answer. A site that does not answer meanwhile is not there yet."""
        deadline = time.monotonic() + timeout
        while True:
            with suppress(DrctlError):
                if found := reached():
                    return found
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout:.0f} s: {what}\n{self.describe()}")
            time.sleep(0.05)

    def await_reason(self, part: str, timeout: float = 5.0) -> str:
        """The status names it, as a person would read it."""

        def look() -> str:
            status = self.status()
            told = [str(status["reason"]), *(f"{m['name']}: {m.get('reason', '')}" for m in status["machines"])]
            return next((text for text in told if part in text), "")

        return str(self.await_(look, f"the status says {part!r}", timeout))

    def await_live(self, timeout: float = LIVE_SECONDS) -> float:
        """Live, with a checkpoint of a moment after this call. Returns the seconds it took."""
        begun, wall = time.monotonic(), time.time()

        def look() -> bool:
            listed = self.call("beta", "group.status")["checkpoints"]["newest"]
            return bool(listed and listed["time"] > wall + CLOCK_SECONDS and self.status()["phase"] == "live")

        self.await_(look, "a new checkpoint of a live group", timeout)
        return time.monotonic() - begun

    def describe(self) -> str:
        """For a failed test: what a person would look at."""
        text = []
        for name in ("alpha", "beta"):
            try:
                text.append(json.dumps(self.call(name, "group.status"), default=str)[:1500])
            except DrctlError as exc:
                text.append(f"{name}: {exc.message}")
        for path in sorted([*self.alpha.home.glob("logs/*.log"), self.alpha.logs / "appliance.log"]):
            text += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-12:]]
        return "\n".join(text)

    # -- judging ----------------------------------------------------------------------------------------------------

    def judge_listed(self, *, since: float = 0.0, most: int = 0) -> int:
        """Judge what is listed now and was not judged yet; how many that were. AssertionError names the first that is
        not a true prefix, or was cut while the order was not proven. `most` (0: all) of those after `since`, spread
        evenly, the first and the last among them; the rest waits for the end of the module."""
        fresh = [each for each in self.checkpoints() if _key(each) not in self._judged and each["time"] >= since]
        if most and len(fresh) > most:
            fresh = [fresh[round(index * (len(fresh) - 1) / (most - 1))] for index in range(most)]
        with closing(GroupStore.open(self.beta.home / "store" / GROUP)) as store:
            return sum(self._judge(store, listed) for listed in fresh)

    def _judge(self, store: GroupStore, listed: dict[str, Any]) -> bool:
        number, moment = self_key = _key(listed)
        verdict = self._verdict(store, number)
        if verdict == "gone":  # merged away since it was listed
            return False
        self._judged[self_key] = verdict
        assert not verdict, f"checkpoint #{number} is no point in the guests' lives: {verdict}"
        assert not self.order.was_unordered(moment), f"checkpoint #{number} is of a time without order"
        return True

    @staticmethod
    def _verdict(store: GroupStore, number: int) -> str:
        if number not in {checkpoint.number for checkpoint in store.checkpoints()}:
            return "gone"
        with closing(store.open_view(number)) as view:
            names = sorted({disk.machine for disk in view.disks})
            verdict = judge({name: [view.disk(f"{name}.vda"), view.disk(f"{name}.vdb")] for name in names})
        return "" if verdict.true_prefix else "; ".join(str(reason) for reason in verdict.reasons[:3])

    def longest_stall(self, begin_ns: int, end_ns: int, guests: list[str]) -> float:
        """Longest time (s) that a chain of a guest went without a new acknowledgement. Chain 0 is left out: it waits
        for the other guest by its nature."""
        logs = self.rig.observer.logs("alpha")
        return max((_stall(logs[guest], begin_ns, end_ns) for guest in guests if guest in logs), default=0.0)

    def assert_unharmed(self, pids: dict[str, int]) -> None:
        """The guests are the same processes, run, and never saw an I/O error."""
        for guest, pid in pids.items():
            assert self.qemu_pid(guest) == pid, f"{guest}'s QEMU is another process"
            assert process.start_time(pid) is not None, f"{guest}'s QEMU has ended"
            assert self.rig.virsh("alpha", "domstate", guest, "--reason").split()[0] == "running"
            for device in self.monitor(guest, "query-block")["return"]:
                assert device.get("io-status", "ok") == "ok", f"{guest}: {device['device']} {device['io-status']}"
        assert {seen.guest: seen.trouble for seen in self.rig.observer.seen() if seen.trouble} == {}

    def control(self, seconds: float = 2.0) -> float:
        """The longest stall without any fault: what this machine, as busy as it is, does to the guests by itself."""
        begin = time.time_ns()
        time.sleep(seconds)
        return self.longest_stall(begin, time.time_ns(), self.rig.guests())

    @contextmanager
    def trial(self, fault: str, *, unharmed: list[str] | None = None, live: float = LIVE_SECONDS) -> Iterator[Outcome]:
        """A fault, made inside; what is claimed afterwards is asserted here. `unharmed`: guests (default: all)."""
        guests = self.rig.guests() if unharmed is None else unharmed
        self.await_live()
        outcome = Outcome(fault, control=self.control())
        pids = {guest: self.qemu_pid(guest) for guest in guests}
        for guest in guests:
            self.rig.observer.await_more(guest, "alpha", 2)
        begin = time.time_ns()
        yield outcome
        outcome.live_after = self.await_live(live)
        self.assert_unharmed(pids)
        for guest in self.rig.guests():
            self.rig.observer.await_more(guest, "alpha", 2)
        outcome.stall = self.longest_stall(begin, time.time_ns(), guests)
        outcome.judged = self.judge_listed(since=begin / 1e9 - 3, most=JUDGED)
        self.outcomes.append(outcome)
        sys.stderr.write(f"  {outcome}\n")
        assert outcome.stall < STALL_SECONDS + outcome.control, str(outcome)

    def close(self) -> None:
        self.relay.close()
        self.order.close()


def _key(listed: dict[str, Any]) -> tuple[int, float]:
    return int(listed["number"]), float(listed["time"])


def _stall(log: AckLog, begin_ns: int, end_ns: int) -> float:
    longest = 0
    for chain in range(1, log.chains):
        last, number = begin_ns, log.newest(chain, begin_ns)
        first = bisect_right(log.times, begin_ns)
        for moment, row in zip(log.times[first:], log.numbers[first:], strict=True):
            if moment > end_ns:
                break
            if row[chain] != number:
                longest = max(longest, moment - last)
                last, number = moment, row[chain]
        longest = max(longest, end_ns - last)
    return longest / 1e9


def protect(rig: Any, *, live: bool = True, **changes: Any) -> FaultRig:
    """Put a relay into the link, apply the group and wait until it is live (or, without `live`, attached)."""
    state = layout.load(rig.directory)
    assert state is not None
    relay = Relay(("127.0.0.1", state.links["beta"]))
    alpha = rig.layout.site("alpha")
    toml = alpha.home / "appliance.toml"
    toml.write_text(toml.read_text().replace(f"127.0.0.1:{state.links['beta']}", f"127.0.0.1:{relay.port}"))
    supervisor = state.process("alpha/appliance")
    assert supervisor is not None
    process.stop([supervisor])
    lab.up(rig.directory)
    spec = GroupSpec(
        **{
            "name": GROUP,
            "source": "alpha",
            "recovery": "beta",
            "machines": tuple(rig.guests()),
            "checkpoint_interval": 1.0,
            "ring_size": 16 * 2**20,
            "retention": Retention(),
            **changes,
        }
    )
    faults = FaultRig(rig, spec, relay, OrderLog(alpha.appliance_run / "rings" / f"{GROUP}.ring"))
    faults.await_(lambda: faults_ready(rig), "both appliances answer")
    apply(faults, spec)
    faults.call("alpha", "replicate.start")
    faults.order.start()
    if live:
        faults.await_live(180)
    return faults


def faults_ready(rig: Any) -> bool:
    return all(Client(f"unix:{place.control}").call("appliance.info") for place in rig.layout.sites)


def apply(faults: FaultRig, spec: GroupSpec) -> None:
    for name in ("beta", "alpha"):
        faults.call(name, "group.put", spec=msgspec.to_builtins(spec))
    faults.spec = spec


def proc_cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


__all__ = [
    "GROUP",
    "AckLog",
    "FaultRig",
    "Outcome",
    "Relay",
    "apply",
    "proc_cpu_seconds",
    "protect",
    "read_log",
    "site",
]
