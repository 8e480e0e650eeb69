"""The ring as the shipper uses it: looks at the header, batches, the bell, release, dirty maps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from drctl.model.extent import Extent
from drctl.replication.marks import RingView
from drctl.store.ring import Ring
from drctl.store.ring_reader import Batch, RingReader
from drctl.wire.ring import DESCRIPTOR_SIZE, HEADER_SIZE, DiskWord, Word

#: The bell may be missed (the two processes' stores pass each other), so nobody waits longer than this for it.
LONGEST_WAIT = 0.1


class RingPort:
    """One shipper's hold on a ring. Used by one task, but `batch` results are read by others until released."""

    def __init__(self, path: Path, bell: Path) -> None:
        """Raises UnsupportedFormat or IntegrityError for what is no ring."""
        self.ring = Ring.open(path)
        self._reader = RingReader(self.ring)
        self._words = self.ring.words
        self._bell = _open_bell(bell)
        self._wake = asyncio.Event()
        # The beat before the name: the last one in the ring is that of a shipper long dead, and we would be taken for
        # hung while we start.
        self.beat()
        self._words[Word.SHIPPER_PID] = os.getpid()

    @property
    def generation(self) -> int:
        return self.ring.generation

    @property
    def epoch(self) -> str:
        return self.ring.epoch

    @property
    def disks(self) -> dict[int, int]:
        return self.ring.disks

    @property
    def published(self) -> int:
        return self._reader.published

    @property
    def released(self) -> int:
        return self._reader.released

    def look(self) -> RingView:
        """The header now, in the order that RingView needs: PUBLISHED last."""
        words = self._words
        stamp = words[Word.ORDER_STAMP]
        ordered_stamp, ordered_sequence = words[Word.ORDERED_STAMP], words[Word.ORDERED_SEQUENCE]
        connections = tuple(self.ring.disk_word(number, DiskWord.CONNECTION) for number in self.ring.tables)
        return RingView(
            order_stamp=stamp,
            ordered_stamp=ordered_stamp,
            ordered_sequence=ordered_sequence,
            connections=connections,
            dropping=bool(words[Word.DROPPING]),
            dropped=words[Word.DROPPED],
            drain_request=words[Word.DRAIN_REQUEST],
            drain_done=words[Word.DRAIN_DONE],
            published=words[Word.PUBLISHED],
        )

    def batch(self, after: int, upto: int, max_bytes: int, max_records: int) -> Batch | None:
        """The next records with after < sequence <= upto, to be verified by who reads them. Raises IntegrityError."""
        return self._reader.batch(after, max_bytes, min(max_records, upto - after), verify=False)

    def release(self, sequence: int) -> None:
        self._reader.release(sequence)

    def beat(self) -> None:
        self._words[Word.SHIPPER_HEARTBEAT] = time.monotonic_ns()

    def used_bytes(self) -> int:
        """Bytes of the data area that are not released yet."""
        released, published = self.released, self.published
        if released >= published:
            return 0
        at = HEADER_SIZE + (released + 1) % self.ring.slots * DESCRIPTOR_SIZE + 8
        tail = int.from_bytes(self.ring.memory[at : at + 8], "little")
        return max(0, self._words[Word.DATA_HEAD] - tail)

    def fill(self) -> float:
        """The fuller of slots and data, 0 to 1."""
        slots = (self.published - self.released) / self.ring.slots
        return max(slots, self.used_bytes() / self.ring.data_capacity)

    # waiting

    def attach(self, wake: asyncio.Event) -> None:
        """From now on the bell sets `wake`."""
        self._wake = wake
        asyncio.get_running_loop().add_reader(self._bell, self._bell_heard)

    async def wait(self, seen: int) -> None:
        """Until a record after `seen` is published, `wake` is set by anybody, or LONGEST_WAIT has passed."""
        self._reader.wait()
        if self.published <= seen:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LONGEST_WAIT):
                    await self._wake.wait()
        self._wake.clear()

    def _bell_heard(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._bell, 4096)
        self._wake.set()

    # dropped blocks

    @property
    def drain_pending(self) -> bool:
        """The tap has not answered the newest drain request yet: no map is ours."""
        return not self._reader.drain_ready(self._words[Word.DRAIN_REQUEST])

    def request_drain(self) -> None:
        self._reader.request_drain()

    def dirty_extents(self, disk: int) -> Iterator[Extent]:
        return self._reader.dirty_extents(disk)

    def dirty_bytes(self) -> int:
        return sum(self._reader.dirty_bytes(disk) for disk in self.disks)

    def clear_inactive(self) -> None:
        for disk in self.disks:
            self._reader.clear(disk)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._bell)
        os.close(self._bell)


def _open_bell(path: Path) -> int:
    """The FIFO, open for both so that it neither blocks nor ends when the tap restarts."""
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
