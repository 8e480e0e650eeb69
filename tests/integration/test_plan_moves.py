"""A switchover and failovers by plan between two real sites, gated by what the recovered guests say, judged by the
witness. The tests go from one to the next."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from drctl.lab.judge import loss
from tests.integration.fault_rig import GROUP, protect
from tests.integration.test_switchover import Sites, cut_off, final_images

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(900)]

#: The check passes when the guest has said on its serial port, since the file `since` was written, that it is up.
PLAN = """\
plan = "web"
groups = ["web"]
on_failure = "{failure}"
rollback_after = "1h"
[[stage]]
name = "first"
[[stage.vm]]
name = "web-1"
[[stage.vm.check]]
kind = "command"
run = ["/bin/sh", "-c", "{check}"]
retries = {retries}
[[stage]]
name = "second"
after = ["first"]
all_of = ["web"]
[[stage.check]]
kind = "command"
run = ["/bin/sh", "-c", "true"]
"""
UP = "tail -c +$(($(cat since-$DRCTL_VM) + 1)) ../serial/$DRCTL_VM.log | grep -q DRCTL-GUEST-UP"


@pytest.fixture(scope="module")
def sites(make_lab):
    rig = make_lab(guests=2, rate=20, slots=256)
    faults = protect(rig)
    yield Sites(faults)
    for name in ("plans", "runs"):  # ours: the lab's user could not remove them
        shutil.rmtree(rig.directory / name, ignore_errors=True)
    faults.close()


def write(sites, failure="stop", check=UP, retries=90) -> None:
    directory = sites.rig.directory / "plans"
    directory.mkdir(exist_ok=True)
    (directory / "web.toml").write_text(PLAN.format(failure=failure, check=check, retries=retries))
    for guest in sites.rig.guests():
        said = (sites.rig.directory / "serial" / f"{guest}.log").stat().st_size
        (directory / f"since-{guest}").write_text(str(said))


def run(sites, mode, *arguments, code=0):
    told, said = sites.drctl("plan", "run", "web", "--mode", mode, "-o", "json", *arguments, code=code)
    return (json.loads(told) if told else {}), said


def test_a_drill_by_plan_leaves_nothing_and_is_reported(sites):
    """The copy of the second stage is switched on when the first one has said on its console that it is up."""
    sites.faults.await_live(120)
    write(sites)
    path = sites.rig.directory / "plans/web.toml"
    by_shell = f'kind = "command"\nrun = ["/bin/sh", "-c", "{UP}"]'
    path.write_text(path.read_text().replace(by_shell, 'kind = "console"\ntext = "DRCTL-GUEST-UP"'))
    document, said = run(sites, "test", "--yes")
    assert document["verdict"] == "passed", said
    steps = json.loads(sites.drctl("run", "show", document["run"], "-o", "json")[0])["steps"]
    times = {one["id"]: (one["begun"], one["begun"] + one["seconds"]) for one in steps}
    well = times["stage:first/vm:web-1/check:console"][1]
    assert times["stage:second/vm:web-2/boot"][0] >= well - 0.1
    assert sites.rig.virsh("beta", "list", "--all", "--name").split() == []
    assert sites.states("alpha") == {"web-1": "running", "web-2": "running"}
    told = json.loads(sites.drctl("run", "report", "latest", "--format", "json")[0])
    assert (told["verdict"], told["rto_seconds"] < 120, told["rpo_seconds"] < 60) == ("passed", True, True)
    assert "✓ passed" in sites.drctl("run", "report", "latest", "--format", "html")[0]
    sites.drctl("check", "drill", "web")


def test_a_switchover_by_plan_loses_nothing_and_is_not_rolled_back(sites):
    sites.faults.await_live(120)
    write(sites)
    begun = time.time_ns()
    document, said = run(sites, "switchover", "--yes")
    moment = time.time_ns()
    assert document["verdict"] == "passed", said
    (standing,) = [one for one in sites.recovery()["recoveries"] if one["kind"] == "switchover"]
    assert standing["auto"]["cancelled"], "it has proven well"
    assert sites.states("alpha") == {"web-1": "shut off", "web-2": "shut off"}
    verdict = final_images(sites, standing["checkpoint"]["number"])
    assert verdict.true_prefix, str(verdict)
    for guest, lost in loss(verdict, sites.rig.observer.logs("alpha"), moment).items():
        assert set(lost.missing) == {0}, f"{guest} lost {lost}"
    sites.boot("beta", begun)
    sites.write_more("beta")
    told = json.loads(sites.drctl("run", "show", document["run"], "-o", "json")[0])
    assert {one["outcome"] for one in told["steps"]} == {"done"}


def test_a_switchover_that_fails_its_check_comes_home_by_itself(sites):
    sites.drctl("rollback", GROUP, "--yes")
    sites.faults.await_live(180)
    write(sites, failure="rollback", check="false", retries=0)
    begun = time.time_ns()
    document, said = run(sites, "switchover", "--yes", code=40)
    assert document["verdict"] == "failed", said
    assert sites.rig.virsh("beta", "list", "--all", "--name").split() == []
    assert sites.states("alpha") == {"web-1": "running", "web-2": "running"}
    sites.boot("alpha", begun)
    sites.faults.await_live(180)
    sites.write_more("alpha")


def test_a_failover_by_plan_is_refused_beside_a_source_that_runs(sites):
    _, said = run(sites, "failover", "--confirm", "web", code=15)
    assert "web-1, web-2 run there" in said
    assert sites.recovery()["mode"] == "journal"


def test_a_failover_by_plan_from_the_recovery_site_alone(sites):
    sites.faults.await_live(120)
    cut_off(sites)
    write(sites)
    begun = time.time_ns()
    document, said = run(sites, "failover", "--source-is-down", "fire", "--confirm", "web")
    assert document["verdict"] == "passed", said
    sites.boot("beta", begun)
    sites.write_more("beta")
