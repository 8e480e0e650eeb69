"""Sizes and ranges of disks: the units that every room counts in."""

from __future__ import annotations

from dataclasses import dataclass

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

#: Smallest write a guest can issue; extents of formats are counted in it.
SECTOR = 512
#: Unit of dirty maps and of the mirror's granularity.
BLOCK = 4 * KiB
#: Largest payload of one frame, so that a random read never unpacks more.
FRAME_PAYLOAD = 64 * KiB


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A range of one disk, in bytes. Invariant: offset >= 0, length > 0."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def format_bytes(count: float) -> str:
    """`1536` as `1.5 KiB`; at most one decimal, none for bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
