"""A pause and its resume: what was written meanwhile is read and nothing else, and no checkpoint is a lie.

First with the real shipper and receiver, then on the lab with guests that write all the while."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from tests.integration.fault_rig import GROUP, protect
from tests.integration.link_rig import MiB, call, until
from tests.integration.test_returning import Lives

BLOCK = 65536


@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")
def test_only_what_the_file_of_extents_names_is_read(make_rig, tmp_path):
    rig = make_rig(sizes={1: 16 * MiB, 2: 4 * MiB}, ring_bytes=32 * MiB)
    rig.guest.scribble(300, 1)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    rig.guest.scribble(100, 3)
    rig.mark()
    rig.kill("shipper")
    before = rig.guest.disk(1)
    rig.guest.unseen(1, 20)
    rig.guest.new_ring("a" * 32)
    after = rig.guest.disk(1)
    changed = [at for at in range(0, len(after), BLOCK) if before[at : at + BLOCK] != after[at : at + BLOCK]]
    extents = tmp_path / "extents.json"
    extents.write_text(json.dumps([[at, BLOCK] for at in changed]))
    rig.start_shipper()
    until(lambda: rig.status()["needs"] == "full")
    rig.exports["1"]["extents"] = str(extents)
    rig.sync("full", disks={"1": rig.exports["1"]}, equal=[2])
    sync = rig.status()["sync"]
    assert sync["read_bytes"] == sync["total_bytes"] == sync["done_bytes"] == len(changed) * BLOCK
    rig.guest.scribble(50, 4)
    told = rig.mark()
    assert rig.view(told["number"]) == {1: rig.guest.disk(1), 2: rig.guest.disk(2)}
    assert rig.check_all() >= 1


@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")
def test_extents_beyond_the_disk_end_the_pass_and_not_the_stream(make_rig, tmp_path):
    rig = make_rig()
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    extents = tmp_path / "extents.json"
    extents.write_text(json.dumps([[0, 4096], [1 << 40, 4096]]))
    disk = {**rig.exports["1"], "extents": str(extents)}
    call(rig.short / "ship.sock", "sync.start", mode="full", disks={"1": disk})
    until(lambda: rig.status()["sync"]["job"] == "failed", 10)
    assert "unexpectedly" in rig.status()["sync"]["error"]
    rig.sync("full", disks={"1": rig.exports["1"]})
    told = rig.mark()
    assert rig.view(told["number"])[1] == rig.guest.disk(1)


@pytest.fixture
def lives(make_lab):
    made = protect(make_lab(rate=20, slots=256))
    yield Lives(made)
    made.close()


def pause_and_resume(lives: Lives, meanwhile) -> dict:
    """The newest status of the shipper after the group is live again."""
    faults = lives.faults
    faults.call("alpha", "replicate.pause", group=GROUP, timeout=90)
    assert all(not disk["pass_needed"] or disk["tracked"] for disk in lives.disks())
    meanwhile()
    faults.call("alpha", "replicate.resume", group=GROUP, timeout=90)
    faults.await_live(180)
    return lives.shipper()["sync"]


@pytest.mark.lab
@pytest.mark.long
@pytest.mark.timeout(900)
def test_resume_reads_what_the_guests_wrote(lives):
    total = sum(disk["size"] for disk in lives.disks())
    sync = pause_and_resume(lives, lambda: time.sleep(5))
    assert 0 < sync["read_bytes"] < total / 10, sync
    lives.judge_newest()
    assert [disk["tracked"] for disk in lives.disks()] == [""] * len(lives.disks())
    # Once more, with one guest restarted meanwhile: its bitmaps are gone, and its disks are compared.
    guest = lives.rig.guests()[0]

    def restart() -> None:
        lives.rig.virsh("alpha", "destroy", guest)
        lives.start(guest)

    sync = pause_and_resume(lives, restart)
    own = sum(disk["size"] for disk in lives.disks(guest))
    assert sync["total_bytes"] < own + total / 10
    lives.judge_newest()
