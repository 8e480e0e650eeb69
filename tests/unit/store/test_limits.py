"""Space: the limit of the journal, a full file system, and what history gives way."""

import errno
import os
import random

import pytest

from drctl.errors import IntegrityError, OutOfSpace
from drctl.model.group import Retention, Rung
from drctl.store.journal import SealPolicy
from drctl.store.maintenance import Maintenance


def maintain(h):
    maintenance = Maintenance(h.root)
    try:
        return maintenance.run(h.now)
    finally:
        maintenance.close()


def write_marks(h, count, size=2048):
    for index in range(count):
        h.write(1, index * 5 % 500, random.Random(index).randbytes(size))
        h.mark()
        h.sync()


@pytest.fixture
def h(harness, tmp_path):
    h = harness(tmp_path / "shop", policy=SealPolicy(size=8000))
    h.end_sync()
    yield h
    h.close()


def test_history_gives_way_before_the_limit_and_what_is_held_does_not(h):
    write_marks(h, 30)
    used = h.store.used()
    h.store.set_retention(Retention(journal_limit=used, ladder=(Rung(1e9, 0),), history=1e9))
    h.store.tag(20, "keep")
    assert maintain(h).promoted >= 2
    assert h.store.used() < 0.85 * used
    numbers = [number for _, number in h.listed()]
    assert 1 not in numbers
    assert numbers[-1] == 30
    h.store.set_retention(Retention(journal_limit=used // 10, ladder=(Rung(1e9, 0),), history=1e9))
    maintain(h)
    assert 20 in [number for _, number in h.listed()]
    h.check_views()
    h.store.untag("keep")
    assert maintain(h).promoted
    assert [number for _, number in h.listed()][-1] == 30
    h.check_views()


def test_appending_goes_on_when_promotion_made_room(h):
    write_marks(h, 20)
    h.store.set_retention(Retention(journal_limit=h.store.used() + 1000, ladder=(Rung(1e9, 0),), history=1e9))
    with pytest.raises(OutOfSpace):
        write_marks(h, 1)
    h.number = 20
    maintain(h)
    h.number = 30
    write_marks(h, 1)
    assert h.listed()[-1][1] == 31
    h.check_views()


@pytest.mark.parametrize("room", [0, 1, 700, 2100])
def test_a_full_disk_loses_nothing_and_appending_goes_on(h, monkeypatch, room):
    write_marks(h, 3)
    real, left = os.pwritev, {"bytes": room}

    def pwritev(file, buffers, offset):
        if left["bytes"] < 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = memoryview(b"".join(buffers))[: left["bytes"]]
        left["bytes"] -= len(part)
        return real(file, [part], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    before = bytes(h.images[1])
    with pytest.raises(OutOfSpace):
        h.write(1, 7, b"x" * 512 + random.Random(1).randbytes(4096))
    monkeypatch.undo()
    h.images[1][:] = before
    h.sequence -= 1
    assert h.store.sync().sequence == 3
    write_marks(h, 2)
    h.check_views()
    assert h.reopen().sequence == 5
    assert not h.store.torn_bytes
    h.check_views()


def test_a_sync_that_finds_the_disk_full_acknowledges_nothing(h, monkeypatch):
    write_marks(h, 2)
    listed = h.listed()
    h.write(1, 7, b"y" * 512)
    h.mark()

    def fdatasync(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(OutOfSpace):
        h.store.sync()
    monkeypatch.undo()
    assert h.listed() == listed
    h.sync()
    assert len(h.listed()) == 3
    h.check_views()


def test_a_damaged_segment_is_not_promoted_and_nothing_is_lost(h):
    write_marks(h, 30)
    segment = min(h.root.glob("streams/*/*/*.seg"))
    data = bytearray(segment.read_bytes())
    data[1000] ^= 4
    segment.write_bytes(data)
    listed = h.listed()
    h.store.set_retention(Retention(ladder=(Rung(20, 0),), history=20))
    with pytest.raises(IntegrityError, match=str(segment)):
        maintain(h)
    assert h.listed() == listed
    assert h.store.info.promoting == 0
    (damage,) = h.store.verify().damages
    assert (damage.path, damage.checkpoint) == (segment, 1)
    assert damage.offset <= 1000


def test_a_pin_holds_back_merges_and_promotions(h):
    write_marks(h, 10)
    view = h.store.view(4, "test-1")
    write_marks(h, 20)
    h.store.set_retention(Retention(ladder=(Rung(20, 0),), history=20))
    maintain(h)
    assert 4 in [number for _, number in h.listed()]
    assert bytes(view.disk("web.vda").read(0, 4096)) == h.marks[h.epoch, 4][1][:4096]
    h.check_views()
    view.close()
    h.store.unpin("test-1")
    maintain(h)
    assert 4 not in [number for _, number in h.listed()]
    h.check_views()
