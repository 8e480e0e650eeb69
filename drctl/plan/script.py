"""Runs a command of a plan: an argument list, its own process group, a time limit, bounded output.

The only module of the plan that starts processes."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import IO

from drctl.plan.output import Capture

#: Between SIGTERM and SIGKILL to a script's processes.
MERCY = 5.0
#: How long a finished script's output is read on, when something that it left behind holds it open.
LINGER = 0.5
#: How often a running script looks for cancellation.
_LOOK = 0.1


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a command. `code` is its exit code, negative for a signal, None when it could not be started.

    `reason` is empty when it exited with 0."""

    code: int | None
    output: str
    reason: str
    seconds: float

    @property
    def done(self) -> bool:
        return not self.reason


def run_script(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    time_limit: float,
    cancelled: Event | None = None,
    stdin: bytes = b"",
) -> Ran:
    """Run it to its end. At the time limit, or when `cancelled` is set, its whole process group is ended; what an
    orderly one leaves running goes on.

    `environment` is added to ours. Its stdin ends after `stdin`, so that nothing in it can wait for an answer. Never
    raises for what the command does."""
    begun = time.monotonic()
    given: IO[bytes] | None = None
    try:
        given = _given(stdin) if stdin else None
        process = subprocess.Popen(
            list(arguments),
            stdin=given or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=directory,
            start_new_session=True,
        )
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        return Ran(None, "", f"can't be started: {arguments[0]}: {reason}", time.monotonic() - begun)
    finally:
        if given is not None:
            given.close()
    with process:
        assert process.stdout is not None
        capture = Capture()
        reason = _follow(process, process.stdout, capture, begun + time_limit, cancelled or Event())
        if reason:
            _kill(process, signal.SIGKILL)  # what ignored SIGTERM, or was started since
        _drain(process.stdout, capture, time.monotonic() + LINGER)
        code = process.wait()
    if not reason and code:
        reason = f"exited with {code}" if code > 0 else f"ended by signal {-code}"
    if reason == "time limit":
        reason = f"time limit of {time_limit:g} s"
    return Ran(code, capture.text(), reason, time.monotonic() - begun)


def _given(data: bytes) -> IO[bytes]:
    """A file that is read from its beginning: a pipe could be full before the command reads."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the caller, once the command has it
    file.write(data)
    file.seek(0)
    return file


def _follow(
    process: subprocess.Popen[bytes], output: IO[bytes], capture: Capture, deadline: float, cancelled: Event
) -> str:
    """Read until the process has ended, by itself or by us; why we ended it, else nothing."""
    reason = ""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while not _has_ended(process):
            now = time.monotonic()
            if now >= deadline and reason:
                _kill(process, signal.SIGKILL)
            elif now >= deadline or (cancelled.is_set() and not reason):
                reason = "given up" if cancelled.is_set() else "time limit"
                deadline = now + MERCY
                _kill(process, signal.SIGTERM)
            _read_some(selector, output, capture, max(0.0, min(_LOOK, deadline - now)))
    return reason


def _read_some(selector: selectors.BaseSelector, output: IO[bytes], capture: Capture, seconds: float) -> None:
    if not selector.get_map():
        time.sleep(min(seconds, 0.02))  # it closed its output and goes on
    elif selector.select(seconds):
        data = os.read(output.fileno(), 65536)
        if data:
            capture.add(data)
        else:
            selector.unregister(output)


def _drain(output: IO[bytes], capture: Capture, deadline: float) -> None:
    """What is left in the pipe, until its end or the deadline."""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and selector.select(left):
            data = os.read(output.fileno(), 65536)
            if not data:
                return
            capture.add(data)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has. It is not reaped by that, so nobody else can get its number yet."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """A signal to the process group. It is the process's own, and the process is not reaped before `wait`."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
