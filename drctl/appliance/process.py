"""Child processes that outlive their supervisor, and how a new supervisor finds them again."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from drctl.errors import StepFailed

log = logging.getLogger(__name__)

#: A child that somebody or something stopped (SIGSTOP, a terminal) works as little as a dead one, but holds its place.
STOPPED_SECONDS = 2.0
CALM_SECONDS = 10.0
CALM_STARTS = 5
#: What stands behind the name of a child that is to take another's place.
_HEIR = ".heir"


@dataclass(frozen=True, slots=True)
class Child:
    """A process, known by pid *and* start time, so that a reused pid is never taken for it."""

    name: str
    pid: int
    start_time: int


def start_time_of(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)), in clock ticks since boot; None for a dead process or a zombie."""
    fields = _stat(pid)
    return None if fields[0] in ("", "Z", "X") else int(fields[19])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state letter on; one empty field when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return [""]


def alive(child: Child) -> bool:
    return start_time_of(child.pid) == child.start_time


class Processes:
    """Starts, finds, and ends named children of one appliance. A name has at most one live process."""

    def __init__(self, directory: Path, logs: Path) -> None:
        self._directory = directory
        self._logs = logs
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self._starts: dict[str, list[float]] = {}
        #: Children that were last seen stopped, and since when.
        self._stopped: dict[Child, float] = {}

    def find(self, name: str) -> Child | None:
        """The live child of that name, started by us or by a supervisor before us."""
        try:
            data = json.loads(self._file(name).read_text())
        except (FileNotFoundError, ValueError):
            return None
        child = Child(name, data["pid"], data["start_time"])
        if (popen := self._started.get(child.pid)) and popen.poll() is not None:
            del self._started[child.pid]
        return child if alive(child) else None

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._directory.glob("*.json"))

    def ensure(self, name: str, module: str, arguments: Sequence[str], *, nice: int = 0) -> tuple[Child, bool]:
        """The live child, and whether it had to be started now. One that is stopped for 2 s is killed and replaced."""
        child = self.find(name)
        if child is not None and self._stopped_too_long(child):
            log.warning("%s (%d) is stopped; killed, and started again", name, child.pid)
            self.end(name, force=True)
            child = None
        if child is not None:
            return child, False
        return self.spawn(name, module, arguments, nice=nice), True

    def _stopped_too_long(self, child: Child) -> bool:
        if _stat(child.pid)[0] != "T":
            self._stopped.pop(child, None)
            return False
        now = time.monotonic()
        if now - self._stopped.setdefault(child, now) < STOPPED_SECONDS:
            return False
        del self._stopped[child]
        return True

    def spawn(self, name: str, module: str, arguments: Sequence[str], *, nice: int = 0) -> Child:
        """Start `python -m module arguments` in a session of its own, output to logs/NAME.log."""
        command = [sys.executable, "-m", module, *arguments]
        return self._start(name, ["nice", "-n", str(nice), *command] if nice else command)

    def run(self, name: str, command: Sequence[str], *, ready: Path, timeout_seconds: float = 5.0) -> Child:
        """Start another program, and wait until its socket `ready` is there. Raises StepFailed."""
        self.end(name)
        child = self._start(name, command)
        deadline = time.monotonic() + timeout_seconds
        while not ready.exists():
            if not self.find(name) or time.monotonic() > deadline:
                self.end(name)
                raise StepFailed(f"{command[0]} did not start", hint=f"see {self._logs / f'{name}.log'}")
            time.sleep(0.01)
        return child

    # -- a child in another's place ---------------------------------------------------------------------------------

    def foreign(self, child: Child) -> bool:
        """Whether it runs another installation's program than this process does: an upgrade has been."""
        try:
            command = json.loads(self._file(child.name).read_text())["command"]
        except (FileNotFoundError, ValueError, KeyError):
            return False
        return sys.executable not in command

    def succeed(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        took: Callable[[int], bool],
        timeout_seconds: float = 5.0,
    ) -> bool:
        """Start another process that takes the place of the live child of that name, and of its own accord ends that.

        `took` tells whether the process with a pid has done it. False: it did not, and is gone; the child is as before,
        unless the heir failed after it had taken over."""
        old = self.find(name)
        heir = name + _HEIR
        child = self._start(heir, [sys.executable, "-m", module, *arguments])
        deadline = time.monotonic() + timeout_seconds
        while self.find(heir) is not None and time.monotonic() < deadline:
            if took(child.pid):
                self._file(heir).replace(self._file(name))
                if old is not None and (popen := self._started.pop(old.pid, None)) is not None:
                    with suppress(subprocess.TimeoutExpired):
                        popen.wait(2.0)
                return True
            time.sleep(0.005)
        self.end(heir, force=True)
        return False

    def settle(self, name: str, took: Callable[[int], bool], timeout_seconds: float = 1.0) -> None:
        """Finish what a supervisor before us began with `succeed`."""
        heir = name + _HEIR
        deadline = time.monotonic() + timeout_seconds
        while (child := self.find(heir)) is not None:
            if took(child.pid):
                log.info("%s (%d) has taken the place of the one before", name, child.pid)
                self._file(heir).replace(self._file(name))
                return
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self.end(heir)

    def _start(self, name: str, command: Sequence[str]) -> Child:
        self._demand_calm(name)
        with (self._logs / f"{name.removesuffix(_HEIR)}.log").open("ab") as output:
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, close_fds=True
            )
        self._started[popen.pid] = popen
        started = start_time_of(popen.pid)
        if started is None:
            raise StepFailed(f"{name} ended at once", hint=f"see {self._logs / f'{name}.log'}")
        child = Child(name, popen.pid, started)
        temporary = self._file(name).with_suffix(".new")
        temporary.write_text(json.dumps({"pid": child.pid, "start_time": started, "command": command}))
        temporary.replace(self._file(name))
        return child

    def _demand_calm(self, name: str) -> None:
        """A child that ends as soon as it is started must not eat the host: 5 starts in 10 s are enough."""
        now = time.monotonic()
        recent = [moment for moment in self._starts.get(name, ()) if now - moment < CALM_SECONDS]
        if len(recent) >= CALM_STARTS:
            raise StepFailed(f"{name} keeps ending", hint=f"see {self._logs / f'{name}.log'}")
        self._starts[name] = [*recent, now]

    def end(self, name: str, timeout_seconds: float = 5.0, *, force: bool = False) -> None:
        """SIGTERM, then SIGKILL after the timeout. No error when it is not there."""
        child = self.find(name)
        if child is not None:
            self._signal(child, signal.SIGKILL if force else signal.SIGTERM)
            if not self._wait(child, timeout_seconds):
                self._signal(child, signal.SIGKILL)
                self._wait(child, 2.0)
        self._file(name).unlink(missing_ok=True)

    def _wait(self, child: Child, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if self.find(child.name) is None:
                return True
            time.sleep(0.02)
        return False

    def _signal(self, child: Child, number: signal.Signals) -> None:
        if alive(child):
            os.kill(child.pid, number)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"
