"""Ring records, blocks that were read, and control messages as frames. Pure but for the CPU it burns.

Safe to run in several threads at once: the compressor is one per thread and every call is one shot.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from drctl.errors import ProtocolViolation
from drctl.model.extent import BLOCK, FRAME_PAYLOAD, SECTOR
from drctl.store.ring_reader import Batch
from drctl.wire import frame
from drctl.wire.frame import EXTENT, EXTENT_WRITE, EXTENT_ZERO, FrameKind, Span
from drctl.wire.link import MAX_MESSAGE
from drctl.wire.ring import RECORD_WRITE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Extents of one frame; keeps the table (24 bytes each) small beside the payload when all records are zeroes.
MAX_FRAME_EXTENTS = 1024
#: A sample this long is compressed first; random data costs this much instead of the whole.
_SAMPLE = 4096
_SECTORS_PER_FRAME = FRAME_PAYLOAD // SECTOR
_ZEROES = bytes(FRAME_PAYLOAD)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What every frame of a stream carries."""

    generation: int
    epoch: str

    def span(self, first: int, last: int, *, partial: bool = False) -> Span:
        return Span(self.generation, self.epoch, first, last, partial)


def frames_of_batch(stamp: Stamp, batch: Batch) -> list[bytes]:
    """DATA frames for records of the ring, in their order."""
    frames: list[bytes] = []
    starts = batch.starts.astype(np.int64)
    ends = np.append(starts[1:], len(batch.data))
    first = 0
    while first < len(batch):
        after = int(np.searchsorted(ends, starts[first] + FRAME_PAYLOAD, side="right"))
        after = min(after, first + MAX_FRAME_EXTENTS)
        if after > first:
            frames.append(_frame(stamp, batch, slice(first, after)))
            first = after
        else:
            frames += _pieces(stamp, batch.descriptors[first], batch.payload(first))
            first += 1
    return frames


def _frame(stamp: Stamp, batch: Batch, part: slice) -> bytes:
    records = batch.descriptors[part]
    starts = batch.starts[part]
    is_write = records["kind"] == RECORD_WRITE
    table = np.zeros(len(records), EXTENT)
    table["offset"] = records["offset"]
    table["length"] = records["length"]
    table["disk"] = records["disk"]
    table["kind"] = np.where(is_write, EXTENT_WRITE, EXTENT_ZERO)
    table["payload_offset"] = np.where(is_write, starts - starts[0], 0)
    table["sequence_delta"] = records["sequence"] - records["sequence"][0]
    end = int(starts[-1]) + (int(records["length"][-1]) * SECTOR if is_write[-1] else 0)
    payload = batch.data[int(starts[0]) : end]
    span = stamp.span(int(records["sequence"][0]), int(records["sequence"][-1]))
    return frame.pack(FrameKind.DATA, span, table, payload, compress=compressible(payload))


def _pieces(stamp: Stamp, record: Any, data: memoryview) -> list[bytes]:
    """A record that is larger than a frame: PARTIAL on all but its last."""
    sequence, offset, sectors = int(record["sequence"]), int(record["offset"]), int(record["length"])
    frames = []
    for done in range(0, sectors, _SECTORS_PER_FRAME):
        length = min(_SECTORS_PER_FRAME, sectors - done)
        payload = data[done * SECTOR : (done + length) * SECTOR]
        table = _one_extent(offset + done, length, int(record["disk"]), EXTENT_WRITE)
        span = stamp.span(sequence, sequence, partial=done + length < sectors)
        frames.append(frame.pack(FrameKind.DATA, span, table, payload, compress=compressible(payload)))
    return frames


def _one_extent(offset: int, length: int, disk: int, kind: int) -> frame.Extents:
    table = np.zeros(1, EXTENT)
    table[0] = (offset, length, disk, kind, 0, 0, 0)
    return table


def frames_of_zeroes(stamp: Stamp, position: int, disk: int, offset: int, length: int) -> list[bytes]:
    """A SYNC frame that says: this range (bytes) is zeroes. One frame per 1 TiB."""
    frames = []
    largest = 1 << 31
    for done in range(0, length // SECTOR, largest):
        sectors = min(largest, length // SECTOR - done)
        table = _one_extent(offset // SECTOR + done, sectors, disk, EXTENT_ZERO)
        frames.append(frame.pack(FrameKind.SYNC, stamp.span(position, position), table, b""))
    return frames


def frames_of_blocks(stamp: Stamp, position: int, disk: int, offset: int, data: bytes | memoryview) -> list[bytes]:
    """SYNC frames for what was read at `offset` (bytes, multiples of a sector). Blocks of zeroes carry no payload."""
    whole = memoryview(data)
    frames = []
    for done in range(0, len(whole), FRAME_PAYLOAD):
        piece = whole[done : done + FRAME_PAYLOAD]
        if piece == _ZEROES[: len(piece)]:
            frames += frames_of_zeroes(stamp, position, disk, offset + done, len(piece))
        else:
            frames.append(_blocks(stamp, position, disk, offset + done, piece))
    return frames


def _blocks(stamp: Stamp, position: int, disk: int, offset: int, piece: memoryview) -> bytes:
    runs = _runs(piece)
    table = np.zeros(len(runs), EXTENT)
    parts: list[memoryview] = []
    filled = 0
    for index, (begin, end, is_zero) in enumerate(runs):
        kind = EXTENT_ZERO if is_zero else EXTENT_WRITE
        place = 0 if is_zero else filled
        table[index] = ((offset + begin) // SECTOR, (end - begin) // SECTOR, disk, kind, 0, place, 0)
        if not is_zero:
            parts.append(piece[begin:end])
            filled += end - begin
    payload = parts[0] if len(parts) == 1 else b"".join(parts)
    return frame.pack(FrameKind.SYNC, stamp.span(position, position), table, payload, compress=compressible(payload))


def _runs(piece: memoryview) -> list[tuple[int, int, bool]]:
    """(begin, end, all zero) of the piece in bytes, in blocks; neighbours of one kind are one run."""
    whole = len(piece) // BLOCK * BLOCK
    zero: list[bool] = (~np.frombuffer(piece[:whole], np.uint8).reshape(-1, BLOCK).any(axis=1)).tolist()  # type: ignore[assignment]
    if whole < len(piece):
        zero.append(not any(piece[whole:]))
    runs: list[tuple[int, int, bool]] = []
    for index, is_zero in enumerate(zero):
        end = min((index + 1) * BLOCK, len(piece))
        if runs and runs[-1][2] == is_zero:
            runs[-1] = (runs[-1][0], end, is_zero)
        else:
            runs.append((index * BLOCK, end, is_zero))
    return runs


def compressible(payload: bytes | memoryview) -> bool:
    """Whether a sample from the middle shrinks by an eighth. Small payloads are just tried."""
    if len(payload) < 4 * _SAMPLE:
        return True
    middle = len(payload) // 2 // _SAMPLE * _SAMPLE
    return len(zstd.compress(payload[middle : middle + _SAMPLE], 1)) < _SAMPLE - _SAMPLE // 8


def control_frame(stamp: Stamp, kind: FrameKind, position: int, fields: dict[str, Any]) -> bytes:
    """A control frame. Raises ProtocolViolation when it can't pass the link (a definition with huge files)."""
    whole = frame.pack(kind, stamp.span(position, position), None, msgspec.json.encode(fields))
    if len(whole) > MAX_MESSAGE - 16:
        raise ProtocolViolation(f"a {kind.name} of {len(whole)} bytes is too large for the link")
    return whole


def messages_of(frames: Sequence[bytes], limit: int = MAX_MESSAGE // 4) -> list[list[bytes]]:
    """The frames in groups of at most about `limit` bytes, each to be one FRAMES message."""
    groups: list[list[bytes]] = []
    size = limit
    for whole in frames:
        if size + len(whole) > limit:
            groups.append([])
            size = 0
        groups[-1].append(whole)
        size += len(whole)
    return groups
