"""A full pass compares: only what differs crosses the link, the replica ends equal, older checkpoints stay exact."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from contextlib import closing

import pytest

from drctl.store.signatures import SignatureStore
from tests.integration.link_rig import MiB, call, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")

KiB = 1024


def live(rig, filled=0.75):
    """A rig after its first sync, its disks filled in part, with a checkpoint; and what that one holds."""
    for number, size in rig.guest.sizes.items():
        os.pwrite(rig.guest.files[number], random.Random(number).randbytes(int(size * filled) // 4096 * 4096), 0)
        rig.guest.start[number] = rig.guest.disk(number)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper(interval=60)
    rig.sync("initial")
    rig.guest.scribble(40, 1)
    told = rig.mark()
    return told["number"], rig.guest.prefix(told["sequence"])


def unseen(rig, seed, count):
    """Writes that no tap saw; then a new ring, as after a power cycle. Returns the bytes of the blocks touched."""
    rig.kill("shipper")
    dice = random.Random(seed)
    touched = set()
    for _ in range(count):
        number = dice.choice(list(rig.guest.sizes))
        block = dice.randrange(rig.guest.sizes[number] // 4096)
        kind = dice.random()
        data = bytes(4096) if kind < 0.2 else dice.randbytes(4096 if kind < 0.7 else 512)
        os.pwrite(rig.guest.files[number], data, block * 4096)
        touched.add((number, block))
    rig.guest.new_ring(f"{seed:032x}")
    rig.start_shipper(interval=60)
    until(lambda: rig.status()["needs"] == "full")
    return len(touched) * 4096


def disks(rig):
    return {number: rig.guest.disk(number) for number in rig.guest.sizes}


def test_only_what_differs_is_sent(make_rig):
    rig = make_rig(sizes={1: 24 * MiB + 12 * KiB, 2: 4 * MiB})
    old, expected = live(rig)
    touched = unseen(rig, 5, 30)
    call(rig.short / "ship.sock", "sync.start", mode="survey", disks=rig.exports)
    until(lambda: rig.status()["sync"]["job"] == "surveyed")
    found, before = rig.status()["survey"], rig.status()["link"]["sent_bytes"]
    assert found["done_bytes"] == found["total_bytes"] == sum(rig.guest.sizes.values())
    assert 0 < found["differing_bytes"] <= touched
    assert rig.status()["needs"] == "full", "a survey is no pass"
    rig.sync("full")
    assert rig.status()["sync"]["sent_bytes"] == found["differing_bytes"]
    assert abs(rig.status()["link"]["sent_bytes"] - before - found["crossing_bytes"]) < 32 * KiB
    sync, sent = rig.status()["sync"], rig.status()["link"]["sent_bytes"]
    assert 0 < sync["sent_bytes"] <= touched
    assert sync["matched_bytes"] >= 15 * MiB
    assert sent <= 1.3 * touched + 24 * KiB, "more crossed the link than what differs"
    told = rig.mark()
    assert rig.view(told["number"]) == disks(rig)
    assert rig.view(old) == expected
    # Again: the receiver's map knows all but what was just written.
    unseen(rig, 6, 0)
    rig.sync("full")
    assert rig.status()["sync"]["sent_bytes"] == 0
    assert rig.view(rig.mark()["number"]) == disks(rig)
    rig.terminate("shipper")
    rig.terminate("receiver")
    with closing(SignatureStore(rig.store_root)) as store:
        checked = list(store.verify())
        assert sum(count for count, _ in checked) > 15 * MiB, "the map was not kept"
        assert not any(wrong for _, wrong in checked)


def test_a_receiver_without_signatures_gets_everything(make_rig):
    rig = make_rig(sizes={1: 4 * MiB})
    old, expected = live(rig)
    unseen(rig, 5, 30)
    rig.kill("receiver")
    # The key can't be had: as from a receiver that knows no signatures.
    shutil.rmtree(rig.store_root / "signatures")
    (rig.store_root / "signatures").write_text("")
    rig.start_receiver()
    rig.sync("full")
    assert rig.status()["sync"]["matched_bytes"] == 0
    assert rig.status()["sync"]["sent_bytes"] >= 3 * MiB
    assert rig.view(rig.mark()["number"]) == disks(rig)
    assert rig.view(old) == expected


@pytest.mark.parametrize("seed", [11, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(12, 24))])
def test_a_guest_that_writes_while_everything_dies(make_rig, seed):
    """Writes, kills and cuts during comparing passes: the replica ends equal, older checkpoints stay exact."""
    rig = make_rig(sizes={1: 24 * MiB, 2: 8 * MiB}, ring_bytes=64 * MiB, slots=65536)
    old, expected = live(rig)
    unseen(rig, 7, 400)
    dice = random.Random(seed)
    # The first seed is short; the others kill the processes of both sides six times, in any order.
    victims = ["cut", "receiver", "shipper"]
    if seed != 11:
        victims = dice.choices(victims[1:], k=6)
        victims.insert(dice.randrange(6), "cut")
    stop = threading.Event()

    def guest():
        seed = 100
        while not stop.is_set():
            rig.guest.scribble(20, seed, pause=0.004)
            seed += 1

    call(rig.short / "ship.sock", "limit", read_limit=16 * MiB)
    call(rig.short / "ship.sock", "sync.start", mode="full", disks=rig.exports)
    writer = threading.Thread(target=guest)
    writer.start()
    try:
        for victim in victims:
            time.sleep(dice.uniform(0.1, 0.5))
            if victim == "cut":
                rig.relay.cut()
                rig.relay.mend()
                continue
            rig.kill(victim)
            if victim == "receiver":
                rig.start_receiver()
            else:
                rig.start_shipper(interval=60)
                until(lambda: rig.status()["needs"] != "unknown", 120)
                if rig.status()["needs"] == "full":
                    call(rig.short / "ship.sock", "sync.start", mode="full", disks=rig.exports)
        until(lambda: rig.status()["sync"]["job"] in ("done", "idle"), 240, why="sync done")
    finally:
        stop.set()
        writer.join()
    told = rig.mark(timeout=120)
    assert rig.view(told["number"]) == disks(rig)
    assert rig.view(old) == expected


def test_a_pass_that_is_ended_goes_on_by_its_name(make_rig):
    """As a supervisor does that comes back and finds a pass whose exports are gone."""
    rig = make_rig(sizes={1: 64 * MiB})
    old, expected = live(rig)
    unseen(rig, 5, 200)
    socket, named = rig.short / "ship.sock", "ab" * 16
    call(socket, "limit", read_limit=24 * MiB)
    call(socket, "sync.start", mode="full", disks=rig.exports, id=named)
    # The second place: of the first one the source has heard by then.
    until(lambda: rig.receiver_status()["groups"]["web"]["sync"]["offset"] >= 32 * MiB, why="a place is durable")
    gone = {"1": {"socket": str(rig.short / "none.sock"), "export": "d1"}}
    rig.kill("nbd1")
    with pytest.raises(RuntimeError, match="a sync is running already"):
        call(socket, "sync.start", mode="full", disks=gone, id=named)
    call(socket, "sync.cancel")
    until(lambda: rig.status()["sync"]["job"] == "stopped")
    rig.serve_disks()
    call(socket, "limit", read_limit=0)
    rig.sync("full", id=named)
    assert rig.status()["sync"]["read_bytes"] <= 48 * MiB, "it began anew"
    assert rig.view(rig.mark()["number"]) == disks(rig)
    assert rig.view(old) == expected
