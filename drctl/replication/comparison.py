"""One disk compared with the other side's: which parts of what was read here differ there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from drctl.model.extent import BLOCK, Extent, MiB
from drctl.replication.signature_exchange import SignatureExchange
from drctl.wire.signature import (
    PARTS,
    SIGNATURE_SIZE,
    SIGNED,
    blocks_of,
    differing,
    digests,
    runs_of,
    signatures,
    signatures_of_zeroes,
    zero_signature,
)

#: Read and hashed at once. No read that is only compared holds the stream, so it may be large.
COMPARED_READ = 1 * MiB
#: Bytes of a disk that are being compared: what a link of 20 ms takes at 1.6 GB/s.
COMPARED_WINDOW = 32 * MiB
#: Signatures asked for at once, in blocks (16 MiB), and how many such questions go ahead of the reads.
ASKED = 256
AHEAD = 2
_UNKNOWN = b"\xff" * SIGNATURE_SIZE
_ALL: int = 2**PARTS - 1

#: What differs is sent together, so that frames are full, but does not wait longer than this for company (seconds).
GATHER = 0.03

T = TypeVar("T")


class Gate:
    """Lets those that wait pass together: when enough bytes wait, or the first of them has waited GATHER."""

    def __init__(self, enough: int) -> None:
        self._enough = enough
        self._waiting = 0
        self._gate = asyncio.Event()

    async def wait(self, size: int) -> None:
        gate = self._gate
        self._waiting += size
        if self._waiting >= self._enough:
            self._open()
            return
        try:
            async with asyncio.timeout(GATHER):
                await gate.wait()
        except TimeoutError:
            if gate is self._gate:
                self._open()

    def _open(self) -> None:
        self._gate.set()
        self._gate = asyncio.Event()
        self._waiting = 0


class Source(Protocol):
    """Where the disk is read here."""

    async def read(self, offset: int, length: int) -> bytearray: ...


@dataclass(frozen=True, slots=True)
class Compared:
    """What is compared: one disk, in one pass."""

    sync: str
    disk: int
    size: int
    source: Source


class Comparison:
    """Runs in the event loop, hashes in `workers`. Not to be used beyond one connection of the exchange."""

    def __init__(
        self, what: Compared, exchange: SignatureExchange, tasks: asyncio.TaskGroup, workers: ThreadPoolExecutor
    ) -> None:
        self.what = what
        self._exchange = exchange
        self._key = exchange.key
        self._tasks = tasks
        self._workers = workers
        self._windows: dict[int, asyncio.Task[bytes | None]] = {}

    async def differences(self, extent: Extent, data: bytearray | None) -> list[Extent] | None:
        """The parts of `extent` that differ there from `data`, None: from zeroes. None when the connection is gone.

        The extent begins at a multiple of SIGNED, ends at one or at the disk's end, and is COMPARED_READ at most."""
        asked = self._asked(extent)
        mine = await self._sign(extent, data)
        window = await asked
        if window is None:
            return None
        first = extent.offset // SIGNED % ASKED * SIGNATURE_SIZE
        theirs = window[first : first + len(mine)]
        blocks = differing(mine, theirs)
        if not blocks:
            return []
        masks = await self._masks(extent, data, blocks, theirs)
        if masks is None:
            return None
        return [
            _part(extent, block, first, after)
            for block, mask in zip(blocks, masks, strict=True)
            for first, after in runs_of(mask)
        ]

    def _asked(self, extent: Extent) -> asyncio.Task[bytes | None]:
        """The answer that the extent's signatures are in; the next ones are asked for, too."""
        number = extent.offset // SIGNED // ASKED
        for old in [each for each in self._windows if each < number]:
            del self._windows[old]
        count = blocks_of(self.what.size)
        for each in range(number, number + AHEAD + 1):
            if each not in self._windows and each * ASKED < count:
                asked = self._exchange.signatures(
                    self.what.sync, self.what.disk, each * ASKED, min(ASKED, count - each * ASKED)
                )
                self._windows[each] = self._tasks.create_task(asked)
        return self._windows[number]

    async def _sign(self, extent: Extent, data: bytearray | None) -> bytes:
        if data is None:
            return signatures_of_zeroes(self._key, extent.length)
        return await self._in_worker(lambda: signatures(self._key, data))

    async def _masks(
        self, extent: Extent, data: bytearray | None, blocks: list[int], theirs: bytes
    ) -> list[int] | None:
        """Which parts of the blocks differ. Of those that are zeroes at one of the sides it is known here."""
        if data is None:
            return [_all_of(_length(extent, block)) for block in blocks]
        masks = {block: self._known(extent, data, block, theirs) for block in blocks}
        unknown = [block for block, mask in masks.items() if mask is None]
        if unknown:
            whole = memoryview(data)
            made = await self._in_worker(
                lambda: b"".join(digests(self._key, whole[at * SIGNED : (at + 1) * SIGNED]) for at in unknown)
            )
            start = extent.offset // SIGNED
            answer = await self._exchange.masks(self.what.disk, tuple(start + block for block in unknown), made)
            if answer is None:
                return None
            masks.update(zip(unknown, answer, strict=True))
        return [mask or 0 for mask in masks.values()]

    def _known(self, extent: Extent, data: bytearray, block: int, theirs: bytes) -> int | None:
        length = _length(extent, block)
        content = memoryview(data)[block * SIGNED : block * SIGNED + length]
        signature = theirs[block * SIGNATURE_SIZE : (block + 1) * SIGNATURE_SIZE]
        filled = _filled(content)
        if signature == _UNKNOWN or filled == 0:
            return _all_of(length)
        return filled if signature == zero_signature(self._key, length) else None

    async def _in_worker(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)


def _length(extent: Extent, block: int) -> int:
    return min(SIGNED, extent.length - block * SIGNED)


def _all_of(length: int) -> int:
    """The mask that names all parts of a block of `length` bytes."""
    return int(_ALL >> (PARTS - -(-length // BLOCK)))


def _filled(content: memoryview) -> int:
    """The mask of the parts that are not all zeroes."""
    whole = len(content) // BLOCK * BLOCK
    parts: list[bool] = np.frombuffer(content[:whole], np.uint64).reshape(-1, BLOCK // 8).any(axis=1).tolist()  # type: ignore[assignment]
    if whole < len(content):
        parts.append(any(content[whole:]))
    return sum(1 << index for index, some in enumerate(parts) if some)


def _part(extent: Extent, block: int, first: int, after: int) -> Extent:
    begin = extent.offset + block * SIGNED
    start, end = begin + first * BLOCK, min(begin + after * BLOCK, extent.end)
    return Extent(start, end - start)
