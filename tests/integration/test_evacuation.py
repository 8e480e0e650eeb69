"""A host's maintenance on the lab: guests that write all the while, paused or shut down, and taken up again."""

from __future__ import annotations

import sys
import time

import pytest

from drctl.errors import Refused
from tests.integration.fault_rig import GROUP, protect
from tests.integration.test_returning import Lives, read_since

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def lives(make_lab):
    made = protect(make_lab(rate=20, slots=256))
    yield Lives(made)
    made.close()


def test_evacuated_guests_run_on_and_the_return_reads_what_they_wrote(lives) -> None:
    faults = lives.faults
    pids = {guest: faults.qemu_pid(guest) for guest in lives.rig.guests()}
    total = sum(disk["size"] for disk in lives.disks())
    done = faults.call("alpha", "host.evacuate", timeout=120, by="ann")
    assert (done["failed"], done["evacuation"]["phase"]) == ({}, "evacuated")
    status = faults.status()
    assert (status["phase"], status["evacuated"]["by"]) == ("paused", "ann")
    with pytest.raises(Refused, match="is evacuated"):
        faults.call("alpha", "replicate.resume")
    time.sleep(5)
    assert faults.call("alpha", "host.return", timeout=120)["returned"] == [GROUP]
    faults.await_live(180)
    sync = lives.shipper()["sync"]
    sys.stderr.write(f"  evacuated while running: {sync['read_bytes']} of {total} bytes read\n")
    assert 0 < sync["read_bytes"] < total / 10
    faults.assert_unharmed(pids)
    assert faults.status()["evacuated"] is None
    lives.judge_newest()


def test_with_shutdown_a_restarted_appliance_starts_no_guest_and_the_return_reads_nothing(lives) -> None:
    faults = lives.faults
    guests = lives.rig.guests()
    before = lives.shipper()
    done = faults.call("alpha", "host.evacuate", timeout=300, shutdown=True, shutdown_seconds=120)
    assert done["failed"] == {}
    assert sorted(done["evacuation"]["sources"][GROUP]) == sorted(guests)
    assert all(lives.rig.state("alpha", guest) == "shut off" for guest in guests)
    assert all(disk["held"] and not disk["pass_needed"] for disk in lives.disks())
    # As after the host's boot: the run directory says that nobody was looked after.
    faults.kill("supervisor")
    (faults.alpha.appliance_run / "boots" / GROUP).unlink(missing_ok=True)
    faults.up()
    faults.await_(lambda: faults.status()["evacuated"], "the appliance is back and knows", 60)
    time.sleep(3)
    assert all(lives.rig.state("alpha", guest) == "shut off" for guest in guests)
    begun = time.time_ns()
    back = faults.call("alpha", "host.return", timeout=300)
    assert back["failed"] == {}
    for guest in guests:
        lives.rig.observer.await_up(guest, "alpha", after_ns=begun, timeout=300)
        lives.rig.observer.await_more(guest, "alpha", 2, timeout=120)
    faults.await_live(180)
    read = read_since(before, lives.shipper())
    sys.stderr.write(f"  evacuated with shutdown: {read} bytes read at the return\n")
    lives.judge_newest()
    # A guest that writes before its mirror is there costs a pass of its own disks, by design; not of all.
    assert read < sum(disk["size"] for disk in lives.disks())
