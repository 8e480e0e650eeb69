import random

import pytest

from drctl.errors import IntegrityError, Locked, NotFound, OutOfSpace, ProtocolViolation, Refused
from drctl.model.checkpoint import resolve
from drctl.model.group import GroupDisk, Retention
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore
from drctl.store.journal import SealPolicy
from drctl.wire.frame import EXTENT_WRITE, FrameKind, pack


def block(seed, sectors=8):
    return random.Random(seed).randbytes(sectors * 512)


@pytest.fixture
def live(harness, tmp_path):
    h = harness(tmp_path / "shop")
    h.end_sync()
    yield h
    h.close()


def test_a_checkpoint_is_listed_only_when_its_proof_is_durable(live):
    live.write(1, 0, block(1))
    number = live.mark(prove=False)
    live.sync()
    assert live.listed() == []
    live.prove(number)
    assert live.listed() == []
    durable = live.sync()
    assert durable.mark == number
    assert durable.sequence == 1
    assert live.listed() == [(live.epoch, number)]


def test_a_view_is_the_prefix_of_the_log_up_to_its_mark(live):
    live.write(1, 0, block(1))
    first = live.mark(prove=False)
    live.write(1, 4, block(2))
    live.prove(first)
    live.write(2, 9, block(3, 300))
    live.zero(2, 30, 70)
    live.sync_block(1, 2, block(4, 3))
    live.mark()
    live.sync()
    assert len(live.listed()) == 2
    live.check_views()


def test_readers_in_other_processes_see_new_checkpoints(live):
    with_reader = GroupStore.open(live.root)
    assert with_reader.checkpoints() == []
    live.write(1, 0, block(1))
    live.mark()
    live.sync()
    live.check_views(with_reader)
    assert live.listed(with_reader) == [(live.epoch, 1)]
    with_reader.close()


def test_one_writer_only(live):
    with pytest.raises(Locked):
        GroupStore.open(live.root, writer=True)


def test_a_stream_resumes_after_its_last_whole_record(live):
    live.write(1, 0, block(1))
    frames = live.write_frames(1, 0, block(2, 200))
    assert len(frames) == 2
    live.send(frames[0])
    assert live.sync().sequence == 1
    assert live.reopen().sequence == 1
    assert live.position.needs == "nothing"
    live.send(*frames)
    live.mark()
    assert live.sync().sequence == 2
    live.check_views()


def test_an_unknown_epoch_needs_a_full_pass_and_older_checkpoints_stay(live):
    live.write(1, 0, block(1))
    live.mark()
    live.sync()
    position = live.new_epoch("f" * 32)
    assert (position.sequence, position.needs) == (0, "full")
    live.write(1, 0, block(2))
    live.mark(kind="resync")
    live.sync()
    assert [number for _, number in live.listed()] == [1, 2]
    live.check_views()
    assert live.reopen().sequence == 1


def test_the_first_sync_goes_to_the_bases_and_resumes(harness, tmp_path):
    h = harness(tmp_path / "shop")
    assert h.position.needs == "initial"
    h.send(h.control(FrameKind.SYNC_BEGIN, sync="a" * 32, mode="initial", disks={"1": 512 * 512, "2": 512 * 512}))
    h.sync_block(1, 0, block(1))
    h.write(1, 4, block(2))
    h.send(h.control(FrameKind.SYNC_PROGRESS, sync="a" * 32, disk=1, offset=4096))
    durable = h.sync()
    assert (durable.sequence, durable.sync.offset) == (1, 4096)
    position = h.reopen()
    assert (position.sequence, position.sync.disk, position.sync.offset) == (1, 1, 4096)
    assert h.listed() == []
    h.zero(1, 0, 3)
    # The end of the sync and what belongs into the journal, in one batch.
    end = h.control(FrameKind.SYNC_END, sync="a" * 32)
    h.send(end, *h.write_frames(2, 100, block(3)))
    h.mark()
    h.sync()
    assert h.store.info.mode is StoreMode.JOURNAL
    assert h.reopen().sequence == 3
    h.check_views()
    assert (tmp_path / "shop/disks/web.vda/base.raw").read_bytes()[: 12 * 512] == bytes(h.images[1][: 12 * 512])
    h.close()


def test_segments_are_sealed_and_resume_carries_over(harness, tmp_path):
    h = harness(tmp_path / "shop", policy=SealPolicy(size=20_000))
    h.end_sync()
    for index in range(30):
        h.write(1 + index % 2, index * 7 % 500, block(index))
        h.mark()
        h.sync()
    assert len(list(h.root.glob("streams/*/*/*.seg"))) > 4
    assert len(list(h.root.glob("runs/*.run"))) > 3
    h.check_views()
    assert h.reopen().sequence == 30
    assert h.position.last_mark == 30
    h.check_views()
    h.close()


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "flipped"])
def test_the_catalog_is_made_anew(harness, tmp_path, damage):
    h = harness(tmp_path / "shop", policy=SealPolicy(size=20_000))
    h.end_sync()
    for index in range(12):
        h.write(1, index, block(index))
        h.mark()
    h.sync()
    listed = h.listed()
    h.close()
    for path in h.root.glob("catalog.sqlite*"):
        data = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "garbage":
            path.write_bytes(b"no database at all" * 100)
        else:
            path.write_bytes(data[:3000] + bytes(x ^ 0xFF for x in data[3000:9000]) + data[9000:])
    reader = GroupStore.open(h.root)
    assert h.listed(reader) == listed
    reader.close()
    h.open()
    assert h.listed() == listed
    h.check_views()
    h.close()


def test_a_superseded_or_failed_over_store_takes_nothing(live):
    other = GroupStore.open(live.root)
    other.set_generation(2)
    with pytest.raises(Refused):
        live.write(1, 0, block(1))
    with pytest.raises(Refused):
        other.set_generation(1)
    other.set_mode(StoreMode.FAILED_OVER)
    with pytest.raises(Refused):
        live.store.begin_stream("host-a", 2, "e" * 32)
    other.close()


def test_malformed_frames_never_reach_the_journal(live, harness):
    extents = harness.extents
    bad = [
        pack(FrameKind.DATA, live.span(), extents((1, 510, 8, EXTENT_WRITE, 0, 0)), block(1)),
        pack(FrameKind.DATA, live.span(), extents((9, 0, 8, EXTENT_WRITE, 0, 0)), block(1)),
        pack(FrameKind.DATA, live.span(), extents((1, 0, 9, EXTENT_WRITE, 0, 0)), block(1)),
        pack(FrameKind.DATA, live.span(), extents((1, 0, 8, 7, 0, 0)), block(1)),
        pack(FrameKind.MARK, live.span(), None, b"[]"),
        pack(FrameKind.MARK, live.span(), None, b'{"number": "x"}'),
        pack(FrameKind.PROOF, live.span(), None, b"not json"),
    ]
    before = live.store.journal.size
    for frame in bad:
        with pytest.raises(ProtocolViolation):
            live.send(frame)
    assert live.store.journal.size == before


def test_the_limit_refuses_before_writing(live):
    live.store.set_retention(Retention(journal_limit=6000))
    live.write(1, 0, block(1))
    with pytest.raises(OutOfSpace):
        live.write(1, 0, block(2))
    assert live.sync().sequence == 1
    live.store.set_retention(Retention())
    live.write(1, 0, block(2))
    live.mark()
    live.sync()
    live.check_views()


def test_definitions_are_versioned_by_checkpoint(live):
    def define(version, size):
        disks = [{"number": 1, "machine": "web", "target": "vda", "size": size}]
        live.send(live.control(FrameKind.DEFINITION, version=version, disks=disks, machines=[], spec={}))

    define(1, 512 * 512)
    live.write(1, 0, block(1))
    first = live.mark()
    define(2, 1024 * 512)
    live.images[1].extend(bytes(512 * 512))
    live.write(1, 1000, block(2))
    second = live.mark()
    live.sync()
    assert live.store.definition(first)["version"] == 1
    assert live.store.definition()["version"] == 2
    assert [disk.size for disk in live.store.disks(first)] == [512 * 512]
    assert [disk.size for disk in live.store.disks(second)] == [1024 * 512]
    assert live.store.begin_stream("host-a", 1, live.epoch).definition_version == 2
    live.check_views()


def test_tags_and_pins_name_checkpoints(live):
    live.write(1, 0, block(1))
    live.mark(tags=["nightly"])
    live.sync()
    live.store.tag(1, "before-upgrade")
    live.store.tag(1, "before-upgrade")
    view = live.store.view(1, "test-7")
    checkpoint = live.store.checkpoint(1)
    assert checkpoint.tags == ("nightly", "before-upgrade")
    assert checkpoint.pinned
    view.close()
    live.store.unpin("test-7")
    live.store.untag("before-upgrade")
    assert live.store.checkpoint(1).tags == ("nightly",)
    assert not live.store.checkpoint(1).pinned
    with pytest.raises(NotFound):
        live.store.tag(99, "x")
    with pytest.raises(NotFound):
        live.store.untag("before-upgrade")


def test_a_newest_segment_cut_at_every_byte_loses_nothing_acknowledged(harness, tmp_path):
    h = harness(tmp_path / "shop")
    h.end_sync()
    h.write(1, 0, block(1, 1))
    h.mark()
    h.sync()
    (segment,) = h.root.glob("streams/*/*/*.seg")
    durable = segment.stat().st_size
    h.write(1, 1, block(2, 1))
    h.send(*h.write_frames(2, 0, b"\1" * 512 * 130))
    h.mark()
    h.close()
    whole, claim = segment.read_bytes(), (h.root / "tail").read_bytes()
    assert len(whole) - durable < 2500
    for length in range(durable, len(whole)):
        segment.write_bytes(whole[:length])
        (h.root / "tail").write_bytes(claim)
        store = GroupStore.open(h.root, writer=True)
        assert store.begin_stream("host-a", 1, h.epoch).sequence >= 1
        assert store.torn_bytes == length - segment.stat().st_size
        assert [c.number for c in store.checkpoints()][:1] == [1]
        if store.torn_bytes == 0:
            h.check_views(store)
        store.close()


def test_a_newest_segment_cut_below_what_was_acknowledged_is_named(harness, tmp_path):
    h = harness(tmp_path / "shop")
    h.end_sync()
    h.write(1, 0, block(1, 1))
    h.mark()
    h.sync()
    h.close()
    (segment,) = h.root.glob("streams/*/*/*.seg")
    whole = segment.read_bytes()
    for length in range(len(whole)):
        segment.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match=str(segment)):
            GroupStore.open(h.root, writer=True)
    segment.write_bytes(whole)
    h.open()
    h.check_views()
    h.close()


def test_a_new_disk_gets_a_base(live):
    disks = [
        {"number": 1, "machine": "web", "target": "vda", "size": 512 * 512},
        {"number": 3, "machine": "new", "target": "vda", "size": 4096},
    ]
    live.send(live.control(FrameKind.DEFINITION, version=1, disks=disks, machines=[], spec={}))
    assert GroupDisk(3, "new", "vda", 4096) in live.store.info.disks
    assert (live.root / "disks/new.vda/base.raw").stat().st_size == 4096


def test_a_look_at_few_checkpoints_finds_what_a_look_at_all_does(live):
    h = live
    numbers = [h.mark(tags=["nightly"] if index % 3 == 0 else []) for index in range(7)]
    unproven = h.mark(prove=False)
    h.sync()
    h.store.tag(numbers[1], "before-upgrade")
    h.store.untag("nightly")
    h.store.tag(numbers[3], "nightly")
    every = h.store.checkpoints()
    assert h.store.count() == len(every) == len(numbers)
    assert (h.store.oldest().number, h.store.newest().number) == (numbers[0], numbers[-1])
    assert h.store.checkpoints(2) == every[-2:]
    assert [moment.number for moment in h.store.moments()] == numbers
    now = every[-1].time + 1
    selectors = ["latest", f"#{numbers[2]}", "-11s", "tag:before-upgrade", "tag:nightly", "-1s"]
    assert [h.store.choose(each, now) for each in selectors] == [resolve(each, every, now) for each in selectors]
    for each in (f"#{unproven}", "-1h", "tag:other"):
        with pytest.raises(NotFound):
            h.store.choose(each, now)
    with pytest.raises(ValueError, match="names no checkpoint"):
        h.store.choose("yesterday", now)
