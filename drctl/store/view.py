"""A view: all disks of a group as they were at a checkpoint. Base and journal up to there, nothing copied.

The view finds its files again when merges and promotions move them; its pin keeps them from passing its checkpoint.
One thread at a time."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drctl.errors import IntegrityError, NotFound
from drctl.model.extent import SECTOR, Extent, KiB, MiB
from drctl.model.group import GroupDisk
from drctl.store.catalog import Mark
from drctl.store.extent_map import SECTOR_MASK, ZERO, Entries, ends, key, resolve
from drctl.store.layer import Distrust, Layer, close_all
from drctl.store.replica import Base
from drctl.store.segment import SegmentList, read_frame
from drctl.wire.frame import payload_of

#: What is resolved at once: small enough for a first read, large enough that a boot does not resolve per read.
REGION = 4 * MiB
#: Unpacked frames kept, bytes.
_FRAME_CACHE = 64 * MiB
#: Pieces kept in resolved regions; one is about 150 bytes.
_PIECE_CACHE = 500_000
_OPEN_FILES = 128
#: One read of the base goes over pieces of the log up to this: copying 32 KiB in vain costs less than a system call.
_BASE_GAP = 32 * KiB
#: Attempts to find files that merges and promotions keep moving.
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Layout:
    """What a view reads: found at one moment, valid until a file of it is gone."""

    mark: Mark
    segments: SegmentList
    layers: list[Layer]


FindLayout = Callable[[Distrust], Layout]


class _Frames:
    """Unpacked payloads of frames, each checked when it was read from its file."""

    def __init__(self, segments: SegmentList) -> None:
        self._segments = segments
        self._files: OrderedDict[int, int] = OrderedDict()
        self._payloads: OrderedDict[tuple[int, int], memoryview] = OrderedDict()
        self._size = 0

    def payload(self, log: int, offset: int, wanted: int) -> memoryview:
        """The payload of which `wanted` bytes are. Raises FileNotFoundError (the segment was merged or promoted) or
        IntegrityError."""
        found = self._payloads.get((log, offset))
        if found is not None:
            if 2 * wanted < len(found):
                self._payloads.move_to_end((log, offset))
            return found
        path, file = self._open(log)
        frame = read_frame(file, path, offset)
        payload = memoryview(payload_of(frame.header, frame.body, f"{path}+{offset}"))
        self._payloads[log, offset] = payload
        # Little is left to ask for of one that is used up by one read: it must not drive out those of scattered blocks.
        self._payloads.move_to_end((log, offset), last=2 * wanted < len(payload))
        self._size += len(payload)
        while self._size > _FRAME_CACHE:
            self._size -= len(self._payloads.popitem(last=False)[1])
        return payload

    def place(self, log: int, offset: int) -> str:
        segment = self._segments.holding(log)
        return f"{segment.path if segment else log}+{offset}"

    def _open(self, log: int) -> tuple[Path, int]:
        segment = self._segments.holding(log)
        if segment is None:
            raise IntegrityError(f"the index names log {log}, which no segment has")
        file = self._files.get(log)
        if file is None:
            file = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
            self._files[log] = file
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(log)
        return segment.path, file

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


#: (start, end, log, frame, payload) in bytes of the disk; log 0: the base; payload with ZERO: zeroes.
Piece = tuple[int, int, int, int, int]
#: The pieces of a part of a disk, in order, without gaps, and where each starts.
Region = tuple[list[int], list[Piece]]


class View:
    """All disks at one checkpoint. Close it, then remove its pin."""

    def __init__(self, root: Path, disks: tuple[GroupDisk, ...], find: FindLayout, close: Callable[[], None]) -> None:
        self._root = root
        self.disks = disks
        self._find = find
        self._close = close
        self._distrust = Distrust()
        self._layout = find(self._distrust)
        self._frames = _Frames(self._layout.segments)
        self._regions: OrderedDict[tuple[int, int], Region] = OrderedDict()
        self._pieces = 0
        self._open: dict[str, ViewDisk] = {}

    @property
    def mark(self) -> Mark:
        return self._layout.mark

    @property
    def layers(self) -> int:
        """How many sorted indexes a first read looks into."""
        return len(self._layout.layers)

    def disk(self, name: str) -> ViewDisk:
        """One disk, by `MACHINE.TARGET`. Raises NotFound."""
        if name not in self._open:
            for disk in self.disks:
                if disk.name == name:
                    self._open[name] = ViewDisk(self, disk, Base(self._root, disk))
                    break
            else:
                raise NotFound("disk", name, known=[disk.name for disk in self.disks])
        return self._open[name]

    def region(self, disk: GroupDisk, index: int) -> Region:
        """What lies where in a region. Raises FileNotFoundError or IntegrityError."""
        found = self._regions.get((disk.number, index))
        if found is not None:
            self._regions.move_to_end((disk.number, index))
            return found
        sectors = REGION // SECTOR
        low = key(disk.number, index * sectors)
        entries = _joined(self._resolved(low, low + sectors))
        pieces = _pieces(entries, index * REGION, REGION)
        region = [piece[0] for piece in pieces], pieces
        self._regions[disk.number, index] = region
        self._pieces += len(pieces)
        while self._pieces > _PIECE_CACHE and len(self._regions) > 1:
            self._pieces -= len(self._regions.popitem(last=False)[1][1])
        return region

    def _resolved(self, low: int, high: int) -> Entries:
        while True:
            try:
                return resolve(np.concatenate([layer.entries(low, high) for layer in self._layout.layers]))
            except IntegrityError as exc:
                path = exc.fields.get("path")
                if not isinstance(path, Path) or path.suffix != ".run" or path in self._distrust.paths:
                    raise
                # An index is a cache: do without this one.
                self._distrust.paths.add(path)
                self.refresh()

    def payload(self, log: int, frame: int, wanted: int) -> memoryview:
        return self._frames.payload(log, frame, wanted)

    def place(self, log: int, frame: int) -> str:
        return self._frames.place(log, frame)

    def refresh(self) -> None:
        """Find the checkpoint's files anew. Raises NotFound when the checkpoint is gone: it had no pin."""
        layout = self._find(self._distrust)
        close_all(self._layout.layers)
        self._frames.close()
        self._layout, self._frames = layout, _Frames(layout.segments)
        self._regions.clear()
        self._pieces = 0

    def retry(self, action: Callable[[], None]) -> None:
        """Do `action` with the files as they are now, however often they move meanwhile."""
        for attempt in range(_ATTEMPTS):
            try:
                return action()
            except FileNotFoundError as exc:
                if attempt == _ATTEMPTS - 1:
                    raise IntegrityError(f"{exc.filename}: the file is gone") from exc
                self.refresh()
        return None

    def close(self) -> None:
        """Close all files; the pin stays."""
        close_all(self._layout.layers)
        self._frames.close()
        while self._open:
            self._open.popitem()[1].close()
        self._close()


class ViewDisk:
    """One disk of a view; implements model.ports.BlockSource."""

    def __init__(self, view: View, disk: GroupDisk, base: Base) -> None:
        self._view = view
        self._disk = disk
        self._base = base
        self.size = disk.size

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """Bytes of the disk. Raises IntegrityError rather than serve a wrong byte, ValueError beyond its end."""
        buffer = memoryview(bytearray(length))
        self.read_into(buffer, offset)
        return buffer

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """As `read`, into memory of the caller's: a server that allocates for each read pays for its pages again."""
        self._check(offset, len(buffer))
        try:
            self._fill(buffer, offset)
        except FileNotFoundError:
            self._view.refresh()
            self._view.retry(lambda: self._fill(buffer, offset))

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{self._disk.name}: {length} bytes at {offset} are not on the disk ({self.size})")

    def _fill(self, buffer: memoryview, offset: int) -> None:
        if not len(buffer):
            return
        starts, pieces = self._view.region(self._disk, offset // REGION)
        start, end, log, frame, payload = pieces[bisect_right(starts, offset) - 1]
        if end - offset >= len(buffer):
            # Most small reads: all of it lies in one place.
            if log:
                self._put(buffer, log, frame, payload if payload & ZERO else payload + offset - start)
            else:
                self._base.read_into(buffer, offset)
            return
        self._fill_parts(buffer, offset)

    def _fill_parts(self, buffer: memoryview, offset: int) -> None:
        parts = list(self._parts(offset, len(buffer)))
        for start, end in _base_reads(parts):
            self._base.read_into(buffer[start - offset : end - offset], start)
        for start, end, log, frame, payload in parts:
            if log:
                self._put(buffer[start - offset : end - offset], log, frame, payload)

    def _put(self, target: memoryview, log: int, frame: int, payload: int) -> None:
        if payload & ZERO:
            target[:] = bytes(len(target))
            return
        data = self._view.payload(log, frame, len(target))[payload : payload + len(target)]
        if len(data) != len(target):
            raise IntegrityError(f"{self._view.place(log, frame)}: the frame has fewer bytes than its index says")
        target[:] = data

    def _parts(self, offset: int, length: int) -> Iterator[Piece]:
        """The pieces between, each cut to the range."""
        end = offset + length
        for index in range(offset // REGION, (end + REGION - 1) // REGION):
            starts, pieces = self._view.region(self._disk, index)
            first = max(bisect_right(starts, offset) - 1, 0)
            for piece in pieces[first : bisect_left(starts, end, first)]:
                yield piece if piece[0] >= offset and piece[1] <= end else _cut(piece, offset, end)

    def extents(self, offset: int, length: int) -> Iterator[tuple[Extent, bool]]:
        """The range in order as (extent, is data); what is not data reads as zeroes."""
        self._check(offset, length)
        found: list[tuple[Extent, bool]] = []
        self._view.retry(lambda: self._map(found, offset, length))
        return iter(found)

    def _map(self, found: list[tuple[Extent, bool]], offset: int, length: int) -> None:
        found.clear()
        for start, end, log, _, payload in self._parts(offset, length):
            piece = Extent(start, end - start)
            for extent, data in self._base.extents(start, end - start) if log == 0 else [(piece, not payload & ZERO)]:
                if found and found[-1][1] == data:
                    last = found.pop()[0]
                    extent = Extent(last.offset, last.length + extent.length)
                found.append((extent, data))

    def close(self) -> None:
        self._base.close()


def _base_reads(parts: list[Piece]) -> list[tuple[int, int]]:
    """What to read of the base, (start, end): across small pieces of the log, which are put over it afterwards."""
    reads: list[tuple[int, int]] = []
    for start, end, log, _, _ in parts:
        if log:
            continue
        if reads and start - reads[-1][1] <= _BASE_GAP:
            reads[-1] = (reads[-1][0], end)
        else:
            reads.append((start, end))
    return reads


def _cut(piece: Piece, low: int, high: int) -> Piece:
    """The part of a piece that lies between."""
    start, end, log, frame, payload = piece
    begin = max(start, low)
    return begin, min(end, high), log, frame, payload if payload & ZERO else payload + begin - start


def _joined(entries: Entries) -> Entries:
    """Neighbours whose bytes lie side by side in one frame, or that are zeroes, as one entry."""
    if len(entries) < 2:
        return entries
    here, after = entries[:-1], entries[1:]
    zero = (here["payload"] & after["payload"] & ZERO) != 0
    same = (here["log"] == after["log"]) & (here["frame"] == after["frame"]) & ((after["payload"] & ZERO) == 0)
    follows = here["payload"] + here["length"] * np.uint32(SECTOR) == after["payload"]
    joined = (ends(here) == after["start"]) & (zero | (same & follows))
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    last = np.append(first[1:], len(entries)) - 1
    result = entries[first].copy()
    result["length"] = ends(entries)[last] - result["start"]
    return result


def _pieces(entries: Entries, offset: int, length: int) -> list[Piece]:
    """Entries as pieces in bytes, with the base in the gaps."""
    starts = ((entries["start"] & np.uint64(SECTOR_MASK)) * np.uint64(SECTOR)).tolist()
    lengths = (entries["length"].astype(np.uint64) * np.uint64(SECTOR)).tolist()
    pieces: list[Piece] = []
    position, end = offset, offset + length
    columns = (entries[name].tolist() for name in ("log", "frame", "payload"))
    rows = zip(starts, lengths, *columns, strict=True)
    for start, size, log, frame, payload in rows:
        if start > position:
            pieces.append((position, start, 0, 0, 0))
        position = start + size
        pieces.append((start, position, log, frame, payload))
    if position < end:
        pieces.append((position, end, 0, 0, 0))
    return pieces
