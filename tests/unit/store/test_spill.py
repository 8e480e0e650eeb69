"""A spill's files: what was written is read, what is torn is cut, what is another ring's is removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from drctl.errors import IntegrityError, OutOfSpace
from drctl.store import spill as spill_module
from drctl.store.spill import HEADER, Spill, SpillIdentity
from drctl.wire import frame
from drctl.wire.frame import EXTENT_LAYOUT, EXTENT_WRITE, FrameKind, Parts, Span

EPOCH = "0123456789abcdef" * 2
IDENTITY = SpillIdentity(3, EPOCH, bytes(range(32)))
KIB = 1024


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(spill_module, "SMALLEST_SEGMENT", 16 * KIB)
    monkeypatch.setattr(spill_module, "CHUNK", 8 * KIB)


def frames(first: int, last: int, *, partial: bool = False) -> list[Parts]:
    """One frame per record, of 2 KiB each."""
    made = []
    for number in range(first, last + 1):
        table = EXTENT_LAYOUT.pack(number, 4, 1, EXTENT_WRITE, 0, 0, 0)
        span = Span(3, EPOCH, number, number, partial)
        made.append(frame.pack_parts(FrameKind.DATA, span, table, bytes([number]) * 2048, None))
    return made


def put(spill: Spill, first: int, last: int) -> None:
    spill.added(spill.write(frames(first, last), first, last))


def numbers(spill: Spill) -> list[int]:
    """All that can be read, in order."""
    found, at = [], spill.floor
    while (chunk := spill.chunk_after(at)) is not None:
        for header, whole in frame.split(memoryview(spill.read(chunk)), "read"):
            found.append(header.last_sequence)
            assert bytes(frame.payload_of(header, whole[frame.HEADER_SIZE :], "read"))[:1] == bytes([found[-1]])
        at = chunk.last
    return found


def opened(path: Path, identity: SpillIdentity = IDENTITY, limit: int = 256 * KIB) -> Spill:
    return Spill(path / "spill", identity, limit)


def test_what_was_written_is_read_also_by_a_successor(tmp_path):
    spill = opened(tmp_path)
    for first in range(1, 40, 3):
        put(spill, first, first + 2)
    assert numbers(spill) == list(range(1, 40))
    assert len(list((tmp_path / "spill").iterdir())) > 3
    again = opened(tmp_path)
    assert (again.floor, again.upto) == (0, 39)
    assert numbers(again) == list(range(1, 40))
    put(again, 40, 41)
    assert numbers(opened(tmp_path)) == list(range(1, 42))


def test_what_is_released_gives_its_room_back(tmp_path):
    spill = opened(tmp_path)
    for first in range(1, 40, 3):
        put(spill, first, first + 2)
    before = spill.used
    spill.release(20, 0)
    assert spill.used < before
    assert numbers(spill)[0] <= 21
    assert spill.floor <= 20
    spill.release(39, 1)
    assert spill.empty
    assert spill.used == 0
    assert not list((tmp_path / "spill").iterdir())


def test_a_torn_end_is_cut_at_every_byte(tmp_path):
    spill = opened(tmp_path)
    put(spill, 1, 3)
    [path] = (tmp_path / "spill").iterdir()
    data = path.read_bytes()
    step = (len(data) - HEADER.size) // 3
    for size in [*range(0, HEADER.size + 70, 7), *range(HEADER.size, len(data) + 1, 61)]:
        path.write_bytes(data[:size])
        whole = max(0, size - HEADER.size) // step
        torn = opened(tmp_path)
        assert numbers(torn) == list(range(1, whole + 1)), size
        torn.remove()
    path.write_bytes(data)
    assert numbers(opened(tmp_path)) == [1, 2, 3]


def test_a_record_in_pieces_is_whole_or_not_there(tmp_path):
    spill = opened(tmp_path)
    spill.added(spill.write([*frames(1, 1), *frames(2, 2, partial=True), *frames(2, 2)], 1, 2))
    [path] = (tmp_path / "spill").iterdir()
    assert opened(tmp_path).upto == 2
    os.truncate(path, path.stat().st_size - 1)
    again = opened(tmp_path)
    assert again.upto == 1
    assert numbers(again) == [1]


def test_a_hole_in_the_middle_costs_what_is_before_it(tmp_path):
    spill = opened(tmp_path)
    for first in range(1, 40, 3):
        put(spill, first, first + 2)
    second = sorted((tmp_path / "spill").iterdir())[1]
    data = bytearray(second.read_bytes())
    data[HEADER.size] ^= 0xFF
    second.write_bytes(data)
    again = opened(tmp_path)
    assert again.upto == 39
    assert again.floor > 1
    assert numbers(again) == list(range(again.floor + 1, 40))


@pytest.mark.parametrize(
    "other",
    [
        SpillIdentity(3, "f" * 32, IDENTITY.key),
        SpillIdentity(4, EPOCH, IDENTITY.key),
        SpillIdentity(3, EPOCH, bytes(32)),
    ],
)
def test_another_rings_is_removed(tmp_path, other):
    put(opened(tmp_path), 1, 3)
    assert opened(tmp_path, other).empty
    assert not list((tmp_path / "spill").iterdir())


def test_a_file_that_is_none_is_left_alone(tmp_path):
    (tmp_path / "spill").mkdir()
    for name in ("README", "x.spill"):
        (tmp_path / "spill" / name).write_text("mine")
    opened(tmp_path).remove()
    assert (tmp_path / "spill" / "README").exists()
    assert (tmp_path / "spill" / "x.spill").exists()


def test_a_full_disk_leaves_what_was_whole(tmp_path, monkeypatch):
    spill = opened(tmp_path)
    put(spill, 1, 2)
    real = spill_module.write_at

    def refuse(file, buffers, offset):
        real(file, [buffers[0][:1000]], offset)
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(spill_module, "write_at", refuse)
    for _ in range(2):
        with pytest.raises(OutOfSpace):
            put(spill, 3, 4)
    monkeypatch.setattr(spill_module, "write_at", real)
    put(spill, 3, 5)
    assert numbers(spill) == numbers(opened(tmp_path)) == [1, 2, 3, 4, 5]


def test_the_last_room_of_the_disk_is_left_to_others(tmp_path, monkeypatch):
    spill = opened(tmp_path)
    monkeypatch.setattr(spill_module, "RESERVE", 1 << 62)
    space = os.statvfs(tmp_path)
    if space.f_bavail * space.f_frsize > space.f_blocks * space.f_frsize // 20:
        put(spill, 1, 1)
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 1000, 50, 50, 1, 1, 1, 0, 255)))
    with pytest.raises(OutOfSpace, match="too little room"):
        put(spill, 2, 2)


def test_no_two_places_are_encrypted_alike(tmp_path):
    """Equal data at equal places of two segments, or written again after a torn end, must not look alike."""
    spill = opened(tmp_path)
    for _ in range(2):
        spill.write(frames(7, 7), 7, 7)
        spill.close()
    one, two = ((path.read_bytes()[HEADER.size :]) for path in sorted((tmp_path / "spill").iterdir()))
    assert len(one) == len(two)
    assert sum(a == b for a, b in zip(one, two, strict=True)) < len(one) // 50


def test_notes_are_kept_as_long_as_their_mark_waits(tmp_path):
    spill = opened(tmp_path)
    spill.note(5, {"note": "mark", "number": 5})
    put(spill, 1, 2)
    spill.note(6, {"note": "mark", "number": 6})
    spill.release(2, 6)
    assert [note["number"] for note in opened(tmp_path).notes] == [5, 6]
    spill.release(2, 7)
    assert not list((tmp_path / "spill").iterdir())


def test_what_was_removed_by_hand_is_told(tmp_path):
    spill = opened(tmp_path)
    put(spill, 1, 2)
    for path in (tmp_path / "spill").iterdir():
        path.unlink()
    chunk = spill.chunk_after(0)
    assert chunk is not None
    with pytest.raises(IntegrityError):
        spill.read(chunk)
