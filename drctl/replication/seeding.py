"""Old disks put into a group's store: an epoch of their own, of which only what differs is written, and a checkpoint.

Not a stream of the link, but the same frames: a view, a merge and a comparison know no difference. Who calls it holds
the group: the receiver has let go of it. An interrupted one is given again, and goes on where it is durable."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drctl.errors import HypervisorRefused, Interrupted
from drctl.model.checkpoint import CheckpointKind
from drctl.model.extent import BLOCK, FRAME_PAYLOAD, MiB
from drctl.model.group import GroupDisk
from drctl.replication import framing
from drctl.replication.disk_connection import DiskConnection, Export, connected
from drctl.replication.framing import Stamp
from drctl.store.group_store import GroupStore
from drctl.store.tip import Tip
from drctl.store.view import ViewDisk
from drctl.wire import frame
from drctl.wire.frame import FrameKind, Parts

#: Read and compared at once, and how many such reads go ahead.
PIECE = 1 * MiB
AHEAD = 4
#: How much of a disk is asked about at once, and made durable together.
STEP = 256 * MiB


@dataclass(frozen=True, slots=True)
class OldDisks:
    """What is put into the store. `exports`: those to be compared with what the store holds; the others are there
    already, as bases. `number` and `wall_ns` are the checkpoint's; its time is when the disks were written last."""

    group: str
    host: str
    generation: int
    epoch: str
    number: int
    wall_ns: int
    definition: Mapping[str, Any]
    disks: tuple[GroupDisk, ...]
    exports: Mapping[int, Export] = field(default_factory=dict)


@dataclass(slots=True)
class Told:
    """How far it is, in bytes."""

    total: int = 0
    done: int = 0
    differing: int = 0


Tell = Callable[[Told], None]


def put(root: Path, old: OldDisks, tell: Tell, stop: Callable[[], bool] = lambda: False) -> Told:
    """Make it a checkpoint of the store. Blocks. Raises OutOfSpace (the journal's limit), Interrupted, Locked, what
    reading the old disks raises; nothing that was in the store is touched by any of these."""
    with closing(GroupStore.open(root, writer=True)) as store:
        position = store.begin_stream(old.host, old.generation, old.epoch)
        told = Told(sum(disk.size for disk in old.disks if disk.number in old.exports))
        if position.last_mark:
            return told
        writing = _Writing(store, old, told, tell, stop)
        writing.send(framing.control_frame(writing.stamp, FrameKind.DEFINITION, 0, dict(old.definition)))
        if old.exports:
            begun = position.sync
            asyncio.run(writing.compare((begun.disk, begun.offset) if begun else None))
        writing.mark(known=store.with_catalog(lambda catalog: catalog.newest_number(old.epoch)))
        return told


class _Writing:
    """One attempt."""

    def __init__(self, store: GroupStore, old: OldDisks, told: Told, tell: Tell, stop: Callable[[], bool]) -> None:
        self._store = store
        self._old = old
        self._told = told
        self._tell = tell
        self._stop = stop
        self.stamp = Stamp(old.generation, old.epoch)

    def send(self, *frames: Parts) -> None:
        whole = b"".join(bytes(part) for parts in frames for part in parts)
        self._store.append(list(frame.split(memoryview(whole), "seed")))

    def _control(self, kind: FrameKind, fields: dict[str, Any]) -> None:
        self.send(framing.control_frame(self.stamp, kind, 0, fields))

    async def compare(self, begun: tuple[int, int] | None) -> None:
        """All exports; `begun`: where an earlier attempt is durable."""
        old, sync = self._old, {"sync": self._old.epoch}
        compared = sorted((disk for disk in old.disks if disk.number in old.exports), key=lambda disk: disk.number)
        if begun is None:
            sizes = {str(disk.number): disk.size for disk in compared}
            self._control(FrameKind.SYNC_BEGIN, {**sync, "mode": "full", "disks": sizes})
        self._store.sync()
        with closing(Tip(self._store.root)) as tip, closing(tip.open()) as view:
            for disk in compared:
                first = begun[1] if begun and begun[0] == disk.number else 0
                if begun and disk.number < begun[0]:
                    first = disk.size
                self._told.done += first
                if first < disk.size:
                    await self._disk(disk, view.disk(disk.name), first)
        self._control(FrameKind.SYNC_END, sync)

    async def _disk(self, disk: GroupDisk, here: ViewDisk, first: int) -> None:
        async with connected(self._old.exports[disk.number]) as (seed, tasks):
            if seed.ready.size < disk.size:
                raise HypervisorRefused(f"{disk.name} has {seed.ready.size} bytes, expected {disk.size}")
            position = first
            while position < disk.size:
                if self._stop():
                    raise Interrupted(f"putting the old disks of {self._old.group} into its store was interrupted")
                length, hole = await seed.first_holes(position, min(STEP, disk.size - position))
                if hole:
                    self._hole(disk, here, position, length)
                else:
                    await self._data(disk, here, (position, length), (seed, tasks))
                position += length
                self._durable(disk, position, length)

    def _hole(self, disk: GroupDisk, here: ViewDisk, offset: int, length: int) -> None:
        for extent, data in here.extents(offset, length):
            for at in range(extent.offset, extent.end, PIECE) if data else ():
                count = min(PIECE, extent.end - at)
                self._differing(disk, at, bytes(count), here.read(at, count))

    async def _data(
        self, disk: GroupDisk, here: ViewDisk, place: tuple[int, int], seed: tuple[DiskConnection, asyncio.TaskGroup]
    ) -> None:
        offset, end = place[0], place[0] + place[1]
        connection, tasks = seed
        pieces = iter([(at, min(PIECE, end - at)) for at in range(offset, end, PIECE)])
        reads: list[tuple[int, int, asyncio.Task[bytearray]]] = []
        for at, count in pieces:
            reads.append((at, count, tasks.create_task(connection.read(at, count))))
            if len(reads) >= AHEAD:
                await self._one(disk, here, *reads.pop(0))
        for read in reads:
            await self._one(disk, here, *read)

    async def _one(
        self, disk: GroupDisk, here: ViewDisk, offset: int, length: int, reading: asyncio.Task[bytearray]
    ) -> None:
        self._differing(disk, offset, await reading, here.read(offset, length))

    def _differing(self, disk: GroupDisk, offset: int, old: bytes | bytearray, here: bytes | memoryview) -> None:
        if old == here:
            return
        whole = memoryview(old)
        pieces = [(offset + begin, whole[begin:end]) for begin, end in unlike(old, here)]
        self._told.differing += sum(len(piece) for _, piece in pieces)
        self.send(*framing.frames_of_pieces(self.stamp, 0, disk.number, pieces))

    def _durable(self, disk: GroupDisk, offset: int, length: int) -> None:
        progress = {"sync": self._old.epoch, "disk": disk.number, "offset": offset}
        self._control(FrameKind.SYNC_PROGRESS, progress)
        self._store.sync()
        self._told.done += length
        self._tell(self._told)

    def mark(self, known: int) -> None:
        """MARK and PROOF, durable when this returns. `known`: the number of a MARK that is there without a PROOF."""
        old = self._old
        if known < old.number:
            self._control(
                FrameKind.MARK,
                {
                    "number": old.number,
                    "kind": CheckpointKind.CRASH.value,
                    "sequence": 0,
                    "wall_ns": old.wall_ns,
                    "offset_ns": 0,
                    "monotonic_ns": 0,
                    "order_stamp": 0,
                    "streams": {old.host: 0},
                    "tags": [],
                    "interval_ms": 0,
                },
            )
        self._control(FrameKind.PROOF, {"number": old.number, "wall_ns": old.wall_ns})
        self._store.sync()
        self._tell(self._told)


def unlike(one: bytes | bytearray, other: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """The runs of blocks in which two pieces of one length differ: (begin, end) in bytes, no longer than a frame."""
    whole = len(one) // BLOCK * BLOCK
    old, new = (np.frombuffer(data, np.uint8)[:whole].reshape(-1, BLOCK) for data in (one, other))
    flags = (old != new).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    for begin, end in edges.reshape(-1, 2).tolist():
        for first in range(begin * BLOCK, end * BLOCK, FRAME_PAYLOAD):
            yield first, min(first + FRAME_PAYLOAD, end * BLOCK)
    if bytes(one[whole:]) != bytes(other[whole:]):
        yield whole, len(one)
