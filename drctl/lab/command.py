"""Runs other programs for the lab: argument lists, output captured, a failure in the program's own words."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from drctl.errors import SetupFailed, StepFailed

#: Programs of the lab that distributions keep out of an unprivileged user's PATH.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def need(program: str) -> str:
    """The program's path. Raises SetupFailed when this machine lacks it."""
    found = shutil.which(program, path=_PATH)
    if not found:
        raise SetupFailed(f"the lab needs the program {program}", hint="run: make setup", program=program)
    return found


def run(argv: Sequence[str], *, cwd: Path | None = None, timeout: float = 120, data: bytes | None = None) -> str:
    """Standard output of a program that succeeded. Raises SetupFailed (absent) or StepFailed (failed, or too slow)."""
    program = [need(argv[0]), *argv[1:]]
    environment = {**os.environ, "PATH": _PATH, "LC_ALL": "C", "MTOOLS_SKIP_CHECK": "1"}
    try:
        done = subprocess.run(
            program, cwd=cwd, env=environment, input=data, capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise StepFailed(f"{argv[0]} did not end within {timeout:.0f} s: {' '.join(argv)}") from exc
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise StepFailed(f"{' '.join(argv)} failed ({done.returncode}): {words[-600:]}")
    return done.stdout.decode(errors="replace")
