"""The watchdog: kills a tap or a shipper that no longer beats, because either can hold up its guests without limit.

A hung tap blocks a guest's writes. A hung shipper that reads a guest's disk blocks the guest at QEMU's next drain,
which waits for every reply that an NBD client has not taken (QEMU 7.2, measured: until the client reads on or its
socket is closed; `shutdown` alone does not free it). The supervisor may be what waits for that drain.

A process of its own that knows nothing but the headers of the rings, so that no libvirt call, disk or lock of the
supervisor can hold it up. Killing is safe: QEMU's mirror goes to standby and the guest runs on (measured: 0 of 95
deaths with on-target-error=stop), and a ring holds all that was not acknowledged; the supervisor then starts what was
killed again, and it adopts its ring.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from drctl.wire.ring import HEADER_SIZE, MAGIC, Word

#: How often the rings are looked at. With the limits below a stopped tap stalls its guest for under 500 ms.
PERIOD_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Watched:
    """A process that beats in its ring's header each 100 ms. `hung`: it sleeps or waits on a disk for so long after its
    last beat (seconds). `starved`: it wants to run, but gets no processor; killing it would not free one."""

    name: str
    module: str
    pid: Word
    beat: Word
    hung: float
    starved: float


#: A shipper's loop may wait for its threads, which read on meanwhile: it is given longer.
WATCHED = (
    Watched("tap", "drctl.replication.tap", Word.TAP_PID, Word.HEARTBEAT, 0.35, 1.5),
    Watched("shipper", "drctl.replication.shipper", Word.SHIPPER_PID, Word.SHIPPER_HEARTBEAT, 5.0, 15.0),
)

log = logging.getLogger(__name__)


def verdict(watched: Watched, age_seconds: float, state: str) -> bool:
    """Whether a process whose last beat is that old, in that process state (proc(5)), must be killed. One that is
    stopped is not waited for."""
    if state in ("T", "t"):
        return age_seconds > PERIOD_SECONDS
    return age_seconds > (watched.starved if state == "R" else watched.hung)


def read_header(path: Path) -> memoryview | None:
    """The words of a ring's header, None when there is none."""
    with suppress(OSError, TypeError), path.open("rb") as file:
        words = memoryview(file.read(HEADER_SIZE)).cast("Q")
        if len(words) == HEADER_SIZE // 8 and words[Word.MAGIC] == MAGIC:
            return words
    return None


def state_of(pid: int, module: str) -> str:
    """The process state letter, "" when that pid is none of that module (any more)."""
    with suppress(OSError):
        if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def look(directory: Path, now_ns: int) -> None:
    """One look at every ring of the directory."""
    for path in directory.glob("*.ring"):
        words = read_header(path)
        if words is None:
            continue
        for watched in WATCHED:
            if pid := words[watched.pid]:
                _look_at(watched, path.stem, pid, (now_ns - words[watched.beat]) / 1e9)


def _look_at(watched: Watched, group: str, pid: int, age: float) -> None:
    if age <= PERIOD_SECONDS:
        return
    state = state_of(pid, watched.module)
    if state not in ("", "Z", "X") and verdict(watched, age, state):
        log.warning(
            "%s: %s %d is hung (state %s, last beat %.0f ms ago); killed", group, watched.name, pid, state, age * 1e3
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
