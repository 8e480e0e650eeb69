"""A survey: what a pass would send. The disks are read and compared, and nothing is put into the stream."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from uuid import uuid4

from drctl.errors import ApplianceUnreachable, HypervisorRefused, WrongPhase
from drctl.model.extent import Extent
from drctl.replication import framing
from drctl.replication.comparison import ASKED, COMPARED_READ, COMPARED_WINDOW, Compared, Comparison
from drctl.replication.disk_connection import DiskConnection, Export, connected
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
        self._room = asyncio.Semaphore(COMPARED_WINDOW // COMPARED_READ)
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
            async with connected(exports[number]) as (connection, tasks):
                if connection.ready.size < size:
                    raise HypervisorRefused(f"disk {number} has {connection.ready.size} bytes, expected {size}")
                what = Compared(sync, number, size, connection)
                await self._disk(Comparison(what, self._exchange, tasks, self._hashers), connection, tasks)
        self._now()

    def _now(self) -> None:
        self.findings.seconds = time.monotonic() - self.findings.began

    async def _disk(self, comparison: Comparison, connection: DiskConnection, tasks: asyncio.TaskGroup) -> None:
        position, size = 0, comparison.what.size
        while position < size:
            length, hole = await connection.first_holes(position, min(STATUS_WINDOW, size - position))
            end = aligned(position, length, size, hole=hole)
            if end <= position:
                hole, end = False, min(size, position + SIGNED)
            step = _HOLE if hole else COMPARED_READ
            while position < end:
                after = min(end, position // step * step + step)
                await self._pace.take(0 if hole else after - position)
                await self._room.acquire()
                tasks.create_task(self._one(comparison, Extent(position, after - position), hole=hole))
                position = after

    async def _one(self, comparison: Comparison, extent: Extent, *, hole: bool) -> None:
        try:
            data = None if hole else await comparison.what.source.read(extent.offset, extent.length)
            parts = await comparison.differences(extent, data)
            if parts is None:
                raise ApplianceUnreachable("the link broke while the disks were compared")
            await self._count(comparison, extent, data, parts)
        finally:
            self._room.release()

    async def _count(self, comparison: Comparison, extent: Extent, data: bytearray | None, parts: list[Extent]) -> None:
        found = self.findings
        crossing = -(-extent.length // SIGNED) * SIGNATURE_SIZE
        if data is not None and parts:
            crossing += DIGESTS_SIZE * len({part.offset // SIGNED for part in parts})
            crossing += await asyncio.get_running_loop().run_in_executor(
                self._hashers, _size_of_frames, comparison.what.disk, extent, data, parts
            )
        found.done += extent.length
        found.read += 0 if data is None else extent.length
        found.differing += sum(part.length for part in parts)
        found.crossing += crossing
        self._now()


def _size_of_frames(disk: int, extent: Extent, data: bytearray, parts: list[Extent]) -> int:
    whole = memoryview(data)
    pieces = [(part.offset, whole[part.offset - extent.offset : part.end - extent.offset]) for part in parts]
    return sum(len(head) + len(body) for head, body in framing.frames_of_pieces(_STAMP, 0, disk, pieces))
