"""The reader: walks disks through QEMU's read-only NBD export and hands what it finds to the stream.

First sync, full resync and dropped blocks are one path. It is slow on purpose where it must be: paced by `read_limit`,
by what the link takes, and by the ring's backlog. It goes on where the receiver's durable progress stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from drctl.errors import DrctlError, HypervisorRefused
from drctl.model.extent import FRAME_PAYLOAD, KiB, MiB
from drctl.model.extent import Extent as Range
from drctl.replication.comparison import COMPARED_WINDOW, STRETCH, Compared, Comparison, Gate, Piece
from drctl.replication.disk_connection import DiskConnection, Export, connected
from drctl.replication.disk_scan import DiskScan, scanned
from drctl.replication.ring_port import RingPort
from drctl.replication.signature_exchange import SignatureExchange
from drctl.replication.sync_progress import Read, Sync, SyncState
from drctl.wire.signature import SIGNED

#: One read: large enough for an array, small enough that its hold on the stream is short.
READ_SIZE = 256 * KiB
#: Bytes being read or waiting to be sent; with READ_SIZE 16 reads in flight.
WINDOW = 4 * MiB
#: How much of the disk is asked about at once.
STATUS_WINDOW = 1024 * MiB
#: Above this fill of the ring the reader rests: what the guest writes goes first, or the ring overflows.
CONGESTED = 0.25
#: What differs of a compared range goes into the stream in pieces of about this size.
PART = READ_SIZE
#: A part that must be read again is read over gaps up to this.
_GAP = SIGNED
#: Threads that measure and hash beside those that read.
HASHERS = 2

log = logging.getLogger(__name__)


class Pace:
    """At most `limit` bytes a second, on the loop's clock; 0: no limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._next = 0.0

    async def take(self, count: int) -> None:
        if self.limit <= 0:
            return
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now - 0.1)
        delay = self._next - now
        self._next += count / self.limit
        if delay > 0:
            await asyncio.sleep(delay)


Extents = Callable[[int], Iterator[Range]]


@dataclass(frozen=True, slots=True)
class _Walk:
    """One disk in one attempt of a pass."""

    sync: Sync
    attempt: int
    disk: int
    connection: DiskConnection
    scan: DiskScan
    tasks: asyncio.TaskGroup

    @property
    def over(self) -> bool:
        """Another attempt has begun, or the pass was given up."""
        return self.sync.attempt != self.attempt


@dataclass(frozen=True, slots=True)
class Peer:
    """The other side as the reader knows it: whom to ask, and the newest sequence that is on its way there."""

    exchange: SignatureExchange
    cursor: Callable[[], int]
    #: Of a window, in bytes, what the link's limit leaves; and whether the guest's writes need all of the link now.
    room: Callable[[int], int] = lambda window: window
    behind: Callable[[], bool] = lambda: False


class Reader:
    """Runs the passes of one stream. The stream's owner sets `moved` when a read was taken into the stream or the
    sync's state changed; `arrived` tells it that there is something to take."""

    def __init__(
        self, port: RingPort, peer: Peer, moved: asyncio.Event, arrived: Callable[[], None], pace: Pace
    ) -> None:
        self._port = port
        self.peer = peer
        self._gate = Gate(FRAME_PAYLOAD)
        self.hashers = ThreadPoolExecutor(HASHERS, "hashing")
        self._moved = moved
        self._arrived = arrived
        self.pace = pace
        self.last_error = ""

    async def run(self, sync: Sync, exports: dict[int, Export], extents: Extents | None) -> None:
        """Read until the receiver has the whole pass durable. `extents` tells what to read of a disk; None: all of it,
        holes skipped. Ends by cancellation, or when done; errors of the disks are retried for ever and told."""
        while sync.active:
            attempt = sync.attempt
            try:
                await self._pass(sync, attempt, exports, extents)
            except DrctlError as exc:
                self.last_error = str(exc)
                log.warning("reader: %s", exc)
                sync.abandon()
                await asyncio.sleep(1.0)
                continue
            self.last_error = ""
            while sync.attempt == attempt and sync.active:
                await self._wait()

    async def _wait(self) -> None:
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await self._moved.wait()

    async def _pass(self, sync: Sync, attempt: int, exports: dict[int, Export], extents: Extents | None) -> None:
        while sync.state is SyncState.BEGINNING:
            await self._wait()
        compares = extents is None and await self._comparable(sync, attempt)
        resume = sync.resume
        for disk in sorted(sync.disks):
            if disk < resume.disk or sync.attempt != attempt:
                continue
            begin = resume.offset if disk == resume.disk else 0
            async with scanned(exports[disk]) as scan, connected(exports[disk]) as (connection, tasks):
                walk = _Walk(sync, attempt, disk, connection, scan, tasks)
                ranges = extents(disk) if extents is not None else _ranges(exports[disk])
                if ranges is not None:
                    await self._fetch(walk, begin, ranges)
                elif compares:
                    await self._walk_compared(walk, begin)
                else:
                    await self._walk(walk, begin)
        if sync.attempt == attempt:
            sync.finished_reading()
            self._arrived()

    async def _walk(self, walk: _Walk, begin: int) -> None:
        """All of a disk. A hole is believed only under the hold that was set before it was asked about."""
        sync, size = walk.sync, walk.sync.disks[walk.disk]
        if walk.connection.ready.size < size:
            raise HypervisorRefused(f"disk {walk.disk} has {walk.connection.ready.size} bytes, expected {size}")
        position = begin
        while position < size and await self._room(walk, READ_SIZE):
            read = sync.issue(walk.disk, Range(position, 0), self._port.published)
            length, hole = await walk.connection.first_holes(position, min(STATUS_WINDOW, size - position))
            if walk.over:
                return
            if hole:
                read.extent = Range(position, length)
                self._done(sync, read, b"", zero=True)
                position += length
            else:
                position = await self._read_until(walk, read, position + length)

    async def _read_until(self, walk: _Walk, read: Read, end: int) -> int:
        """Read from where `read` stands up to `end`; returns where the next is to be."""
        position = read.extent.offset
        while True:
            read.extent = Range(position, min(READ_SIZE, end - position))
            walk.tasks.create_task(self._one(walk, read))
            position = read.extent.end
            if position >= end or not await self._room(walk, READ_SIZE):
                return position
            read = walk.sync.issue(walk.disk, Range(position, 0), self._port.published)

    # comparing

    async def _comparable(self, sync: Sync, attempt: int) -> bool:
        """Whether the other side can be asked how its blocks are: only after it has SYNC_BEGIN durable."""
        if sync.mode != "full":
            return False
        while sync.attempt == attempt and sync.active and not (self.peer.exchange.connected and sync.begun):
            await self._wait()
        return bool(self.peer.exchange.key)

    async def _walk_compared(self, walk: _Walk, begin: int) -> None:
        """As `_walk`; what is equal at the other side is not sent. Holes are: they cost less than the question."""
        sync, size = walk.sync, walk.sync.disks[walk.disk]
        if walk.connection.ready.size < size:
            raise HypervisorRefused(f"disk {walk.disk} has {walk.connection.ready.size} bytes, expected {size}")
        comparison = Comparison(Compared(sync.id, walk.disk, size), self.peer.exchange, walk.tasks)
        position = begin // SIGNED * SIGNED
        while position < size and await self._room(walk, self._stretch(), COMPARED_WINDOW):
            read = sync.issue(walk.disk, Range(position, 0), self._port.published)
            length, hole = await walk.connection.first_holes(position, min(STATUS_WINDOW, size - position))
            if walk.over:
                return
            end = aligned(position, length, size, hole=hole)
            if hole and end > position:
                read.extent = Range(position, end - position)
                self._done(sync, read, b"", zero=True)
                position = end
            else:
                sync.withdraw(read)
                position = await self._compare_until(walk, comparison, position, max(end, position + SIGNED))

    async def _compare_until(self, walk: _Walk, comparison: Comparison, position: int, end: int) -> int:
        """Compare from `position` up to `end`; returns where the next is to be."""
        end = min(end, comparison.what.size)
        while True:
            step = self._stretch()
            after = min(end, position // step * step + step)
            read = walk.sync.compare(walk.disk, Range(position, after - position))
            walk.tasks.create_task(self._compare(walk, comparison, read))
            position = after
            if position >= end or not await self._room(walk, self._stretch(), COMPARED_WINDOW):
                return position

    def _stretch(self) -> int:
        """How much is compared at once: a power of two, less where the link or the reader is held back."""
        most = self.peer.room(COMPARED_WINDOW) * STRETCH // COMPARED_WINDOW
        if self.pace.limit > 0:
            most = min(most, self.pace.limit // 10)
        return max(READ_SIZE, min(STRETCH, 1 << most.bit_length() >> 1))

    async def _compare(self, walk: _Walk, comparison: Comparison, read: Read) -> None:
        sync, extent = walk.sync, read.extent
        theirs = await comparison.theirs(extent)
        if theirs is None or walk.over:
            return
        floor = self._port.published
        found = await walk.scan.visit(extent, comparison.look(extent, theirs))
        pieces = await comparison.pieces(found) if not walk.over else None
        if pieces is None or walk.over:
            return
        if pieces:
            await self._gate.wait(sum(len(data) for _, data in pieces))
            await self._send_parts(walk, read, floor, pieces)
        if not walk.over:
            sync.compared(read)
            self._moved.set()
            self._arrived()

    async def _send_parts(self, walk: _Walk, read: Read, floor: int, pieces: list[Piece]) -> None:
        """Put what differs into the stream. What was read is of use while the cursor is not beyond its floor; else
        it is read again, and this time the stream is held."""
        for group in _groups(pieces):
            if walk.over:
                return
            if self.peer.cursor() <= floor:
                walk.sync.part_arrived(walk.sync.part(read, floor), group)
                continue
            part = walk.sync.part(read, self._port.published)
            fresh = await _again(walk.connection, group)
            if not walk.over:
                walk.sync.part_arrived(part, fresh)
            self._arrived()

    async def _fetch(self, walk: _Walk, begin: int, extents: Iterator[Range]) -> None:
        """The given ranges of a disk."""
        sync = walk.sync
        for whole in extents:
            position = max(whole.offset, begin)
            while position < whole.end:
                length = min(READ_SIZE, whole.end - position)
                if not await self._room(walk, length):
                    return
                read = sync.issue(walk.disk, Range(position, length), self._port.published)
                walk.tasks.create_task(self._one(walk, read))
                position += length

    async def _room(self, walk: _Walk, length: int, window: int = WINDOW) -> bool:
        """Wait until one more read may start. False: this attempt is over."""
        sync = walk.sync
        await self.pace.take(length)
        while not walk.over and (sync.outstanding + length > self._window(length, window) or self._congested()):
            await self._wait()
        return not walk.over

    def _window(self, length: int, window: int) -> int:
        # One read is always let through, and one more so that the disk is not idle while the link is not.
        return max(2 * length, self.peer.room(window))

    def _congested(self) -> bool:
        return self._port.fill() > CONGESTED or self.peer.behind()

    async def _one(self, walk: _Walk, read: Read) -> None:
        data = await walk.connection.read(read.extent.offset, read.extent.length)
        self._done(walk.sync, read, data, zero=False)

    def _done(self, sync: Sync, read: Read, data: bytes | bytearray, *, zero: bool) -> None:
        if read.attempt == sync.attempt:
            sync.arrived(read, memoryview(data), zero=zero)
            self._arrived()


def _ranges(export: Export) -> Iterator[Range] | None:
    ranges = export.ranges()
    return None if ranges is None else iter(ranges)


def aligned(position: int, length: int, size: int, *, hole: bool) -> int:
    """The end of what begins at `position`, at a block's border or the disk's end: a block that is only in part a hole
    is data."""
    end = position + length
    if end < size:
        end = (end if hole else end + SIGNED - 1) // SIGNED * SIGNED
    return min(end, size)


def _groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """The pieces in groups of PART bytes, or what lies in one block."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + len(piece[1]) > PART:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece[1])
    if group:
        yield group


async def _again(connection: DiskConnection, pieces: list[Piece]) -> list[Piece]:
    """The same pieces as they are now."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        near = runs and piece[0] - _end(runs[-1][-1]) <= _GAP and _end(piece) - runs[-1][0][0] <= READ_SIZE
        if near:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    reads = await asyncio.gather(*(connection.read(run[0][0], _end(run[-1]) - run[0][0]) for run in runs))
    return [
        (offset, memoryview(data)[offset - run[0][0] : offset - run[0][0] + len(old)])
        for run, data in zip(runs, reads, strict=True)
        for offset, old in run
    ]


def _end(piece: Piece) -> int:
    return piece[0] + len(piece[1])
