"""The ring runs over into the spill while the link is down or slow, with real processes: no point in time is lost, whatever
is killed meanwhile, and all comes back by itself."""

from __future__ import annotations

import random
import shutil
import threading
import time

import pytest

from drctl.wire.ring import Word
from tests.integration.link_rig import LinkRig, MiB, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")


def spilling(rig: LinkRig, size: int = 256 * MiB) -> dict:
    return {
        "spill": str(rig.directory / "spill"),
        "spill_key": str(rig.directory / "source" / "web.spill-key"),
        "spill_size": size,
    }


@pytest.fixture
def live(make_rig):
    """A rig with a ring of 6 MiB after its first sync."""
    rig = make_rig(ring_bytes=6 * MiB, slots=4096)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper(**spilling(rig))
    rig.sync("initial")
    rig.mark()
    return rig


def numbers(rig: LinkRig) -> set[int]:
    return {checkpoint.number for checkpoint in rig.checkpoints()}


def overflow(rig: LinkRig, seed: int, size: int = 12 * MiB) -> None:
    """Write more than the ring takes, as fast as the spill does."""
    written = rig.guest.ring.words[Word.DATA_HEAD]
    while rig.guest.ring.words[Word.DATA_HEAD] - written < size:
        until(lambda: rig.status()["ring"]["fill"] < 0.85, why="the ring is emptied into the spill")
        rig.guest.scribble(10, seed, pause=0.001)
        seed += 1000


def at_rest(rig: LinkRig) -> None:
    """All is at the other side, and nothing is left behind."""
    until(lambda: rig.status()["backlog_bytes"] == 0, 30)
    until(lambda: not list((rig.directory / "spill").glob("*.spill")), why="the spill is removed")
    assert rig.status()["spill"]["state"] == "empty"


def test_an_outage_that_no_ring_holds_costs_no_checkpoint(live):
    live.relay.cut()
    first = live.status()["marks"]["last_number"] + 1
    for seed in range(2):
        overflow(live, seed)
        time.sleep(live.interval)
    spilled = live.status()["spill"]
    assert spilled["state"] == "holding"
    assert spilled["used"] > 8 * MiB
    assert live.guest.ring.words[Word.DROPPED] == 0
    last = live.status()["marks"]["last_number"]
    assert last >= first + 1
    live.relay.mend()
    told = live.mark(timeout=30)
    assert set(range(first, last + 1)) <= numbers(live)
    assert live.view(told["number"])[1] == live.guest.disk(1)
    live.check_all()
    at_rest(live)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))])
def test_a_shipper_killed_while_it_spills_and_drains_loses_no_checkpoint(live, seed):
    dice = random.Random(seed)
    stop = threading.Event()

    def guest() -> None:
        at = seed * 1000
        words = live.guest.ring.words
        while not stop.is_set():
            if words[Word.PUBLISHED] - words[Word.RELEASED] < 250:  # while the shipper is dead nobody makes room
                live.guest.scribble(15, at, pause=0.004)
            at += 1

    live.relay.cut()
    overflow(live, seed)
    until(lambda: live.status()["marks"]["pending"] >= 2)
    until(lambda: not live.supervisor.attested or live.supervisor.attested[-1] >= 2)
    writer = threading.Thread(target=guest)
    writer.start()
    known: set[int] = set()
    try:
        for life in range(8):
            time.sleep(dice.uniform(0.2, 0.9))
            attested = set(live.supervisor.attested[:-1])  # what was asked for last may not be noted yet
            live.kill("shipper")
            known |= attested
            live.start_shipper(**spilling(live))
            if life >= 4:
                live.relay.mend()
                time.sleep(dice.uniform(0.0, 0.4))
                live.relay.cut()
    finally:
        stop.set()
        writer.join()
    assert live.guest.ring.words[Word.DROPPED] == 0
    live.relay.mend()
    told = live.mark(timeout=60)
    assert live.view(told["number"])[1] == live.guest.disk(1)
    assert live.check_all() >= 3
    assert len(known) >= 3
    assert known <= numbers(live), f"lost: {sorted(known - numbers(live))}"
    at_rest(live)


def test_a_spill_that_is_full_gives_way_to_the_dirty_map(make_rig):
    rig = make_rig(ring_bytes=2 * MiB, slots=1024)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper(**spilling(rig, 3 * MiB))
    rig.sync("initial")
    rig.mark()
    rig.relay.cut()
    overflow(rig, 3, 4 * MiB)
    pending = rig.status()["marks"]["last_number"]
    rig.guest.scribble(2500, 4)
    until(lambda: rig.status()["spill"]["state"] == "full")
    status = rig.status()
    assert status["spill"]["used"] <= 3 * MiB
    assert status["ring"]["dirty_bytes"] > 0
    assert rig.guest.ring.words[Word.DROPPED] > 0
    rig.relay.mend()
    until(lambda: rig.status()["needs"] == "dirty" and not rig.status()["ring"]["dropping"], 30)
    rig.sync("dirty")
    told = rig.mark()
    assert rig.view(told["number"])[1] == rig.guest.disk(1)
    assert rig.view(told["number"])[2] == rig.guest.disk(2)
    assert pending in numbers(rig), "what was cut before the ring was full is a checkpoint"
    rig.check_all()
    at_rest(rig)


def test_a_disk_that_refuses_is_named(make_rig):
    rig = make_rig(ring_bytes=2 * MiB, slots=1024)
    (rig.directory / "spill").write_text("in the way")
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper(**spilling(rig))
    rig.sync("initial")
    rig.relay.cut()
    rig.guest.scribble(1200, 1)
    until(lambda: rig.status()["spill"]["state"] == "failed")
    assert "spill" in rig.status()["spill"]["error"]
    assert rig.guest.ring.words[Word.DROPPED] > 0
    rig.relay.mend()
    until(lambda: rig.status()["needs"] == "dirty" and not rig.status()["ring"]["dropping"], 30)
    rig.sync("dirty")
    assert rig.view(rig.mark()["number"])[1] == rig.guest.disk(1)


def test_a_spill_that_was_lost_is_made_good_by_a_pass(live):
    """Somebody deletes its files: the receiver's lack shows, and no mark of meanwhile is called a checkpoint."""
    live.relay.cut()
    overflow(live, 5)
    until(lambda: live.status()["marks"]["pending"] >= 1)
    pending = live.status()["marks"]["last_number"]
    for path in (live.directory / "spill").glob("*.spill"):
        path.unlink()
    live.relay.mend()
    until(lambda: live.status()["needs"] == "full", 30)
    live.sync("full")
    told = live.mark()
    assert live.view(told["number"])[1] == live.guest.disk(1)
    assert pending not in numbers(live)
    live.check_all()
