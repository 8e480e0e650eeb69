"""Outages of the link on the lab, with a spill: checkpoints go on being cut, become true ones afterwards, and replication
is live again by itself; the witness is the judge."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from tests.integration.fault_rig import FaultRig, protect

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(3600)]
MIB = 2**20


@pytest.fixture(scope="module")
def faults(make_lab):
    made = protect(make_lab(rate=20, slots=2048), spill_size=512 * MIB)
    yield made
    made.await_live()
    made.close()


def spill(faults: FaultRig) -> dict:
    return dict(faults.status()["spill"] or {})


def newest(faults: FaultRig) -> int:
    return int(faults.call("beta", "group.status")["checkpoints"]["newest"]["number"])


def run_over(faults: FaultRig) -> None:
    """The guests write until the ring has run over into the spill, and then as before."""
    faults.rig.observer.send("rate max", wait=60)
    faults.await_(lambda: spill(faults).get("used", 0) > 4 * MIB, "the spill is used", 120)
    faults.rig.observer.send("rate 20", wait=60)


def all_there(faults: FaultRig, before: int, since: float) -> int:
    """Every mark that was cut meanwhile is a checkpoint, and true: how many."""
    last = newest(faults)
    listed = {each["number"] for each in faults.checkpoints()}
    missing = set(range(before + 1, last + 1)) - listed
    assert not missing, f"not listed: {sorted(missing)}"
    told = faults.judge_listed(since=since, most=20)
    sys.stderr.write(f"  {len([each for each in listed if each > before])} checkpoints since, {told} judged\n")
    return told


def at_rest(faults: FaultRig) -> None:
    faults.await_(lambda: spill(faults)["state"] == "empty" and not spill(faults)["used"], "the spill is gone", 60)
    assert not list((faults.alpha.home / "spill").glob("*/*"))
    assert faults.status()["dirty_map"]["used"] == 0


def test_a_minute_without_the_link_costs_no_checkpoint(faults):
    with faults.trial("link down for 60 s", live=120):
        before, since = newest(faults), time.time()
        faults.relay.cut()
        run_over(faults)
        assert not faults.status()["ring"]["dropping"]
        time.sleep(max(0.0, since + 60 - time.time()))
        faults.relay.restore()
    assert newest(faults) >= before + 40
    assert all_there(faults, before, since) >= 10
    at_rest(faults)


def test_a_link_that_comes_and_goes(faults):
    with faults.trial("link flaps each 3 s for a minute", live=120):
        before, since = newest(faults), time.time()
        while time.time() < since + 60:
            faults.relay.cut()
            time.sleep(3)
            faults.relay.restore()
            time.sleep(3)
    all_there(faults, before, since)
    at_rest(faults)


def test_a_slow_link_is_caught_up_with(faults):
    """64 KiB a second for half a minute, while the guests write more."""
    with faults.trial("slow link", live=240):
        before, since = newest(faults), time.time()
        faults.relay.rate = MIB // 16
        run_over(faults)
        time.sleep(max(0.0, since + 30 - time.time()))
        faults.relay.rate = 0
    all_there(faults, before, since)
    at_rest(faults)


@pytest.mark.parametrize("victims", [["receiver"], ["shipper"], ["supervisor"], ["shipper", "receiver", "supervisor"]])
def test_processes_that_die_in_an_outage(faults, victims):
    """While it spills, and again while it drains."""
    with faults.trial(f"link down, {' and '.join(victims)} killed", live=240):
        before, since = newest(faults), time.time()
        faults.relay.cut()
        run_over(faults)
        for what in victims:
            faults.kill(what, signal.SIGKILL)
        faults.up()
        time.sleep(5)
        faults.relay.rate = 4 * MIB
        faults.relay.restore()
        faults.await_(lambda: spill(faults).get("used", 1) > 0, "it drains", 60)
        time.sleep(0.5)
        for what in victims:
            faults.kill(what, signal.SIGKILL)
        faults.up()
        faults.relay.rate = 0
    faults.judge_listed(since=since, most=20)
    assert newest(faults) > before + 5
    at_rest(faults)
