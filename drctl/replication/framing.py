"""Ring records, blocks that were read, and control messages as frames. Pure but for the CPU it burns.

Safe to run in several threads at once: the compressors are each thread's own.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from drctl.errors import ProtocolViolation
from drctl.model.extent import BLOCK, FRAME_PAYLOAD, SECTOR
from drctl.store.ring_reader import Batch
from drctl.wire import frame
from drctl.wire.frame import EXTENT, EXTENT_SIZE, EXTENT_WRITE, EXTENT_ZERO, Buffer, Compress, FrameKind, Parts, Span
from drctl.wire.link import MAX_MESSAGE, frames_head
from drctl.wire.ring import RECORD_WRITE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Extents of one frame; keeps the table (24 bytes each) small beside the payload when all records are zeroes.
MAX_FRAME_EXTENTS = 1024
#: zstd's level. Those below 0 need half the time and leave text without repetitions as it is.
LEVEL = 1
#: A sample this long is compressed first; random data costs this much instead of the whole.
_SAMPLE = 4096
_SECTORS_PER_FRAME = FRAME_PAYLOAD // SECTOR
_ZEROES = bytes(FRAME_PAYLOAD)


class _Compressors(threading.local):
    """By level, each thread's own."""

    def __init__(self) -> None:
        self.by_level: dict[int, Compress] = {}


_compressors = _Compressors()


def _compressor(level: int) -> Compress:
    kept = _compressors.by_level
    if level not in kept:
        made = zstd.ZstdCompressor(level)
        kept[level] = lambda data: made.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)
    return kept[level]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What every frame of a stream carries."""

    generation: int
    epoch: str

    def span(self, first: int, last: int, *, partial: bool = False) -> Span:
        return Span(self.generation, self.epoch, first, last, partial)


def frames_of_batch(stamp: Stamp, batch: Batch, level: int | None = LEVEL) -> list[Parts]:
    """DATA frames for records of the ring, in their order. `level`: zstd's; None stores everything."""
    frames: list[Parts] = []
    starts: list[int] = batch.starts.tolist()
    ends = [*starts[1:], len(batch.data)]
    cuts: list[tuple[int, int]] = []
    first = 0
    while first < len(batch):
        after = min(bisect_right(ends, starts[first] + FRAME_PAYLOAD), first + MAX_FRAME_EXTENTS)
        # A record larger than a frame stands alone, and is cut below.
        cuts.append((first, after if after > first else first + 1))
        first = cuts[-1][1]
    table = memoryview(_table(batch, cuts).tobytes())
    sequence = batch.first
    for first, after in cuts:
        payload = batch.data[starts[first] : ends[after - 1]]
        extents = table[first * EXTENT_SIZE : after * EXTENT_SIZE]
        if len(payload) > FRAME_PAYLOAD:
            frames += _pieces(stamp, batch.descriptors[first], payload, level)
        else:
            span = stamp.span(sequence + first, sequence + after - 1)
            frames.append(_data(FrameKind.DATA, span, extents, payload, level))
    return frames


def _table(batch: Batch, cuts: list[tuple[int, int]]) -> frame.Extents:
    """The extent tables of all frames that `cuts` makes, one after the other."""
    records, starts = batch.descriptors, batch.starts
    is_write = records["kind"] == RECORD_WRITE
    firsts = np.array([first for first, _ in cuts])
    heads = np.repeat(firsts, [after - first for first, after in cuts])
    table = np.zeros(len(records), EXTENT)
    table["offset"] = records["offset"]
    table["length"] = records["length"]
    table["disk"] = records["disk"]
    table["kind"] = np.where(is_write, EXTENT_WRITE, EXTENT_ZERO)
    table["payload_offset"] = np.where(is_write, starts - starts[heads], 0)
    table["sequence_delta"] = np.arange(len(records)) - heads
    return table


def _data(kind: FrameKind, span: Span, extents: Buffer, payload: Buffer, level: int | None) -> Parts:
    compress = None if level is None or not compressible(payload) else _compressor(level)
    return frame.pack_parts(kind, span, extents, payload, compress)


def _pieces(stamp: Stamp, record: Any, data: memoryview, level: int | None) -> list[Parts]:
    """A record that is larger than a frame: PARTIAL on all but its last."""
    sequence, offset, sectors = int(record["sequence"]), int(record["offset"]), int(record["length"])
    frames = []
    for done in range(0, sectors, _SECTORS_PER_FRAME):
        length = min(_SECTORS_PER_FRAME, sectors - done)
        payload = data[done * SECTOR : (done + length) * SECTOR]
        extent = _one_extent(offset + done, length, int(record["disk"]), EXTENT_WRITE)
        span = stamp.span(sequence, sequence, partial=done + length < sectors)
        frames.append(_data(FrameKind.DATA, span, extent, payload, level))
    return frames


def frames_between(data: memoryview, after: int, upto: int, place: str) -> list[Parts]:
    """The DATA frames in `data` with the records after `after` and up to `upto`, checked; those that hold others, too,
    are made anew without them. Raises IntegrityError."""
    frames: list[Parts] = []
    for header, whole in frame.split(data, place):
        if header.kind is not FrameKind.DATA or header.last_sequence <= after or header.first_sequence > upto:
            continue
        if header.first_sequence > after and header.last_sequence <= upto:
            frames.append((b"", whole))
        else:
            frames.append(_trimmed(header, whole[frame.HEADER_SIZE :], after, upto, place))
    return frames


def _trimmed(header: frame.FrameHeader, body: memoryview, after: int, upto: int, place: str) -> Parts:
    """Of a frame of several records those after `after` and up to `upto`."""
    table = frame.extents_of(header, body)
    sequences = header.first_sequence + table["sequence_delta"].astype(np.uint64)
    table = table[(sequences > after) & (sequences <= upto)].copy()
    first, last = max(header.first_sequence, after + 1), min(header.last_sequence, upto)
    payload = memoryview(frame.payload_of(header, body, place))
    writes = table["kind"] == EXTENT_WRITE
    begin = int(table["payload_offset"][writes].min()) if writes.any() else 0
    size = int(table["length"][writes].sum()) * SECTOR
    table["payload_offset"][writes] -= begin
    table["sequence_delta"] -= first - header.first_sequence
    span = Span(header.generation, header.epoch, first, last)
    return _data(FrameKind.DATA, span, table.tobytes(), payload[begin : begin + size], LEVEL)


def _one_extent(offset: int, length: int, disk: int, kind: int) -> bytes:
    return frame.EXTENT_LAYOUT.pack(offset, length, disk, kind, 0, 0, 0)


def frames_of_zeroes(stamp: Stamp, position: int, disk: int, offset: int, length: int) -> list[Parts]:
    """A SYNC frame that says: this range (bytes) is zeroes. One frame per 1 TiB."""
    frames = []
    largest = 1 << 31
    for done in range(0, length // SECTOR, largest):
        sectors = min(largest, length // SECTOR - done)
        extent = _one_extent(offset // SECTOR + done, sectors, disk, EXTENT_ZERO)
        frames.append(frame.pack_parts(FrameKind.SYNC, stamp.span(position, position), extent, b"", None))
    return frames


def frames_of_blocks(
    stamp: Stamp, position: int, disk: int, offset: int, data: Buffer, level: int | None = LEVEL
) -> list[Parts]:
    """SYNC frames for what was read at `offset` (bytes, multiples of a sector). Blocks of zeroes carry no payload."""
    whole = memoryview(data)
    frames = []
    for done in range(0, len(whole), FRAME_PAYLOAD):
        piece = whole[done : done + FRAME_PAYLOAD]
        if piece == _ZEROES[: len(piece)]:
            frames += frames_of_zeroes(stamp, position, disk, offset + done, len(piece))
        else:
            table, payload = _blocks(disk, offset + done, piece)
            frames.append(_data(FrameKind.SYNC, stamp.span(position, position), table, payload, level))
    return frames


def frames_of_pieces(
    stamp: Stamp, position: int, disk: int, pieces: Sequence[tuple[int, Buffer]], level: int | None = LEVEL
) -> list[Parts]:
    """SYNC frames for scattered pieces of a disk, (offset, data), as many to a frame as fit. Compression is tried on
    all: a sample of one piece says nothing of its neighbours."""
    compress = None if level is None else _compressor(level)
    frames: list[Parts] = []
    table: list[bytes] = []
    payload: list[Buffer] = []
    span, filled = stamp.span(position, position), 0
    for offset, data in pieces:
        whole = memoryview(data)
        for begin, end, is_zero in _runs(whole):
            size = 0 if is_zero else end - begin
            if filled + size > FRAME_PAYLOAD or len(table) >= MAX_FRAME_EXTENTS:
                frames.append(frame.pack_parts(FrameKind.SYNC, span, b"".join(table), b"".join(payload), compress))
                table, payload, filled = [], [], 0
            kind, place = (EXTENT_ZERO, 0) if is_zero else (EXTENT_WRITE, filled)
            sectors = (end - begin) // SECTOR
            table.append(frame.EXTENT_LAYOUT.pack((offset + begin) // SECTOR, sectors, disk, kind, 0, place, 0))
            if not is_zero:
                payload.append(whole[begin:end])
                filled += size
    if table:
        frames.append(frame.pack_parts(FrameKind.SYNC, span, b"".join(table), b"".join(payload), compress))
    return frames


def _blocks(disk: int, offset: int, piece: memoryview) -> tuple[bytes, Buffer]:
    """Extent table and payload of a piece of a disk."""
    table: list[bytes] = []
    parts: list[memoryview] = []
    filled = 0
    for begin, end, is_zero in _runs(piece):
        kind = EXTENT_ZERO if is_zero else EXTENT_WRITE
        place = 0 if is_zero else filled
        sectors = (end - begin) // SECTOR
        table.append(frame.EXTENT_LAYOUT.pack((offset + begin) // SECTOR, sectors, disk, kind, 0, place, 0))
        if not is_zero:
            parts.append(piece[begin:end])
            filled += end - begin
    return b"".join(table), parts[0] if len(parts) == 1 else b"".join(parts)


def _runs(piece: memoryview) -> list[tuple[int, int, bool]]:
    """(begin, end, all zero) of the piece in bytes, in blocks; neighbours of one kind are one run."""
    if len(piece) <= BLOCK:
        return [(0, len(piece), piece == _ZEROES[: len(piece)])]
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


def compressible(payload: Buffer) -> bool:
    """Whether a sample from the middle shrinks by an eighth. Small payloads are just tried."""
    if len(payload) < 4 * _SAMPLE:
        return True
    middle = len(payload) // 2 // _SAMPLE * _SAMPLE
    return len(_compressor(LEVEL)(payload[middle : middle + _SAMPLE])) < _SAMPLE - _SAMPLE // 8


def control_frame(stamp: Stamp, kind: FrameKind, position: int, fields: dict[str, Any]) -> Parts:
    """A control frame. Raises ProtocolViolation when it can't pass the link (a definition with huge files)."""
    parts = frame.pack_parts(kind, stamp.span(position, position), b"", msgspec.json.encode(fields), _compressor(LEVEL))
    size = _size(parts)
    if size > MAX_MESSAGE - 16:
        raise ProtocolViolation(f"a {kind.name} of {size} bytes is too large for the link")
    return parts


def _size(parts: Parts) -> int:
    return len(parts[0]) + len(parts[1])


def messages_of(frames: Sequence[Parts], limit: int = MAX_MESSAGE // 2) -> list[bytes]:
    """FRAMES messages, as they go over the link, of the frames: at most about `limit` bytes each. The only copy of a
    payload between ring and TLS is made here."""
    messages = []
    group: list[Buffer] = [b""]
    size = 0
    for parts in frames:
        if size and size + _size(parts) > limit:
            messages.append(_message(group, size))
            group, size = [b""], 0
        group += parts
        size += _size(parts)
    if size:
        messages.append(_message(group, size))
    return messages


def _message(group: list[Buffer], size: int) -> bytes:
    group[0] = frames_head(size)
    return b"".join(group)
