"""One disk compared with the other side's: which parts of what is read here differ there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from drctl.model.extent import BLOCK, Extent, MiB
from drctl.replication.disk_scan import Look
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
    zero_signature,
)

#: One range of a pass: read, hashed and compared by one thread at once. No read that is only compared holds the stream,
#: so it may be large.
STRETCH = 4 * MiB
#: Bytes of a disk that are being compared: what a link of 20 ms takes at 1.6 GB/s.
COMPARED_WINDOW = 32 * MiB
#: Signatures asked for at once, in blocks (64 MiB), and how many such questions go ahead of the reads.
ASKED = 1024
AHEAD = 2
_UNKNOWN = b"\xff" * SIGNATURE_SIZE
_ALL: int = 2**PARTS - 1
_ZEROES = memoryview(bytes(SIGNED))

#: What differs is sent together, so that frames are full, but does not wait longer than this for company (seconds).
GATHER = 0.03

#: Something of a disk: its offset there, and its bytes.
Piece = tuple[int, memoryview]


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


@dataclass(frozen=True, slots=True)
class Compared:
    """What is compared: one disk, in one pass."""

    sync: str
    disk: int
    size: int


@dataclass(frozen=True, slots=True)
class Differing:
    """A block that differs there: its number, and what it is here. `mask`: which of its parts differ; where that is not
    known without a question, the digests to ask with."""

    block: int
    data: memoryview
    mask: int | None
    digests: bytes = b""


class Comparison:
    """Runs in the event loop, but for looks. Not to be used beyond one connection of the exchange."""

    def __init__(self, what: Compared, exchange: SignatureExchange, tasks: asyncio.TaskGroup) -> None:
        self.what = what
        self._exchange = exchange
        self._key = exchange.key
        self._tasks = tasks
        self._windows: dict[int, asyncio.Task[bytes | None]] = {}

    async def theirs(self, extent: Extent) -> bytes | None:
        """The other side's signatures of the extent; None when the connection is gone.

        The extent begins at a multiple of SIGNED, ends at one or at the disk's end, and crosses no multiple of
        ASKED * SIGNED."""
        window = await self._asked(extent)
        if window is None:
            return None
        first = extent.offset // SIGNED % ASKED
        return window[first * SIGNATURE_SIZE : (first + blocks_of(extent.length)) * SIGNATURE_SIZE]

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

    def look(self, extent: Extent, theirs: bytes) -> Look[Differing]:
        """For a thread that reads the extent: finds the blocks that differ from `theirs`."""
        key, start = self._key, extent.offset

        def look(offset: int, data: memoryview) -> list[Differing]:
            first = (offset - start) // SIGNED
            mine = signatures(key, data)
            expected = theirs[first * SIGNATURE_SIZE : first * SIGNATURE_SIZE + len(mine)]
            if mine == expected:
                return []
            return [
                _found(
                    key, offset // SIGNED + at, data[at * SIGNED : (at + 1) * SIGNED], _of(mine, at), _of(expected, at)
                )
                for at in differing(mine, expected)
            ]

        return look

    def zeroes(self, extent: Extent, theirs: bytes) -> list[Differing]:
        """The blocks of the extent that are not zeroes there."""
        first = extent.offset // SIGNED
        lengths = (min(SIGNED, extent.length - at * SIGNED) for at in range(blocks_of(extent.length)))
        return [
            Differing(first + at, _ZEROES[:length], _all_of(length))
            for at, length in enumerate(lengths)
            if _of(theirs, at) != zero_signature(self._key, length)
        ]

    async def pieces(self, found: Sequence[Differing]) -> list[Piece] | None:
        """What differs, in order; None when the connection is gone."""
        asked = [each for each in found if each.mask is None]
        masks: dict[int, int] = {}
        if asked:
            blocks = tuple(each.block for each in asked)
            answer = await self._exchange.masks(self.what.disk, blocks, b"".join(each.digests for each in asked))
            if answer is None:
                return None
            masks = dict(zip(blocks, answer, strict=True))
        ordered = sorted(found, key=lambda each: each.block)
        return [
            piece for each in ordered for piece in _parts(each, masks[each.block] if each.mask is None else each.mask)
        ]


def _of(joined: bytes, at: int) -> bytes:
    return joined[at * SIGNATURE_SIZE : (at + 1) * SIGNATURE_SIZE]


def _found(key: bytes, block: int, content: memoryview, mine: bytes, theirs: bytes) -> Differing:
    """Which parts differ of a block that is zeroes at one of the sides is known here."""
    length = len(content)
    if mine == zero_signature(key, length):
        return Differing(block, _ZEROES[:length], _all_of(length))
    kept = memoryview(bytes(content))
    if theirs == _UNKNOWN:
        return Differing(block, kept, _all_of(length))
    if theirs == zero_signature(key, length):
        return Differing(block, kept, _filled(kept))
    return Differing(block, kept, None, digests(key, kept))


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


def _parts(each: Differing, mask: int) -> Iterator[Piece]:
    start, data = each.block * SIGNED, each.data
    for first, after in runs_of(mask):
        if piece := data[first * BLOCK : after * BLOCK]:
            yield start + first * BLOCK, piece
