"""Frames: what a stream is made of on the link *and* in the journal, byte for byte the same.

The shipper makes a frame once; the receiver checks it and appends it to a segment as it came; a view reads it there.
All integers little-endian. Layout (also in docs/formats.md):

    offset size  header (64 bytes)
         0    4  magic "DRFR"
         4    1  version, 1
         5    1  kind (FrameKind)
         6    1  codec of the payload: 0 stored, 1 zstd
         7    1  flags: bit 0 PARTIAL, the record `last_sequence` goes on in the next frame
         8    8  first_sequence
        16    8  last_sequence: the stream's position after this frame (SYNC and control frames: position before it)
        24    4  extent_count
        28    4  raw_length: payload bytes before compression, at most 64 KiB for DATA and SYNC
        32    4  stored_length: payload bytes that follow the extent table
        36    4  body_checksum: CRC-32 of extent table and stored payload
        40    4  generation
        44   16  epoch, a UUID
        60    4  header_checksum: CRC-32 of the 60 bytes before

    offset size  extent table entry (24 bytes)
         0    8  offset on the disk, in 512-byte sectors
         8    4  length, in sectors
        12    2  disk number in its group
        14    1  kind: 1 write, 2 zero (no payload)
        15    1  zero
        16    4  payload_offset: where its bytes begin in the raw payload (zero: 0)
        20    4  sequence_delta: its sequence minus first_sequence

Entries stand in the order in which they were written; a later one wins over an earlier. Control frames
(MARK and above) have no extents; their payload is one JSON object, fields in docs/formats.md.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import msgspec
import numpy as np
import numpy.typing as npt

from drctl.errors import IntegrityError, UnsupportedFormat

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"DRFR"
VERSION = 1
HEADER = struct.Struct("<4sBBBBQQIIIII16sI")
HEADER_SIZE = HEADER.size
EXTENT = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("disk", "<u2"),
        ("kind", "u1"),
        ("zero", "u1"),
        ("payload_offset", "<u4"),
        ("sequence_delta", "<u4"),
    ]
)
EXTENT_SIZE = EXTENT.itemsize
#: The same as EXTENT, for one entry: numpy takes 5 µs for that.
EXTENT_LAYOUT = struct.Struct("<QIHBBII")
#: Bounds checked before anything is read: a control frame carries domain definitions, never more than this.
MAX_PAYLOAD = 16 * 1024 * 1024
MAX_EXTENTS = 65536
PARTIAL = 1
CODEC_STORED = 0
CODEC_ZSTD = 1
EXTENT_WRITE = 1
EXTENT_ZERO = 2

Extents = npt.NDArray[np.void]
Buffer = bytes | bytearray | memoryview
#: A frame that was not copied together yet: header with extent table, and the stored payload.
Parts = tuple[bytes, Buffer]

_UNCHECKED = struct.Struct("<4sBBBBQQIIIII16s")
#: Payloads below this are stored: zstd's own header and the call cost more than they save.
_LEAST_COMPRESSED = 256

#: One zstd frame of these bytes. Who makes many keeps a compressor: to make one costs as much as to use it.
Compress = Callable[[Buffer], bytes]


class FrameKind(IntEnum):
    """DATA: writes from the ring. SYNC: blocks from the reader. The others are control frames."""

    DATA = 1
    SYNC = 2
    MARK = 3
    PROOF = 4
    DEFINITION = 5
    SYNC_BEGIN = 6
    SYNC_PROGRESS = 7
    SYNC_END = 8


class FrameHeader(msgspec.Struct, frozen=True, gc=False):
    """The fixed part of a frame. Invariant: lengths are within MAX_PAYLOAD and MAX_EXTENTS."""

    kind: FrameKind
    codec: int
    flags: int
    first_sequence: int
    last_sequence: int
    extent_count: int
    raw_length: int
    stored_length: int
    body_checksum: int
    generation: int
    epoch: str

    @property
    def body_length(self) -> int:
        return self.extent_count * EXTENT_SIZE + self.stored_length

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return HEADER_SIZE + self.body_length

    @property
    def partial(self) -> bool:
        return bool(self.flags & PARTIAL)

    @property
    def is_data(self) -> bool:
        return self.kind in (FrameKind.DATA, FrameKind.SYNC)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a frame stands in its stream. `partial`: the record `last` goes on in the next frame."""

    generation: int
    epoch: str
    first: int
    last: int
    partial: bool = False


def pack(kind: FrameKind, span: Span, extents: Extents | None, payload: Buffer) -> bytes:
    """A whole frame. The payload is compressed (zstd level 1) when that saves at least an eighth of it."""
    table = b"" if extents is None else extents.tobytes()
    return b"".join(pack_parts(kind, span, table, payload, _compress_once))


def pack_parts(kind: FrameKind, span: Span, table: Buffer, payload: Buffer, compress: Compress | None) -> Parts:
    """As `pack`, of an extent table's bytes, and without copying a payload that is stored as it is. None: store it."""
    stored, codec = (payload, CODEC_STORED) if compress is None else _compressed(payload, compress)
    head = _UNCHECKED.pack(
        MAGIC,
        VERSION,
        kind,
        codec,
        PARTIAL if span.partial else 0,
        span.first,
        span.last,
        len(table) // EXTENT_SIZE,
        len(payload),
        len(stored),
        zlib.crc32(stored, zlib.crc32(table)),
        span.generation,
        bytes.fromhex(span.epoch),
    )
    return b"".join((head, zlib.crc32(head).to_bytes(4, "little"), table)), stored


def _compressed(payload: Buffer, compress: Compress) -> tuple[Buffer, int]:
    if len(payload) < _LEAST_COMPRESSED:
        return payload, CODEC_STORED
    packed = compress(payload)
    if len(packed) < len(payload) - len(payload) // 8:
        return packed, CODEC_ZSTD
    return payload, CODEC_STORED


def _compress_once(data: Buffer) -> bytes:
    return zstd.compress(data, 1)


def unpack_header(data: bytes | memoryview, place: str) -> FrameHeader:
    """The header at the start of `data` (at least HEADER_SIZE bytes). `place` names file and offset for errors."""
    head = bytes(data[:HEADER_SIZE])
    if len(head) < HEADER_SIZE or head[:4] != MAGIC:
        raise IntegrityError(f"{place}: no frame begins here")
    fields = HEADER.unpack(head)
    if zlib.crc32(head[:-4]) != fields[-1]:
        raise IntegrityError(f"{place}: frame header checksum does not match")
    if fields[1] != VERSION:
        raise UnsupportedFormat(f"{place}: frame version {fields[1]}, known: {VERSION}")
    try:
        kind = FrameKind(fields[2])
    except ValueError:
        raise UnsupportedFormat(f"{place}: unknown frame kind {fields[2]}") from None
    if max(fields[8], fields[9]) > MAX_PAYLOAD or fields[7] > MAX_EXTENTS:
        raise IntegrityError(f"{place}: frame lengths out of bounds")
    codec, flags, first, last, extents, raw, stored, checksum, generation, epoch, _ = fields[3:]
    return FrameHeader(kind, codec, flags, first, last, extents, raw, stored, checksum, generation, epoch.hex())


def check_body(header: FrameHeader, body: bytes | memoryview, place: str) -> None:
    """Raises IntegrityError when the body (extent table + stored payload) is not what was packed."""
    if len(body) != header.body_length or zlib.crc32(body) != header.body_checksum:
        raise IntegrityError(f"{place}: frame body checksum does not match")


def extents_of(header: FrameHeader, body: bytes | memoryview) -> Extents:
    """The extent table (a view on `body`). Call check_body before."""
    return np.frombuffer(body, EXTENT, header.extent_count)


def payload_of(header: FrameHeader, body: bytes | memoryview, place: str) -> bytes | memoryview:
    """The raw payload. Call check_body before. Raises IntegrityError when it does not unpack to its length."""
    stored = memoryview(body)[header.extent_count * EXTENT_SIZE :]
    if header.codec == CODEC_STORED:
        return stored
    if header.codec != CODEC_ZSTD:
        raise UnsupportedFormat(f"{place}: unknown codec {header.codec}")
    try:
        raw = zstd.decompress(stored)
    except zstd.ZstdError as exc:
        raise IntegrityError(f"{place}: payload does not decompress: {exc}") from exc
    if len(raw) != header.raw_length:
        raise IntegrityError(f"{place}: payload is {len(raw)} bytes, header says {header.raw_length}")
    return raw


def split(data: memoryview, place: str) -> Iterator[tuple[FrameHeader, memoryview]]:
    """The whole frames in `data`, each as (header, whole frame), body checked. Raises IntegrityError on a torn end."""
    position = 0
    while position < len(data):
        here = f"{place}+{position}"
        header = unpack_header(data[position : position + HEADER_SIZE], here)
        whole = data[position : position + header.size]
        check_body(header, whole[HEADER_SIZE:], here)
        yield header, whole
        position += header.size
