"""Both sides held against each other while the guest writes, with the real shipper and receiver: a bit that has turned
is found, named and repaired; what is only being written is not taken for wrong."""

from __future__ import annotations

import random
import shutil
import threading

import pytest

from tests.integration.link_rig import MiB, call, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")

SIZE = 20 * MiB
#: Draws one of three pieces.
SEED = 2
#: The guest writes below, so that what lies above is in the base.
QUIET = 12 * MiB


@pytest.fixture
def rig(make_rig):
    rig = make_rig(sizes={1: SIZE, 2: 2 * MiB}, ring_bytes=32 * MiB, slots=8192)
    dice = random.Random(3)
    for at in (0, 5, QUIET // MiB, QUIET // MiB + 3):
        rig.guest.write(1, at * MiB, dice.randbytes(MiB))
    rig.guest.scribble(50, 1)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    rig.mark()
    return rig


@pytest.fixture
def busy(rig):
    """The guest writes all the while: everywhere below QUIET, and one block again and again."""
    stop = threading.Event()

    def write() -> None:
        dice = random.Random(9)
        while not stop.wait(0.002):
            rig.guest.write(1, dice.randrange(QUIET // 4096) * 4096, dice.randbytes(4096))
            rig.guest.write(2, 8192, dice.randbytes(4096))

    writer = threading.Thread(target=write)
    writer.start()
    yield rig
    stop.set()
    writer.join()


def verify(rig, **order) -> dict:
    order = {"mode": "verify", "disks": rig.exports, "confirm": 0.3, **order}
    call(rig.short / "ship.sock", "sync.start", **order)
    until(lambda: rig.status()["sync"]["job"] != "running", 60)
    status = rig.status()
    assert status["sync"]["job"] == "surveyed", status["sync"]
    return status["verification"]


def flip(rig, name: str, offset: int) -> None:
    """A bit of the replica's base turns."""
    with (rig.store_root / "disks" / name / "base.raw").open("r+b") as base:
        base.seek(offset)
        byte = base.read(1)[0]
        base.seek(offset)
        base.write(bytes([byte ^ 4]))


@pytest.mark.long
def test_sound_sides_are_equal_while_the_guest_writes(busy) -> None:
    before = busy.status()["marks"]["last_number"]
    found = verify(busy)
    assert found["wrong"] == []
    assert found["done_bytes"] == found["total_bytes"] == SIZE + 2 * MiB
    assert found["undecided_bytes"] <= 65536
    assert busy.status()["marks"]["last_number"] > before, "marks go on"
    assert busy.check_all() > 1


def test_a_bit_that_turned_is_named(busy) -> None:
    verify(busy)  # the maps hold, and know of the bit as it was
    flip(busy, "vm1.vda", QUIET + 3 * MiB + 5000)
    found = verify(busy)
    assert found["wrong"] == [{"disk": 1, "offset": QUIET + 3 * MiB + 4096, "length": 4096}]
    assert found["wrong_bytes"] == 4096


def test_it_is_repaired_and_nothing_else_is_sent(busy) -> None:
    flip(busy, "vm1.vda", QUIET + 77)
    flip(busy, "vm1.vda", QUIET + MiB + 1)
    found = verify(busy, repair=True)
    assert [each["offset"] for each in found["wrong"]] == []
    assert found["repaired_bytes"] == 8192
    assert busy.status()["sync"]["sent_bytes"] == 8192
    told = busy.mark()
    assert busy.view(told["number"])[1][QUIET:] == busy.guest.disk(1)[QUIET:]


@pytest.mark.long
def test_a_write_that_nobody_saw_is_found(rig) -> None:
    rig.guest.unseen(2, 1)
    found = verify(rig)
    assert [(each["disk"], each["length"]) for each in found["wrong"]] == [(2, 4096)]
    assert verify(rig, repair=True)["repaired_bytes"] == 4096
    assert verify(rig)["wrong"] == []


@pytest.mark.long
def test_a_sample_reads_a_part(rig) -> None:
    found = verify(rig, share=0.4, seed=SEED)
    assert 0 < found["total_bytes"] < SIZE
    assert found["done_bytes"] == found["total_bytes"]


@pytest.mark.long
def test_the_pace_is_kept(rig) -> None:
    found = verify(rig, rate=8 * MiB)
    assert found["read_bytes"] >= 5 * MiB
    assert found["seconds"] > 0.7 * found["read_bytes"] / (8 * MiB)


def test_a_link_that_breaks_ends_it_with_an_error(rig) -> None:
    call(rig.short / "ship.sock", "sync.start", mode="verify", disks=rig.exports, rate=MiB // 4)
    until(lambda: (rig.status()["verification"] or {}).get("done_bytes"))
    rig.relay.cut()
    until(lambda: rig.status()["sync"]["job"] == "failed", 10)
    assert "link broke" in rig.status()["sync"]["error"]
    rig.relay.mend()
    until(lambda: rig.status()["link"]["state"] == "connected")
    assert verify(rig)["wrong"] == []
