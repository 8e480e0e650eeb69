"""The ring: what the tap puts in comes out whole and in order, through wraps, kills and full rings."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import IntegrityError, Locked, OutOfSpace, UnsupportedFormat
from drctl.model.extent import BLOCK, Extent
from drctl.model.identity import StreamIdentity
from drctl.store import ring as ring_module
from drctl.store.ring import Ring, dirty_map_path, dirty_map_size, exports_path, read_exports, write_exports
from drctl.store.ring_reader import RingReader
from drctl.store.ring_writer import DROPPED, RingWriter
from drctl.wire.ring import (
    DESCRIPTOR_SIZE,
    HEADER_SIZE,
    MAX_DISKS,
    RECORD_WRITE,
    RECORD_ZERO,
    DiskWord,
    OrderReason,
    Word,
)

EPOCH = "0123456789abcdef" * 2
IDENTITY = StreamIdentity("web", "alpha-1", 3, EPOCH)
#: Numbers of a group whose first disks were removed: not 0, not in a row.
DISKS = {4: 1 << 20, 300: (1 << 16) + 512}
CAPACITY = 64 * 1024
SLOTS = 16


class Pair:
    """A writer and a reader of one ring, each with its own mapping, as in two processes."""

    def __init__(self, path: Path, capacity: int = CAPACITY, slots: int = SLOTS) -> None:
        self.path = path
        Ring.create(path, IDENTITY, DISKS, capacity, slots).close()
        self.reopen()

    def reopen(self) -> None:
        """As after a kill -9: what the dead tap had mapped is gone, the file is as it left it."""
        self.writing = Ring.open(self.path, writer=True)
        self.writer = RingWriter(self.writing)
        self.reading = Ring.open(self.path)
        self.reader = RingReader(self.reading)

    def kill(self) -> None:
        """The writer vanishes without a word; its mapping goes with the garbage."""
        fcntl.flock(self.writing._descriptor, fcntl.LOCK_UN)

    def word(self, word: Word) -> int:
        return self.reading.words[word]

    def read(self, **limits: int) -> list[tuple[int, int, int, int, bytes]]:
        """All that is published and not released: (sequence, disk, kind, offset, data or length)."""
        found, after = [], self.reader.released
        while batch := self.reader.batch(after, **limits):
            for index, row in enumerate(batch.descriptors.tolist()):
                data = bytes(batch.payload(index)) if row[5] == RECORD_WRITE else row[3] * 512
                found.append((row[0], row[4], row[5], row[2] * 512, data))
            after = batch.last
        return found


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "web.ring")


def put(pair: Pair, count: int, length: int = 4096) -> list[int]:
    found = [pair.writer.append(4, n * BLOCK, bytes([n % 251]) * length) for n in range(count)]
    pair.writer.publish()
    return found


def test_a_ring_says_whose_it_is(pair: Pair) -> None:
    ring = pair.reading
    assert (ring.generation, ring.epoch, ring.disks) == (3, EPOCH, DISKS)
    assert (ring.slots, ring.data_capacity) == (SLOTS, CAPACITY)
    assert ring.data_at % 4096 == 0
    assert (pair.path.stat().st_mode & 0o777) == 0o600


def test_a_new_ring_is_unordered(tmp_path: Path) -> None:
    """Or a mark could be cut before the supervisor has proven anything."""
    ring = Ring.create(tmp_path / "a.ring", IDENTITY, DISKS, CAPACITY, SLOTS)
    assert ring.words[Word.ORDER_STAMP] != ring.words[Word.ORDERED_STAMP]


def test_records_come_out_as_they_went_in(pair: Pair) -> None:
    pair.writer.now = 123456789
    assert pair.writer.append(4, 8192, b"a" * 1536) == 1
    assert pair.writer.append_zeroes(300, 0, 65536) == 2
    assert pair.writer.append(300, 512, b"b" * 512) == 3
    pair.writer.publish()
    assert pair.read() == [
        (1, 4, RECORD_WRITE, 8192, b"a" * 1536),
        (2, 300, RECORD_ZERO, 0, 65536),
        (3, 300, RECORD_WRITE, 512, b"b" * 512),
    ]
    batch = pair.reader.batch(0)
    assert batch is not None
    assert (batch.first, batch.last, len(batch)) == (1, 3, 3)
    assert bytes(batch.data) == b"a" * 1536 + b"b" * 512
    assert batch.starts.tolist() == [0, 1536, 1536]
    assert set(batch.descriptors["time"].tolist()) == {123456789}
    assert pair.reading.disk_word(300, DiskWord.WRITES) == 2
    assert pair.reading.disk_word(300, DiskWord.BYTES) == 65536 + 512


def test_nothing_is_seen_before_it_is_published(pair: Pair) -> None:
    pair.writer.append(4, 0, b"x" * 512)
    assert pair.reader.batch(0) is None
    assert pair.writer.publish()
    assert not pair.writer.publish()
    assert len(pair.read()) == 1


def test_batches_keep_to_their_limits_and_to_whole_records(pair: Pair) -> None:
    put(pair, 10)
    sizes = []
    after = 0
    while batch := pair.reader.batch(after, max_bytes=3 * 4096 + 100):
        sizes.append(len(batch))
        after = batch.last
    assert sizes == [3, 3, 3, 1]
    assert len(pair.reader.batch(0, max_records=2)) == 2  # type: ignore[arg-type]
    assert len(pair.reader.batch(0, max_bytes=1)) == 1  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds"):
        pair.reader.batch(11)


def test_release_never_goes_back_nor_ahead(pair: Pair) -> None:
    put(pair, 4)
    pair.reader.release(3)
    pair.reader.release(2)
    assert pair.reader.released == 3
    with pytest.raises(ValueError, match="newest"):
        pair.reader.release(5)
    with pytest.raises(ValueError, match="holds"):
        pair.reader.batch(2)


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 24), st.integers(0, 100)),
        st.tuples(st.just("zero"), st.integers(1, 100), st.integers(0, 100)),
        st.tuples(st.just("release"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("kill"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(_STEPS, st.integers(1, 20000))
def test_every_acknowledged_write_is_in_the_ring_or_noted_as_dirty(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]], max_bytes: int
) -> None:
    """The oracle is a list; the ring wraps, fills, drops, recovers and loses its writer on the way."""
    pair = Pair(tmp_path_factory.mktemp("ring") / "web.ring", 16 * 4096, 12)
    log: list[tuple[int, int, int, int, object]] = []
    dropped: set[int] = set()
    for number, (step, amount, place) in enumerate(steps):
        if step == "release":
            pair.reader.release(min(pair.reader.released + amount, pair.reader.published))
        elif step == "kill":
            pair.kill()
            pair.reopen()
        else:
            length = amount * 512
            offset = place * 512
            if step == "write":
                data: object = random.Random(number).randbytes(length)
                sequence = pair.writer.append(4, offset, data)  # type: ignore[arg-type]
            else:
                data = length
                sequence = pair.writer.append_zeroes(4, offset, length)
            pair.writer.publish()
            if sequence == DROPPED:
                dropped.update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
                assert pair.word(Word.DROPPING) == 1
            else:
                log.append((sequence, 4, RECORD_WRITE if step == "write" else RECORD_ZERO, offset, data))
    assert [entry[0] for entry in log] == list(range(1, len(log) + 1))
    assert pair.read(max_bytes=max_bytes) == log[pair.reader.released :]
    assert noted(pair, 4) == dropped
    pair.kill()


def noted(pair: Pair, disk: int) -> set[int]:
    """Blocks in both maps of a disk."""
    found: set[int] = set()
    for _ in range(2):
        request = pair.reader.request_drain()
        assert not pair.reader.drain_ready(request)
        assert pair.writer.poll(1)
        assert pair.reader.drain_ready(request)
        for extent in pair.reader.dirty_extents(disk):
            found.update(range(extent.offset // BLOCK, -(-extent.end // BLOCK)))
    return found


# --- adoption


def test_adoption_goes_on_where_the_dead_tap_had_published(pair: Pair) -> None:
    put(pair, 3)
    pair.writer.connected(4)
    stamp = pair.word(Word.ORDER_STAMP)
    pair.writer.append(4, 0, b"never published" + bytes(497))
    pair.writing.words[Word.DATA_HEAD] = 999_999  # killed between two stores
    pair.kill()
    pair.reopen()
    assert pair.word(Word.ORDER_STAMP) == stamp + 1
    assert pair.word(Word.LAST_REASON) == OrderReason.TAP_RESTARTED
    assert pair.reading.disk_word(4, DiskWord.CONNECTION) == 0
    assert pair.writer.append(4, 0, b"z" * 512) == 4
    pair.writer.publish()
    assert [entry[0] for entry in pair.read()] == [1, 2, 3, 4]
    assert pair.read()[3][4] == b"z" * 512


def test_adoption_of_a_fully_released_ring_does_not_forget_its_sequence(pair: Pair) -> None:
    put(pair, 5)
    pair.reader.release(5)
    pair.kill()
    pair.reopen()
    assert put(pair, 2) == [6, 7]
    assert [entry[0] for entry in pair.read()] == [6, 7]


def test_adoption_keeps_dropping_and_its_maps(pair: Pair) -> None:
    assert DROPPED in put(pair, SLOTS + 2)
    pair.kill()
    pair.reopen()
    assert pair.writer.append(4, 100 * BLOCK, bytes(512)) == DROPPED
    assert noted(pair, 4) == {SLOTS - 1, SLOTS, SLOTS + 1, 100}


def test_a_damaged_last_descriptor_is_not_adopted(pair: Pair) -> None:
    put(pair, 3)
    pair.writing.memory[HEADER_SIZE + 3 * DESCRIPTOR_SIZE + 16] ^= 1
    pair.kill()
    with pytest.raises(IntegrityError, match="record 3"):
        pair.reopen()


def test_words_that_break_the_law_are_not_adopted(pair: Pair) -> None:
    put(pair, 3)
    pair.writing.words[Word.RELEASED] = 9
    pair.kill()
    with pytest.raises(IntegrityError, match="released 9"):
        pair.reopen()


def test_a_ring_has_one_writer(pair: Pair) -> None:
    with pytest.raises(Locked):
        Ring.open(pair.path, writer=True)


def test_connection_numbers_are_never_reused_under_an_epoch(pair: Pair) -> None:
    assert [pair.writer.connected(4), pair.writer.connected(300)] == [1, 2]
    assert pair.reading.disk_word(300, DiskWord.CONNECTION) == 2
    pair.writer.disconnected(4)
    assert pair.reading.disk_word(4, DiskWord.CONNECTION) == 0
    assert pair.word(Word.LAST_REASON) == OrderReason.CONNECTION_LOST
    pair.kill()
    pair.reopen()
    assert pair.writer.connected(4) == 3


def test_a_goodbye_is_no_loss_and_all_else_is_one(pair: Pair) -> None:
    """Whether writes of a disk may have passed the ring by is told by ENDED and LOSSES together."""
    before = pair.word(Word.LOSSES)
    pair.writer.poll(77)
    pair.writer.connected(4)
    put(pair, 1)
    pair.writer.publish()
    assert pair.reading.disk_word(4, DiskWord.WRITTEN) == 77
    assert pair.reading.disk_word(300, DiskWord.WRITTEN) == 0
    pair.writer.poll(88)
    pair.writer.disconnected(4)
    assert (pair.word(Word.LOSSES), pair.reading.disk_word(4, DiskWord.ENDED)) == (before, 0), "not told yet"
    pair.writer.ended(4, goodbye=True)
    assert (pair.word(Word.LOSSES), pair.reading.disk_word(4, DiskWord.ENDED)) == (before, 88)
    pair.writer.connected(4)
    assert pair.reading.disk_word(4, DiskWord.ENDED) == 0
    pair.writer.disconnected(4)
    pair.writer.ended(4, goodbye=False)
    assert (pair.word(Word.LOSSES), pair.reading.disk_word(4, DiskWord.ENDED)) == (before + 1, 0)
    for reason in (OrderReason.WRITE_REFUSED, OrderReason.RING_FULL):
        pair.writer.order_lost(reason)
    assert pair.word(Word.LOSSES) == before + 3
    pair.kill()
    pair.reopen()
    assert pair.word(Word.LOSSES) == before + 4, "a tap that died may have died before a write came"


# --- a full ring


@pytest.mark.parametrize(("count", "length"), [(SLOTS + 3, 512), (20, 4096)], ids=["slots", "bytes"])
def test_a_full_ring_drops_notes_and_loses_order_once(pair: Pair, count: int, length: int) -> None:
    stamp = pair.word(Word.ORDER_STAMP)
    found = put(pair, count, length)
    fitted = found.index(DROPPED)
    assert fitted == min(SLOTS - 1, CAPACITY // length)
    assert set(found[fitted:]) == {DROPPED}
    assert pair.word(Word.ORDER_STAMP) == stamp + 1
    assert pair.word(Word.LAST_REASON) == OrderReason.RING_FULL
    assert (pair.word(Word.DROPPING), pair.word(Word.DROPPED)) == (1, count - fitted)
    assert len(pair.read()) == fitted
    assert noted(pair, 4) == set(range(fitted, count))


def test_dropping_ends_when_half_is_free_and_not_before(pair: Pair) -> None:
    put(pair, 20)
    assert pair.word(Word.PUBLISHED) == 15
    pair.reader.release(6)
    pair.writer.poll(1)
    assert pair.word(Word.DROPPING) == 1
    assert pair.writer.append(4, 0, bytes(512)) == DROPPED
    pair.reader.release(8)
    assert pair.writer.poll(1)
    assert pair.word(Word.DROPPING) == 0
    assert pair.writer.append(4, 0, bytes(512)) == 16


def test_a_record_too_large_for_the_ring_is_dropped_whole(pair: Pair) -> None:
    assert pair.writer.append(4, 0, bytes(CAPACITY + 512)) == DROPPED
    assert noted(pair, 4) == set(range(17))


def test_drains_swap_the_maps_and_clear_one(pair: Pair) -> None:
    put(pair, 18)
    request = pair.reader.request_drain()
    pair.writer.poll(1)
    assert pair.reader.drain_ready(request)
    assert list(pair.reader.dirty_extents(4)) == [Extent(15 * BLOCK, 3 * BLOCK)]
    pair.writer.append(4, 200 * BLOCK + 100 * 512, bytes(512))
    assert list(pair.reader.dirty_extents(4)) == [Extent(15 * BLOCK, 3 * BLOCK)]
    assert pair.reader.dirty_bytes(4) == 4 * BLOCK
    pair.reader.clear(4)
    assert list(pair.reader.dirty_extents(4)) == []
    pair.reader.request_drain()
    pair.writer.poll(1)
    assert list(pair.reader.dirty_extents(4)) == [Extent(212 * BLOCK, BLOCK)]


def test_a_swap_that_a_kill_cut_in_two_is_not_undone(pair: Pair) -> None:
    put(pair, 18)
    request = pair.reader.request_drain()
    assert pair.reader.request_drain() == request, "one that waits is not counted twice"
    pair.writing.words[Word.ACTIVE_MAP] ^= 1  # the tap got so far, then it was killed
    pair.kill()
    pair.reopen()
    assert pair.writer.poll(1)
    assert pair.reader.drain_ready(request)
    assert list(pair.reader.dirty_extents(4)) == [Extent(15 * BLOCK, 3 * BLOCK)]


def test_dirty_extents_end_with_the_disk(pair: Pair) -> None:
    put(pair, 20)
    pair.writer.append(300, DISKS[300] - 512, bytes(512))
    pair.reader.request_drain()
    pair.writer.poll(1)
    assert list(pair.reader.dirty_extents(300)) == [Extent(16 * BLOCK, 512)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 40)), max_size=12))
def test_dirty_bits_cover_exactly_the_blocks_written(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    pair = Pair(tmp_path_factory.mktemp("ring") / "web.ring", 4096, 2)
    put(pair, 2)
    expected = {1}
    for first, count in ranges:
        pair.writer.append_zeroes(4, first * BLOCK, count * BLOCK) if first + count <= 256 else None
        expected |= set(range(first, first + count)) if first + count <= 256 else set()
    pair.reader.request_drain()
    pair.writer.poll(1)
    extents = list(pair.reader.dirty_extents(4))
    assert {n for e in extents for n in range(e.offset // BLOCK, e.end // BLOCK)} == expected
    assert all(one.end < two.offset for one, two in pairwise(extents))
    pair.kill()


# --- damage


def test_a_damaged_record_is_named_and_not_handed_out(pair: Pair) -> None:
    put(pair, 5)
    at = pair.writing.data_at + 2 * 4096 + 77
    pair.writing.memory[at] ^= 0x40
    with pytest.raises(IntegrityError, match="data of record 3"):
        pair.reader.batch(0)
    pair.writing.memory[at] ^= 0x40
    pair.writing.memory[HEADER_SIZE + 4 * DESCRIPTOR_SIZE + 8] ^= 1
    with pytest.raises(IntegrityError, match="descriptor of record 4"):
        pair.reader.batch(0)


@pytest.mark.parametrize("at", [0, 4095, 65536, 3 * 65536 + 100, 256 * 1024 - 4096, 256 * 1024 - 1])
def test_a_long_record_overwritten_at_an_edge_is_found_out(tmp_path: Path, at: int) -> None:
    """Its checksum is of samples; what overwrites a record comes over one of its edges."""
    pair = Pair(tmp_path / "web.ring", 1 << 20)
    pair.writer.append(4, 0, random.Random(1).randbytes(256 * 1024))
    pair.writer.publish()
    assert pair.reader.batch(0) is not None
    pair.writing.memory[pair.writing.data_at + at] ^= 1
    with pytest.raises(IntegrityError, match="data of record 1"):
        pair.reader.batch(0)


def test_a_slot_of_another_round_is_found_out(pair: Pair) -> None:
    put(pair, 3)
    memory = pair.writing.memory
    at = HEADER_SIZE + DESCRIPTOR_SIZE
    memory[at + DESCRIPTOR_SIZE : at + 2 * DESCRIPTOR_SIZE] = bytes(memory[at : at + DESCRIPTOR_SIZE])
    with pytest.raises(IntegrityError, match="other records"):
        pair.reader.batch(0)


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(8192)])
def test_what_is_no_ring_is_not_opened(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ring"
    path.write_bytes(content)
    with pytest.raises(UnsupportedFormat):
        Ring.open(path)


def test_a_cut_ring_is_not_opened(pair: Pair) -> None:
    os.truncate(pair.path, pair.path.stat().st_size - 4096)
    with pytest.raises(IntegrityError, match="header says"):
        Ring.open(pair.path)


# --- files


def test_a_full_file_system_is_told_at_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write into a hole of a full tmpfs would be SIGBUS in the tap."""

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(ring_module.os, "posix_fallocate", full)
    with pytest.raises(OutOfSpace):
        Ring.create(tmp_path / "a.ring", IDENTITY, DISKS, CAPACITY, SLOTS)
    assert list(tmp_path.iterdir()) == []


def test_all_room_is_taken_at_creation(pair: Pair) -> None:
    for path in (pair.path, dirty_map_path(pair.path, 4, 0)):
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 0


@pytest.mark.parametrize(
    ("disks", "capacity", "slots"),
    [({}, 4096, 2), (dict.fromkeys(range(MAX_DISKS + 1), 4096), 4096, 2), ({0: 1}, 4096, 1), ({0: 1}, 5000, 2)],
)
def test_impossible_rings_are_not_made(tmp_path: Path, disks: dict[int, int], capacity: int, slots: int) -> None:
    with pytest.raises(ValueError, match="can't be made"):
        Ring.create(tmp_path / "a.ring", IDENTITY, disks, capacity, slots)


def test_the_largest_number_of_disks_fits_the_header(tmp_path: Path) -> None:
    disks = {7 * n: 4096 * (n + 1) for n in range(MAX_DISKS)}
    assert Ring.create(tmp_path / "a.ring", IDENTITY, disks, 4096, 2).disks == disks


def test_creation_replaces_an_older_ring_and_removal_leaves_nothing(pair: Pair) -> None:
    put(pair, 20)
    write_exports(exports_path(pair.path), {"vm.vda": (4, 1 << 20)})
    ring = Ring.create(pair.path, IDENTITY, DISKS, CAPACITY, SLOTS)
    assert ring.words[Word.PUBLISHED] == 0
    assert not any(dirty_map_path(pair.path, 4, 0).read_bytes())
    Ring.remove(pair.path)
    assert list(pair.path.parent.iterdir()) == []


def test_a_ring_is_amended_with_its_records(pair: Pair) -> None:
    """A disk grows, one comes, one goes: what is in the ring stays, and so do the words of disks that stay."""
    put(pair, 3)
    pair.writer.publish()
    writes = pair.reading.disk_word(4, DiskWord.WRITES)
    with pytest.raises(Locked):
        Ring.amend(pair.path, {4: 8 << 20})
    pair.kill()
    size = DISKS[4] * 2
    Ring.amend(pair.path, {4: size, 9: 4096})
    pair.reopen()
    assert pair.reading.disks == {4: size, 9: 4096}
    assert pair.reading.disk_word(4, DiskWord.WRITES) == writes
    assert pair.reading.disk_word(9, DiskWord.WRITES) == 0
    assert dirty_map_path(pair.path, 4, 0).stat().st_size == dirty_map_size(size)
    assert pair.word(Word.PUBLISHED) == 3
    assert len(pair.read()) == 3
    put(pair, 1)
    pair.writer.publish()
    assert pair.word(Word.PUBLISHED) == 4


def test_exports_survive_the_round_trip_and_garbage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "web.ring.json"
    write_exports(path, {"web.vda": (4, 1 << 20), "db.vdb": (300, 512)})
    assert read_exports(path) == {"web.vda": (4, 1 << 20), "db.vdb": (300, 512)}
    for garbage in ("", "[]", '{"exports": 3}', '{"exports": {"a": {}}}'):
        path.write_text(garbage)
        with pytest.raises(UnsupportedFormat, match=r"web\.ring\.json"):
            read_exports(path)


def test_the_tap_loads_neither_numpy_nor_asyncio() -> None:
    program = "import sys, drctl.replication.tap; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "asyncio", "logging", "msgspec", "argparse", "ssl", "subprocess", "threading"} & set(loaded)
