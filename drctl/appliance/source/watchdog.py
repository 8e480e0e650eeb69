"""The watchdog: kills a tap that no longer beats, because a hung target blocks its guest's writes without limit.

A process of its own that knows nothing but the headers of the rings, so that no libvirt call, disk or lock of the
supervisor can hold it up. Killing is safe: QEMU's mirror goes to standby and the guest runs on (measured: 0 of 95
deaths with on-target-error=stop); the supervisor then starts the tap again, which adopts its ring.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from drctl.wire.ring import MAGIC, Word

#: How often the rings are looked at. With the limits below a stopped tap stalls its guest for under 500 ms.
PERIOD_SECONDS = 0.1
#: A tap beats every 100 ms. One that sleeps, is stopped or waits on a disk this long after its last beat is hung.
HUNG_SECONDS = 0.35
#: One that wants to run but gets no processor is given longer: killing it would not free one.
STARVED_SECONDS = 1.5

log = logging.getLogger(__name__)


def verdict(age_seconds: float, state: str) -> bool:
    """Whether a tap whose last beat is that old, in that process state (proc(5)), must be killed."""
    if state in ("T", "t"):
        return age_seconds > PERIOD_SECONDS
    limit = STARVED_SECONDS if state == "R" else HUNG_SECONDS
    return age_seconds > limit


def read_header(path: Path) -> tuple[int, int] | None:
    """(tap pid, heartbeat in monotonic nanoseconds), None when there is no ring or no tap in it."""
    with suppress(OSError, TypeError, IndexError), path.open("rb") as file:
        raw = memoryview(file.read((Word.HEARTBEAT + 1) * 8)).cast("Q")
        if raw[Word.MAGIC] == MAGIC and raw[Word.TAP_PID]:
            return raw[Word.TAP_PID], raw[Word.HEARTBEAT]
    return None


def tap_state(pid: int) -> str:
    """The process state letter of a tap, "" when that pid is no tap (any more)."""
    with suppress(OSError):
        if b"drctl.replication.tap" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def look(directory: Path, now_ns: int) -> None:
    """One look at every ring of the directory."""
    for path in directory.glob("*.ring"):
        found = read_header(path)
        if found is None:
            continue
        pid, beat = found
        age = (now_ns - beat) / 1e9
        if age <= PERIOD_SECONDS:
            continue
        state = tap_state(pid)
        if state not in ("", "Z", "X") and verdict(age, state):
            log.warning(
                "%s: tap %d is hung (state %s, last beat %.0f ms ago); killed", path.stem, pid, state, age * 1e3
            )
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    directory = Path(arguments[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        look(directory, time.monotonic_ns())
        time.sleep(PERIOD_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
