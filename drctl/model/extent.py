"""Sizes and ranges of disks: the units that every room counts in."""

from __future__ import annotations

import re
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


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?")
_SIZE_UNITS = {"B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": TiB}


def parse_bytes(text: str) -> int:
    """Bytes of `64 GiB`, `1.5TiB`, `4096`. Raises ValueError that says what would be right."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size; write e.g. 256 MiB, 64 GiB, 1.5 TiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2] or "B"])
