"""Both sides of a stream held against each other while the guest writes: what differs and was not written is wrong.

The receiver hashes its data anew for it: a map of what it once had would not tell of a bit that has turned since. What
differs at the first look is looked at again, each time like this: all that was written up to the cursor is durable at
the other side, the receiver looks at the end of its log after that, and the block is read here after that. Then it can
only differ because a record beyond that cursor touches it, and all records are seen on their way; or because a write is
on this disk and not yet in the ring. That one would be there a moment later, or its connection ended: a tap that makes
a guest wait for two seconds is killed (the watchdog), and that raises ORDER_STAMP. So a block is wrong when it differs
at two looks three seconds apart, no record since before the first has touched it, and the order was not lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np

from drctl.errors import ApplianceUnreachable, HypervisorRefused, WrongPhase
from drctl.model.extent import BLOCK, SECTOR, Extent, MiB
from drctl.replication.comparison import COMPARED_WINDOW
from drctl.replication.disk_connection import DiskConnection, Export, connected
from drctl.replication.marks import RingView
from drctl.replication.reader import STATUS_WINDOW, Pace, aligned
from drctl.replication.signature_exchange import SignatureExchange
from drctl.wire.signature import SIGNED, differing, digests, runs_of, signatures, signatures_of_zeroes

#: A write that is on the disk is in the ring after so long (seconds), or its connection has ended: the limit of a
#: guest's stall by any single fault is 2 s.
CONFIRM = 3.0
#: Looks at what differs before it is given up: what is written all the time can't be told.
LOOKS = 12
#: Longest that the other side may take to make durable what it was sent (seconds).
PATIENCE = 60.0
#: Read and asked about at once.
COMPARED_READ = 1 * MiB
#: A sample is drawn in pieces of this size.
PIECE = 16 * MiB

Block = tuple[int, int]
T = TypeVar("T")


class WriteWatch:
    """The blocks that records on their way touch, from some moment on."""

    def __init__(self, blocks: set[Block]) -> None:
        self._watched = blocks
        #: The look that goes on, and at which one each block was touched last.
        self.look = 0
        self._touched: dict[Block, int] = {}

    def note(self, records: Any) -> None:
        """Descriptors of records (wire/ring.py), as an array."""
        offsets = records["offset"].astype(np.int64) * SECTOR
        ends = offsets + np.maximum(records["length"].astype(np.int64), 1) * SECTOR
        for disk, first, last in zip(
            records["disk"].tolist(), (offsets // SIGNED).tolist(), ((ends - 1) // SIGNED).tolist(), strict=True
        ):
            for block in range(first, last + 1):
                if (disk, block) in self._watched:
                    self._touched[disk, block] = self.look

    def quiet(self, block: Block, since: int) -> bool:
        """Whether nothing has touched the block since that look began."""
        return self._touched.get(block, -1) < since


@dataclass(frozen=True, slots=True)
class Order:
    """How to verify. `share` of the disks, 0 to 1; `rate` of reading, bytes a second, 0: none."""

    share: float = 1.0
    rate: int = 0
    seed: int = 0
    confirm: float = CONFIRM


@dataclass(slots=True)
class Verdict:
    """What was found so far, in bytes. `undecided` was written too often to be told; `wrong` is (disk, offset,
    length)."""

    total: int = 0
    done: int = 0
    read: int = 0
    suspect: int = 0
    undecided: int = 0
    wrong: list[tuple[int, int, int]] = field(default_factory=list)
    repaired: int = 0
    began: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Stream:
    """The stream as a verification needs it: the ring now, how far it is sent and durable, and who sees the records."""

    exchange: SignatureExchange
    look: Callable[[], RingView]
    cursor: Callable[[], int]
    released: Callable[[], int]
    unfit: Callable[[], str]
    watch: Callable[[WriteWatch | None], None]


class Verification:
    """One order. Marks go on meanwhile, but for a repair."""

    def __init__(self, stream: Stream, order: Order, hashers: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._order = order
        self._pace = Pace(order.rate)
        self._hashers = hashers
        #: The group's; the exchange has none while there is no connection.
        self._key = b""
        self._room = asyncio.Semaphore(COMPARED_WINDOW // COMPARED_READ)
        self.verdict = Verdict()

    async def run(self, exports: dict[int, Export], sizes: dict[int, int]) -> Verdict:
        """Raises WrongPhase (nothing to compare with, or the stream is not live), HypervisorRefused,
        ApplianceUnreachable."""
        self._key = self._stream.exchange.key
        if not self._key:
            raise WrongPhase("the other site has nothing to compare with", hint="is its first sync done?")
        self.verdict = Verdict(sum(sizes.values()), began=time.monotonic())
        suspects = await self._first_look(exports, sizes)
        await self._look_again(exports, sizes, suspects)
        self._now()
        return self.verdict

    async def recheck(self, exports: dict[int, Export], sizes: dict[int, int]) -> None:
        """After a repair: what was wrong and is equal now was repaired."""
        before, self.verdict.wrong = self.verdict.wrong, []
        await self._look_again(exports, sizes, {(disk, at // SIGNED) for disk, at, _ in before})
        self.verdict.repaired = sum(length for _, _, length in before) - sum(each[2] for each in self.verdict.wrong)
        self._now()

    def _now(self) -> None:
        self.verdict.seconds = time.monotonic() - self.verdict.began

    # the first look

    async def _first_look(self, exports: dict[int, Export], sizes: dict[int, int]) -> set[Block]:
        sync, dice = uuid4().hex, random.Random(self._order.seed)
        suspects: set[Block] = set()
        for number, size in sorted(sizes.items()):
            async with connected(exports[number]) as (connection, tasks):
                _demand_size(connection, number, size)
                async for extent, hole in self._walk(connection, size, dice):
                    await self._room.acquire()
                    tasks.create_task(self._one(sync, number, connection, extent, suspects, hole=hole))
        return suspects

    async def _walk(
        self, connection: DiskConnection, size: int, dice: random.Random
    ) -> AsyncIterator[tuple[Extent, bool]]:
        """(extent, whether it is a hole) of the disk's sample."""
        for piece in self._pieces(size, dice):
            position = piece.offset
            while position < piece.end:
                length, hole = await connection.first_holes(position, min(STATUS_WINDOW, piece.end - position))
                end = min(piece.end, aligned(position, length, size, hole=hole))
                if end <= position:
                    hole, end = False, min(size, position + SIGNED)
                step = PIECE if hole else COMPARED_READ
                while position < end:
                    after = min(end, position // step * step + step)
                    yield Extent(position, after - position), hole
                    position = after

    def _pieces(self, size: int, dice: random.Random) -> Iterator[Extent]:
        for offset in range(0, size, PIECE):
            piece = Extent(offset, min(PIECE, size - offset))
            if self._order.share >= 1 or dice.random() < self._order.share:
                yield piece
            else:
                self.verdict.total -= piece.length

    async def _one(
        self, sync: str, disk: int, connection: DiskConnection, extent: Extent, suspects: set[Block], *, hole: bool
    ) -> None:
        try:
            if not hole:
                await self._pace.take(extent.length)
            first = extent.offset // SIGNED
            asked = asyncio.ensure_future(
                self._stream.exchange.signatures(sync, disk, first, -(-extent.length // SIGNED), fresh=True)
            )
            data = None if hole else await connection.read(extent.offset, extent.length)
            key = self._key
            if data is None:
                mine = signatures_of_zeroes(key, extent.length)
            else:
                mine = await self._in_worker(lambda: signatures(key, data))
            suspects.update((disk, first + at) for at in differing(mine, _answered(await asked)))
        finally:
            self._room.release()
        self.verdict.done += extent.length
        self.verdict.read += 0 if hole else extent.length
        self.verdict.suspect = len(suspects) * SIGNED
        self._now()

    # looks at what differs

    async def _look_again(self, exports: dict[int, Export], sizes: dict[int, int], suspects: set[Block]) -> None:
        """Look until each is equal, wrong, or given up."""
        watch = WriteWatch(set(suspects))
        seen: dict[Block, list[Extent]] = {}
        stamp = -1
        self._stream.watch(watch)
        try:
            for look in range(LOOKS):
                if not suspects:
                    break
                if look:
                    await asyncio.sleep(self._order.confirm)
                watch.look = look
                found, now = await self._look(exports, sizes, suspects)
                wrong = {each for each in found if each in seen and now == stamp >= 0 and watch.quiet(each, look - 1)}
                self.verdict.wrong += [(each[0], e.offset, e.length) for each in sorted(wrong) for e in found[each]]
                suspects, seen, stamp = set(found) - wrong, found, now
                self.verdict.suspect = len(suspects) * SIGNED
        finally:
            self._stream.watch(None)
        self.verdict.undecided = len(suspects) * SIGNED

    async def _look(
        self, exports: dict[int, Export], sizes: dict[int, int], suspects: set[Block]
    ) -> tuple[dict[Block, list[Extent]], int]:
        """What differs of the suspects, and the order's stamp all the while; -1 when it changed, so nothing is told."""
        stream = self._stream
        before = stream.look()
        await self._until(lambda: stream.released() >= before.published, "the other site does not acknowledge")
        sync, found = uuid4().hex, dict[Block, list[Extent]]()
        for number in sorted({disk for disk, _ in suspects}):
            blocks = sorted(block for disk, block in suspects if disk == number)
            async with connected(exports[number]) as (connection, tasks):
                _demand_size(connection, number, sizes[number])
                for block in blocks:
                    await self._room.acquire()
                    extent = Extent(block * SIGNED, min(SIGNED, sizes[number] - block * SIGNED))
                    tasks.create_task(self._block(sync, number, connection, extent, found))
        after = stream.look()
        await self._until(lambda: stream.cursor() >= after.published, "the link does not keep up")
        same = (before.order_stamp, before.connections) == (after.order_stamp, after.connections)
        return found, after.order_stamp if same and after.ordered else -1

    async def _block(
        self, sync: str, disk: int, connection: DiskConnection, extent: Extent, found: dict[Block, list[Extent]]
    ) -> None:
        try:
            await self._pace.take(extent.length)
            exchange, number = self._stream.exchange, extent.offset // SIGNED
            theirs = _answered(await exchange.signatures(sync, disk, number, 1, fresh=True))
            data = await connection.read(extent.offset, extent.length)
            if signatures(self._key, data) == theirs:
                return
            masks = await exchange.masks(disk, (number,), digests(self._key, data))
            if masks is None:
                raise _gone()
            parts = [(first * BLOCK, min(after * BLOCK, extent.length)) for first, after in runs_of(masks[0])]
            found[disk, number] = [Extent(extent.offset + a, b - a) for a, b in parts if b > a] or [extent]
        finally:
            self._room.release()

    async def _until(self, reached: Callable[[], bool], why: str) -> None:
        """Raises WrongPhase when the stream is not live, or ApplianceUnreachable."""
        end = time.monotonic() + PATIENCE
        while True:
            if unfit := self._stream.unfit():
                raise WrongPhase(f"the stream is not live any more: {unfit}", hint="verify again when it is")
            if reached():
                return
            if time.monotonic() > end:
                raise ApplianceUnreachable(f"{why} within {PATIENCE:.0f} s")
            await asyncio.sleep(0.02)

    async def _in_worker(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._hashers, work)


def _demand_size(connection: DiskConnection, number: int, size: int) -> None:
    if connection.ready.size < size:
        raise HypervisorRefused(f"disk {number} has {connection.ready.size} bytes, expected {size}")


def _answered(answer: bytes | None) -> bytes:
    if answer is None:
        raise _gone()
    return answer


def _gone() -> ApplianceUnreachable:
    return ApplianceUnreachable("the link broke while the disks were compared")
