"""Segments: the files that a journal is made of. One header, then frames as they came.

    streams/HOST/EPOCH/NNNNNNNNNNNN.seg                 log number N
    streams/HOST/EPOCH/NNNNNNNNNNNN-MMMMMMMMMMMM.seg    merged from the segments N to M

A segment that lies wholly in the range of another is a leftover of a merge and is not looked at. All integers
little-endian. Header (128 bytes, also in docs/formats.md):

    offset size
         0    4  magic "DRSG"
         4    1  version, 1
         5    1  flags: bit 0 MERGED, bit 1 SYNCING (the sync fields hold)
         6    2  zero
         8    8  first log number
        16    8  last log number
        24    4  generation
        28    2  disk that the sync has reached
        30    2  zero
        32   16  epoch, a UUID
        48    8  sequence: the stream's position before the first frame
        56    8  number of the newest checkpoint proven before the first frame
        64   16  sync, an id
        80    8  offset on that disk below which the sync is done, bytes
        88   16  blake2b of group, a zero byte, host
       104   20  zero
       124    4  CRC-32 of the 124 bytes before
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from drctl.errors import IntegrityError, UnsupportedFormat
from drctl.store.atomic import read_at
from drctl.wire.frame import HEADER_SIZE as FRAME_HEADER_SIZE
from drctl.wire.frame import FrameHeader, check_body, unpack_header

MAGIC = b"DRSG"
VERSION = 1
HEADER = struct.Struct("<4sBBHQQIHH16sQQ16sQ16s20sI")
HEADER_SIZE = HEADER.size
MERGED = 1
SYNCING = 2
#: What a scan reads at once; most frames are below 70 KiB.
_CHUNK = 4 * 1024 * 1024
_FIRST_READ = 8 * 1024
_NAME = re.compile(r"(\d{12})(?:-(\d{12}))?\.seg$")


@dataclass(frozen=True, slots=True)
class SyncProgress:
    """How far the reader's pass `sync` has come: all below `offset` of `disk`, and all disks before it."""

    sync: str
    disk: int
    offset: int


@dataclass(frozen=True, slots=True)
class StreamKey:
    host: str
    generation: int
    epoch: str


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What was true when the segment began."""

    stream: StreamKey
    first: int
    last: int
    sequence: int
    mark: int = 0
    sync: SyncProgress | None = None
    merged: bool = False

    def pack(self, group: str) -> bytes:
        sync = self.sync or SyncProgress("0" * 32, 0, 0)
        flags = (MERGED if self.merged else 0) | (SYNCING if self.sync else 0)
        stream = self.stream
        head = HEADER.pack(
            *(MAGIC, VERSION, flags, 0, self.first, self.last, stream.generation, sync.disk, 0),
            *(bytes.fromhex(stream.epoch), self.sequence, self.mark, bytes.fromhex(sync.sync.rjust(32, "0"))),
            *(sync.offset, owner_hash(group, stream.host), b"", 0),
        )[:-4]
        return head + zlib.crc32(head).to_bytes(4, "little")


def owner_hash(group: str, host: str) -> bytes:
    return hashlib.blake2b(f"{group}\0{host}".encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment file: a name and what the name says. Its content may be damaged or cut."""

    path: Path
    first: int
    last: int
    #: Bytes when it was listed; the newest segment may grow.
    size: int

    @property
    def host(self) -> str:
        return unquote(self.path.parent.parent.name)

    @property
    def epoch(self) -> str:
        return self.path.parent.name

    def header(self, group: str) -> SegmentHeader:
        """Raises IntegrityError (damaged, foreign) or UnsupportedFormat."""
        with self.path.open("rb") as file:
            return unpack_segment_header(file.read(HEADER_SIZE), self, group)


def segment_path(root: Path, stream: StreamKey, first: int, last: int) -> Path:
    name = f"{first:012d}.seg" if first == last else f"{first:012d}-{last:012d}.seg"
    return root / "streams" / safe_name(stream.host) / stream.epoch / name


def safe_name(name: str) -> str:
    """A host's or disk's name as the name of one directory."""
    quoted = quote(name, safe=" ")
    return quoted.replace(".", "%2E") if quoted.strip(".") == "" else quoted


def unpack_segment_header(data: bytes, segment: Segment, group: str) -> SegmentHeader:
    place = str(segment.path)
    if len(data) < HEADER_SIZE or data[:4] != MAGIC:
        raise IntegrityError(f"{place}+0: no segment begins here", path=place, offset=0)
    if zlib.crc32(data[: HEADER_SIZE - 4]) != int.from_bytes(data[HEADER_SIZE - 4 : HEADER_SIZE], "little"):
        raise IntegrityError(f"{place}+0: segment header checksum does not match", path=place, offset=0)
    _, version, flags, _, first, last, generation, disk, _, epoch, sequence, mark, sync, offset, owner, _, _ = (
        HEADER.unpack(data[:HEADER_SIZE])
    )
    if version != VERSION:
        raise UnsupportedFormat(f"{place}: segment version {version}, known: {VERSION}")
    stream = StreamKey(segment.host, generation, epoch.hex())
    if owner != owner_hash(group, segment.host) or stream.epoch != segment.epoch:
        raise IntegrityError(f"{place}+0: the segment is of another group, host or epoch", path=place, offset=0)
    if (first, last) != (segment.first, segment.last):
        raise IntegrityError(f"{place}+0: the segment says log {first} to {last}", path=place, offset=0)
    progress = SyncProgress(sync.hex(), disk, offset) if flags & SYNCING else None
    return SegmentHeader(stream, first, last, sequence, mark, progress, bool(flags & MERGED))


class SegmentList:
    """The segments of a journal in log order, leftovers of merges left out."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments
        self._lasts = [segment.last for segment in segments]

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    @property
    def tail(self) -> Segment | None:
        """The newest segment: the one that may still grow, all others are sealed."""
        return self._segments[-1] if self._segments else None

    @property
    def sealed(self) -> list[Segment]:
        return self._segments[:-1]

    def holding(self, log: int) -> Segment | None:
        """The segment whose last log number is `log`: how entries and the catalog name it."""
        index = bisect_left(self._lasts, log)
        return self._segments[index] if index < len(self) and self._lasts[index] == log else None

    def between(self, first: int, last: int) -> list[Segment]:
        """Those that lie wholly in the log numbers `first` to `last`."""
        inside = self._segments[bisect_left(self._lasts, first) : bisect_left(self._lasts, last + 1)]
        return inside[1:] if inside and inside[0].first < first else inside


def list_segments(root: Path) -> tuple[SegmentList, list[Segment]]:
    """The segments under a store, and the leftovers of merges that a writer may remove."""
    found = [segment for directory in root.glob("streams/*/*") for segment in _in_directory(directory)]
    found.sort(key=lambda segment: (segment.first, -segment.last))
    kept: list[Segment] = []
    leftover: list[Segment] = []
    for segment in found:
        covered = bool(kept) and segment.last <= kept[-1].last
        (leftover if covered else kept).append(segment)
    return SegmentList(kept), leftover


def _in_directory(directory: Path) -> Iterator[Segment]:
    # A month of segments is 10,000 files: with glob, listing them takes four times as long.
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as found:
        for entry in found:
            if match := _NAME.match(entry.name):
                first = int(match[1])
                with suppress(FileNotFoundError):
                    yield Segment(directory / entry.name, first, int(match[2] or first), entry.stat().st_size)


@dataclass(frozen=True, slots=True)
class PlacedFrame:
    """A whole, checked frame and where it lies in its segment."""

    offset: int
    header: FrameHeader
    whole: memoryview

    @property
    def end(self) -> int:
        return self.offset + self.header.size

    @property
    def body(self) -> memoryview:
        return self.whole[FRAME_HEADER_SIZE:]


def scan(path: Path, start: int = HEADER_SIZE, end: int | None = None) -> Iterator[PlacedFrame]:
    """The frames from `start` to `end` (default: the whole file), each checked.

    Raises IntegrityError naming file and offset at the first frame that is torn or damaged."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        limit = os.fstat(file).st_size
        if end is not None and end > limit:
            raise _damage(path, limit, f"the file ends here, {end - limit} bytes are missing")
        limit = limit if end is None else end
        chunk, base, position = memoryview(b""), start, start
        while position < limit:
            frame = _frame_in(chunk[position - base :], path, position, limit)
            if frame is None:
                wanted = _wanted(chunk[position - base :])
                chunk, base = memoryview(read_at(file, min(max(_CHUNK, wanted), limit - position), position)), position
                continue
            yield frame
            position = frame.end
    finally:
        os.close(file)


def _wanted(data: memoryview) -> int:
    return unpack_header(data, "").size if len(data) >= FRAME_HEADER_SIZE else FRAME_HEADER_SIZE


def _frame_in(data: memoryview, path: Path, offset: int, limit: int) -> PlacedFrame | None:
    """The frame at the start of `data`; None when `data` is too short and the file has more."""
    if len(data) < min(FRAME_HEADER_SIZE, limit - offset):
        return None
    header = _header(data, path, offset)
    if offset + header.size > limit:
        raise _damage(path, offset, "the frame is cut")
    if len(data) < header.size:
        return None
    whole = data[: header.size]
    try:
        check_body(header, whole[FRAME_HEADER_SIZE:], f"{path}+{offset}")
    except IntegrityError as exc:
        exc.fields.update(path=path, offset=offset)
        raise
    return PlacedFrame(offset, header, whole)


def _header(data: memoryview, path: Path, offset: int) -> FrameHeader:
    try:
        return unpack_header(data, f"{path}+{offset}")
    except IntegrityError as exc:
        exc.fields.update(path=path, offset=offset)
        raise


def _damage(path: Path, offset: int, problem: str) -> IntegrityError:
    return IntegrityError(f"{path}+{offset}: {problem}", path=path, offset=offset)


def read_frame(file: int, path: Path, offset: int) -> PlacedFrame:
    """The frame at `offset` of an open segment, checked. Raises IntegrityError."""
    # A frame that compressed well is whole in the first read, and no more than it is fetched from the disk.
    data = memoryview(os.pread(file, _FIRST_READ, offset))
    header = _header(data, path, offset)
    if header.size > len(data):
        data = memoryview(read_at(file, header.size, offset))
    if header.size > len(data):
        raise _damage(path, offset, "the frame is cut")
    frame = _frame_in(data, path, offset, offset + header.size)
    if frame is None:
        raise _damage(path, offset, "the frame is cut")
    return frame
