"""The host runs out of memory: the kernel's OOM killer ends parts of the appliance while guests write.

Real kills by the kernel: a process is put into a memory cgroup that has room for nothing, so that the next memory that
it asks for is its end. Nothing may hurt a guest, no checkpoint may be a lie, and the group is live again by itself."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from drctl.errors import DrctlError
from drctl.lab import process
from tests.integration.fault_rig import GROUP, FaultRig, protect

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(1200)]

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
#: A whole page, and little enough that the next allocation is one too many.
PAGE = 4096
OOM_SECONDS = 60.0


class Cage:
    """A memory cgroup, version 1 or 2."""

    def __init__(self) -> None:
        v1 = (V1 / "memory.limit_in_bytes").exists()
        if not v1 and "memory" not in _read(V2 / "cgroup.controllers"):
            pytest.skip("no memory cgroups here")
        self.path = (V1 if v1 else V2) / f"drctl-test-{os.getpid()}"
        try:
            self.path.mkdir()
        except OSError as exc:
            pytest.skip(f"no memory cgroup can be made here: {exc}")
        self._v1 = v1
        self._limit = self.path / ("memory.limit_in_bytes" if v1 else "memory.max")
        self._usage = self.path / ("memory.usage_in_bytes" if v1 else "memory.current")
        self._events = self.path / ("memory.oom_control" if v1 else "memory.events")

    def take(self, pid: int) -> None:
        """The process; what it has in memory stays charged where it was."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def tighten(self) -> None:
        """From now on there is no more than what is used now."""
        self._limit.write_text(str((int(_read(self._usage)) // PAGE) * PAGE + PAGE))

    def loosen(self) -> None:
        self._limit.write_text("-1" if self._v1 else "max")

    def kills(self) -> int:
        lines = dict(line.split() for line in _read(self._events).splitlines())
        return int(lines["oom_kill"])

    def close(self) -> None:
        self.loosen()
        root = self.path.parent / "cgroup.procs"
        for pid in _read(self.path / "cgroup.procs").split():
            with suppress(OSError):
                root.write_text(pid)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                self.path.rmdir()
            except OSError:
                time.sleep(0.1)
            else:
                return


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


@pytest.fixture(scope="module")
def faults(make_lab) -> Iterator[FaultRig]:
    """Guests that write as fast as an emulated machine lets them."""
    made = protect(make_lab(rate=100, chains=4, slots=512))
    yield made
    made.await_live(180)
    sys.stderr.write(f"\n  {made.judge_listed()} more checkpoints judged at the end\n")
    made.close()


@pytest.fixture
def cage() -> Iterator[Cage]:
    made = Cage()
    yield made
    made.close()


@contextmanager
def starved(faults: FaultRig, cage: Cage, what: str, press: Callable[[], object]) -> Iterator[int]:
    """Until the kernel has killed the process for want of memory, `press`ed meanwhile. Gives its pid."""
    pid = faults.pid(what)
    cage.take(pid)
    before = cage.kills()
    cage.tighten()
    deadline = time.monotonic() + OOM_SECONDS
    while process.start_time(pid) is not None and time.monotonic() < deadline:
        with suppress(DrctlError, OSError):
            press()
        time.sleep(0.05)
    assert process.start_time(pid) is None, f"{what} was not killed within {OOM_SECONDS:.0f} s"
    assert cage.kills() > before, f"{what} ended, but not by the OOM killer"
    yield pid


def knock(path: Path) -> None:
    """A connection is memory of who accepts it."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(1)
        caller.connect(str(path))
        caller.recv(64)


@pytest.mark.parametrize("what", ["shipper", "tap", "receiver"])
def test_a_process_that_the_oom_killer_takes_is_back(faults, cage, what) -> None:
    run = faults.alpha.appliance_run
    doors = {"tap": run / f"taps/{GROUP}.sock", "shipper": run / f"shippers/{GROUP}.sock"}
    door = doors.get(what, faults.beta.appliance_run / "receiver.sock")
    with faults.trial(f"OOM kill of {what}"), starved(faults, cage, what, lambda: knock(door)) as old:
        cage.loosen()
        faults.await_(lambda: _another(faults, what, old), f"another {what}", 30)


def _another(faults: FaultRig, what: str, old: int) -> bool:
    with suppress(FileNotFoundError, ValueError):
        pid = faults.pid(what)
        return pid != old and process.start_time(pid) is not None
    return False


def test_a_supervisor_that_the_oom_killer_takes_is_followed_by_one_that_adopts(faults, cage) -> None:
    with faults.trial("OOM kill of supervisor"):
        before = [faults.pid(what) for what in ("tap", "shipper", "watchdog")]
        with starved(faults, cage, "supervisor", lambda: faults.call("alpha", "appliance.history", limit=5000)):
            cage.loosen()
            faults.up()
            faults.await_live()
        assert [faults.pid(what) for what in ("tap", "shipper", "watchdog")] == before


def test_an_appliance_without_any_memory_left_hurts_no_guest(faults, cage) -> None:
    """Supervisor, tap and shipper in one cage, where each that comes back is put in again, and what a caged supervisor
    starts begins inside: half a minute of dying."""
    run = faults.alpha.appliance_run
    doors = (run / f"taps/{GROUP}.sock", run / f"shippers/{GROUP}.sock")
    with faults.trial("no memory for the whole appliance"):
        end, before, tight = time.monotonic() + 30, cage.kills(), False
        while time.monotonic() < end:
            for what in ("supervisor", "tap", "shipper"):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    cage.take(faults.pid(what))
            if not tight:
                cage.tighten()
                tight = True
            for door in doors:
                with suppress(OSError):
                    knock(door)
            with suppress(DrctlError, OSError):
                faults.call("alpha", "appliance.history", timeout=2, limit=5000)
            if process.start_time(faults.pid("supervisor")) is None:
                cage.loosen()
                faults.up()
                tight = False
        killed = cage.kills() - before
        cage.loosen()
        faults.up()
    sys.stderr.write(f"  {killed} kills by the OOM killer in 30 s\n")
    assert killed >= 3
