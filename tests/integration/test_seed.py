"""Seeds with a real stream behind them: what differs alone crosses the link, and the replica ends equal."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import time
from contextlib import closing

import pytest

from drctl.appliance.replica.held_store import HeldStores
from drctl.appliance.replica.seed_service import SeedService
from drctl.errors import Refused
from drctl.replication.disk_connection import Export
from drctl.replication.sample import Sampled, differing, sample
from drctl.replication.seeding import OldDisks, put
from drctl.store.group_store import GroupStore
from tests.integration.link_rig import MiB, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")

KiB = 1024
SIZES = {1: 24 * MiB + 12 * KiB, 2: 4 * MiB}


def fill(rig):
    for number, size in SIZES.items():
        os.pwrite(rig.guest.files[number], random.Random(number).randbytes(size * 3 // 4 // 4096 * 4096), 0)
        rig.guest.start[number] = rig.guest.disk(number)


def disks(rig):
    return {number: rig.guest.disk(number) for number in SIZES}


def test_a_pre_seeded_copy_saves_the_first_sync(make_rig, tmp_path):
    """A raw and a qcow2 copy of some days ago, taken while the receiver runs."""
    rig = make_rig(sizes=SIZES)
    fill(rig)
    raw, packed = tmp_path / "vm1.vda.raw", tmp_path / "vm2.vda.qcow2"
    shutil.copy(rig.guest.path(1), raw)
    command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(rig.guest.path(2)), str(packed)]
    subprocess.run(command, check=True)
    for number in SIZES:
        rig.guest.unseen(number, 20)
    rig.guest.start = disks(rig)
    rig.serve_disks()
    rig.start_receiver()
    service = SeedService(tmp_path / "store", HeldStores(rig.short / "recv.sock"))
    order = {
        "group": "web",
        "disks": [{"number": n, "machine": f"vm{n}", "target": "vda", "size": size} for n, size in SIZES.items()],
        "seeds": [{"disk": "vm1.vda", "path": str(raw)}, {"disk": "vm2.vda", "path": str(packed)}],
        "give_up": True,
    }
    told = service.take(order, lambda _: None)
    assert [seed["way"] for seed in told["seeds"]] == ["move", "copy"]
    rig.start_shipper(interval=60)
    until(lambda: rig.status()["needs"] == "full")
    rig.sync("full")
    sent = rig.status()["sync"]["sent_bytes"]
    assert 0 < sent <= 40 * 4096
    assert rig.status()["link"]["sent_bytes"] < sent + 64 * KiB
    rig.guest.scribble(20, 3)
    number = rig.mark()["number"]
    assert rig.view(number) == disks(rig)
    with pytest.raises(Refused):
        service.take(order | {"seeds": [{"disk": "vm1.vda", "path": str(packed)}] * 2}, lambda _: None)


def test_old_disks_become_a_checkpoint_and_the_beginning_of_a_new_reign(make_rig, tmp_path):
    """A store with history: the disks that were left are sealed in it, then another reign goes on from there."""
    rig = make_rig(sizes=SIZES)
    fill(rig)
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper(interval=60)
    rig.sync("initial")
    first = rig.mark()["number"]
    before = disks(rig)
    rig.kill("shipper")
    for number in SIZES:
        rig.guest.unseen(number, 10)
    tail = disks(rig)
    definition = {"version": 1, "spec": {"name": "web"}, "machines": [], "disks": []}
    definition["disks"] = [
        {"number": d.number, "machine": d.machine, "target": d.target, "size": d.size} for d in rig.disks
    ]
    exports = {int(number): Export(**export) for number, export in rig.exports.items()}
    old = OldDisks("web", "host-a", 1, "5" * 32, first + 1, time.time_ns(), definition, tuple(rig.disks), exports)
    with HeldStores(rig.short / "recv.sock").held("web"):
        assert rig.receiver_status()["groups"]["web"]["released"]
        told = put(rig.store_root, old, lambda _: None)
        assert 0 < told.differing <= 20 * 4096
        with closing(GroupStore.open(rig.store_root)) as store:
            store.tag(first + 1, "before-failback")
            store.set_generation(2)
    # The other site has gone on from the first checkpoint, and comes back under a new generation.
    for number, data in before.items():
        os.pwrite(rig.guest.files[number], data, 0)
        rig.guest.unseen(number, 15)
    rig.guest.new_ring("7" * 32, generation=2)
    rig.start_shipper(interval=60)
    rig.sync("full")
    assert rig.status()["link"]["sent_bytes"] < (20 + 30) * 4096 + 64 * KiB
    newest = rig.mark()["number"]
    assert newest > first + 1
    assert rig.view(newest) == disks(rig)
    assert rig.view(first + 1) == tail
    assert rig.view(first) == before


def test_samples_of_two_sites_tell_how_much_differs(make_rig):
    rig = make_rig(sizes=SIZES)
    fill(rig)
    rig.serve_disks()
    wanted = [Sampled(f"vm{n}.vda", size, Export(**rig.exports[str(n)])) for n, size in SIZES.items()]
    before = asyncio.run(sample(wanted, bytes(32), 1))
    assert {name: len(hashes) // 8 for name, hashes in before.items()} == {"vm1.vda": 385, "vm2.vda": 64}
    for offset in (5 * 65536 + 17, 5 * 65536 + 900, 20 * MiB, SIZES[1] - 1):
        os.pwrite(rig.guest.files[1], b"different", offset - 9)
    after = asyncio.run(sample(wanted, bytes(32), 1))
    assert differing(before["vm1.vda"], after["vm1.vda"]) == 3
    assert before["vm2.vda"] == after["vm2.vda"]
