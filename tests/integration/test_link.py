"""The stream from a fake guest's ring to the views of the journal: exact, whatever dies in between."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from link_rig import LinkRig, MiB, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")


@pytest.fixture
def make_rig(tmp_path):
    short = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))
    rigs = []

    def make(**options):
        rig = LinkRig(tmp_path, short, **options)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.close()
    shutil.rmtree(short)


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
