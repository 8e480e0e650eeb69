"""File systems that are really full under a protected lab's recovery site: the store's, and that of a test's scratch.

Nothing is acknowledged that has no place; the guests don't notice; when there is room again, all heals by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise

import pytest

from drctl.lab import layout, process, user
from drctl.lab.judge import judge, loss
from drctl.model.extent import GiB, MiB
from drctl.store.group_store import GroupStore
from drctl.store.ring import Ring
from drctl.wire.ring import Word
from tests.integration.fault_rig import GROUP, FaultRig, protect
from tests.integration.test_faults import again, begin_test, list_tests
from tests.integration.volume_rig import Volume

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(900)]
FULL = "No space left on device"


@pytest.fixture(scope="module")
def volumes(make_lab) -> Iterator[tuple[object, Volume, Volume]]:
    """A lab whose recovery site has a small disk for its home, and another for the scratch of tests."""
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    rig = make_lab(rate=20, slots=256)
    place = rig.layout.site("beta")
    state = layout.load(rig.directory)
    assert state is not None
    supervisor = state.process("beta/appliance")
    assert supervisor is not None
    process.stop([supervisor])
    made = []
    try:
        made.append(Volume(place.home, GiB))
        scratch = place.home / "scratch"
        if not scratch.exists():
            scratch.mkdir(mode=0o700)
            entry = user.ensure()
            os.chown(scratch, entry.pw_uid, entry.pw_gid)
        made.append(Volume(scratch, 3 * GiB))
    except OSError as exc:
        for each in reversed(made):
            each.close()
        pytest.skip(f"no loop device can be mounted here: {exc}")
    yield rig, *made
    for each in reversed(made):
        each.close()


@pytest.fixture(scope="module")
def faults(volumes) -> Iterator[FaultRig]:
    """Protected, onto a disk that has not even room for the first sync."""
    rig, home, _ = volumes
    home.fill(leave=60 * MiB)
    made = protect(rig, live=False)
    yield made
    made.close()


@pytest.fixture
def home(volumes) -> Iterator[Volume]:
    yield volumes[1]
    volumes[1].make_room()


@pytest.fixture
def scratch(volumes) -> Iterator[Volume]:
    yield volumes[2]
    volumes[2].make_room()


def released(faults: FaultRig) -> int:
    ring = faults.alpha.appliance_run / "rings" / f"{GROUP}.ring"
    with closing(Ring.open(ring)) as opened:
        return int(opened.words[Word.RELEASED])


def doctor(faults: FaultRig) -> tuple[int, list[str]]:
    """Its exit code, and what it calls an error."""
    done = subprocess.run(
        [sys.executable, "-m", "drctl.cli", "--config", str(faults.rig.directory), "doctor", "--output", "json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)["findings"]
    return done.returncode, [f"{each['subject']}: {each['message']}" for each in found if each["severity"] == "error"]


def test_a_disk_that_is_too_small_for_the_first_sync_is_waited_for(faults, home):
    guests = faults.rig.guests()
    pids = {guest: faults.qemu_pid(guest) for guest in guests}
    faults.await_reason(FULL, 120)
    begun = time.time_ns()
    time.sleep(12)  # twice as long as the shipper waits between two attempts
    assert faults.checkpoints() == []
    for guest in guests:
        faults.rig.observer.await_more(guest, "alpha", 5)
    assert faults.longest_stall(begun, time.time_ns(), guests) < 2 + faults.control()
    home.make_room()
    faults.await_live(120)
    faults.assert_unharmed(pids)
    assert faults.judge_listed() > 0


def test_a_full_disk_under_the_journal_stops_acknowledgements_until_there_is_room(faults, home):
    home.make_room()
    faults.await_live(180)
    before = [each["number"] for each in faults.checkpoints()]
    with faults.trial("the journal's disk is full", live=240):
        home.fill(leave=2 * MiB)
        faults.await_reason(FULL, 90)
        newest, durable = faults.checkpoints()[-1], released(faults)
        code, told = doctor(faults)
        assert code == 42, told
        assert any("free for the journal" in each for each in told), told
        _restart_recovery_site(faults)
        faults.rig.observer.send("rate 200", wait=60)
        faults.await_(lambda: (faults.status()["ring"] or {}).get("dropping"), "the ring is full", 120)
        faults.rig.observer.send("rate 20", wait=60)
        faults.await_reason(FULL, 30)
        assert faults.checkpoints()[-1]["number"] == newest["number"]
        assert released(faults) == durable, "acknowledged without a place"
        home.make_room()
    listed = {each["number"] for each in faults.checkpoints()}
    assert set(before[-5:]) <= listed, "a checkpoint was lost"
    assert faults.judge_listed() > 0
    _nothing_is_missing(faults)


def _restart_recovery_site(faults: FaultRig) -> None:
    """What an operator tries first. It must come up on a full disk, and say the same as before."""
    old = faults.kill("receiver")
    again(faults, "receiver", old)
    state = layout.load(faults.rig.directory)
    assert state is not None
    supervisor = state.process("beta/appliance")
    assert supervisor is not None
    process.stop([supervisor])
    faults.up()
    faults.await_(lambda: faults.call("beta", "appliance.info"), "the appliance answers", 30)
    faults.await_reason(FULL, 30)


def _nothing_is_missing(faults: FaultRig) -> None:
    """All that the guests were ever told is done is in the newest checkpoint, once they rest."""
    faults.rig.observer.send("stop", wait=60)
    try:
        time.sleep(0.5)
        moment = time.time_ns()
        faults.await_live(60)
        with closing(GroupStore.open(faults.beta.home / "store" / GROUP)) as store:
            newest = store.checkpoints()[-1].number
            with closing(store.open_view(newest)) as view:
                names = sorted({disk.machine for disk in view.disks})
                verdict = judge({name: [view.disk(f"{name}.vda"), view.disk(f"{name}.vdb")] for name in names})
        assert verdict.true_prefix, verdict
        missing = loss(verdict, faults.rig.observer.logs("alpha"), moment)
        assert set(missing) == set(faults.rig.guests())
        assert not any(any(each.missing) for each in missing.values()), missing
    finally:
        faults.rig.observer.send("go", wait=60)


def test_a_full_disk_under_the_scratch_ends_the_test_and_nothing_else(faults, home, scratch):
    home.make_room()
    faults.await_live(180)
    with faults.trial("the scratch's disk is full", live=120):
        begun = time.time()
        test = begin_test(faults)
        scratch.fill()
        assert scratch.free_bytes() < MiB

        def ended() -> bool:
            found = list_tests(faults).get(test["id"])
            return found is None or found["state"] in ("stopped", "failed")

        faults.await_(ended, "the test has ended", 90)
        assert not [*scratch.place.glob("*/*.qcow2")]
        times = [each["time"] for each in faults.checkpoints() if each["time"] >= begun]
        assert max(b - a for a, b in pairwise(times)) < 15, "replication waited for the test"
