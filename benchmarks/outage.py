"""A scripted hour of a WAN: enough room, an outage, too little room, recovery; and what the guests felt of it.

    python -m benchmarks.outage [--minute 60] [--script 20,5,10] [--control 30] [--link 100] [--latency-ms 10]

On the lab, as root: two guests whose witnesses write one after the other, and beside them QEMU itself writes random
pieces of 256 KiB to their disks (`qemu-io` by its monitor) through the same mirror, so that the stream is what the
phases want: 20 minutes at 80 % of the link, an outage of 5 minutes at the same load, 10 minutes at 150 %, and then at
80 % until the group is live again and for as long as the first phase's quarter. The link is a TCP connection under tc's
tbf in a namespace, with a latency (benchmarks/slow_link.py). `--minute 6` makes it six minutes.

Before replication begins and after it was stopped the same loads run without it, for the control: half of it each time,
2/3 of that at 80 %, 1/3 at 150 %. The machine's own load, and what others take of it, is noted in each phase.
A stall is the time between two acknowledgements of one chain of a witness, which writes at a fixed rate: its interval
is part of it in both runs. Chain 0 is left out, it waits for the other guest.

Backlog at the end of the third phase: what waits in ring and spill, and blocks to be read again. Goals: p99 of RPO -
interval at most 1 s in the first phase and after recovery; live (so again, and the state says so) within 1.2 times
(backlog / spare bandwidth), where the spare is the link's rate less what the load took of it in the first phase; stalls
at p99.9 at most 50 ms and at most 250 ms above the control's; no process's memory grows."""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import msgspec

from benchmarks.lab_world import GROUP, World, percentile, save, world
from benchmarks.slow_link import SlowLink
from drctl.appliance.client import Client
from drctl.errors import DrctlError
from drctl.lab import layout
from drctl.model.group import GroupSpec, Retention
from drctl.store.group_store import GroupStore

MiB = 2**20
INTERVAL = 1.0
PIECE = 256 * 1024
#: Where on vda the pieces go: behind all that the witness and the boot look at.
AREA = (128 * MiB, 48 * MiB)
#: What a witness's record of 4 KiB takes on the link, about: half of it is noise. It is measured, too.
RECORD = 2200
CHAINS = 4
#: From the begin of a load on (seconds) until its checkpoints are counted.
SETTLE = 5
HMP = 1


class Load(threading.Thread):
    """Writes pieces to one guest's disk by its QEMU, `rate` of them a second."""

    def __init__(self, uri: str, guest: str, noise: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self._domain = libvirt.open(uri).lookupByName(guest)
        self._noise = noise
        self._dice = random.Random(seed)
        self.rate = 0.0
        self.written = 0
        self.errors = 0
        self.ended = False

    def run(self) -> None:
        due = time.monotonic()
        while not self.ended:
            if not self.rate:
                time.sleep(0.05)
                due = time.monotonic()
                continue
            due = max(due + 1 / self.rate, time.monotonic() - 1)
            time.sleep(max(0.0, due - time.monotonic()))
            self._write()

    def _write(self) -> None:
        start, length = AREA
        offset = start + self._dice.randrange(length // PIECE) * PIECE
        # Another piece of the noise each time, so that nothing is equal to what was there.
        noise = self._noise.with_suffix(f".{self._dice.randrange(NOISES)}")
        command = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "write -s {noise} {offset} {PIECE}"'
        try:
            told = libvirt_qemu.qemuMonitorCommand(self._domain, command, HMP)
        except libvirt.libvirtError as exc:
            told = str(exc)
        # What it says of a write that was done goes to QEMU's own stdout.
        if not told.strip():
            self.written += PIECE
        else:
            self.errors += 1
            if self.errors == 1:
                print(f"load: {told}", flush=True)


NOISES = 16


def make_noise(directory: Path) -> Path:
    """Random files that QEMU can read."""
    for number in range(NOISES):
        path = directory / f"noise.{number}"
        path.write_bytes(random.randbytes(PIECE))
        path.chmod(0o644)
    return directory / "noise.0"


@dataclass
class Watch:
    """What is seen of the stream all the time."""

    made: World
    #: (wall seconds, what the shipper says) and (wall seconds, {process: MiB}).
    samples: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    #: (marked, listed) of each checkpoint.
    listed: list[tuple[float, float]] = field(default_factory=list)
    ended: bool = False

    def start(self) -> None:
        for work in (self._stream, self._memory, self._checkpoints):
            threading.Thread(target=work, daemon=True).start()

    def _stream(self) -> None:
        path = self.made.layout.site("alpha").appliance_run / "shippers" / f"{GROUP}.sock"
        while not self.ended:
            with suppress(DrctlError):
                said = Client(f"unix:{path}").call("status", timeout=5)
                self.samples.append((time.time(), said))
            time.sleep(0.25)

    def _memory(self) -> None:
        while not self.ended:
            found = {}
            for site in ("alpha", "beta"):
                for name, pid in self.made.pids(site).items():
                    with suppress(OSError):
                        found[f"{site}/{name}"] = own_mib(pid)
            self.memory.append((time.time(), found))
            time.sleep(2)

    def _checkpoints(self) -> None:
        newest = -1
        with closing(GroupStore.open(self.made.store)) as store:
            while not self.ended:
                marks = store.marks()
                now = time.time()
                for mark in marks[-4:]:
                    if mark.number > newest:
                        newest = mark.number
                        self.listed.append((mark.time, now))
                time.sleep(0.02)

    def last(self) -> dict[str, Any]:
        return self.samples[-1][1]

    def rpo(self) -> float:
        return time.time() - self.listed[-1][0] if self.listed else float("inf")

    def over_interval(self, begin: float, end: float) -> list[float]:
        """RPO - interval right before each new checkpoint, seconds."""
        return [
            listed - marked - INTERVAL
            for (marked, _), (_, listed) in pairwise(self.listed)
            if begin <= marked and listed <= end
        ]

    def between(self, begin: float, end: float) -> list[tuple[float, dict[str, Any]]]:
        return [each for each in self.samples if begin <= each[0] <= end]

    def rates(self, begin: float, end: float) -> tuple[float, float]:
        """Bytes a second on the link, and of records shipped."""
        seen = self.between(begin, end)
        (first, a), (last, b) = seen[0], seen[-1]
        took = last - first
        return (
            (b["link"]["sent_bytes"] - a["link"]["sent_bytes"]) / took,
            (b["shipped_bytes"] - a["shipped_bytes"]) / took,
        )


def own_mib(pid: int) -> float:
    """Memory of one process alone (USS), MiB, but for the ring: a page of it that only the tap has touched, so far,
    counts as the tap's own."""
    total, ring = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            ring = "/rings/" in rest
        elif first in ("Private_Clean:", "Private_Dirty:") and not ring:
            total += int(rest.split()[0])
    return total / 1024


def backlog(said: dict[str, Any]) -> int:
    """Bytes that wait: ring and spill, and blocks to be read again."""
    return int(said["backlog_bytes"]) + int(said["ring"]["dirty_bytes"])


def gaps(made: World, begin: float, end: float) -> list[float]:
    """Seconds between two acknowledgements of a chain, of all chains but the first ones."""
    found = []
    for log in made.observer.logs("alpha", until_ns=int(end * 1e9)).values():
        rows = [(at, row) for at, row in zip(log.times, log.numbers, strict=True) if at >= begin * 1e9]
        for chain in range(1, log.chains):
            changes = [at for (_, old), (at, new) in pairwise(rows) if new[chain] != old[chain]]
            found += [(after - before) / 1e9 for before, after in pairwise(changes)]
    return found


def stalls(values: list[float]) -> dict[str, float]:
    found = {f"p{share:g}_ms": round(percentile(values, share / 100) * 1e3, 1) for share in (50, 99, 99.9)}
    return {**found, "max_ms": round(max(values) * 1e3, 1), "count": len(values)}


class Script:
    """The phases, one after the other."""

    def __init__(self, made: World, loads: list[Load], watch: Watch, options: argparse.Namespace) -> None:
        self.made, self.loads, self.watch, self.options = made, loads, watch, options
        self.link = options.link * 1e6 / 8
        self.witness = options.guest_rate * CHAINS * len(loads) * RECORD
        self.times: dict[str, tuple[float, float]] = {}
        self.load_average: dict[str, float] = {}

    def load(self, share: float) -> None:
        rate = max(0.0, share * self.link - self.witness) / PIECE / len(self.loads)
        for each in self.loads:
            each.rate = rate

    def phase(self, name: str, minutes: float) -> None:
        begin, averages = time.time(), []
        end = begin + minutes * self.options.minute
        print(f"{name}: {minutes:g} minutes", flush=True)
        while (left := end - time.time()) > 0:
            time.sleep(min(left, 5))
            averages.append(os.getloadavg()[0])
        self.times[name] = begin, time.time()
        self.load_average[name] = round(sum(averages) / len(averages), 1)
        said = "" if name.startswith("control") else self.said(begin)
        print(f"  load {self.load_average[name]}{said}", flush=True)

    def said(self, begin: float) -> str:
        said = self.watch.last()
        return (
            f", phase {self.state()}, backlog {backlog(said) / 1e6:.1f} MB (ring {said['ring']['used'] / 1e6:.1f}, "
            f"spill {json.dumps(said.get('spill'))}, dirty {said['ring']['dirty_bytes'] / 1e6:.1f}), "
            f"RPO {self.watch.rpo():.1f} s, over the interval {over(self.watch, begin, time.time())}"
        )

    def state(self) -> str:
        with suppress(DrctlError):
            return str(self.made.call("alpha", "group.status", group=GROUP)["phase"])
        return "unknown"

    def calibrate(self) -> None:
        """How much the witnesses take of the link."""
        begin = time.time()
        time.sleep(max(5.0, self.options.minute / 4))
        self.witness = self.watch.rates(begin, time.time())[0]
        print(f"the witnesses take {self.witness / self.link:.1%} of the link", flush=True)

    def run(self) -> dict[str, Any]:
        room, out, tight = (float(each) for each in self.options.script.split(","))
        self.calibrate()
        self.load(0.8)
        self.phase("room", room)
        self.made.relay.cut()
        self.phase("outage", out)
        self.made.relay.mend()
        self.load(1.5)
        self.phase("tight", tight)
        self.load(0.8)
        result = self.recover()
        self.phase("after", room / 4)
        return result

    def recover(self) -> dict[str, Any]:
        begin, waiting = time.time(), self.watch.last()
        raw = backlog(waiting)
        wire, shipped = self.watch.rates(*self.times["room"])
        seconds = raw * wire / shipped / (self.link - wire)
        print(f"recovery: {raw / 1e6:.1f} MB wait, {seconds:.1f} s at the spare rate", flush=True)
        limit = begin + 4 * seconds + 300
        while not (self.watch.rpo() < INTERVAL + 1 and self.state() == "live") and time.time() < limit:
            time.sleep(0.2)
        took = time.time() - begin
        self.times["recovery"] = begin, time.time()
        print(f"live again after {took:.1f} s, {took / max(seconds, 0.1):.2f} times", flush=True)
        return {
            "backlog_bytes": raw,
            "ring_bytes": waiting["ring"]["used"],
            "dirty_bytes": waiting["ring"]["dirty_bytes"],
            "spill": waiting.get("spill"),
            "load_wire_bytes_s": round(wire),
            "load_share": round(wire / self.link, 3),
            "wire_per_record_byte": round(wire / shipped, 3),
            "at_spare_rate_s": round(seconds, 1),
            "goal_s": round(1.2 * seconds, 1),
            "live_after_s": round(took, 1),
            "ratio": round(took / seconds, 2) if seconds else None,
        }

    def control(self, when: str) -> list[float]:
        """The gaps of the same loads without replication."""
        self.load(0.8)
        self.phase(f"control {when} at 80 %", self.options.control / 3)
        self.load(1.5)
        self.phase(f"control {when} at 150 %", self.options.control / 6)
        self.load(0)
        begin, end = self.times[f"control {when} at 80 %"][0], self.times[f"control {when} at 150 %"][1]
        return gaps(self.made, begin, end)

    def stop(self) -> None:
        self.watch.ended = True
        self.made.call("alpha", "replicate.stop", group=GROUP)
        time.sleep(5)


def memory(watch: Watch, begin: float, end: float) -> dict[str, dict[str, float]]:
    """Of each process that was there all the time: medians of the first and last tenth, and the most, MiB."""
    rows = [found for at, found in watch.memory if begin <= at <= end]
    names = set.intersection(*(set(row) for row in rows)) if rows else set()
    part = max(1, len(rows) // 10)
    return {
        name: {
            "first": round(percentile([row[name] for row in rows[:part]], 0.5), 1),
            "last": round(percentile([row[name] for row in rows[-part:]], 0.5), 1),
            "most": round(max(row[name] for row in rows), 1),
        }
        for name in sorted(names)
    }


def over(watch: Watch, begin: float, end: float) -> dict[str, float] | None:
    values = watch.over_interval(begin, end)
    if not values:
        return None
    found = {f"p{share:g}_ms": round(percentile(values, share / 100) * 1e3) for share in (50, 99)}
    return {**found, "max_ms": round(max(values) * 1e3), "checkpoints": len(values)}


def protect(made: World, ring_mib: int) -> None:
    state = layout.load(made.directory)
    assert state is not None
    machines = tuple(guest.name for guest in state.guests)
    spec = GroupSpec(
        GROUP,
        "alpha",
        "beta",
        machines,
        checkpoint_interval=INTERVAL,
        ring_size=ring_mib * MiB,
        retention=Retention(history=900.0),
    )
    for site in ("beta", "alpha"):
        made.call(site, "group.put", spec=msgspec.to_builtins(spec))
    made.call("alpha", "replicate.start", group=GROUP)
    made.wait_live()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    def link(port: int) -> SlowLink:
        return SlowLink(port, options.latency_ms / 1e3, options.link)

    with world(guests=2, rate=options.guest_rate, link=link) as made:
        state = layout.load(made.directory)
        assert state is not None
        noise, uri = make_noise(made.directory), made.layout.site("alpha").uri
        loads = [Load(uri, guest.name, noise, seed) for seed, guest in enumerate(state.guests)]
        watch = Watch(made)
        for each in loads:
            each.start()
        script = Script(made, loads, watch, options)
        control = script.control("before")
        # The first sync may have all of the processor's rate: it is no part of the script.
        made.relay.say("rate 1000")
        protect(made, options.ring_mib)
        made.relay.say(f"rate {options.link}")
        watch.start()
        recovery = script.run()
        times = script.times
        script.stop()
        control += script.control("after")
        for each in loads:
            each.ended = True
        replicated = gaps(made, times["room"][0], times["after"][1])
        by_phase = {name: stalls(gaps(made, *span)) for name, span in times.items()}
        errors = sum(each.errors for each in loads)
    ours, theirs = stalls(replicated), stalls(control)
    return {
        "link_mbit": options.link,
        "round_trip_ms": 2 * options.latency_ms,
        "minute_s": options.minute,
        "script_minutes": options.script,
        "seconds": {name: round(end - begin, 1) for name, (begin, end) in times.items()},
        "link_bytes_s": {name: round(watch.rates(*times[name])[0]) for name in ("room", "tight", "recovery", "after")},
        "rpo_over_interval_room": over(watch, times["room"][0] + SETTLE, times["room"][1]),
        "rpo_over_interval_after": over(watch, times["after"][0] + SETTLE, times["after"][1]),
        "recovery": recovery,
        "stalls": ours,
        "stalls_control": theirs,
        "stalls_above_control": {
            name: round(ours[name] - theirs[name], 1) for name in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")
        },
        "stalls_by_phase": by_phase,
        "load_average": script.load_average,
        "memory_mib": memory(watch, times["room"][0], times["after"][1]),
        "load_errors": errors,
    }


def table(result: dict[str, Any]) -> None:
    room, after, recovery = result["rpo_over_interval_room"], result["rpo_over_interval_after"], result["recovery"]
    above = result["stalls_above_control"]
    rows = [
        ("RPO - interval with room, p99", "1000 ms", f"{room['p99_ms']} ms (max {room['max_ms']})" if room else "-"),
        ("the same after recovery, p99", "1000 ms", f"{after['p99_ms']} ms (max {after['max_ms']})" if after else "-"),
        ("live again", f"{recovery['goal_s']} s", f"{recovery['live_after_s']} s ({recovery['ratio']} times)"),
        ("stall above control, p99.9", "50 ms", f"{above['p99.9_ms']} ms"),
        ("stall above control, max", "250 ms", f"{above['max_ms']} ms"),
        *(
            (f"USS of {name}", "flat", f"{each['first']} -> {each['last']} MiB (most {each['most']})")
            for name, each in result["memory_mib"].items()
        ),
    ]
    print("\n| what | goal | measured |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minute", type=float, default=60, help="seconds that a minute of the script takes")
    parser.add_argument("--script", default="20,5,10", help="minutes with room, of outage, of too little room")
    parser.add_argument(
        "--control", type=float, default=30, help="minutes without replication, half before and half after"
    )
    parser.add_argument("--link", type=float, default=100, help="Mbit/s")
    parser.add_argument("--latency-ms", type=float, default=10, help="one way")
    parser.add_argument("--guest-rate", type=int, default=25, help="records/s of each chain")
    parser.add_argument("--ring-mib", type=int, default=128)
    parser.add_argument("--output", default="outage", help="name of the result")
    options = parser.parse_args()
    result = measure(options)
    save(options.output, result)
    table(result)


if __name__ == "__main__":
    main()
