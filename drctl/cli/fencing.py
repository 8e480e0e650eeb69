"""Fencing: makes sure that a host can't run its guests any more, by a command that the operator configured.

`fence = ["fence_ipmilan", "--ip=192.0.2.5", …]` of a host in drctl.toml: an argument list, never a shell's line. It ran
well when it exits with 0 within its time; everything else means that nothing is known of the host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from drctl.model.site import Host

#: What of the command's words is kept: its last line says most.
_OUTPUT = 300


@dataclass(frozen=True, slots=True)
class Fencing:
    """What became of it. `problem` is empty when the host is fenced; `output` is the end of what the command said."""

    command: str
    seconds: float
    problem: str = ""
    output: str = ""

    @property
    def fenced(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        words = f": {self.output}" if self.output else ""
        return f"{self.command} {self.problem or 'fenced it'} after {self.seconds:.1f} s{words}"


def fence(host: Host, *, group: str = "", reason: str = "") -> Fencing | None:
    """Run the host's fence command and wait for it; None when it has none. Never raises.

    The command finds the host, its site, the group and the reason in DRCTL_HOST, DRCTL_SITE, DRCTL_GROUP and
    DRCTL_REASON. What it leaves running at its time limit is killed with it."""
    if not host.fence:
        return None
    told = {"DRCTL_HOST": host.name, "DRCTL_SITE": host.site, "DRCTL_GROUP": group, "DRCTL_REASON": reason}
    begun = time.monotonic()
    # A file, not a pipe: what the command leaves behind may hold a pipe open for ever.
    with tempfile.TemporaryFile() as output:
        problem = _run(host, os.environ | told, output.fileno())
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - 4 * _OUTPUT))
        text = output.read().decode(errors="replace").strip()[-_OUTPUT:]
    return Fencing(Path(host.fence[0]).name, time.monotonic() - begun, problem, " ".join(text.split()))


def _run(host: Host, environment: dict[str, str], output: int) -> str:
    """What is wrong, or nothing."""
    try:
        process = subprocess.Popen(
            host.fence, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    except OSError as exc:
        return f"can't be run ({exc.strerror})"
    try:
        code = process.wait(host.fence_timeout)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "did not end in time"
    return f"failed with exit code {code}" if code else ""


def unusable(command: Sequence[str]) -> str:
    """Why a fence command can't be run on this machine; empty when it can."""
    if not command or shutil.which(command[0]):
        return ""
    return f"{command[0]} is not there, or may not be run"
