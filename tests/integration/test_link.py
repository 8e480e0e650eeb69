"""The stream from a fake guest's ring to the views of the journal: exact, whatever dies in between."""

from __future__ import annotations

import random
import shutil
import threading
import time

import pytest

from drctl.model.extent import KiB
from drctl.model.group import Retention
from drctl.store.group_store import GroupStore
from drctl.wire.ring import Word
from tests.integration.link_rig import MiB, call, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")


@pytest.fixture
def live(make_rig):
    """A rig after its first sync."""
    rig = make_rig()
    rig.guest.scribble(200, 1)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    return rig


def test_first_sync_then_checkpoints_are_exact(live):
    for round_number in range(4):
        live.guest.scribble(300, round_number)
        told = live.mark(tags=["here"])
        assert live.view(told["number"]) == live.guest.prefix(told["sequence"])
        assert told["sequence"] == live.guest.ring.words[8]
    assert live.check_all() >= 4
    until(lambda: live.status()["backlog_bytes"] == 0)


def test_writes_during_the_first_sync_are_in_it(make_rig):
    rig = make_rig(sizes={1: 8 * MiB, 2: 4 * MiB})
    rig.guest.scribble(500, 1)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper(read_limit=6 * MiB)
    writer = threading.Thread(target=rig.guest.scribble, args=(1200, 2), kwargs={"pause": 0.001})
    writer.start()
    rig.sync("initial")
    writer.join()
    told = rig.mark()
    assert rig.view(told["number"])[1] == rig.guest.disk(1)
    assert rig.view(told["number"])[2] == rig.guest.disk(2)
    assert rig.check_all() >= 1


def test_writes_while_everything_dies(make_rig):
    """Shipper and receiver killed at random, the link cut, the shipper's supervisor away: no checkpoint is a lie."""
    live = make_rig(ring_bytes=192 * MiB, slots=65536)
    live.serve_disks()
    live.start_receiver()
    live.start_shipper()
    live.sync("initial")
    live.mark()
    dice = random.Random(7)
    stop = threading.Event()

    def guest():
        seed = 100
        while not stop.is_set():
            live.guest.scribble(20, seed, pause=0.002)
            seed += 1

    writer = threading.Thread(target=guest)
    writer.start()
    try:
        for _ in range(6):
            time.sleep(dice.uniform(0.3, 1.0))
            match dice.choice(["shipper", "receiver", "cut", "supervisor"]):
                case "shipper":
                    live.kill("shipper")
                    live.start_shipper()
                case "receiver":
                    live.kill("receiver")
                    live.start_receiver()
                case "cut":
                    live.relay.cut()
                    time.sleep(0.3)
                    live.relay.mend()
                case "supervisor":
                    live.supervisor.stop()
                    time.sleep(0.3)
                    live.supervisor.restart()
    finally:
        stop.set()
        writer.join()
    told = live.mark(timeout=30)
    assert live.view(told["number"]) == live.guest.prefix(told["sequence"])
    assert live.view(told["number"])[1] == live.guest.disk(1)
    assert live.check_all() >= 2


@pytest.mark.parametrize("victim", ["shipper", "receiver"])
def test_killed_in_the_first_sync(make_rig, victim):
    rig = make_rig(sizes={1: 24 * MiB, 2: 8 * MiB}, ring_bytes=96 * MiB)
    rig.guest.scribble(2500, 3)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper(read_limit=12 * MiB)
    until(lambda: rig.status()["needs"] == "initial")
    call(rig.short / "ship.sock", "sync.start", mode="initial", disks=rig.exports, id="1st")
    until(lambda: rig.receiver_status()["groups"]["web"]["sync"]["offset"] >= 16 * MiB)
    rig.kill(victim)
    rig.guest.scribble(100, 4)
    if victim == "shipper":
        rig.start_shipper()
        until(lambda: rig.status()["needs"] == "initial")
        rig.sync("initial", id="1st")
        assert rig.status()["sync"]["read_bytes"] <= 16 * MiB, "it did not go on where it was"
    else:
        rig.start_receiver()
        until(lambda: rig.status()["sync"]["job"] == "done", 30)
    told = rig.mark()
    assert rig.view(told["number"]) == rig.guest.prefix(told["sequence"])


@pytest.mark.parametrize("mode", ["initial", "full"])
def test_a_pass_is_not_run_again_for_a_shipper_that_died_after_it(make_rig, mode):
    """Between SYNC_END and the first durable mark the receiver can't tell that the epoch is whole; it knows the pass."""
    rig = make_rig()
    rig.serve_disks()
    rig.start_receiver()
    if mode == "full":
        rig.start_shipper()
        rig.sync("initial")
        rig.mark()
        rig.kill("shipper")
        rig.guest.new_ring("a" * 32)
    rig.start_shipper(interval=3600)
    rig.guest.scribble(200, 3)
    rig.sync(mode, id="this one")
    rig.kill("shipper")
    rig.guest.scribble(50, 4)
    rig.start_shipper(interval=3600)
    until(lambda: rig.status()["needs"] == "full")
    rig.sync("full", id="this one")
    assert rig.status()["sync"]["read_bytes"] == 0
    told = rig.mark()
    assert rig.view(told["number"])[1] == rig.guest.disk(1)
    rig.check_all()


def test_a_pass_over_one_disk_of_a_live_group(make_rig):
    """What the others hold is there already; a broken link does not make it a pass over all."""
    rig = make_rig(sizes={1: 24 * MiB, 2: 8 * MiB}, ring_bytes=96 * MiB)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    before = rig.mark()
    rig.guest.unseen(1, 40)
    call(rig.short / "ship.sock", "limit", read_limit=12 * MiB)
    one = {"1": rig.exports["1"]}
    call(rig.short / "ship.sock", "sync.start", mode="full", disks=one, id="web")
    until(lambda: rig.status()["sync"]["done_bytes"] >= 4 * MiB)
    rig.kill("shipper")
    rig.guest.scribble(100, 4)
    rig.start_shipper()
    until(lambda: rig.status()["needs"] != "unknown")
    assert rig.status()["needs"] == "nothing", "the supervisor remembers which disks missed writes"
    rig.sync("full", disks=one, id="web")
    assert rig.status()["sync"]["total_bytes"] == 24 * MiB
    told = rig.mark()
    assert rig.view(told["number"]) == {1: rig.guest.disk(1), 2: rig.guest.disk(2)}
    assert rig.view(before["number"]) == rig.guest.prefix(before["sequence"])


def test_a_new_epoch_that_is_equal_in_part(make_rig):
    rig = make_rig(sizes={1: 4 * MiB, 2: 8 * MiB})
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    rig.guest.scribble(100, 3)
    rig.mark()
    rig.kill("shipper")
    rig.guest.new_ring("a" * 32)
    rig.guest.unseen(2, 40)
    rig.start_shipper()
    until(lambda: rig.status()["needs"] == "full")
    two = {"2": rig.exports["2"]}
    with pytest.raises(RuntimeError, match="needs all disks"):
        rig.sync("full", disks=two)
    rig.sync("full", disks=two, equal=[1])
    assert rig.status()["sync"]["total_bytes"] == 8 * MiB
    told = rig.mark()
    assert rig.view(told["number"]) == {1: rig.guest.disk(1), 2: rig.guest.disk(2)}


def test_a_full_ring_is_made_good(make_rig):
    """The link is down until the ring overflows; the dropped blocks are read again, then marks go on."""
    rig = make_rig(ring_bytes=MiB)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    before = rig.mark()
    rig.relay.cut()
    rig.guest.scribble(600, 5)
    assert rig.guest.ring.words[Word.DROPPED] > 0
    with pytest.raises(RuntimeError, match="dropped blocks"):
        rig.mark(timeout=1)
    rig.relay.mend()
    until(lambda: rig.status()["needs"] == "dirty" and not rig.status()["ring"]["dropping"])
    writer = threading.Thread(target=rig.guest.scribble, args=(200, 6), kwargs={"pause": 0.003})
    writer.start()
    rig.sync("dirty")
    writer.join()
    told = rig.mark()
    assert told["number"] > before["number"]
    assert rig.view(told["number"])[1] == rig.guest.disk(1)
    assert rig.view(told["number"])[2] == rig.guest.disk(2)
    assert rig.view(before["number"]) == rig.guest.prefix(before["sequence"])
    assert rig.status()["ring"]["dirty_bytes"] == 0
    rig.check_all()


@pytest.mark.long
def test_what_waits_in_the_ring_does_not_win_over_dropped_writes(make_rig):
    """The ring holds old records of blocks that were then dropped, and the link is so slow that they wait still when
    the dropped blocks are read."""
    rig = make_rig(ring_bytes=96 * MiB, latency=0.004)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    rig.relay.cut()
    dice, writes = random.Random(7), 0
    while not rig.guest.ring.words[Word.DROPPED] or writes % 300:
        rig.guest.write(1, dice.randrange(64) * 64 * KiB, dice.randbytes(64 * KiB))
        writes += 1
    rig.relay.mend()
    until(lambda: rig.status()["needs"] == "dirty" and not rig.status()["ring"]["dropping"], 60)
    rig.sync("dirty", 60)
    told = rig.mark()
    assert rig.view(told["number"])[1] == rig.guest.disk(1)


def test_a_shipper_killed_with_dropped_blocks_loses_none(make_rig):
    rig = make_rig(ring_bytes=MiB)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    rig.mark()
    rig.relay.cut()
    rig.guest.scribble(600, 5)
    rig.kill("shipper")
    rig.relay.mend()
    rig.start_shipper()
    until(lambda: rig.status()["needs"] == "dirty" and not rig.status()["ring"]["dropping"])
    rig.sync("dirty")
    told = rig.mark()
    assert rig.view(told["number"])[1] == rig.guest.disk(1)


def test_marks_of_an_outage_become_checkpoints(live):
    """The link is cut for several intervals: their marks are checkpoints once it is back."""
    first = live.mark()["number"]
    live.relay.cut()
    for seed in range(3):
        live.guest.scribble(50, seed)
        time.sleep(0.6)
    live.relay.mend()
    last = live.mark()["number"]
    numbers = [c.number for c in live.checkpoints()]
    assert {n for n in range(first, last + 1)} <= set(numbers)
    live.check_all()


def test_what_is_not_attested_is_no_checkpoint(live):
    live.mark()
    live.supervisor.answer = {"ok": False, "reason": "the job is gone"}
    with pytest.raises(RuntimeError, match="the job is gone"):
        live.mark()
    time.sleep(1.0)  # a mark that was attested before may be on its way to the disk
    count = len(live.checkpoints())
    time.sleep(1.2)
    assert len(live.checkpoints()) == count
    live.supervisor.answer = {"ok": True}
    assert live.mark()["number"] > count


def test_order_is_asked_for_and_no_mark_is_cut_before(live):
    live.mark()
    live.supervisor.prove = False
    live.guest.ring.words[Word.ORDER_STAMP] += 1
    with pytest.raises(RuntimeError, match="order of writes is not proven"):
        live.mark(timeout=1)
    live.supervisor.prove = True
    assert live.mark()["number"]


def test_a_new_ring_needs_a_full_sync_and_older_checkpoints_stay(live):
    live.guest.scribble(100, 9)
    old = live.mark()
    expected = live.guest.prefix(old["sequence"])
    live.kill("shipper")
    live.guest.scribble(100, 10)
    live.guest.new_ring("f" * 32)
    live.guest.scribble(100, 11)
    live.start_shipper()
    until(lambda: live.status()["needs"] == "full")
    with pytest.raises(RuntimeError, match="full sync is needed"):
        live.mark(timeout=0.5)
    live.sync("full")
    told = live.mark()
    assert told["kind"] == "resync"
    assert told["number"] > old["number"]
    assert live.view(told["number"])[1] == live.guest.disk(1)
    assert live.view(old["number"]) == expected


def test_drain_is_the_end(live):
    live.guest.scribble(100, 12)
    told = call(live.short / "ship.sock", "drain", tags=["switchover"])
    assert told["kind"] == "final"
    assert live.view(told["number"])[1] == live.guest.disk(1)
    time.sleep(1.2)
    assert live.checkpoints()[-1].number == told["number"]
    assert "switchover" in live.checkpoints()[-1].tags


def test_a_definition_that_changes_travels(live):
    live.mark()
    live.write_definition(2)
    until(lambda: definition_version(live) == 2)


def definition_version(rig):
    store = GroupStore.open(rig.store_root)
    try:
        return (store.definition() or {}).get("version")
    finally:
        store.close()


def test_processes_end_cleanly(live):
    live.mark()
    assert live.terminate("shipper") == 0
    assert live.terminate("receiver") == 0


def test_a_slow_link_keeps_up_with_the_marks(make_rig):
    rig = make_rig(latency=0.02)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    rig.guest.scribble(300, 13)
    assert rig.view(rig.mark()["number"])[1] == rig.guest.disk(1)
    link = rig.status()["link"]
    assert link["round_trip_ms"] >= 20
    # Both ends have one clock here; a sample is wrong by half its round trip at most.
    assert abs(link["offset_ms"]) <= link["round_trip_ms"] / 2 + 1


def set_limit(rig, limit):
    store = GroupStore.open(rig.store_root)
    store.set_retention(Retention(journal_limit=limit))
    store.close()


def test_a_full_journal_stops_acknowledgements_and_goes_on_when_there_is_room(make_rig):
    rig = make_rig(ring_bytes=64 * MiB)
    rig.serve_disks()
    rig.start_receiver(maintenance=False)
    rig.start_shipper()
    rig.sync("initial")
    before = rig.mark()
    set_limit(rig, 2 * MiB)
    rig.guest.scribble(600, 14)
    status = until(lambda: (s := rig.status())["link"]["state"] == "refused" and s)
    assert status["link"]["error"]["refusal"] == "out-of-space"
    assert status["backlog_bytes"] > 0
    assert rig.receiver_status()["groups"]["web"]["error"]["error"] == "out-of-space"
    assert rig.view(before["number"]) == rig.guest.prefix(before["sequence"])
    set_limit(rig, 1024 * MiB)
    told = rig.mark(timeout=40)
    assert rig.view(told["number"]) == rig.guest.prefix(told["sequence"])
    rig.check_all()


def test_the_clean_mode_reads_nothing(live):
    """A clean re-attach: the supervisor knows that nothing was written while the new ring was made."""
    live.mark()
    live.kill("shipper")
    live.guest.new_ring("c" * 32)
    live.start_shipper()
    until(lambda: live.status()["needs"] == "full")
    call(live.short / "ship.sock", "sync.start", mode="clean", disks={})
    live.guest.scribble(50, 15)
    told = live.mark()
    assert live.status()["sync"]["read_bytes"] == 0
    assert live.view(told["number"]) == live.guest.prefix(told["sequence"])
