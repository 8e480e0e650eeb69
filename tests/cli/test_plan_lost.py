"""A recovery host that is lost in the middle of a run, at each of its calls; and names that hide things."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ET
from itertools import count

import pytest

from drctl.errors import ApplianceUnreachable
from tests.cli.appliance import machine, recovery
from tests.cli.test_plan import PLAN, runs_of, write

QUICK = (
    PLAN.replace('interval = "100ms"\nretries = 2', 'interval = "100ms"\nretries = 0')
    .replace('name = "db"\n', 'name = "db"\ntime_limit = "1s"\n')
    .replace('all_of = ["web"]\n', '[[stage.vm]]\nname = "front"\ntime_limit = "1s"\n')
)


@pytest.fixture
def plans(world):
    (world.directory / "plans").mkdir()
    write(world, QUICK)
    world.clock.monotonic = time.monotonic  # time limits are real ones
    return world.applied()


def lost_from(appliance, number: int):
    """Its calls go to nobody from that one on; what it had done stands. Returns what ends that."""
    call, calls = appliance.call, count(1)

    def answer(method, params=None, **more):
        if next(calls) >= number:
            raise ApplianceUnreachable(f"no appliance answers at {appliance.host}")
        return call(method, params, **more)

    appliance.call = answer

    def back() -> None:
        appliance.call = call

    return back


def test_a_drill_whose_host_is_lost_at_any_call_leaves_nothing_once_it_is_back(plans) -> None:
    """What could not be removed is 44, and a second try removes it; a run that could not begin begins nothing."""
    codes, number = set(), 0
    while True:
        number += 1
        back = lost_from(plans.beta, number)
        result = plans("plan", "run", "web", "--mode", "test", "--yes", "-o", "json")
        back()
        codes.add(result.code)
        assert result.code in (0, 10, 11, 22, 40, 42, 44), (number, result.code, result.err)
        row = max(runs_of(plans), key=lambda one: one["began"], default=None)
        if row is not None and plans.beta.tests:
            assert row["state"] == "dirty", (number, row, result.err)
            again = plans("run", "resume", row["run"], "--yes")
            assert again.code in (0, 40), (number, again.err)
        assert plans.beta.tests == [], number
        plans.clock.sleep(60)
        if result.code == 0:
            break
    assert 44 in codes, "none was lost in the middle"
    for row in runs_of(plans):
        assert plans("run", "verify", row["run"]).code == 0


def test_a_host_that_is_lost_while_its_machines_boot_fails_them_and_says_so(plans) -> None:
    def start(params, progress):
        test = recovery("test", "web", label=params["label"])
        test["machines"][0]["state"] = "defined"
        plans.beta.tests.append(test)
        plans.beta.down = True
        return test

    plans.beta.replies["test.start"] = start
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert (result.code, "no appliance answers at b1" in result.err) == (44, True)
    plans.beta.down = False
    assert plans("run", "resume", runs_of(plans)[0]["run"], "--yes").code == 40
    assert plans.beta.tests == []


NAMES = ["my db", 'o\'brien "x"', "a/b\\c", "größe-数据", "-rf", "<b>&amp;", "%s{}$(id)", "x" * 200, "..", "#1|`"]


def test_names_with_blanks_quotes_slashes_and_letters_of_all_kinds(plans, tmp_path) -> None:
    """From the plan's file through scripts, steps, record, reports and JUnit; no name is taken for anything else."""
    (plans.directory / "groups/web.toml").write_text(
        f'name = "web"\nsource = "alpha"\nrecovery = "beta"\nmachines = {json.dumps(NAMES)}\n'
    )
    check = '[[stage.vm.check]]\nkind = "command"\nrun = ["/bin/sh", "-c", "printf %s \\"$DRCTL_VM\\""]\n'
    vms = "".join(f"[[stage.vm]]\nname = {json.dumps(name)}\n{check}" for name in NAMES)
    write(plans, f'plan = "web"\ngroups = ["web"]\n[[stage]]\nname = "all"\n{vms}')
    plans.alpha.machines = [machine(name) for name in NAMES]
    assert plans("apply", "--yes").code == 0
    states = [{"name": name, "state": "running", "reason": ""} for name in NAMES]

    def start(params, progress):
        plans.beta.tests.append(recovery("test", "web", label=params["label"], machines=states))
        return plans.beta.tests[-1]

    plans.beta.replies["test.start"] = start
    file = tmp_path / "names.xml"
    result = plans("plan", "run", "web", "--mode", "test", "--yes", "--junit", str(file), "-o", "json")
    assert (result.code, plans.beta.tests) == (0, []), result.err
    steps = plans("run", "show", result.json["run"], "-o", "json").json["steps"]
    assert all(one["outcome"] == "done" for one in steps)
    ids = [one["id"] for one in steps]
    assert len(ids) == len(set(ids))
    assert not [one for one in ids if any(letter in one for letter in " '\"\\<|`$")]
    told = plans("run", "report", "latest", "--format", "json").json
    assert sorted(one["name"] for one in told["machines"]) == sorted(NAMES)
    assert ET.fromstring(file.read_text()).get("failures") == "0"
    page = plans("run", "report", "latest", "--format", "html").out
    assert "<b>&amp;<" not in page
    assert "&lt;b&gt;&amp;amp;" in page
    assert plans("plan", "show", "web").code == 0
