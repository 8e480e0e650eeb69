"""The journal's growing end: appends frames to segments, makes them durable, seals. One writer, one thread.

Law: acknowledged <= written; a claim in the file `tail` says up to where the newest segment was durable:

    offset size  (all little-endian; also in docs/formats.md)
         0    8  log number
         8    8  offset: all before it was synced when this was written
        16    4  CRC-32 of the 16 bytes before
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from drctl.errors import IntegrityError, OutOfSpace
from drctl.model.extent import MiB
from drctl.store import atomic
from drctl.store.content import Content, Control, StreamState
from drctl.store.run import write_segment_run
from drctl.store.segment import (
    HEADER_SIZE,
    Segment,
    SegmentHeader,
    StreamKey,
    list_segments,
    scan,
    segment_path,
)
from drctl.wire.frame import FrameHeader, FrameKind

_CLAIM = struct.Struct("<QQI")

FrameList = Sequence[tuple[FrameHeader, memoryview]]
#: Told of each segment's controls once they are durable: (segment, controls, durable offset, anew).
Listener = Callable[[Segment, Sequence[Control], int, bool], None]


@dataclass(frozen=True, slots=True)
class SealPolicy:
    """When a segment is closed: at the first MARK past `size` bytes or `age` seconds between its marks, and anywhere
    at twice that size or past `extents`, so that its index fits in memory."""

    size: int = 64 * MiB
    age: float = 3600.0
    extents: int = 262_144


def read_claim(root: Path) -> tuple[int, int]:
    """(log, offset) up to which the newest segment was durable at least; (0, 0) when unknown."""
    try:
        data = (root / "tail").read_bytes()
    except FileNotFoundError:
        return 0, 0
    if len(data) != _CLAIM.size or zlib.crc32(data[:16]) != int.from_bytes(data[16:], "little"):
        return 0, 0
    log, offset, _ = _CLAIM.unpack(data)
    return log, offset


class Journal:
    """Invariant: the tail file is written up to `_content.end`, durable up to `_durable`."""

    def __init__(self, root: Path, group: str, base_position: int, listener: Listener, policy: SealPolicy) -> None:
        self._root = root
        self._group = group
        self._base_position = base_position
        self._listener = listener
        self._policy = policy
        self._file = -1
        self._segment: Segment | None = None
        self._content: Content | None = None
        self._told = 0
        self._durable = 0
        self.sealed_size = 0
        #: Bytes cut from the end of the newest segment when it was opened: written, never acknowledged.
        self.torn_bytes = 0
        self._claim_file = os.open(root / "tail", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._recover()
        except BaseException:
            os.close(self._claim_file)
            raise

    # Opening

    def _recover(self) -> None:
        segments, leftover = list_segments(self._root)
        for segment in leftover:
            atomic.remove(segment.path)
        self.refresh_size()
        if segments.tail is None:
            return
        self._segment = segments.tail
        self._content = self._read_tail(self._segment)
        self._file = os.open(self._segment.path, os.O_RDWR | os.O_CLOEXEC)
        self._cut_tail()
        self._told, self._durable = len(self._content.controls), self._content.end
        self._listener(self._segment, self._content.controls, self._durable, True)

    def _read_tail(self, segment: Segment) -> Content:
        """What the newest segment holds up to its torn end. Raises IntegrityError when what is missing was durable."""
        claimed_log, claimed = read_claim(self._root)
        claimed = claimed if claimed_log == segment.last else 0
        content = Content(segment.header(self._group), HEADER_SIZE)
        try:
            content.add_all(scan(segment.path))
        except IntegrityError:
            if content.end < claimed:
                raise
        if content.end < claimed:
            raise IntegrityError(
                f"{segment.path}+{content.end}: the file ends here, durable were {claimed} bytes",
                path=segment.path,
                offset=content.end,
            )
        return content

    def _cut_tail(self) -> None:
        assert self._content is not None
        self.torn_bytes = os.fstat(self._file).st_size - self._content.end
        if self.torn_bytes:
            os.ftruncate(self._file, self._content.end)
            atomic.step("cut tail")
        atomic.sync_data(self._file)
        self._claim(self._content)

    def refresh_size(self) -> None:
        """Count the bytes of all segments but the newest, and of the runs."""
        segments, _ = list_segments(self._root)
        total = sum(segment.size for segment in segments.sealed)
        for path in (self._root / "runs").glob("*.run"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        self.sealed_size = total

    # State

    @property
    def size(self) -> int:
        """Bytes on disk: segments and runs."""
        return self.sealed_size + (self._content.end if self._content else 0)

    @property
    def state(self) -> StreamState:
        """The newest stream's state as written."""
        return self._content.state if self._content else StreamState()

    @property
    def stream(self) -> StreamKey | None:
        """The stream of the newest segment."""
        return self._content.header.stream if self._content else None

    def state_of(self, stream: StreamKey) -> StreamState | None:
        """The durable state of a stream, None when the journal has never seen it."""
        if self.stream == stream:
            return self.state
        segments, _ = list_segments(self._root)
        for segment in reversed(segments.sealed):
            if (segment.host, segment.epoch) == (stream.host, stream.epoch):
                content = Content(segment.header(self._group), HEADER_SIZE)
                content.add_all(scan(segment.path))
                return content.state if content.header.stream == stream else None
        return None

    # Writing

    def begin(self, stream: StreamKey, state: StreamState) -> None:
        """Go on with `stream`, in a new segment unless it is the newest segment's."""
        if self.stream == stream:
            return
        self.seal()
        log = max(self._segment.last if self._segment else 0, self._base_position) + 1
        self._create(SegmentHeader(stream, log, log, state.sequence, state.mark, state.sync))

    def _create(self, header: SegmentHeader) -> None:
        path = segment_path(self._root, header.stream, header.first, header.last)
        temp = atomic.temporary(path)
        with atomic.space_errors(path):
            atomic.make_directory(path.parent)
            file = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                atomic.write_at(file, [header.pack(self._group)], 0)
                os.fsync(file)
                atomic.step("fsync segment")
                atomic.commit(temp, path)
            except BaseException:
                os.close(file)
                raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._segment = file, Segment(path, header.first, header.last, HEADER_SIZE)
        self._content = Content(header, HEADER_SIZE)
        self._told, self._durable = 0, HEADER_SIZE
        self.refresh_size()
        self._listener(self._segment, (), HEADER_SIZE, True)

    def append(self, frames: FrameList) -> None:
        """Write whole, checked frames of the stream that was begun. Raises OutOfSpace with part written."""
        start = 0
        assert self._content is not None
        end = self._content.end
        extents = self._content.extent_count
        for index, (header, _) in enumerate(frames):
            end += header.size
            extents += header.extent_count
            if self._is_full(end, extents, header.kind):
                self._write(frames[start : index + 1])
                self.roll()
                start, end, extents = index + 1, HEADER_SIZE, 0
        self._write(frames[start:])

    def _is_full(self, end: int, extents: int, kind: FrameKind) -> bool:
        policy = self._policy
        if end >= 2 * policy.size or extents >= policy.extents:
            return True
        return kind is FrameKind.MARK and (end >= policy.size or self._span() >= policy.age)

    def _span(self) -> float:
        """Seconds between the first and the newest mark of the newest segment."""
        assert self._content is not None
        times = [c.fields.get("wall_ns", 0) for c in self._content.controls if c.kind is FrameKind.MARK]
        return (times[-1] - times[0]) / 1e9 if times else 0.0

    def _write(self, frames: FrameList) -> None:
        if not frames:
            return
        assert self._content is not None
        assert self._segment is not None
        try:
            with atomic.space_errors(self._segment.path):
                atomic.write_at(self._file, [whole for _, whole in frames], self._content.end)
        except OutOfSpace:
            # Give back what was written of it: the next append starts at a frame's border anyway.
            os.ftruncate(self._file, self._content.end)
            raise
        self._content.extend(frames)

    def roll(self) -> None:
        """Seal the newest segment and begin the next of the same stream."""
        self.seal()
        assert self._content is not None
        header, state = self._content.header, self._content.state
        log = header.last + 1
        self._create(replace(header, first=log, last=log, sequence=state.sequence, mark=state.mark, sync=state.sync))

    def seal(self) -> None:
        """Make the newest segment durable and index it. It stays the newest until another begins."""
        if self._content is None or self._segment is None:
            return
        self.sync()
        write_segment_run(self._root, replace(self._segment, size=self._content.end), self._content)

    def sync(self) -> None:
        """Make all that was written durable. Raises OutOfSpace or IntegrityError: then open the store anew."""
        if self._content is None or self._segment is None or self._durable == self._content.end:
            return
        try:
            with atomic.space_errors(self._segment.path):
                atomic.sync_data(self._file)
        except OSError as exc:
            raise IntegrityError(f"{self._segment.path}: sync failed: {exc.strerror}", path=self._segment.path) from exc
        self._durable = self._content.end
        self._claim(self._content)
        self._listener(self._segment, self._content.controls[self._told :], self._durable, False)
        self._told = len(self._content.controls)

    def _claim(self, content: Content) -> None:
        # Not synced: an old claim is true as well, and a torn one does not count.
        head = _CLAIM.pack(content.header.last, content.end, 0)[:16]
        atomic.write_at(self._claim_file, [head + zlib.crc32(head).to_bytes(4, "little")], 0)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        os.close(self._claim_file)
