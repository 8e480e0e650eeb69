"""Pre-seeded copies: taken as bases, or refused with nothing changed; killed at any step, they are taken all the same."""

from __future__ import annotations

import os
import subprocess
from contextlib import closing, contextmanager

import pytest

from drctl.appliance.replica import seed_files
from drctl.appliance.replica.seed_service import SeedService, pristine
from drctl.errors import NotFound, OutOfSpace, PreconditionFailed, Refused, WrongPhase
from drctl.model.group import Retention
from drctl.store import atomic
from drctl.store.group_info import StoreMode, read_info
from drctl.store.group_store import GroupStore
from drctl.store.initial import read_note

MIB = 2**20
DISKS = [
    {"number": 0, "machine": "web-1", "target": "vda", "size": 2 * MIB},
    {"number": 1, "machine": "web-1", "target": "vdb", "size": MIB},
]


class Held:
    def __init__(self):
        self.log = []

    @contextmanager
    def held(self, group):
        self.log.append(f"hold {group}")
        yield
        self.log.append(f"let go {group}")


class Place:
    def __init__(self, directory):
        self.directory = directory
        self.root = directory / "store" / "web"
        GroupStore.create(self.root, "web", 1, (), Retention()).close()
        self.held = Held()
        self.service = SeedService(directory / "store", self.held)

    def file(self, name, size=2 * MIB, fill=b"seed"):
        path = self.directory / name
        data = (fill * (size // len(fill) + 1))[:size]
        path.write_bytes(data)
        return path

    def take(self, *seeds, **params):
        named = [{"disk": disk, "path": str(path)} for disk, path in seeds]
        order = {"group": "web", "disks": DISKS, "seeds": named, **params}
        return self.service.take(order, lambda _: None)

    def base(self, disk):
        return self.root / "disks" / disk / "base.raw"


@pytest.fixture
def place(tmp_path):
    yield Place(tmp_path)
    atomic.set_fault(None)


def test_a_raw_file_becomes_the_base_and_stays_where_it_is(place):
    path = place.file("a.raw")
    told = place.take(("web-1.vda", path))
    assert told["seeds"][0]["way"] in ("copy", "clone")
    assert told["unseeded"] == ["web-1.vdb"]
    assert place.base("web-1.vda").read_bytes() == path.read_bytes()
    info = read_info(place.root)
    assert info.mode is StoreMode.JOURNAL
    assert place.held.log == ["hold web", "let go web"]
    # What comes now is compared and goes through the journal.
    with closing(GroupStore.open(place.root, writer=True)) as store:
        assert store.begin_stream("alpha-1", 1, "0" * 31 + "1").needs == "full"
        assert store.checkpoints() == []


def test_a_file_that_may_be_used_up_is_moved(place):
    path = place.file("a.raw")
    data = path.read_bytes()
    told = place.take(("web-1.vda", path), give_up=True)
    assert told["seeds"][0]["way"] == "move"
    assert not path.exists()
    assert place.base("web-1.vda").read_bytes() == data
    again = place.take(("web-1.vda", path), give_up=True)
    assert again["seeds"][0]["way"] == "move"
    assert place.base("web-1.vda").read_bytes() == data


def test_a_qcow2_image_is_unpacked(place):
    raw = place.file("a.raw")
    path = place.directory / "web-1.vda.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, path], check=True)
    place.take(("web-1.vda", path), give_up=True)
    assert path.exists()
    assert place.base("web-1.vda").read_bytes() == raw.read_bytes()


@pytest.mark.parametrize(
    ("seed", "error", "text"),
    [
        (("web-1.vda", "small.raw"), Refused, "small.raw has 1048576 bytes .* web-1.vda has 2097152"),
        (("web-9.vda", "good.raw"), NotFound, "web-9.vda"),
        (("web-1.vda", "none.raw"), NotFound, "there is no"),
        (("web-1.vda", "fake.raw"), PreconditionFailed, "qcow2 image by its content"),
        (("web-1.vda", "text.qcow2"), PreconditionFailed, "can't be used"),
        (("web-1.vda", "."), PreconditionFailed, "neither a file"),
    ],
)
def test_what_is_no_seed_is_named_and_nothing_is_done(place, seed, error, text):
    place.file("small.raw", MIB)
    good = place.file("good.raw")
    place.file("fake.raw", fill=b"QFI\xfb")
    place.file("text.qcow2", fill=b"text")
    before = sorted(place.root.rglob("*"))
    with pytest.raises(error, match=text):
        place.take(("web-1.vdb", place.file("b.raw", MIB)), (seed[0], place.directory / seed[1]))
    assert read_info(place.root).mode is StoreMode.INITIAL
    assert sorted(place.root.rglob("*")) == before
    assert good.exists()


def test_a_dry_run_tells_and_does_nothing(place):
    path = place.file("a.raw")
    told = place.take(("web-1.vda", path), dry_run=True, give_up=True)
    assert told["seeds"][0] | {"bytes": 0} == {"disk": "web-1.vda", "path": str(path), "way": "move", "bytes": 0}
    assert path.exists()
    assert place.held.log == []


def test_two_seeds_for_one_disk_and_relative_paths_are_refused(place):
    path = place.file("a.raw")
    with pytest.raises(Refused, match="two seeds"):
        place.take(("web-1.vda", path), ("web-1.vda", path))
    with pytest.raises(Refused, match="absolute"):
        place.take(("web-1.vda", "a.raw"))


def test_a_replica_is_not_replaced(place):
    with closing(GroupStore.open(place.root, writer=True)) as store:
        store.set_mode(StoreMode.JOURNAL)
        store.begin_stream("alpha-1", 1, "0" * 31 + "1")
        store.sync()
    assert not pristine(place.root)
    with pytest.raises(WrongPhase, match="has a replica"):
        place.take(("web-1.vda", place.file("a.raw")))


def test_no_room_is_told_before_anything_is_copied(place, monkeypatch):
    monkeypatch.setattr(seed_files, "free_at", lambda _: 1000)
    monkeypatch.setattr(seed_files, "_clones", lambda _: False)
    with pytest.raises(OutOfSpace, match="1000"):
        place.take(("web-1.vda", place.file("a.raw")))
    assert read_info(place.root).mode is StoreMode.INITIAL


def test_a_large_disk_without_a_seed_does_not_fit_the_journal(place):
    large = {"number": 2, "machine": "web-1", "target": "vdc", "size": 1 << 50}
    with pytest.raises(OutOfSpace, match=r"web-1\.vdc without a seed"):
        place.take(("web-1.vda", place.file("a.raw")), disks=[*DISKS, large])


def test_what_a_broken_first_sync_had_brought_is_forgotten(place):
    with closing(GroupStore.open(place.root, writer=True)) as store:
        store.begin_stream("alpha-1", 1, "0" * 31 + "1")
        store.sync()
    assert read_note(place.root) is not None
    place.take(("web-1.vda", place.file("a.raw")))
    with closing(GroupStore.open(place.root, writer=True)) as store:
        assert store.begin_stream("alpha-1", 1, "0" * 31 + "1").needs == "full"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("give_up", [True, False])
def test_killed_at_any_step_it_is_taken_the_next_time(tmp_path, give_up):
    steps = 0
    for die_at in range(1, 100):
        directory = tmp_path / str(die_at)
        directory.mkdir()
        place = Place(directory)
        path = place.file("a.raw", fill=os.urandom(64))
        data = path.read_bytes()
        steps = 0

        def fault(_name, die_at=die_at):
            nonlocal steps
            steps += 1
            if steps == die_at:
                raise Killed

        atomic.set_fault(fault)
        try:
            place.take(("web-1.vda", path), give_up=give_up)
        except Killed:
            atomic.set_fault(None)
            place.take(("web-1.vda", path), give_up=give_up)
        atomic.set_fault(None)
        assert place.base("web-1.vda").read_bytes() == data
        assert read_info(place.root).mode is StoreMode.JOURNAL
        if steps < die_at:
            break
    assert steps > 8
