"""Processes of the lab: started detached, known by pid and start time, so that nothing else is ever signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drctl.appliance.process import start_time_of


@dataclass(frozen=True, slots=True)
class Process:
    """A process that the lab started. `start` is field 22 of /proc/PID/stat: with the pid it is never reused."""

    name: str
    pid: int
    start: int


#: Field 22 of /proc/PID/stat, None for a process that is gone or a zombie.
start_time = start_time_of


def alive(process: Process) -> bool:
    return start_time(process.pid) == process.start


def spawn(name: str, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Starts a process in a session of its own that outlives this one; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            argv,
            env=dict(environment),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    started = start_time(child.pid)
    # The child is left to init on purpose; saying so keeps Popen from warning about it.
    child.returncode = 0
    return Process(name, child.pid, started if started is not None else -1)


def stop(processes: Sequence[Process], patience: float = 10.0) -> list[Process]:
    """SIGTERM, and after `patience` seconds SIGKILL. Returns those that still run: none, unless they hang in the kernel
    or belong to somebody else."""
    for step in (signal.SIGTERM, signal.SIGKILL):
        left = [process for process in processes if alive(process)]
        for process in left:
            _signal(process, step)
        deadline = time.monotonic() + (patience if step is signal.SIGTERM else 3.0)
        while any(alive(process) for process in left) and time.monotonic() < deadline:
            _reap()
            time.sleep(0.02)
    return [process for process in processes if alive(process)]


def _signal(process: Process, number: int) -> None:
    if alive(process):
        try:
            os.kill(process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def _reap() -> None:
    """Collects our own dead children, so that they don't stay zombies for as long as this process lives."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return
