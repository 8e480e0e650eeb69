"""How a machine left: whether every write of its disks is in the ring, and what its images were like then.

Pure but for one look at the image files and for waiting some milliseconds. When in doubt, the answer is that it did not
leave in order; that costs a pass over its disks, and nothing else.

**What proves that nothing is missing**, for one disk:

1. Since order was proven nothing was lost (LOSSES == ORDERED_LOSSES): no connection broke, no write was refused, no
   ring was full, no tap died. So what passed the mirror until then is in the ring.
2. The disk's connection ended by a goodbye (ENDED). QEMU says it when it closes the mirror's target; at its end that
   is after it has drained all requests and ended all jobs. A killed QEMU says nothing.
3. Nothing passed *beside* the mirror: the image was not modified after the newest record of the disk (raw images), and
   in no case after QEMU let go of it. A mirror that somebody cancelled by hand shows here; for other formats, whose
   files QEMU also writes at a flush and at its end, only at a look, each 250 ms: then the machine was not `mirrored`.
4. libvirt says that the guest powered off, not that it was destroyed, crashed, or saved.

The image's stamp is taken after all that; who writes to it later changes it. A file's time has the resolution of a
kernel tick, so a stamp younger than SETTLED_SECONDS is not believed yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from drctl.appliance.source.image_stamp import Stamp, image_stamp
from drctl.model.machine import Disk

#: A file's time is that of the last kernel tick (4 to 10 ms); a change within the same tick would not show.
SETTLED_SECONDS = 0.03
#: The tap takes the time of a batch before it reads it; a slow batch may be this much older than its write.
BATCH_SECONDS = 0.02
#: QEMU writes the metadata of a qcow2 image when it closes it, some milliseconds before or after the mirror's target.
CLOSING_SECONDS = 0.2
#: So long the tap may need to hear the end of a QEMU that libvirt knows to be gone.
HEARD_SECONDS = 0.5
_LOOK_SECONDS = 0.01


class Ends(Protocol):
    """What the ring tells of the ends of connections (Worker has it)."""

    def lossless(self) -> bool:
        """Nothing was lost since order was proven, but connections that said goodbye."""
        ...

    def connection(self, number: int) -> int: ...

    def ended(self, number: int) -> int:
        """CLOCK_MONOTONIC nanoseconds of the goodbye of the disk's newest connection; 0: it lives, or was lost."""
        ...

    def written(self, number: int) -> int:
        """CLOCK_MONOTONIC nanoseconds of the disk's newest record; 0: none in this epoch."""
        ...


@dataclass(frozen=True, slots=True)
class Clocks:
    """Time as the proof sees it; tests own it."""

    wall_ns: Callable[[], int] = time.time_ns
    monotonic_ns: Callable[[], int] = time.monotonic_ns
    sleep: Callable[[float], None] = time.sleep


def stamp_at_end(number: int, facts: Disk, ring: Ends, *, mirrored: bool, clocks: Clocks | None = None) -> Stamp | None:
    """The image as it was when its machine left in order; None when it is not proven that it did.

    `mirrored`: the last look before the end found all mirrors of the machine in place. Whether libvirt says that the
    guest powered off (4.) is for the caller to ask."""
    clocks = clocks or Clocks()
    ended = _goodbye(number, ring, clocks)
    if not ended or not ring.lossless():
        return None
    stamp = _settled(facts.source, clocks)
    if stamp is None:
        return None
    latest = _latest(number, facts, ring, ended, mirrored=mirrored)
    offset = clocks.wall_ns() - clocks.monotonic_ns()
    return stamp if latest and stamp[1] <= latest + offset else None


def _latest(number: int, facts: Disk, ring: Ends, ended: int, *, mirrored: bool) -> int:
    """The latest moment (monotonic ns) at which the image may have been modified by what is in the ring; 0: unknown."""
    if facts.format == "raw" and Path(facts.source).is_file() and (written := ring.written(number)):
        return written + int(BATCH_SECONDS * 1e9)
    return ended + int(CLOSING_SECONDS * 1e9) if mirrored else 0


def _goodbye(number: int, ring: Ends, clocks: Clocks) -> int:
    """When the disk's connection said goodbye; 0 when it did not, or the tap has not heard of its end in time."""
    until = clocks.monotonic_ns() + HEARD_SECONDS * 1e9
    while clocks.monotonic_ns() < until:
        if ring.connection(number) == 0 and (ended := ring.ended(number)):
            return ended
        if not ring.lossless():
            return 0
        clocks.sleep(_LOOK_SECONDS)
    return 0


def _settled(path: str, clocks: Clocks) -> Stamp | None:
    """The image's stamp, once it is older than a tick."""
    stamp = image_stamp(path)
    if stamp is not None and clocks.wall_ns() - stamp[1] < SETTLED_SECONDS * 1e9:
        clocks.sleep(SETTLED_SECONDS)
        stamp = image_stamp(path)
    return stamp
