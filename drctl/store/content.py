"""What the frames of one segment say: extents, marks, the stream's position. Filled frame by frame. Knows no files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from drctl.errors import IntegrityError
from drctl.store.extent_map import Entries, entries_of
from drctl.store.segment import PlacedFrame, SegmentHeader, SyncProgress
from drctl.wire.frame import EXTENT, EXTENT_SIZE, HEADER_SIZE, FrameHeader, FrameKind, payload_of

#: Control frames that the catalog knows.
LISTED = (FrameKind.MARK, FrameKind.PROOF, FrameKind.DEFINITION)


@dataclass(frozen=True, slots=True)
class Control:
    """A MARK, PROOF or DEFINITION frame and where it lies. A definition's payload is left in its frame."""

    kind: FrameKind
    offset: int
    end: int
    generation: int
    epoch: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream stands after a frame. `sequence`: the last record that is whole."""

    sequence: int = 0
    mark: int = 0
    sync: SyncProgress | None = None

    def after(self, header: FrameHeader, fields: dict[str, Any]) -> StreamState:
        """The state after a frame; `fields` is the payload of a control frame."""
        if header.kind is FrameKind.DATA:
            return replace(self, sequence=header.last_sequence - (1 if header.partial else 0))
        if header.kind is FrameKind.PROOF:
            return replace(self, mark=max(self.mark, int(fields["number"])))
        if header.kind is FrameKind.SYNC_BEGIN:
            first = min((int(number) for number in fields["disks"]), default=0)
            return replace(self, sync=SyncProgress(fields["sync"], first, 0))
        if header.kind is FrameKind.SYNC_PROGRESS:
            return replace(self, sync=SyncProgress(fields["sync"], int(fields["disk"]), int(fields["offset"])))
        return replace(self, sync=None) if header.kind is FrameKind.SYNC_END else self


def control_fields(frame: PlacedFrame) -> dict[str, Any]:
    """The JSON object of a control frame, {} for data. Raises IntegrityError when there is none."""
    if frame.header.is_data:
        return {}
    try:
        fields = json.loads(bytes(payload_of(frame.header, frame.body, f"frame at {frame.offset}")))
    except ValueError as exc:
        raise IntegrityError(f"control frame at {frame.offset}: not JSON: {exc}", offset=frame.offset) from exc
    if not isinstance(fields, dict):
        raise IntegrityError(f"control frame at {frame.offset}: not a JSON object", offset=frame.offset)
    return fields


class Content:
    """The extents and control frames of a segment up to `end`, and the stream's state there."""

    def __init__(self, header: SegmentHeader, end: int) -> None:
        self.header = header
        self.end = end
        self.state = StreamState(header.sequence, header.mark, header.sync)
        self.controls: list[Control] = []
        self.extent_count = 0
        #: Extent tables as bytes: an array for each would be twice as large and slower to make.
        self._tables: list[bytes] = []
        self._frames: list[int] = []

    def add(self, frame: PlacedFrame) -> None:
        """Take the next frame. A malformed control frame raises IntegrityError and changes nothing."""
        header = frame.header
        fields = control_fields(frame)
        self.state = self.state.after(header, fields)
        if header.kind in LISTED:
            kept = {"version": fields.get("version")} if header.kind is FrameKind.DEFINITION else fields
            self.controls.append(Control(header.kind, frame.offset, frame.end, header.generation, header.epoch, kept))
        self._take_extents(header, frame.whole)
        self.end = frame.end

    def extend(self, frames: Iterable[tuple[FrameHeader, memoryview]]) -> None:
        """As `add`, for frames that lie one after the other from `end` on. A stream's state after many DATA frames is
        that after the last of them, so most frames cost no more than the copy of their table."""
        newest: FrameHeader | None = None
        for header, whole in frames:
            if not header.is_data:
                self._stand_at(newest)
                newest = None
                self.add(PlacedFrame(self.end, header, whole))
                continue
            if header.kind is FrameKind.DATA:
                newest = header
            self._take_extents(header, whole)
            self.end += header.size
        self._stand_at(newest)

    def _stand_at(self, header: FrameHeader | None) -> None:
        if header is not None:
            self.state = self.state.after(header, {})

    def _take_extents(self, header: FrameHeader, whole: memoryview) -> None:
        if header.extent_count:
            # A copy: the frame's memory is the receiver's.
            self._tables.append(bytes(whole[HEADER_SIZE : HEADER_SIZE + header.extent_count * EXTENT_SIZE]))
            self._frames.append(self.end)
            self.extent_count += header.extent_count

    def add_all(self, frames: Iterable[PlacedFrame]) -> None:
        for frame in frames:
            self.add(frame)

    def entries(self) -> Entries:
        """All extents in log order."""
        return entries_of([np.frombuffer(table, EXTENT) for table in self._tables], self._frames, self.header.last)
