"""The program is there at once: nothing is imported that a command does not use."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "libvirt",
    "numpy",
    "paramiko",
    "rich",
    "asyncio",
    "pydantic",
    "cryptography",
    "jinja2",
    "prometheus_client",
    "uvloop",
    "tomlkit",
    "msgspec",
}
#: Over `python -c pass`, in CPU time: wall time says more about the neighbours than about us.
LIMIT_SECONDS = 0.150


@pytest.fixture
def place(tmp_path: Path) -> Path:
    hosts = "".join(f'[[host]]\nname = "h{n}"\nsite = "a"\ncontrol = "unix:/no/{n}.sock"\n' for n in range(2))
    (tmp_path / "drctl.toml").write_text(f'[[site]]\nname = "a"\n{hosts}')
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [["--help"], ["status"], ["replicate", "start", "--help"], ["checkpoint", "list", "web"], ["explain", "12"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(place: Path, words: list[str]) -> None:
    code = f"import sys; from drctl.cli.app import run; run({words!r}); print(sorted({HEAVY!r} & set(sys.modules)))"
    environment = {**os.environ, "DRCTL_CONFIG": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def cpu_seconds(argv: list[str], environment: dict[str, str]) -> float:
    def children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    best = float("inf")
    for _ in range(5):
        before = children()
        subprocess.run(argv, capture_output=True, env=environment, timeout=60, check=False)
        best = min(best, children() - before)
    return best


@pytest.mark.parametrize("words", [["--help"], ["status"]], ids=" ".join)
def test_the_program_starts_in_time(place: Path, words: list[str]) -> None:
    environment = {**os.environ, "DRCTL_CONFIG": str(place)}
    nothing = cpu_seconds([sys.executable, "-c", "pass"], environment)
    assert cpu_seconds([sys.executable, "-m", "drctl.cli", *words], environment) - nothing <= LIMIT_SECONDS
