"""The shipper's side of a ring: published records in batches, checked; release; the drain of dirty maps.

One reader per ring, in a process of its own. Never writes records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt

from drctl.errors import IntegrityError
from drctl.model.extent import BLOCK, FRAME_PAYLOAD, Extent
from drctl.store.ring import Ring
from drctl.wire.ring import DESCRIPTOR_SIZE, HEADER_SIZE, RECORD_WRITE, RECORD_ZERO, DiskWord, Word, data_checksum

DESCRIPTOR_DTYPE = np.dtype(
    [
        ("sequence", "<u8"),
        ("data_position", "<u8"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("disk", "<u2"),
        ("kind", "u1"),
        ("zero", "u1"),
        ("time", "<u8"),
        ("data_checksum", "<u4"),
        ("descriptor_checksum", "<u4"),
    ]
)

Descriptors = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole records `first`..`last`, as they stand in the ring: valid until they are released.

    `descriptors` is a DESCRIPTOR_DTYPE array (offset and length in sectors, kind 1 write, 2 zero); `data` holds the
    payloads of all writes one after the other, without gaps; `starts[i]` is where record i's payload begins in it."""

    first: int
    last: int
    descriptors: Descriptors
    starts: npt.NDArray[np.uint64]
    data: memoryview

    #: Named in errors.
    place: str = ""

    def __len__(self) -> int:
        return len(self.descriptors)

    def verify(self) -> None:
        """Compare the data with the checksums that the tap made. Raises IntegrityError, naming the sequence.

        Apart from making the batch, so that it can be done in a worker thread: it reads every byte."""
        sizes = np.where(self.descriptors["kind"] == RECORD_WRITE, self.descriptors["length"], 0).tolist()
        checksums = self.descriptors["data_checksum"].tolist()
        data = self.data
        for index, start in enumerate(self.starts.tolist()):
            end = start + sizes[index] * 512
            if end > start and data_checksum(data[start:end]) != checksums[index]:
                raise IntegrityError(f"{self.place}: the data of record {self.first + index} is damaged")

    def payload(self, index: int) -> memoryview:
        """The bytes of record `index`; empty for zeroes."""
        if self.descriptors["kind"][index] != RECORD_WRITE:
            return self.data[:0]
        start = int(self.starts[index])
        return self.data[start : start + int(self.descriptors["length"][index]) * 512]


class RingReader:
    """Invariant: nothing is handed out that was not published, or whose descriptor's checksum does not match."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._words = ring.words
        end = HEADER_SIZE + ring.slots * DESCRIPTOR_SIZE
        self._raw = ring.memory[HEADER_SIZE:end]
        self._table: Descriptors = np.frombuffer(self._raw, DESCRIPTOR_DTYPE)
        self._data = ring.memory[ring.data_at : ring.data_at + ring.data_capacity]
        self._maps: dict[tuple[int, int], memoryview] = {}

    @property
    def published(self) -> int:
        return self._words[Word.PUBLISHED]

    @property
    def released(self) -> int:
        return self._words[Word.RELEASED]

    def batch(
        self, after: int, max_bytes: int = FRAME_PAYLOAD, max_records: int = 1024, *, verify: bool = True
    ) -> Batch | None:
        """The next whole records after sequence `after`: as many as have at most `max_bytes` of data together, at
        least one (which alone may be longer); None when there is none. Stops where the ring wraps.

        Raises IntegrityError, naming the sequence, for a record that is not what the tap wrote. Without `verify` only
        the descriptors are looked at, and the batch is the caller's to verify."""
        released, published = self.released, self.published
        if not released <= after <= published:
            raise ValueError(f"the ring holds {released + 1}..{published}, not what follows {after}")
        slot = (after + 1) % self._ring.slots
        count = min(published - after, self._ring.slots - slot, max_records)
        if count == 0:
            return None
        table = self._table[slot : slot + count]
        lengths = np.where(table["kind"] == RECORD_WRITE, table["length"].astype(np.uint64) * np.uint64(512), 0)
        ends = np.cumsum(lengths)
        count = max(1, int(np.searchsorted(ends, max_bytes, side="right")))
        count = min(count, _before_the_wrap(table[:count], self._ring.data_capacity))
        table = table[:count]
        self._check_descriptors(after + 1, slot, table)
        starts = ends[:count] - lengths[:count]
        data = self._contiguous(table, starts, int(ends[count - 1]), after + 1)
        batch = Batch(after + 1, after + count, table, starts, data, str(self._ring.path))
        if verify:
            batch.verify()
        return batch

    def _check_descriptors(self, first: int, slot: int, table: Descriptors) -> None:
        raw = self._raw
        checksums = table["descriptor_checksum"].tolist()
        at = slot * DESCRIPTOR_SIZE
        for index, checksum in enumerate(checksums):
            if crc32(raw[at : at + DESCRIPTOR_SIZE - 4]) != checksum:
                raise IntegrityError(f"{self._ring.path}: descriptor of record {first + index} is damaged")
            at += DESCRIPTOR_SIZE
        if (table["sequence"] != np.arange(first, first + len(table), dtype=np.uint64)).any():
            raise IntegrityError(f"{self._ring.path}: the slots from record {first} on hold other records")
        kinds = table["kind"]
        if not ((kinds == RECORD_WRITE) | (kinds == RECORD_ZERO)).all():
            raise IntegrityError(f"{self._ring.path}: a record of unknown kind, from {first} on")

    def _contiguous(self, table: Descriptors, starts: npt.NDArray[np.uint64], size: int, first: int) -> memoryview:
        """The data of all writes in one view. Raises IntegrityError when it does not lie as the law says."""
        writes = table["kind"] == RECORD_WRITE
        if not writes.any():
            return self._data[:0]
        bases = table["data_position"][writes] - starts[writes]
        place = int(bases[0]) % self._ring.data_capacity
        if (bases != bases[0]).any() or place + size > self._ring.data_capacity:
            raise IntegrityError(f"{self._ring.path}: the data of the records from {first} on does not lie together")
        return self._data[place : place + size]

    def release(self, sequence: int) -> None:
        """All up to `sequence` is durable at the other site; its room may be used again. Never goes back."""
        if sequence > self.published:
            raise ValueError(f"{sequence} can't be released: {self.published} is the newest record")
        if sequence > self.released:
            self._words[Word.RELEASED] = sequence

    # --- waiting

    def wait(self) -> None:
        """Ask the tap to ring the bell at the next record. Look at `published` once more after it, and wait with a time
        limit (100 ms): store and load of the two processes may pass each other."""
        self._words[Word.READER_WAITING] = 1

    # --- dirty maps

    def request_drain(self) -> int:
        """Ask the tap to swap the maps; the number of the request. One that it has not answered is asked again, since
        the number's parity tells which map is to be active."""
        if self._words[Word.DRAIN_REQUEST] == self._words[Word.DRAIN_DONE]:
            self._words[Word.DRAIN_REQUEST] += 1
        return self._words[Word.DRAIN_REQUEST]

    def drain_ready(self, request: int) -> bool:
        """Whether the tap has swapped: then the inactive maps stand still and are ours."""
        return self._words[Word.DRAIN_DONE] >= request

    @property
    def inactive_map(self) -> int:
        return self._words[Word.ACTIVE_MAP] ^ 1

    def _map(self, disk: int, which: int) -> memoryview:
        if (disk, which) not in self._maps:
            self._maps[disk, which] = self._ring.open_dirty_map(disk, which)
        return self._maps[disk, which]

    def dirty_bytes(self, disk: int) -> int:
        """Bytes noted in both maps of a disk, counting a block twice when it is in both."""
        views = (self._map(disk, which) for which in (0, 1))
        return sum(_count(view) for view in views) * BLOCK

    def dirty_extents(self, disk: int) -> Iterator[Extent]:
        """What the disk's inactive map notes, in order, as long as possible, cut at the disk's end."""
        size = self._ring.disk_word(disk, DiskWord.SIZE)
        for first, last in _runs(self._map(disk, self.inactive_map)):
            if first * BLOCK < size:
                yield Extent(first * BLOCK, min(last * BLOCK, size) - first * BLOCK)

    def clear(self, disk: int) -> None:
        """Clear the disk's inactive map: its blocks have been read and are in the stream."""
        view = self._map(disk, self.inactive_map)
        np.frombuffer(view, np.uint8)[:] = 0

    def close(self) -> None:
        """Let go of all views, so that the ring can be closed."""
        self._table = np.empty(0, DESCRIPTOR_DTYPE)
        self._maps.clear()
        self._raw.release()
        self._data.release()


def _before_the_wrap(table: Descriptors, capacity: int) -> int:
    """How many of the records, from the first on, lie in the same round of the data area. At least one."""
    rounds = table["data_position"] // np.uint64(capacity)
    return int(np.searchsorted(rounds, rounds[0], side="right")) or 1


_WINDOW = 1024 * 1024
_ONES = np.array([value.bit_count() for value in range(256)], np.uint8)


def _count(view: memoryview) -> int:
    return int(np.sum(_ONES[np.frombuffer(view, np.uint8)], dtype=np.uint64))


def _runs(view: memoryview) -> Iterator[tuple[int, int]]:
    """Runs of set bits as (first, one past the last). Windowed: a map of 1 TiB would unpack to 256 MiB."""
    first = last = 0
    for begin in range(0, len(view), _WINDOW):
        window = np.frombuffer(view[begin : begin + _WINDOW], np.uint8)
        if not window.any():
            continue
        bits = np.unpackbits(window, bitorder="little")
        edges = np.flatnonzero(np.diff(bits.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
        for start, stop in zip((edges[::2] + begin * 8).tolist(), (edges[1::2] + begin * 8).tolist(), strict=True):
            if start == last:
                last = stop
                continue
            if last:
                yield first, last
            first, last = start, stop
    if last:
        yield first, last
