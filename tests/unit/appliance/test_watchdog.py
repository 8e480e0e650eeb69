"""The watchdog kills what hangs and spares what merely waits for a processor."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drctl.appliance.source import watchdog
from drctl.wire.ring import HEADER_SIZE, MAGIC, Word


@pytest.mark.parametrize(
    ("age", "state", "killed"),
    [
        (0.05, "T", False),
        (0.2, "T", True),
        (0.2, "S", False),
        (0.4, "S", True),
        (0.4, "D", True),
        (0.4, "R", False),
        (1.6, "R", True),
    ],
)
def test_verdict(age: float, state: str, killed: bool) -> None:
    assert watchdog.verdict(age, state) is killed


def _ring(path: Path, pid: int, beat: int) -> None:
    words = [0] * (HEADER_SIZE // 8)
    words[Word.MAGIC], words[Word.TAP_PID], words[Word.HEARTBEAT] = MAGIC, pid, beat
    path.write_bytes(b"".join(word.to_bytes(8, "little") for word in words))


def test_a_hung_tap_is_killed_and_a_stranger_with_its_pid_is_not(tmp_path: Path) -> None:
    sleep = "import time; time.sleep(60)"
    tap = subprocess.Popen([sys.executable, "-c", sleep, "drctl.replication.tap"])
    stranger = subprocess.Popen([sys.executable, "-c", sleep])
    try:
        time.sleep(0.2)
        old = time.monotonic_ns() - 10**9 * 2
        _ring(tmp_path / "web.ring", tap.pid, old)
        _ring(tmp_path / "db.ring", stranger.pid, old)
        watchdog.look(tmp_path, time.monotonic_ns())
        assert tap.wait(5) == -signal.SIGKILL
        assert stranger.poll() is None
    finally:
        tap.kill()
        stranger.kill()
        tap.wait()
        stranger.wait()


def test_a_torn_or_foreign_ring_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "web.ring").write_bytes(b"short")
    (tmp_path / "db.ring").write_bytes(b"\0" * HEADER_SIZE)
    watchdog.look(tmp_path, time.monotonic_ns())
