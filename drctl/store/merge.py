"""Merging: adjacent segments become one that holds only what the kept checkpoints need.

The merged file's rename makes it true; from then on its inputs are leftovers, whoever removes them and when. Killed
before, it is a temporary file. Blocks that a later write of the same interval overwrote, and the marks that are not
kept, are dropped; frames between are packed anew, control frames are kept as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from drctl.errors import IntegrityError
from drctl.model.extent import FRAME_PAYLOAD, SECTOR, GiB
from drctl.store import atomic
from drctl.store.content import Content, Control
from drctl.store.extent_map import DISK_SHIFT, SECTOR_MASK, ZERO, Entries, resolve
from drctl.store.label import CheckpointKey
from drctl.store.segment import (
    HEADER_SIZE,
    PlacedFrame,
    Segment,
    SegmentHeader,
    read_frame,
    scan,
    segment_path,
)
from drctl.wire.frame import EXTENT, EXTENT_WRITE, EXTENT_ZERO, FrameKind, Span, pack, payload_of, unpack_header

#: Extents per merged frame: bounds the table of a frame of zeroes.
_MAX_EXTENTS = 2048
_BUFFER = 1024 * 1024


@dataclass(frozen=True, slots=True)
class MergePolicy:
    """Merge when `width` adjacent segments (or the last ones of a stream) may lose at least half of their marks,
    up to `size` bytes of input. Frames are addressed with 32 bits."""

    width: int = 8
    size: int = 1 * GiB


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sealed segment and its marks, proven or not."""

    segment: Segment
    marks: tuple[CheckpointKey, ...]


def plan(candidates: Sequence[Candidate], kept: set[CheckpointKey], policy: MergePolicy) -> list[list[Segment]]:
    """Which adjacent segments to merge; `candidates` are all that may be, in log order. Pure."""
    chosen: list[list[Segment]] = []
    group: list[Candidate] = []
    for index, candidate in enumerate(candidates):
        if group and not _fits(group, candidate, policy):
            _take(group, kept, policy, chosen, closed=_ends(group[-1], candidate))
            group = []
        if _thinnable(candidate, kept):
            group.append(candidate)
        else:
            _take(group, kept, policy, chosen, closed=False)
            group = []
        if index == len(candidates) - 1:
            _take(group, kept, policy, chosen, closed=False)
    return chosen


def _fits(group: list[Candidate], candidate: Candidate, policy: MergePolicy) -> bool:
    size = sum(each.segment.size for each in group) + candidate.segment.size
    return size <= policy.size and len(group) < policy.width and not _ends(group[-1], candidate)


def _ends(last: Candidate, after: Candidate) -> bool:
    """The stream ends with `last`, or a gap follows."""
    return last.segment.path.parent != after.segment.path.parent or last.segment.last + 1 != after.segment.first


def _thinnable(candidate: Candidate, kept: set[CheckpointKey]) -> bool:
    stays = sum(mark in kept for mark in candidate.marks)
    return 2 * stays <= len(candidate.marks)


def _take(
    group: list[Candidate], kept: set[CheckpointKey], policy: MergePolicy, chosen: list[list[Segment]], *, closed: bool
) -> None:
    """A group is merged when it is as large as it gets and loses marks by it."""
    full = closed or len(group) >= policy.width or sum(c.segment.size for c in group) * 2 > policy.size
    loses = any(mark not in kept for candidate in group for mark in candidate.marks)
    if len(group) > 1 and full and loses:
        chosen.append([candidate.segment for candidate in group])


class Merge:
    """One merge of `inputs`, all of one stream. `kept`: the checkpoints that stay."""

    def __init__(self, root: Path, group: str, inputs: Sequence[Segment], kept: set[CheckpointKey]) -> None:
        self._group = group
        self._inputs = inputs
        self._kept = kept
        first = inputs[0].header(group)
        self._header: SegmentHeader = replace(first, first=inputs[0].first, last=inputs[-1].last, merged=True)
        self.path = segment_path(root, first.stream, self._header.first, self._header.last)
        self._temp = atomic.temporary(self.path)
        self._out = -1
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._files: dict[int, tuple[Path, int]] = {}
        self.content = Content(self._header, HEADER_SIZE)
        self.dropped: set[CheckpointKey] = set()

    def write(self) -> None:
        """Write the merged segment beside its place, durably. Raises OutOfSpace, IntegrityError (a damaged input)."""
        with atomic.space_errors(self.path):
            self._out = os.open(self._temp, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                atomic.write_at(self._out, [self._header.pack(self._group)], 0)
                for segment in self._inputs:
                    self._files[segment.last] = (segment.path, os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC))
                self._write_intervals()
                self._flush()
                os.fsync(self._out)
                atomic.step("fsync merged segment")
            finally:
                for _, file in self._files.values():
                    os.close(file)
                os.close(self._out)

    def commit(self) -> Segment:
        """Put the merged segment in its place. Call it under the commit lock."""
        atomic.commit(self._temp, self.path)
        return Segment(self.path, self._header.first, self._header.last, self.content.end)

    def abandon(self) -> None:
        self._temp.unlink(missing_ok=True)

    def _write_intervals(self) -> None:
        pending: list[Entries] = []
        controls: list[tuple[int, Control]] = []
        for segment in self._inputs:
            content = Content(segment.header(self._group), HEADER_SIZE)
            content.add_all(scan(segment.path))
            entries, start = content.entries(), 0
            for control in content.controls:
                if not self._stays(control):
                    continue
                controls.append((segment.last, control))
                if control.kind is FrameKind.MARK:
                    after = int(np.searchsorted(entries["frame"], np.uint32(control.offset)))
                    pending.append(entries[start:after])
                    self._interval(np.concatenate(pending), controls)
                    pending, controls, start = [], [], after
            pending.append(entries[start:])
        self._interval(np.concatenate(pending), controls)

    def _stays(self, control: Control) -> bool:
        if control.kind is FrameKind.DEFINITION:
            return True
        label = CheckpointKey(control.epoch, int(control.fields["number"]))
        if control.kind is FrameKind.MARK and label not in self._kept:
            self.dropped.add(label)
        return label not in self.dropped

    def _interval(self, entries: Entries, controls: list[tuple[int, Control]]) -> None:
        """The data between two kept marks, then the control frames that were there."""
        if len(entries):
            span = self._span(entries)
            pieces = resolve(entries)
            for chunk in _chunks(pieces[np.lexsort((pieces["payload"], pieces["frame"], pieces["log"]))]):
                self._emit(self._pack(chunk, span))
        for log, control in controls:
            path, file = self._files[log]
            self._emit(bytes(read_frame(file, path, control.offset).whole))

    def _span(self, entries: Entries) -> Span:
        """Where the stream stands after the last of these entries."""
        path, file = self._files[int(entries[-1]["log"])]
        header = read_frame(file, path, int(entries[-1]["frame"])).header
        position = header.last_sequence - (1 if header.partial else 0)
        return Span(self._header.stream.generation, self._header.stream.epoch, position, position)

    def _pack(self, pieces: Entries, span: Span) -> bytes:
        zero = (pieces["payload"] & ZERO) != 0
        lengths = np.where(zero, 0, pieces["length"].astype(np.int64) * SECTOR)
        table = np.zeros(len(pieces), EXTENT)
        table["offset"] = pieces["start"] & np.uint64(SECTOR_MASK)
        table["length"] = pieces["length"]
        table["disk"] = pieces["start"] >> np.uint64(DISK_SHIFT)
        table["kind"] = np.where(zero, EXTENT_ZERO, EXTENT_WRITE)
        table["payload_offset"] = np.where(zero, 0, np.cumsum(lengths) - lengths)
        return pack(FrameKind.DATA, span, table, b"".join(self._payloads(pieces[~zero])))

    def _payloads(self, pieces: Entries) -> Iterator[memoryview]:
        place, payload = (-1, -1), memoryview(b"")
        rows = zip(*(pieces[name].tolist() for name in ("log", "frame", "payload", "length")), strict=True)
        for log, frame, start, sectors in rows:
            if (log, frame) != place:
                path, file = self._files[log]
                found = read_frame(file, path, frame)
                place, payload = (log, frame), memoryview(payload_of(found.header, found.body, f"{path}+{frame}"))
            part = payload[start : start + sectors * SECTOR]
            if len(part) != sectors * SECTOR:
                raise IntegrityError(f"{self._files[log][0]}+{frame}: the frame has fewer bytes than its table says")
            yield part

    def _emit(self, whole: bytes) -> None:
        header = unpack_header(whole, str(self._temp))
        self.content.add(PlacedFrame(self.content.end, header, memoryview(whole)))
        self._buffer.append(whole)
        self._buffered += len(whole)
        if self._buffered >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        atomic.write_at(self._out, self._buffer, self.content.end - self._buffered)
        self._buffer, self._buffered = [], 0


def _chunks(pieces: Entries) -> Iterator[Entries]:
    """Pieces in parts that fit a frame each; one piece never has more than a frame's payload."""
    zero = (pieces["payload"] & ZERO) != 0
    after = np.cumsum(np.where(zero, 0, pieces["length"].astype(np.int64) * SECTOR))
    start, done = 0, 0
    while start < len(pieces):
        end = int(np.searchsorted(after, done + FRAME_PAYLOAD, "right"))
        end = max(start + 1, min(end, start + _MAX_EXTENTS))
        yield pieces[start:end]
        start, done = end, int(after[end - 1])
