"""Old disks become a checkpoint of a store: exactly they are restored from it, older checkpoints stay, differences alone
are written; interrupted anywhere, it goes on."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager, closing
from types import SimpleNamespace

import pytest

from drctl.errors import Interrupted
from drctl.model.checkpoint import CheckpointKind
from drctl.model.group import GroupDisk, Retention
from drctl.replication import seeding
from drctl.replication.seeding import OldDisks, put, unlike
from drctl.store import atomic
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore
from drctl.store.initial import forget_note

KIB, MIB = 2**10, 2**20
DISKS = (GroupDisk(0, "web", "vda", 3 * MIB + 512), GroupDisk(2, "web", "vdb", MIB))
EPOCH, NEXT = "a" * 32, "b" * 32


class Disk:
    """An old disk as its export shows it; ranges of zeroes are holes."""

    def __init__(self, data):
        self.data = data
        self.ready = SimpleNamespace(size=len(data), allocation=True)

    async def read(self, offset, length):
        return bytearray(self.data[offset : offset + length])

    async def first_holes(self, offset, length):
        step = 64 * KIB
        end = offset
        hole = not any(self.data[offset : offset + step])
        while end < offset + length and (not any(self.data[end : end + step])) is hole:
            end += step
        return min(end - offset, length), hole


class World:
    def __init__(self, root, monkeypatch):
        self.root = root
        self.random = random.Random(7)
        self.disks = {disk.number: bytearray(disk.size) for disk in DISKS}
        for data in self.disks.values():
            for offset in range(0, len(data), 256 * KIB):
                data[offset : offset + 100 * KIB] = self.random.randbytes(len(data[offset : offset + 100 * KIB]))
        GroupStore.create(root, "erp", 3, DISKS, Retention()).close()
        monkeypatch.setattr(seeding, "connected", self.connected)

    @asynccontextmanager
    async def connected(self, number):
        try:
            async with asyncio.TaskGroup() as tasks:
                yield Disk(bytes(self.disks[number])), tasks
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    def order(self, *numbers, epoch=EPOCH, number=41):
        definition = {
            "version": 4,
            "spec": {},
            "machines": [],
            "disks": [{"number": d.number, "machine": d.machine, "target": d.target, "size": d.size} for d in DISKS],
        }
        exports = {each: each for each in numbers}
        return OldDisks("erp", "alpha-1", 3, epoch, number, 5_000_000_000_000, definition, DISKS, exports)

    def put(self, *numbers, **options):
        return put(self.root, self.order(*numbers, **options), lambda _: None)

    def based(self):
        """The disks are the bases."""
        for disk in DISKS:
            (self.root / "disks" / disk.name / "base.raw").write_bytes(self.disks[disk.number])
        forget_note(self.root)
        with closing(GroupStore.open(self.root)) as store:
            store.set_mode(StoreMode.JOURNAL)

    def content(self, number):
        with closing(GroupStore.open(self.root)) as store, closing(store.open_view(number)) as view:
            return {disk.number: bytes(view.disk(disk.name).read(0, disk.size)) for disk in DISKS}

    def scribble(self):
        for data in self.disks.values():
            for _ in range(5):
                at = self.random.randrange(len(data) - 9000) // 512 * 512
                data[at : at + 512] = self.random.randbytes(512)
            data[128 * KIB : 192 * KIB] = bytes(64 * KIB)
            data[300 * KIB : 700 * KIB] = self.random.randbytes(400 * KIB)


@pytest.fixture
def world(tmp_path, monkeypatch):
    yield World(tmp_path / "erp", monkeypatch)
    atomic.set_fault(None)


def test_disks_that_are_the_bases_need_no_byte(world):
    world.based()
    assert world.put().differing == 0
    with closing(GroupStore.open(world.root)) as store:
        (checkpoint,) = store.checkpoints()
        assert (checkpoint.number, checkpoint.kind, checkpoint.time) == (41, CheckpointKind.CRASH, 5000.0)
        assert store.used() < 4 * KIB
    assert world.content(41) == {number: bytes(data) for number, data in world.disks.items()}
    # Given again it is there; another stream is compared in full, and takes the next number.
    world.put()
    with closing(GroupStore.open(world.root, writer=True)) as store:
        assert len(store.checkpoints()) == 1
        assert store.begin_stream("beta-1", 3, NEXT).needs == "full"


def test_what_differs_from_the_store_alone_is_written_and_history_stays(world):
    world.based()
    world.put(number=41)
    before = {number: bytes(data) for number, data in world.disks.items()}
    world.scribble()
    after = {number: bytes(data) for number, data in world.disks.items()}
    told = world.put(0, 2, epoch=NEXT, number=77)
    assert 0 < told.differing <= 2 * (5 * 8 + 64 + 404) * KIB
    assert told.done == told.total == sum(disk.size for disk in DISKS)
    assert world.content(77) == after
    assert world.content(41) == before


class Killed(BaseException):
    pass


def test_killed_at_any_step_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(seeding, "STEP", 512 * KIB)
    for die_at in [*range(1, 12), *range(12, 400, 7)]:
        world = World(tmp_path / str(die_at), monkeypatch)
        world.based()
        world.put(number=41)
        before = {number: bytes(data) for number, data in world.disks.items()}
        world.scribble()
        steps = 0

        def fault(_name, die_at=die_at):
            nonlocal steps
            steps += 1
            if steps == die_at:
                raise Killed

        atomic.set_fault(fault)
        try:
            world.put(0, 2, epoch=NEXT, number=77)
        except Killed:
            atomic.set_fault(None)
            world.put(0, 2, epoch=NEXT, number=77)
        atomic.set_fault(None)
        assert world.content(77) == {number: bytes(data) for number, data in world.disks.items()}
        assert world.content(41) == before
        with closing(GroupStore.open(world.root)) as store:
            assert [checkpoint.number for checkpoint in store.checkpoints()] == [41, 77]
        if steps < die_at:
            return
    pytest.fail("more steps than were tried")


def test_told_to_stop_it_ends_between_two_steps_and_goes_on(world, monkeypatch):
    monkeypatch.setattr(seeding, "STEP", 512 * KIB)
    world.based()
    world.put(number=41)
    world.scribble()
    told = []
    with pytest.raises(Interrupted):
        put(world.root, world.order(0, 2, epoch=NEXT, number=77), lambda now: told.append(now.done), lambda: bool(told))
    assert len(told) == 1
    rest = world.put(0, 2, epoch=NEXT, number=77)
    assert rest.done == rest.total
    assert world.content(77) == {number: bytes(data) for number, data in world.disks.items()}


def test_unlike_finds_blocks_and_the_odd_end():
    one = bytearray(9000)
    assert list(unlike(one, bytes(9000))) == []
    other = bytearray(one)
    other[0] = other[4096] = other[8999] = 1
    assert list(unlike(one, bytes(other))) == [(0, 8192), (8192, 9000)]


def test_a_run_is_no_longer_than_a_frame():
    found = list(unlike(bytearray(200 * KIB), b"x" * 200 * KIB))
    assert found == [(0, 64 * KIB), (64 * KIB, 128 * KIB), (128 * KIB, 192 * KIB), (192 * KIB, 200 * KIB)]
