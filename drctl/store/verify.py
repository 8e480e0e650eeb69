"""Verification: every frame read again, damage named by file and offset."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from drctl.errors import IntegrityError
from drctl.store.atomic import read_at
from drctl.store.catalog import Mark
from drctl.store.segment import HEADER_SIZE, Segment, scan
from drctl.wire.frame import HEADER_SIZE as FRAME_HEADER_SIZE
from drctl.wire.frame import MAGIC, unpack_header

#: How much is searched at once for the frame after a damaged one.
_STEP = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Damage:
    """`checkpoint`: the oldest restorable one that comes after the damage; all from there on may be affected."""

    path: Path
    offset: int
    problem: str
    checkpoint: int | None


@dataclass(slots=True)
class VerifyReport:
    segments: int = 0
    frames: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)


def verify_segment(segment: Segment, group: str, end: int, marks: list[Mark], report: VerifyReport) -> None:
    """Read a segment up to `end`, and add what is found to `report`. `marks`: the restorable ones, in log order."""
    report.segments += 1
    try:
        segment.header(group)
    except IntegrityError as exc:
        report.damages.append(_damage(segment, 0, exc, marks))
    position = HEADER_SIZE
    while position < end:
        try:
            for frame in scan(segment.path, position, end):
                position = frame.end
                report.frames += 1
                report.bytes += frame.header.size
            return
        except IntegrityError as exc:
            report.damages.append(_damage(segment, position, exc, marks))
            position = _next_frame(segment.path, position, end)


def _damage(segment: Segment, offset: int, exc: IntegrityError, marks: list[Mark]) -> Damage:
    after = [mark.number for mark in marks if (mark.place.log, mark.place.end) > (segment.last, offset)]
    return Damage(segment.path, offset, exc.message, after[0] if after else None)


def _next_frame(path: Path, damaged: int, end: int) -> int:
    """Where the first sound frame header after a damaged frame is, or `end`."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        position = damaged + 1
        while position < end:
            data = read_at(file, min(_STEP + FRAME_HEADER_SIZE, end - position), position)
            found = data.find(MAGIC)
            while found >= 0:
                if _is_header(data[found : found + FRAME_HEADER_SIZE]):
                    return position + found
                found = data.find(MAGIC, found + 1)
            position += _STEP
        return end
    finally:
        os.close(file)


def _is_header(data: bytes) -> bool:
    try:
        unpack_header(data, "")
    except IntegrityError:
        return False
    return True
