"""A survey: what a pass would send. The disks are read and compared, and nothing is put into the stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from uuid import uuid4

from drctl.errors import ApplianceUnreachable, HypervisorRefused, WrongPhase
from drctl.model.extent import Extent
from drctl.replication import framing
from drctl.replication.comparison import ASKED, COMPARED_WINDOW, STRETCH, Compared, Comparison, Differing, Piece
from drctl.replication.disk_connection import DiskConnection, Export, connected
from drctl.replication.disk_scan import DiskScan, scanned
from drctl.replication.framing import Stamp
from drctl.replication.reader import STATUS_WINDOW, Pace, aligned
from drctl.replication.signature_exchange import SignatureExchange
from drctl.wire.signature import DIGESTS_SIZE, SIGNATURE_SIZE, SIGNED

#: Frames are only made to be measured.
_STAMP = Stamp(1, "0" * 32)
#: A hole is compared in pieces as large as one question.
_HOLE = ASKED * SIGNED


@dataclass(slots=True)
class Findings:
    """What was found so far, in bytes. `crossing`: what a pass would put on the link, about; `seconds`: since it
    began."""

    total: int
    done: int = 0
    read: int = 0
    differing: int = 0
    crossing: int = 0
    began: float = 0.0
    seconds: float = 0.0


class Survey:
    """Goes over disks once. Blocks that the guest writes meanwhile may count as differing."""

    def __init__(self, exchange: SignatureExchange, pace: Pace, hashers: ThreadPoolExecutor) -> None:
        self._exchange = exchange
        self._pace = pace
        self._hashers = hashers
        self._room = asyncio.Semaphore(COMPARED_WINDOW // STRETCH)
        self.findings = Findings(0)

    async def run(self, exports: dict[int, Export], sizes: dict[int, int]) -> None:
        """Raises WrongPhase (the other side knows no signatures), HypervisorRefused, ApplianceUnreachable."""
        if not self._exchange.key:
            raise WrongPhase(
                "the other site has nothing to compare with",
                hint="its first sync is not done, it does not answer, or its drctl is older",
            )
        self.findings = Findings(sum(sizes.values()), began=time.monotonic())
        sync = uuid4().hex
        for number, size in sorted(sizes.items()):
            async with scanned(exports[number]) as scan, connected(exports[number]) as (connection, tasks):
                if connection.ready.size < size:
                    raise HypervisorRefused(f"disk {number} has {connection.ready.size} bytes, expected {size}")
                comparison = Comparison(Compared(sync, number, size), self._exchange, tasks)
                async for extent, hole in _walk(connection, size):
                    await self._pace.take(0 if hole else extent.length)
                    await self._room.acquire()
                    tasks.create_task(self._one(comparison, scan, extent, hole=hole))
        self._now()

    def _now(self) -> None:
        self.findings.seconds = time.monotonic() - self.findings.began

    async def _one(self, comparison: Comparison, scan: DiskScan, extent: Extent, *, hole: bool) -> None:
        try:
            theirs = await comparison.theirs(extent)
            if theirs is None:
                raise _gone()
            if hole:
                found = comparison.zeroes(extent, theirs)
            else:
                found = await scan.visit(extent, comparison.look(extent, theirs))
            pieces = await comparison.pieces(found)
            if pieces is None:
                raise _gone()
            await self._count(comparison.what.disk, extent, found, pieces, hole=hole)
        finally:
            self._room.release()

    async def _count(
        self, disk: int, extent: Extent, differing: list[Differing], pieces: list[Piece], *, hole: bool
    ) -> None:
        found = self.findings
        crossing = -(-extent.length // SIGNED) * SIGNATURE_SIZE
        if pieces and not hole:
            crossing += DIGESTS_SIZE * len(differing)
            crossing += await asyncio.get_running_loop().run_in_executor(self._hashers, _size_of_frames, disk, pieces)
        found.done += extent.length
        found.read += 0 if hole else extent.length
        found.differing += sum(len(data) for _, data in pieces)
        found.crossing += crossing
        self._now()


async def _walk(connection: DiskConnection, size: int) -> AsyncIterator[tuple[Extent, bool]]:
    """(extent, whether it is a hole) of a disk."""
    position = 0
    while position < size:
        length, hole = await connection.first_holes(position, min(STATUS_WINDOW, size - position))
        end = aligned(position, length, size, hole=hole)
        if end <= position:
            hole, end = False, min(size, position + SIGNED)
        step = _HOLE if hole else STRETCH
        while position < end:
            after = min(end, position // step * step + step)
            yield Extent(position, after - position), hole
            position = after


def _gone() -> ApplianceUnreachable:
    return ApplianceUnreachable("the link broke while the disks were compared")


def _size_of_frames(disk: int, pieces: list[Piece]) -> int:
    return sum(len(head) + len(body) for head, body in framing.frames_of_pieces(_STAMP, 0, disk, pieces))
