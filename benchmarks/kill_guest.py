"""The kills of `kill_loop.py --mode guest`: two real guests in a lab, protected by a real supervisor that mends."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drctl.errors import DrctlError
from drctl.lab import lab, layout, process
from drctl.lab.layout import Layout, Options
from drctl.lab.observer import Observer
from drctl.store.ring import Ring
from drctl.wire.ring import Word
from tests.conftest import LabRig
from tests.integration.fault_rig import GROUP, FaultRig, protect

if TYPE_CHECKING:
    from benchmarks.kill_loop import Tally

#: Writers per guest, and what each writes a second: more, and emulated guests leave no processor to what is killed.
CHAINS, RATE = 4, 60
INTERVAL = 2.0
#: Kills of one round: a phase each; a full pass, or a test, is begun and ended once per round.
ROUND = {"live": 10, "catching up": 10, "view": 10, "full pass": 4}
VICTIMS = (("tap",), ("shipper",), ("tap", "shipper"))


class GuestBench:
    """A protected lab, and kills in it."""

    def __init__(self, faults: FaultRig, tally: Tally) -> None:
        self.faults = faults
        self.tally = tally
        self.pids = {guest: faults.qemu_pid(guest) for guest in faults.rig.guests()}
        self._ring = faults.alpha.appliance_run / "rings" / f"{GROUP}.ring"
        self._turn = count()

    def writes(self) -> int:
        ring = Ring.open(self._ring)
        try:
            return int(ring.words[Word.PUBLISHED]) + int(ring.words[Word.DROPPED])
        finally:
            ring.close()

    def ordered(self) -> bool:
        ring = Ring.open(self._ring)
        try:
            return bool(ring.words[Word.ORDERED_STAMP] == ring.words[Word.ORDER_STAMP])
        finally:
            ring.close()

    def kill(self, phase: str, there: bool = True) -> None:
        """Kill the next victims by turns. Raises SystemExit when a guest did not survive it."""
        victims = VICTIMS[next(self._turn) % len(VICTIMS)]
        try:
            before = self.writes()
            time.sleep(0.05)
            hit = self.writes() > before and there
            for what in victims:
                self.faults.kill(what)
        except (OSError, ValueError, KeyError, TypeError):  # between two lives of it
            hit = False
        self.tally.count(phase, victims, hit)
        time.sleep(0.1)
        for guest, pid in self.pids.items():
            if process.start_time(pid) is None:
                self.tally.deaths.append(f"{phase}: {guest}'s QEMU ended after a kill of {' and '.join(victims)}")
                raise SystemExit(1)

    def live(self, kills: int) -> None:
        for _ in range(kills):
            self.faults.await_live(120)
            time.sleep(random.random() * 0.5)
            self.kill("live", self.faults.status()["phase"] == "live")

    def catching_up(self, kills: int) -> None:
        for _ in range(kills):
            self.faults.await_live(120)
            old = self.faults.kill("tap")
            self.faults.await_(lambda old=old: self._other_tap(old), "another tap", 30)
            self._await_writes(5)  # QEMU has to find out that the new tap is there
            self.kill("catching up", not self.ordered())

    def _await_writes(self, seconds: float) -> None:
        before, deadline = self.writes(), time.monotonic() + seconds
        while self.writes() == before and time.monotonic() < deadline:
            time.sleep(0.01)

    def _other_tap(self, old: int) -> bool:
        try:
            pid = self.faults.pid("tap")
        except (OSError, ValueError):
            return False
        return pid != old and process.start_time(pid) is not None

    def view(self, kills: int) -> None:
        self.faults.await_live(120)
        begun = time.time_ns()
        test = self.faults.call("beta", "test.start", 300, checkpoint="latest", machines=["web-1"])
        try:
            self.faults.rig.observer.await_up("web-1", "beta", after_ns=begun, timeout=300)
            for _ in range(kills):
                self.faults.await_live(120)
                time.sleep(random.random() * 0.5)
                self.kill("view", self.faults.status()["phase"] == "live")
        finally:
            self.faults.call("beta", "test.stop", 120, id=test["id"])

    def full_pass(self, kills: int) -> None:
        self.faults.call("alpha", "replicate.pause", 120)
        self.faults.call("alpha", "replicate.resume", 120)
        self.in_sync("full pass", kills)

    def in_sync(self, phase: str, kills: int) -> None:
        """Kill while a pass runs; each kill may begin it anew."""
        for _ in range(kills):
            deadline = time.monotonic() + 60
            there = False
            while time.monotonic() < deadline and not there:
                sync = self.faults.status()["sync"]
                there = bool(sync and sync["total_bytes"] and sync["done_bytes"])
                if self.faults.status()["phase"] == "live":
                    return
                time.sleep(0.02)
            self.kill(phase, there)

    def rounds(self, kills: int) -> None:
        steps = {"live": self.live, "catching up": self.catching_up, "view": self.view, "full pass": self.full_pass}
        while self.tally.counted.total() < kills:
            for phase, share in ROUND.items():
                try:
                    steps[phase](share)
                except (AssertionError, DrctlError) as exc:
                    self.tally.trouble.append(f"{phase}: {str(exc)[:2000]}")
                print(f"  {sum(self.tally.counted.values())} kills, {phase} done", file=sys.stderr, flush=True)
            if len(self.tally.trouble) > 3:
                return

    def settle(self, begun_ns: int) -> None:
        """The last word: guests unharmed, live again, all that is listed judged."""
        self.faults.await_live(240)
        guests = self.faults.rig.guests()
        stall = self.faults.longest_stall(begun_ns, time.time_ns(), guests)
        try:
            self.faults.assert_unharmed(self.pids)
        except AssertionError as exc:
            self.tally.deaths.append(str(exc))
        try:
            judged = self.faults.judge_listed()
        except AssertionError as exc:
            judged = 0
            self.tally.trouble.append(str(exc))
        self.tally.more |= {"checkpoints_judged_true": judged, "longest_stall_seconds": round(stall, 2)}


@contextmanager
def protected(**options: Any) -> Iterator[FaultRig]:
    """Raises Refused or PreconditionFailed when drctl does not protect such guests on this QEMU."""
    directory = Path(tempfile.mkdtemp(prefix="drctl-kill-", dir="/var/tmp"))
    directory.rmdir()
    try:
        lab.up(directory, Options(**options))
        state = layout.load(directory)
        assert state is not None
        rig = LabRig(directory, Layout(directory, Path(state.run)), Observer(directory))
        # Its first sync is killed at, so nobody waits for it here.
        faults = protect(rig, live=False, checkpoint_interval=INTERVAL, ring_size=64 * 2**20)
        yield faults
        faults.close()
    finally:
        lab.down(directory)


def run_guest(kills: int, tally: Tally, *, bus: str = "virtio", iothread: bool = False) -> Tally:
    """So many kills that count, or until SIGTERM, then the judge; or the refusal to protect them, in the tally."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _run(kills, tally, bus=bus, iothread=iothread)
    except DrctlError as exc:
        if not (iothread and "thread" in exc.message):
            raise
        tally.more["refused"] = exc.message
        return tally


class Enough(Exception):
    """Somebody wants it to end: what was killed so far is judged and told. A second time ends it at once."""


def _enough(*_: object) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise Enough


def _run(kills: int, tally: Tally, **options: Any) -> Tally:
    with protected(guests=2, chains=CHAINS, slots=512, rate=RATE, **options) as faults:
        begun = time.time_ns()
        bench = GuestBench(faults, tally)
        signal.signal(signal.SIGTERM, _enough)
        try:
            bench.in_sync("first sync", 6)
            bench.rounds(kills)
        except Enough:
            tally.more["ended_early"] = True
        seconds = (time.time_ns() - begun) / 1e9
        logs = faults.rig.observer.logs("alpha")
        written = sum(sum(log.numbers[-1]) for log in logs.values())
        tally.more["guest_writes_a_second"] = round(written / seconds)
        tally.more["load_of_the_machine"] = round(os.getloadavg()[0], 1)
        bench.settle(begun)
    return tally
