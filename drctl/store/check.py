"""What a batch of frames must be like before a store takes it: nothing malformed may reach the journal. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from drctl.errors import IntegrityError, ProtocolViolation
from drctl.model.checkpoint import CheckpointKind
from drctl.model.extent import FRAME_PAYLOAD, SECTOR
from drctl.model.group import GroupDisk
from drctl.store.content import StreamState, control_fields
from drctl.store.journal import FrameList
from drctl.store.segment import PlacedFrame, StreamKey
from drctl.wire.frame import (
    EXTENT,
    EXTENT_SIZE,
    EXTENT_WRITE,
    EXTENT_ZERO,
    HEADER_SIZE,
    Extents,
    FrameHeader,
    FrameKind,
)


def check_batch(stream: StreamKey, state: StreamState, frames: FrameList, disks: Sequence[GroupDisk]) -> None:
    """Raises ProtocolViolation: another stream's frame, one that was there before, a malformed control frame, an extent
    outside of its disk or payload."""
    sequence = state.sequence
    tables: list[memoryview] = []
    lengths: list[int] = []
    counts: list[int] = []
    for header, whole in frames:
        if header.epoch != stream.epoch or header.generation != stream.generation:
            raise ProtocolViolation(f"frame of epoch {header.epoch} in the stream of epoch {stream.epoch}")
        if header.kind is FrameKind.DATA:
            if header.first_sequence <= sequence:
                raise ProtocolViolation(f"record {header.first_sequence} comes again; the stream is at {sequence}")
            sequence = header.last_sequence - header.partial
        elif not header.is_data:
            state = _check_control(state, header, whole)
        if count := header.extent_count:
            if not header.is_data or header.raw_length > FRAME_PAYLOAD:
                raise ProtocolViolation(f"{header.kind.name} frame with extents or more payload than a frame may have")
            tables.append(whole[HEADER_SIZE : HEADER_SIZE + count * EXTENT_SIZE])
            lengths.append(header.raw_length)
            counts.append(count)
    if tables:
        _check_extents(np.frombuffer(b"".join(tables), EXTENT), np.repeat(lengths, counts), disks)


def _check_control(state: StreamState, header: FrameHeader, whole: memoryview) -> StreamState:
    try:
        fields = control_fields(PlacedFrame(0, header, whole))
        if header.kind is FrameKind.MARK:
            _check_mark(fields, state)
        return state.after(header, fields)
    except (IntegrityError, KeyError, TypeError, ValueError) as exc:
        raise ProtocolViolation(f"malformed {header.kind.name} frame: {exc!r}") from exc


def _check_mark(fields: dict[str, Any], state: StreamState) -> None:
    for name in ("number", "sequence", "wall_ns"):
        if not isinstance(fields[name], int):
            raise TypeError(name)
    if fields["number"] <= state.mark:
        raise ValueError(f"mark {fields['number']} comes again; {state.mark} is proven")
    CheckpointKind(fields["kind"])


def _check_extents(extents: Extents, payloads: npt.NDArray[np.int64], disks: Sequence[GroupDisk]) -> None:
    sizes = np.zeros(65536, np.uint64)
    for disk in disks:
        sizes[disk.number] = disk.size // SECTOR
    end = extents["offset"] + extents["length"].astype(np.uint64)
    if np.any((end > sizes[extents["disk"]]) | (extents["offset"] > end)):
        raise ProtocolViolation("an extent lies outside of its disk, or names a disk that the group does not have")
    write = extents["kind"] == EXTENT_WRITE
    if np.any(~write & (extents["kind"] != EXTENT_ZERO)):
        raise ProtocolViolation("an extent of an unknown kind")
    last = extents["payload_offset"].astype(np.int64) + extents["length"].astype(np.int64) * SECTOR
    if np.any(write & (last > payloads)):
        raise ProtocolViolation("an extent lies outside of its frame's payload")
