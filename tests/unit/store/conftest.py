"""A store under test beside its oracle: plain bytearrays, one copy per mark."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from drctl.model.group import GroupDisk, Retention
from drctl.store import atomic
from drctl.store.group_store import GroupStore
from drctl.store.journal import SealPolicy
from drctl.wire.frame import EXTENT, EXTENT_WRITE, EXTENT_ZERO, FrameKind, Span, pack, split

EPOCH = "0123456789abcdef" * 2
SECTORS = 512  # per disk: small, so that writes overlap


def extents(*rows):
    """Extent table from (disk, sector, sectors, kind, payload offset, sequence delta)."""
    table = np.zeros(len(rows), EXTENT)
    for index, (disk, sector, sectors, kind, payload, delta) in enumerate(rows):
        table[index] = (sector, sectors, disk, kind, 0, payload, delta)
    return table


@dataclass
class Harness:
    """Writes go to the store and to the oracle. `marks`: {(epoch, number): images at the mark}."""

    root: Path
    policy: SealPolicy = field(default_factory=SealPolicy)
    epoch: str = EPOCH
    generation: int = 1
    sectors: int = SECTORS
    start_time: float = 1_000_000.0

    extents = staticmethod(extents)

    def __post_init__(self):
        self.disks = [GroupDisk(1, "web", "vda", self.sectors * 512), GroupDisk(2, "db 1", "vdb", self.sectors * 512)]
        self.images = {disk.number: bytearray(disk.size) for disk in self.disks}
        self.sequence = 0
        self.number = 0
        self.now = self.start_time
        self.marks = {}
        self.proven = []
        self.pending = []
        GroupStore.create(self.root, "shop", self.generation, self.disks, Retention()).close()
        self.open()

    def open(self):
        self.store = GroupStore.open(self.root, writer=True, policy=self.policy)
        self.position = self.store.begin_stream("host-a", self.generation, self.epoch)
        return self.position

    def close(self):
        self.store.close()

    def reopen(self):
        self.close()
        return self.open()

    def span(self, first=None, last=None, partial=False):
        last = self.sequence if last is None else last
        return Span(self.generation, self.epoch, last if first is None else first, last, partial)

    def send(self, *frames):
        self.store.append([item for frame in frames for item in split(memoryview(frame), "test")])

    def control(self, kind, /, **fields):
        return pack(kind, self.span(), None, json.dumps(fields).encode())

    def end_sync(self):
        """Leave mode initial, with something in every sector but the last quarter of the bases."""
        self.send(self.control(FrameKind.SYNC_BEGIN, sync="a" * 32, mode="initial", disks={"1": 1, "2": 1}))
        for disk in self.disks:
            for sector in range(0, self.sectors * 3 // 4, 64):
                self.sync_block(disk.number, sector, bytes([disk.number, sector // 64 + 1]) * (32 * 512))
        self.send(self.control(FrameKind.SYNC_END, sync="a" * 32))
        self.store.sync()

    def write_frames(self, disk, sector, data):
        """Frames of one record of any size, and the oracle's image changed."""
        self.sequence += 1
        self.images[disk][sector * 512 : sector * 512 + len(data)] = data
        frames = []
        for start in range(0, len(data), 65536):
            part = data[start : start + 65536]
            table = extents((disk, sector + start // 512, len(part) // 512, EXTENT_WRITE, 0, 0))
            frames.append(pack(FrameKind.DATA, self.span(partial=start + 65536 < len(data)), table, part))
        return frames

    def write(self, disk, sector, data):
        self.send(*self.write_frames(disk, sector, data))

    def zero(self, disk, sector, sectors):
        self.sequence += 1
        self.images[disk][sector * 512 : (sector + sectors) * 512] = bytes(sectors * 512)
        self.send(pack(FrameKind.DATA, self.span(), extents((disk, sector, sectors, EXTENT_ZERO, 0, 0)), b""))

    def sync_block(self, disk, sector, data):
        """A block of the reader: the log's place decides, it has no sequence of its own."""
        self.images[disk][sector * 512 : sector * 512 + len(data)] = data
        table = extents((disk, sector, len(data) // 512, EXTENT_WRITE, 0, 0))
        self.send(pack(FrameKind.SYNC, self.span(), table, data))

    def mark(self, *, prove=True, seconds=5.0, **fields):
        self.number += 1
        self.now += seconds
        self.marks[self.epoch, self.number] = {number: bytes(image) for number, image in self.images.items()}
        body = {"number": self.number, "kind": "crash-consistent", "sequence": self.sequence, **fields}
        self.send(self.control(FrameKind.MARK, wall_ns=int(self.now * 1e9), **body))
        if prove:
            self.prove(self.number)
        return self.number

    def prove(self, number):
        self.send(self.control(FrameKind.PROOF, number=number, wall_ns=int(self.now * 1e9)))
        self.pending.append((self.epoch, number))

    def sync(self):
        durable = self.store.sync()
        self.proven += self.pending
        self.pending = []
        return durable

    def new_epoch(self, epoch):
        self.epoch = epoch
        self.sequence = 0
        return self.store.begin_stream("host-a", self.generation, epoch)

    def listed(self, store=None):
        return [(c.epoch, c.number) for c in (store or self.store).checkpoints()]

    def check_views(self, store=None):
        """Every listed checkpoint reads exactly as the oracle had it."""
        store = store or self.store
        for epoch, number in self.listed(store):
            self.check_view(store, epoch, number)

    def check_view(self, store, epoch, number):
        check_view(store, epoch, number, self.marks[epoch, number])


def check_view(store, epoch, number, images):
    view = store.open_view(number, epoch)
    try:
        for disk in view.disks:
            source = view.disk(disk.name)
            image = images[disk.number]
            assert bytes(source.read(0, disk.size)) == image[: disk.size], (epoch, number, disk)
            covered = 0
            for extent, data in source.extents(0, disk.size):
                assert extent.offset == covered
                covered = extent.end
                assert data or not any(image[extent.offset : extent.end])
            assert covered == disk.size
    finally:
        view.close()


@pytest.fixture(scope="session")
def harness():
    """The class: tests make as many as they like."""
    return Harness


@pytest.fixture
def tmp_path():
    """In memory where there is any: these tests sync thousands of times, and kill processes, not machines."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def no_fault():
    yield
    atomic.set_fault(None)
