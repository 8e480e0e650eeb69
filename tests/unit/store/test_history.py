"""Random histories against plain bytearrays: every listed checkpoint reads exactly, whatever was sealed, merged,
promoted, killed in between."""

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drctl.errors import IntegrityError
from drctl.model.group import Retention, Rung
from drctl.store import atomic, maintenance, promote
from drctl.store.group_store import GroupStore
from drctl.store.journal import SealPolicy
from drctl.store.maintenance import Maintenance
from drctl.store.merge import MergePolicy

RETENTION = Retention(history=60, ladder=(Rung(20, 0), Rung(60, 20)))
POLICY = SealPolicy(size=3000, extents=40)
MERGE = MergePolicy(width=2, size=1 << 20)

sectors = st.integers(0, 511)
disks = st.sampled_from([1, 2])
lengths = st.sampled_from([1, 2, 3, 8, 16, 60, 140, 300])
operations = st.one_of(
    st.tuples(st.just("write"), disks, sectors, lengths, st.integers(0, 255)),
    st.tuples(st.just("random"), disks, sectors, st.integers(1, 8), st.integers(0, 255)),
    st.tuples(st.just("zero"), disks, sectors, st.sampled_from([1, 7, 100, 512])),
    st.tuples(st.just("block"), disks, sectors, st.integers(1, 128), st.integers(0, 255)),
    st.tuples(st.just("mark"), st.booleans()),
    st.tuples(st.just("mark"), st.just(True)),
    st.tuples(st.just("prove")),
    st.tuples(st.just("sync")),
    st.tuples(st.just("seal")),
    st.tuples(st.just("reopen")),
    st.tuples(st.just("epoch")),
    st.tuples(st.just("tag")),
    st.tuples(st.just("pin")),
    st.tuples(st.just("unpin")),
    st.tuples(st.just("maintain")),
)


class History:
    """Applies operations to a store and its oracle."""

    def __init__(self, h):
        self.h = h
        self.epochs = 0
        self.unproven = 0
        self.held = {}

    def apply(self, operation):
        name, *values = operation
        getattr(self, f"do_{name}")(*values)

    def do_write(self, disk, sector, count, seed):
        count = min(count, 512 - sector)
        self.h.write(disk, sector, bytes([seed, count & 255]) * (256 * count))

    def do_random(self, disk, sector, count, seed):
        self.h.write(disk, sector, random.Random(seed).randbytes(512 * min(count, 512 - sector)))

    def do_zero(self, disk, sector, count):
        self.h.zero(disk, sector, min(count, 512 - sector))

    def do_block(self, disk, sector, count, seed):
        self.h.sync_block(disk, sector, bytes([seed]) * (512 * min(count, 512 - sector)))

    def do_mark(self, prove):
        number = self.h.mark(prove=prove)
        self.unproven = 0 if prove else number

    def do_prove(self):
        if self.unproven:
            self.h.prove(self.unproven)
            self.unproven = 0

    def do_sync(self):
        self.h.sync()

    def do_seal(self):
        self.h.sync()
        self.h.store.seal()

    def do_reopen(self):
        self.h.sync()
        assert self.h.reopen().sequence == self.h.sequence

    def do_epoch(self):
        self.h.sync()
        self.epochs += 1
        self.unproven = 0
        self.h.new_epoch(f"{self.epochs:032x}")

    def do_tag(self):
        if listed := self.h.listed():
            epoch, number = listed[0]
            self.h.store.tag(number, "keep")
            self.held["keep"] = (epoch, number)

    def do_pin(self):
        if (listed := self.h.listed()) and "pin" not in self.held:
            epoch, number = listed[-1]
            self.h.store.pin("test-1", number, epoch)
            self.held["pin"] = (epoch, number)

    def do_unpin(self):
        self.h.store.unpin("test-1")
        self.held.pop("pin", None)

    def do_maintain(self):
        self.h.sync()
        maintain(self.h.root, self.h.now)
        self.check()

    def check(self):
        listed = self.h.listed()
        assert set(listed) <= set(self.h.proven)
        assert set(self.held.values()) <= set(listed)
        if self.h.proven:
            assert self.h.proven[-1] in listed
        self.h.check_views()


def maintain(root, now):
    keeper = Maintenance(root, MERGE)
    try:
        return keeper.run(now)
    finally:
        keeper.close()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(operations, min_size=20, max_size=70))
def test_every_listed_checkpoint_is_exact(harness, tmp_path, script):
    with tempfile.TemporaryDirectory(dir=tmp_path) as directory:
        h = harness(Path(directory) / "shop", policy=POLICY)
        h.end_sync()
        h.store.set_retention(RETENTION)
        history = History(h)
        for operation in script:
            history.apply(operation)
        h.sync()
        history.check()
        history.do_maintain()
        reader = GroupStore.open(h.root)
        assert h.listed(reader) == h.listed()
        assert not reader.verify().damages
        h.check_views(reader)
        reader.close()
        h.close()


def long_history(h, marks=30, seed=7, random_sectors=4):
    """A history in which everything happens: overlaps, zeroes, epochs, tags; merges and promotions are due."""
    h.end_sync()
    h.store.set_retention(RETENTION)
    history, dice = History(h), random.Random(seed)
    for index in range(marks):
        for _ in range(3):
            history.do_write(dice.choice([1, 2]), dice.randrange(500), dice.choice([1, 8, 140]), dice.randrange(256))
            history.do_random(dice.choice([1, 2]), dice.randrange(500), random_sectors, dice.randrange(256))
        history.do_zero(dice.choice([1, 2]), dice.randrange(500), dice.choice([3, 90]))
        if index == marks // 2:
            history.do_epoch()
        history.do_mark(index % 5 != 3)
        h.sync()
    return history


class Killed(BaseException):
    """What a fault point raises: no handler of ours may stop it."""


def kill_at(count):
    state = {"left": count}

    def fault(name):
        state["left"] -= 1
        if state["left"] == 0:
            raise Killed(name)

    return fault


def test_maintenance_merges_and_promotes(harness, tmp_path):
    h = harness(tmp_path / "shop", policy=POLICY)
    history = long_history(h)
    before = h.listed()
    done = maintain(h.root, h.now)
    assert done.merged
    assert done.promoted
    assert 0 < len(h.listed()) < len(before)
    assert h.store.info.base_position > 0
    assert list(h.root.glob("streams/*/*/*-*.seg"))
    history.check()
    assert maintain(h.root, h.now) == type(done)(0, 0, 0)
    h.close()


def test_a_tag_that_comes_during_a_merge_wins(harness, tmp_path):
    h = harness(tmp_path / "shop", policy=POLICY)
    long_history(h, marks=20)
    h.store.set_retention(Retention(history=1e9, ladder=(Rung(20, 0), Rung(1e9, 20))))
    dropped = set(h.listed()) - set(listed_after_maintenance(h, tmp_path / "copy"))
    assert dropped

    def tag(name):
        if name == "fsync merged segment":
            atomic.set_fault(None)
            for epoch, number in dropped:
                assert (epoch, number) in h.listed()
                h.store.tag(number, "late")

    atomic.set_fault(tag)
    maintain(h.root, h.now)
    assert dropped <= set(h.listed())
    h.check_views()
    h.close()


def test_a_pin_that_comes_before_a_promotion_is_announced_wins(harness, tmp_path, monkeypatch):
    h = harness(tmp_path / "shop", policy=POLICY)
    long_history(h, marks=20)
    epoch, number = h.listed()[1]
    real = promote.check_segments

    def check(*args):
        real(*args)
        h.store.pin("late", number, epoch)

    monkeypatch.setattr(maintenance, "check_segments", check)
    maintain(h.root, h.now)
    monkeypatch.undo()
    assert (epoch, number) in h.listed()
    h.check_views()
    h.close()


def listed_after_maintenance(h, copy):
    h.sync()
    shutil.copytree(h.root, copy)
    maintain(copy, h.now)
    reader = GroupStore.open(copy)
    listed = h.listed(reader)
    reader.close()
    return listed


def test_views_stay_exact_at_every_step_of_maintenance(harness, tmp_path):
    h = harness(tmp_path / "shop", policy=POLICY)
    long_history(h, marks=20)
    epoch, number = h.listed()[8]
    view = h.store.view(number, "open-before")
    reader = GroupStore.open(h.root)
    steps = []

    def look(name):
        steps.append(name)
        if len(steps) % 6 and name != "rename":
            return
        atomic.set_fault(None)
        assert (epoch, number) in h.listed(reader)
        h.check_views(reader)
        for disk in view.disks:
            assert bytes(view.disk(disk.name).read(0, disk.size)) == h.marks[epoch, number][disk.number]
        atomic.set_fault(look)

    atomic.set_fault(look)
    maintain(h.root, h.now)
    atomic.set_fault(None)
    assert len(steps) > 50
    view.close()
    reader.close()
    h.store.unpin("open-before")
    maintain(h.root, h.now)
    h.check_views()
    h.close()


def test_maintenance_killed_at_every_step_is_done_again(harness, tmp_path):
    h = harness(tmp_path / "shop", policy=POLICY)
    long_history(h, marks=16)
    h.close()
    reached = 0
    for count in range(1, 10_000):
        copy = tmp_path / "copy"
        shutil.copytree(h.root, copy)
        atomic.set_fault(kill_at(count))
        try:
            maintain(copy, h.now)
        except Killed:
            reached = count
        else:
            break
        finally:
            atomic.set_fault(None)
        reader = GroupStore.open(copy)
        assert h.listed(reader)[-1] == h.proven[-1]
        if count % 10 == 0:
            h.check_views(reader)
        reader.close()
        maintain(copy, h.now)
        store = GroupStore.open(copy, writer=True)
        assert h.listed(store)[-1] == h.proven[-1]
        if count % 10 == 1:
            h.check_views(store)
        assert not list(copy.glob("**/.*.tmp"))
        store.close()
        shutil.rmtree(copy)
    assert reached > 50


def test_the_writer_killed_at_every_step_loses_nothing_acknowledged(harness, tmp_path):
    def session(h):
        for index in range(6):
            h.write(1, index * 9, random.Random(index).randbytes(2048))
            h.mark()
            h.sync()

    reached = 0
    for count in range(1, 10_000):
        h = harness(tmp_path / f"shop-{count}", policy=POLICY)
        h.end_sync()
        atomic.set_fault(kill_at(count))
        try:
            session(h)
        except Killed:
            reached = count
        else:
            break
        finally:
            atomic.set_fault(None)
        acknowledged = list(h.proven)
        h.close()
        store = GroupStore.open(h.root, writer=True)
        assert set(acknowledged) <= set(h.listed(store))
        assert store.begin_stream("host-a", 1, h.epoch).sequence >= len(acknowledged)
        h.check_views(store)
        store.close()
        shutil.rmtree(h.root)
    assert reached > 30


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << offset % 8
    path.write_bytes(data)


def flipped_bit_is_never_served(h, path, offset):
    """Each listed checkpoint is exact or refuses to be read; damage of a segment is named by verify."""
    original = path.read_bytes()
    flip(path, offset)
    named = []
    try:
        store = GroupStore.open(h.root)
        for epoch, number in h.listed(store)[offset % 3 :: 3]:
            try:
                h.check_view(store, epoch, number)
            except IntegrityError as exc:
                named.append(exc.message)
        assert all(str(path) in message or "log" in message for message in named), named
        if path.suffix == ".seg":
            damages = store.verify().damages
            assert [damage.path for damage in damages][:1] == [path]
            assert damages[0].offset <= offset
        store.close()
    finally:
        path.write_bytes(original)


def damaged_store(harness, tmp_path, random_sectors=4):
    h = harness(tmp_path / "shop", policy=POLICY)
    long_history(h, marks=11, random_sectors=random_sectors)
    maintain(h.root, h.now)
    h.close()
    return h, [*h.root.glob("streams/*/*/*.seg"), *h.root.glob("runs/*.run")]


def test_a_flipped_bit_is_detected_and_never_served(harness, tmp_path):
    h, paths = damaged_store(harness, tmp_path)
    dice = random.Random(3)
    for path in paths:
        size = path.stat().st_size
        for offset in {0, size - 1, *(dice.randrange(size) for _ in range(2))}:
            flipped_bit_is_never_served(h, path, offset)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_flipped_byte_is_detected_and_never_served(harness, tmp_path):
    """Each byte of the store, the bit by turns: 30,000 looks of 11 ms. Little noise in it, so that most bytes are
    headers, tables and runs, and sealed, merged and open segments all the same."""
    h, paths = damaged_store(harness, tmp_path, random_sectors=1)
    assert any("-" in path.stem for path in paths if path.suffix == ".seg"), "no merged segment"
    for path in paths:
        for offset in range(path.stat().st_size):
            flipped_bit_is_never_served(h, path, offset)


def test_maintenance_leaves_alone_what_another_process_is_writing(harness, tmp_path):
    """The receiver seals and indexes a segment while maintenance, another process, opens the store."""
    harness(tmp_path / "shop").close()
    runs = tmp_path / "shop" / "runs"
    runs.mkdir(exist_ok=True)
    living, dead = (runs / f".000000000001-000000000001.run.{pid}.tmp" for pid in (1, 2**22 + 1))
    for temp in (living, dead):
        temp.touch()
    Maintenance(tmp_path / "shop").close()
    assert living.exists()
    assert not dead.exists()
