"""The watchdog kills what hangs and spares what merely waits for a processor."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drctl.appliance.source import watchdog
from drctl.wire.ring import HEADER_SIZE, MAGIC, Word

TAP, SHIPPER = watchdog.WATCHED


@pytest.mark.parametrize(
    ("watched", "age", "state", "killed"),
    [
        (TAP, 0.05, "T", False),
        (TAP, 0.2, "T", True),
        (TAP, 0.2, "S", False),
        (TAP, 0.4, "S", True),
        (TAP, 0.4, "D", True),
        (TAP, 0.4, "R", False),
        (TAP, 1.6, "R", True),
        (SHIPPER, 0.05, "T", False),
        (SHIPPER, 0.2, "T", True),
        (SHIPPER, 4.9, "S", False),
        (SHIPPER, 5.1, "S", True),
        (SHIPPER, 14.0, "R", False),
        (SHIPPER, 16.0, "R", True),
    ],
)
def test_verdict(watched: watchdog.Watched, age: float, state: str, killed: bool) -> None:
    assert watchdog.verdict(watched, age, state) is killed


def _ring(path: Path, watched: watchdog.Watched, pid: int, beat: int) -> None:
    words = [0] * (HEADER_SIZE // 8)
    words[Word.MAGIC], words[watched.pid], words[watched.beat] = MAGIC, pid, beat
    path.write_bytes(b"".join(word.to_bytes(8, "little") for word in words))


@pytest.mark.parametrize(("watched", "silent"), [(TAP, 2), (SHIPPER, 20)], ids=["tap", "shipper"])
def test_what_hangs_is_killed_and_a_stranger_with_its_pid_is_not(
    tmp_path: Path, watched: watchdog.Watched, silent: int
) -> None:
    sleep = "import time; time.sleep(60)"
    hung = subprocess.Popen([sys.executable, "-c", sleep, watched.module])
    stranger = subprocess.Popen([sys.executable, "-c", sleep])
    try:
        time.sleep(0.2)
        old = time.monotonic_ns() - 10**9 * silent
        _ring(tmp_path / "web.ring", watched, hung.pid, old)
        _ring(tmp_path / "db.ring", watched, stranger.pid, old)
        watchdog.look(tmp_path, time.monotonic_ns())
        assert hung.wait(5) == -signal.SIGKILL
        assert stranger.poll() is None
    finally:
        hung.kill()
        stranger.kill()
        hung.wait()
        stranger.wait()


def test_a_stopped_shipper_is_not_waited_for(tmp_path: Path) -> None:
    """QEMU may be waiting for it to take what it asked for, and the guest for QEMU."""
    stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", SHIPPER.module])
    try:
        stopped.send_signal(signal.SIGSTOP)
        while watchdog.state_of(stopped.pid, SHIPPER.module) != "T":
            time.sleep(0.01)
        _ring(tmp_path / "web.ring", SHIPPER, stopped.pid, time.monotonic_ns() - 2 * 10**8)
        watchdog.look(tmp_path, time.monotonic_ns())
        assert stopped.wait(5) == -signal.SIGKILL
    finally:
        stopped.kill()
        stopped.wait()


def test_a_torn_or_foreign_ring_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "web.ring").write_bytes(b"short")
    (tmp_path / "db.ring").write_bytes(b"\0" * HEADER_SIZE)
    watchdog.look(tmp_path, time.monotonic_ns())
