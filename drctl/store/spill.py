"""A spill: the oldest records of a ring, on disk, while the ring fills faster than the link empties it.

    DIRECTORY/NNNNNNNN.spill     segments, in their order; written once from front to back, never changed, unlinked when
                                 all that is in them is durable at the other side

A segment is a header of 48 bytes and then frames as they go over the link (wire/frame.py): DATA frames, and *notes*
about marks, which are MARK frames with fields of their own. All behind the header is AES-256 in counter mode. The key
lies with the ring, in memory only, so a spill that has outlived its ring can't be read by anybody, us included.

    offset size  header
         0    8  magic "DRSPILL1"
         8    4  generation, little-endian
        12    4  zero
        16   16  epoch, a UUID
        32   16  the counter's first block

Nothing is synced: a spill is of use as long as its ring is, and both end with the host's boot. What a killed process
has written is there. Blocking; `write` and `note` belong to one thread, everything else to another.
"""

from __future__ import annotations

import os
import secrets
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from drctl.errors import IntegrityError, OutOfSpace
from drctl.model.extent import GiB, MiB
from drctl.store.atomic import space_errors, write_at
from drctl.wire import frame
from drctl.wire.frame import FrameHeader, FrameKind, Parts, Span

SUFFIX = ".spill"
KEY_BYTES = 32
HEADER = struct.Struct("<8sII16s16s")
_MAGIC = b"DRSPILL1"
#: A segment is the piece in which room comes back; so many of them make up the limit.
SEGMENTS = 16
SMALLEST_SEGMENT, LARGEST_SEGMENT = MiB, 64 * MiB
#: About so many bytes are written, and read again, together.
CHUNK = MiB // 2
#: Of the file system this much is left to others, or a twentieth of it where that is less.
RESERVE = GiB
_AES_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole frames that lie together: records `first` to `last`."""

    segment: int
    offset: int
    length: int
    first: int
    last: int


@dataclass(slots=True)
class _Segment:
    size: int
    #: The largest number of a mark that a note in it is about; 0: there is none.
    mark: int = 0


@dataclass(frozen=True, slots=True)
class SpillIdentity:
    """What a spill belongs to. `key` is KEY_BYTES long."""

    generation: int
    epoch: str
    key: bytes = field(repr=False)


class Spill:
    """Records `floor` + 1 to `upto` of one ring, without a gap. Invariant: chunks follow one another.

    Opening it removes what is of another ring, and what can't be read."""

    def __init__(
        self, directory: Path, identity: SpillIdentity, limit: int, alive: Callable[[], None] = lambda: None
    ) -> None:
        """`limit`: bytes on disk, 0: nothing more is written. `alive` is called now and then while it is read."""
        self.directory = directory
        self.limit = limit
        self._identity = identity
        self._chunks: list[Chunk] = []
        self._firsts: list[int] = []
        self._segments: dict[int, _Segment] = {}
        self._next = 1
        #: The segment that is being written: its file, number and cipher.
        self._open: tuple[int, int, _Stream] | None = None
        #: Notes that were there when it was opened, in their order.
        self.notes: list[dict[str, Any]] = []
        self._scan(alive)

    # what is in it

    @property
    def empty(self) -> bool:
        """Whether it holds no record; it may hold notes."""
        return not self._chunks

    @property
    def floor(self) -> int:
        return self._chunks[0].first - 1 if self._chunks else 0

    @property
    def upto(self) -> int:
        return self._chunks[-1].last if self._chunks else 0

    @property
    def used(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in list(self._segments.values()))

    @property
    def waiting(self) -> int:
        """Bytes of records that are not released."""
        return sum(chunk.length for chunk in self._chunks)

    @property
    def segment_size(self) -> int:
        return min(max(self.limit // SEGMENTS, SMALLEST_SEGMENT), LARGEST_SEGMENT)

    def fits(self, size: int) -> bool:
        """Whether `size` bytes more stay within the limit."""
        return self.used + size + HEADER.size <= self.limit

    def chunk_after(self, sequence: int) -> Chunk | None:
        """The chunk that holds the record after `sequence`; None when none does."""
        index = bisect_right(self._firsts, sequence + 1) - 1
        if index < 0 or self._chunks[index].last <= sequence:
            return None
        return self._chunks[index]

    def read(self, chunk: Chunk) -> bytes:
        """The frames of a chunk, to be checked by whoever unpacks them; from any thread. Raises IntegrityError."""
        path = self._path(chunk.segment)
        try:
            with path.open("rb", buffering=0) as file:
                stream = _stream(self._identity, file.read(HEADER.size), path)
                file.seek(chunk.offset)
                data = file.read(chunk.length)
        except OSError as exc:
            raise IntegrityError(f"{path}: can't be read: {exc.strerror}") from exc
        if data is None or len(data) < chunk.length:
            raise IntegrityError(f"{path}: ends before what was written")
        return stream.apply(data, chunk.offset)

    # writing

    def write(self, frames: Sequence[Parts], first: int, last: int) -> Chunk:
        """Put frames of records behind all others; tell by `added`. Raises OutOfSpace or OSError: nothing was added."""
        number, offset, length = self._append(b"".join(part for parts in frames for part in parts))
        return Chunk(number, offset, length, first, last)

    def note(self, number: int, fields: dict[str, Any]) -> None:
        """Keep `fields` about mark `number`. Raises OutOfSpace or OSError."""
        span = Span(self._identity.generation, self._identity.epoch, 0, 0)
        table, payload = frame.pack_parts(FrameKind.MARK, span, b"", msgspec.json.encode(fields), None)
        segment, _, _ = self._append(table + bytes(payload))
        self._segments[segment].mark = max(self._segments[segment].mark, number)

    def _append(self, data: bytes) -> tuple[int, int, int]:
        """(segment, offset, length) of what was written."""
        if self._open is not None and self._segments[self._open[1]].size + len(data) > self.segment_size:
            self.close()
        with space_errors(self.directory):
            file, number, stream = self._open or self._begin()
            segment = self._segments[number]
            offset = segment.size
            try:
                self._demand_room(len(data))
                write_at(file, [stream.apply(data, offset)], offset)
            except OSError:
                # Other bytes at the same place would give both away: the rest goes into another segment.
                self.close()
                os.truncate(self._path(number), offset)
                raise
            segment.size = offset + len(data)
        return number, offset, len(data)

    def _begin(self) -> tuple[int, int, _Stream]:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        number, path = self._next, self._path(self._next)
        self._next += 1
        first = secrets.token_bytes(_AES_BLOCK)
        epoch = bytes.fromhex(self._identity.epoch)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_at(file, [HEADER.pack(_MAGIC, self._identity.generation, 0, epoch, first)], 0)
        except OSError:
            os.close(file)
            path.unlink()
            raise
        self._segments[number] = _Segment(HEADER.size)
        self._open = file, number, _Stream(self._identity.key, first)
        return self._open

    def _demand_room(self, size: int) -> None:
        """Raises OutOfSpace where the file system's last room would go."""
        space = os.statvfs(self.directory)
        reserve = min(RESERVE, space.f_blocks * space.f_frsize // 20)
        if space.f_bavail * space.f_frsize < reserve + size:
            raise OutOfSpace(f"{self.directory}: the file system has too little room left", path=self.directory)

    def close(self) -> None:
        """What is written next goes into another segment."""
        if self._open is not None:
            os.close(self._open[0])
            self._open = None

    # the other thread's

    def added(self, chunk: Chunk) -> None:
        """A chunk was written. What it does not follow has been released meanwhile."""
        if chunk.first != self.upto + 1:
            self._chunks.clear()
            self._firsts.clear()
        self._chunks.append(chunk)
        self._firsts.append(chunk.first)

    def release(self, sequence: int, oldest_mark: int, *, writing: bool = False) -> None:
        """Records up to `sequence`, and notes about marks before `oldest_mark`, are of no use any more. `writing`: the
        other thread is at work, so no file goes now."""
        count = 0
        while count < len(self._chunks) and self._chunks[count].last <= sequence:
            count += 1
        del self._chunks[:count]
        del self._firsts[:count]
        keep = self._chunks[0].segment if self._chunks else self._next
        for number in () if writing else sorted(self._segments):
            noted = self._segments[number].mark
            if number >= keep or (noted and noted >= oldest_mark):
                break
            if self._open is not None and self._open[1] == number:
                self.close()
            self._remove(number)

    def remove(self) -> None:
        """All of it. The other thread must have stopped."""
        self.close()
        for number in list(self._segments):
            self._remove(number)
        self._chunks.clear()
        self._firsts.clear()

    def _remove(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)
        self._segments.pop(number, None)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:08d}{SUFFIX}"

    # opening

    def _scan(self, alive: Callable[[], None]) -> None:
        """Find what an earlier process has left. A piece in the middle that can't be read costs all before it: the
        receiver, if it lacks them, is told by the gap."""
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            alive()
            if not path.stem.isdecimal():
                continue
            number = int(path.stem)
            self._next = max(self._next, number + 1)
            found = _Found(number)
            try:
                with path.open("rb", buffering=0) as file:
                    found.read(file.fileno(), _stream(self._identity, file.read(HEADER.size), path), path)
            except (IntegrityError, OSError):
                pass  # what lies before is good
            if not found.chunks and not found.notes:
                path.unlink(missing_ok=True)
                continue
            self._segments[number] = _Segment(path.stat().st_size, found.mark)
            self.notes += found.notes
            for chunk in found.chunks:
                self.added(chunk)


class _Found:
    """What one segment holds."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.chunks: list[Chunk] = []
        self.notes: list[dict[str, Any]] = []
        self.mark = 0

    def read(self, file: int, stream: _Stream, path: Path) -> None:
        """Raises IntegrityError at the first thing that is no whole frame."""
        end, at = os.fstat(file).st_size, HEADER.size
        begin, first = at, 0
        while at < end:
            place = f"{path}+{at}"
            head = stream.apply(os.pread(file, frame.HEADER_SIZE, at), at)
            header = frame.unpack_header(head, place)
            if at + header.size > end:
                raise IntegrityError(f"{place}: ends within a frame")
            at += header.size
            if header.kind is not FrameKind.DATA:
                self._note(file, stream, header, at - header.body_length, place)
                begin, first = at, 0
                continue
            first = first or header.first_sequence
            if not header.partial:
                self._records(Chunk(self._number, begin, at - begin, first, header.last_sequence))
                begin, first = at, 0

    def _records(self, more: Chunk) -> None:
        """Whole records: as part of the chunk before them, where they follow and it is not too long."""
        before = self.chunks[-1] if self.chunks else None
        if (
            before is not None
            and before.offset + before.length == more.offset
            and before.last + 1 == more.first
            and before.length < CHUNK
        ):
            length = before.length + more.length
            self.chunks[-1] = Chunk(self._number, before.offset, length, before.first, more.last)
        else:
            self.chunks.append(more)

    def _note(self, file: int, stream: _Stream, header: FrameHeader, at: int, place: str) -> None:
        body = stream.apply(os.pread(file, header.body_length, at), at)
        frame.check_body(header, body, place)
        fields = msgspec.json.decode(bytes(frame.payload_of(header, body, place)), type=dict[str, Any])
        self.notes.append(fields)
        self.mark = max(self.mark, int(fields.get("number") or 0))


class _Stream:
    """The key stream of a segment, from any place on."""

    def __init__(self, key: bytes, first: bytes) -> None:
        self._key = key
        self._first = int.from_bytes(first)

    def apply(self, data: bytes, offset: int) -> bytes:
        """Encrypt or decrypt what stands at `offset`."""
        block, skip = divmod(offset, _AES_BLOCK)
        counter = (self._first + block) % (1 << 128)
        cipher = Cipher(AES(self._key), CTR(counter.to_bytes(_AES_BLOCK))).encryptor()
        cipher.update(bytes(skip))
        return cipher.update(data)


def _stream(identity: SpillIdentity, header: bytes | None, path: Path) -> _Stream:
    """Raises IntegrityError when the segment is not of that ring."""
    if header is None or len(header) < HEADER.size:
        raise IntegrityError(f"{path}: no segment of a spill")
    magic, generation, _, epoch, first = HEADER.unpack(header)
    if magic != _MAGIC or (generation, epoch.hex()) != (identity.generation, identity.epoch):
        raise IntegrityError(f"{path}: no segment of this ring's spill")
    return _Stream(identity.key, first)
