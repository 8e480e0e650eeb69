"""Runs killed in the middle, on the lab: gone on with, they end as one that nobody disturbed. And who vouches for them.

The tests go from one to the next; the failovers come last, since they end the source."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drctl.appliance.run_service import signed_text
from drctl.replication.statement import sign_statement
from drctl.store.run_log import RunLog, read_run
from tests.integration.fault_rig import GROUP, protect
from tests.integration.plan_rig import PATIENCE, Operator, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(3600)]

PLAN = """\
plan = "web"
groups = ["web"]
[[script]]
name = "announce"
when = "before"
run = ["./note", "announce"]
[[stage]]
name = "first"
[[stage.vm]]
name = "web-1"
time_limit = "20m"
[[stage.vm.check]]
kind = "console"
text = "DRCTL-GUEST-UP"
retries = 600
interval = "500ms"
[[stage.vm.script]]
name = "warm"
when = "after"
run = ["./note", "warm"]
[[stage]]
name = "second"
after = ["first"]
[[stage.vm]]
name = "web-2"
time_limit = "20m"
[[stage.vm.check]]
kind = "guest-agent"
retries = 600
interval = "500ms"
"""
#: A script that takes a moment, so that it can be caught in the middle.
NOTE = '#!/bin/sh\necho "$DRCTL_RUN $1 begun" >> notes\nsleep 1\necho "$DRCTL_RUN $1 done" >> notes\n'
LOCKED, DAMAGED = 13, 31

#: Killed when this step has begun.
TEST_STEPS = (
    "before:announce",
    "group:web/recover",
    "stage:first/vm:web-1/boot",
    "stage:first/vm:web-1/check:console",
    "stage:first/vm:web-1/after:warm",
    "stage:second/vm:web-2/check:guest-agent",
    "group:web/clean-up",
)
FAILOVER_STEPS = ("group:web/recover", "stage:first/vm:web-1/check:console", "stage:second/vm:web-2/boot")
FAILOVER = ("--mode", "failover", "--source-is-down", "fire", "--confirm", "web")


@pytest.fixture(scope="module")
def lab(make_lab) -> Iterator[SimpleNamespace]:
    rig = make_lab(guests=2, rate=5, chains=1, slots=256)
    faults = protect(rig)
    operator = Operator(rig, {GROUP: rig.guests()})
    operator.write("web", PLAN)
    operator.script("note", NOTE)
    yield SimpleNamespace(rig=rig, faults=faults, operator=operator, runs={})
    operator.close()
    faults.close()


def events(lab, run: str) -> list[dict[str, Any]]:
    return read_run(lab.operator.directory / "runs" / f"{run}.jsonl")[0]


def killed_at(lab, step: str, *arguments: str) -> str:
    """Begin a run, and kill it without a word as soon as its record says that this step has begun; the run's name."""
    directory = lab.operator.directory / "runs"
    before = set(directory.glob("*.jsonl"))
    command = lab.operator.command("plan", "run", "web", "--yes", *arguments)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            assert process.poll() is None, f"ended before {step}: {process.stderr.read().decode()}"
            assert time.monotonic() < deadline, f"{step} never began"
            new = set(directory.glob("*.jsonl")) - before
            if new and any(
                one.get("step") == step and one["event"] == "begin" for one in events(lab, new.copy().pop().stem)
            ):
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    return new.pop().stem


def resume(lab, run: str) -> dict[str, Any]:
    """Go on with it once what the killed one held of its plan and group has ended by itself."""

    def look() -> Any:
        done = lab.operator.drctl("run", "resume", run, "--yes", "-o", "json", code=None)
        assert done.returncode in (0, LOCKED), f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return None if done.returncode == LOCKED else json.loads(done.stdout)

    return wait_for(look, f"{run} is gone on with", 180)


def ended(lab, run: str) -> dict[str, Any]:
    """What is left of a run: what became of its steps, and what runs where."""
    told = lab.operator.json("run", "show", run)
    machines = {name: lab.rig.virsh(name, "list", "--name").split() for name in ("alpha", "beta")}
    defined = lab.rig.virsh("beta", "list", "--all", "--name").split()
    tests = lab.operator.json("test", "list", code=None)["tests"]  # 3 while alpha is gone
    return {
        "state": told["state"],
        "steps": {one["id"]: one["outcome"] for one in told["steps"]},
        "machines": {name: sorted(found) for name, found in machines.items()},
        "defined": sorted(defined),
        "tests": [one for one in tests if one["state"] != "stopped"],
    }


def notes(lab, run: str) -> list[str]:
    lines = (lab.operator.directory / "plans/notes").read_text().splitlines()
    return [line.partition(" ")[2] for line in lines if line.startswith(run)]


def test_a_drill_that_nobody_disturbs(lab):
    document = lab.operator.json("plan", "run", "web", "--mode", "test", "--yes")
    assert document["verdict"] == "passed"
    lab.runs["test"] = document["run"]
    left = ended(lab, document["run"])
    assert left["defined"] == left["tests"] == []
    assert left["machines"]["alpha"] == ["web-1", "web-2"]


@pytest.mark.parametrize("step", TEST_STEPS)
def test_a_killed_drill_ends_as_one_that_nobody_disturbed(lab, step):
    run = killed_at(lab, step, "--mode", "test")
    resumed = resume(lab, run)
    assert resumed["verdict"] == "passed"
    assert ended(lab, run) == ended(lab, lab.runs["test"])
    told = notes(lab, run)
    for script in ("announce", "warm"):
        cut_off_in_it = step.endswith(f":{script}")  # then it is run again, and the first one may have lived on
        assert 1 <= told.count(f"{script} done") <= 1 + cut_off_in_it, "what had ended is not run again"
    proof = lab.operator.json("run", "verify", run)
    assert proof["sound"]
    assert not proof["differing"]
    assert proof["kept"] == ["beta/beta-1"]


def test_the_other_site_keeps_the_head_and_a_site_that_rewrites_its_record_is_told(lab):
    """Also one that signs anew with its own key: the head at alpha is of another record. Asked from another machine,
    on which no record is."""
    run = lab.runs["test"]
    proof = lab.operator.json("run", "verify", run)
    (anchor,) = proof["anchors"]
    assert (anchor["by"], anchor["lines"], anchor["problem"]) == ("alpha/alpha-1", proof["lines"], "")
    (signature,) = proof["signatures"]
    assert (signature["by"], signature["lines"]) == ("beta/beta-1", proof["lines"])
    assert (signature["problem"], signature["doubt"]) == ("", "")

    elsewhere = Operator(lab.rig, {GROUP: lab.rig.guests()})
    home = lab.rig.layout.site("beta").home
    path, sign = home / "runs" / f"{run}.jsonl", home / "runs" / f"{run}.sig"
    before, signed = path.read_bytes(), sign.read_bytes()
    try:
        assert elsewhere.json("run", "verify", run)["anchors"] == [anchor]
        head = rewrite(path)
        wrong = elsewhere.drctl("run", "verify", run, code=DAMAGED)
        assert "beta/beta-1: signed another line" in wrong.stderr
        told = {**json.loads(signed), "head": head}
        sign.write_text(json.dumps({**told, **sign_statement(home / "tls", signed_text(told))}))
        wrong = elsewhere.drctl("run", "verify", run, code=DAMAGED)
        assert "alpha/alpha-1: keeps another hash of line" in wrong.stderr
        wrong = lab.operator.drctl("run", "verify", run, code=DAMAGED)
        assert "beta/beta-1 differs from the one here" in wrong.stderr
    finally:
        path.write_bytes(before)
        sign.write_bytes(signed)
        elsewhere.close()
    lab.operator.drctl("run", "verify", run)


def rewrite(path: Path) -> str:
    """As somebody would who wants to have been somebody else: each line anew, chained as it should be; its head."""
    fresh = path.with_suffix(".fresh")
    with RunLog.create(fresh) as log:
        for event in read_run(path)[0]:
            body = {key: value for key, value in event.items() if key not in ("n", "time", "previous")}
            log.append(body | ({"operator": "eve"} if "operator" in body else {}), event["time"])
        head = log.head
    path.write_bytes(fresh.read_bytes())
    fresh.unlink()
    return head


def cut_off(lab) -> None:
    """The source site is gone: nothing of it answers, sends or runs."""
    for what in ("supervisor", "watchdog", "shipper", "tap"):
        lab.faults.kill(what)
    for guest in lab.rig.guests():
        lab.rig.virsh("alpha", "destroy", guest)


def stands(lab) -> dict[str, Any]:
    told = lab.faults.call("beta", "group.status")
    (recovery,) = [one for one in told["recoveries"] if one["state"] == "running"]
    machines = [(one["name"], one["state"]) for one in recovery["machines"]]
    return {"mode": told["mode"], "kind": recovery["kind"], "machines": machines, "held": recovery["held"]}


def test_a_failover_that_nobody_disturbs(lab):
    lab.faults.await_live(PATIENCE)
    cut_off(lab)
    document = lab.operator.json("plan", "run", "web", *FAILOVER)
    assert document["verdict"] == "passed"
    lab.runs["failover"] = {**ended(lab, document["run"]), "stands": stands(lab)}
    assert lab.runs["failover"]["machines"] == {"alpha": [], "beta": ["web-1", "web-2"]}
    assert lab.operator.json("run", "verify", document["run"])["anchors"] == [], "the other site could not be reached"


@pytest.mark.parametrize("step", FAILOVER_STEPS)
def test_a_killed_failover_ends_as_one_that_nobody_disturbed(lab, step):
    lab.operator.drctl("rollback", GROUP, "--yes")
    assert lab.rig.virsh("beta", "list", "--all", "--name").split() == []
    run = killed_at(lab, step, *FAILOVER)
    begun = time.time_ns()
    resumed = resume(lab, run)
    assert resumed["verdict"] == "passed"
    assert {**ended(lab, run), "stands": stands(lab)} == lab.runs["failover"]
    lab.rig.observer.await_more("web-2", "beta", 3, timeout=PATIENCE)
    assert all(seen.up_ns < begun + PATIENCE * 1e9 and not seen.trouble for seen in lab.rig.observer.seen())
    assert lab.operator.json("run", "verify", run)["sound"]
