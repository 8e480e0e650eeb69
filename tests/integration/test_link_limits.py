"""A limited link, with the real shipper and receiver: the rate is kept, marks stay young, checkpoints stay true."""

from __future__ import annotations

import random
import shutil
import threading
import time
from dataclasses import replace

import pytest

from drctl.model.bandwidth import Override, RateLimit
from drctl.store.link_limits import LinkLimits
from tests.integration.link_rig import MiB, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")

RATE = 1_000_000


@pytest.fixture
def limited(make_rig):
    """A rig after its first sync, and the file of its limits."""
    rig = make_rig(ring_bytes=32 * MiB, slots=8192)
    limits = LinkLimits(rig.directory / "links.json")
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper(
        links=str(limits.path), share=str(rig.directory / "links" / "beta.share"), site="beta", group="web"
    )
    rig.sync("initial")
    rig.mark()
    return rig, limits


def in_force(rig, rate):
    until(lambda: (rig.status()["link"]["limit"] or {"rate": 0})["rate"] == rate, why=f"limit {rate}")


def fill(rig, count: int) -> None:
    """Data that can't be compressed, 64 KiB at a time."""
    dice = random.Random(count)
    for at in range(count):
        rig.guest.write(1, at % 32 * 65536, dice.randbytes(65536))


def test_a_limit_is_kept_and_lifted_while_it_runs(limited):
    rig, limits = limited
    limits.change("beta", lambda rule: replace(rule, limits=(RateLimit(RATE),)))
    in_force(rig, RATE)
    before, begin = rig.status()["link"]["sent_bytes"], time.monotonic()
    fill(rig, 96)  # 6 MiB, of which 2 s let 2 MB pass
    time.sleep(2.0)
    sent, seconds = rig.status()["link"]["sent_bytes"] - before, time.monotonic() - begin
    assert sent <= RATE * seconds + 256 * 1024
    assert sent >= RATE * seconds * 0.5
    assert rig.status()["backlog_bytes"] > MiB
    limits.change("beta", lambda rule: replace(rule, override=Override(0)))
    until(lambda: rig.status()["backlog_bytes"] == 0, 3.0, why="the backlog has left")
    assert rig.check_all() >= 1


def test_marks_of_a_quiet_group_pass_a_limited_link_at_once(limited):
    rig, limits = limited
    limits.change("beta", lambda rule: replace(rule, limits=(RateLimit(RATE),)))
    in_force(rig, RATE)
    ages = []
    for seed in range(5):
        rig.guest.scribble(3, seed, largest=4)
        begin = time.monotonic()
        rig.mark()
        ages.append(time.monotonic() - begin)
    assert sorted(ages)[2] < 0.5, ages
    assert rig.check_all() >= 5


def test_a_pass_over_a_limited_link_leaves_room_for_what_the_guest_writes(limited):
    rig, limits = limited
    rig.guest.unseen(2, 256)  # 1 MiB differs, scattered
    limits.change("beta", lambda rule: replace(rule, limits=(RateLimit(RATE),)))
    in_force(rig, RATE)
    stop = threading.Event()

    def write() -> None:
        seed = 0
        while not stop.is_set():
            rig.guest.write(1, seed % 32 * 65536, random.Random(seed).randbytes(16384))
            stop.wait(0.05)  # a third of the link
            seed += 1

    writer = threading.Thread(target=write)
    writer.start()
    worst = 0
    try:
        rig.sync("full", 1.0)
    except AssertionError:  # not done within a second, as it should be
        while rig.status()["sync"]["job"] == "running":
            worst = max(worst, rig.status()["backlog_bytes"])
            time.sleep(0.05)
    finally:
        stop.set()
        writer.join()
    assert rig.status()["sync"]["job"] == "done"
    assert 0 < worst < 2 * RATE
    told = rig.mark()
    assert rig.view(told["number"]) == {1: rig.guest.disk(1), 2: rig.guest.disk(2)}
