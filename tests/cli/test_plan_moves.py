"""Plans as a switchover and as a failover: what is asked of whom, what guards it, and what a failed step leaves."""

from __future__ import annotations

import json

import pytest

from drctl.errors import ApplianceUnreachable, Locked, StepFailed
from tests.cli.appliance import NOW, recovery

PLAN = """\
plan = "web"
groups = ["web"]
on_failure = "{failure}"
{more}
[[stage]]
name = "data"
[[stage.vm]]
name = "db"
[[stage.vm.check]]
kind = "command"
run = ["/bin/sh", "-c", "{check}"]
interval = "100ms"
retries = 1
[[stage]]
name = "front"
after = ["data"]
all_of = ["web"]
"""
FAILOVER = ("plan", "run", "web", "--mode", "failover")
SWITCHOVER = ("plan", "run", "web", "--mode", "switchover")
DOWN = ("--source-is-down", "fire", "--confirm", "web")


@pytest.fixture
def plans(world):
    (world.directory / "plans").mkdir()
    write(world)
    return world.applied()


def write(world, failure: str = "stop", check: str = "true", more: str = "") -> None:
    text = PLAN.format(failure=failure, check=check, more=more)
    (world.directory / "plans/web.toml").write_text(text)


def runs_of(world) -> list[dict]:
    return world("run", "list", "-o", "json").json["runs"]


def record_of(world) -> list[dict]:
    (path,) = (world.directory / "runs").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def order_of(world) -> list[str]:
    wanted = ("lease.take", "handover.run", "switchover.run", "failover.run", "lease.release", "rollback")
    calls = [(name, "alpha") for name, _ in world.alpha.calls if name in wanted]
    calls += [(name, "beta") for name, _ in world.beta.calls if name in wanted]
    return [name for name, _ in calls]


def test_a_switchover_by_plan(plans) -> None:
    write(plans, more='rollback_after = "4h"')
    result = plans(*SWITCHOVER, "--shutdown-timeout", "10m", "--on-shutdown-timeout", "suspend", "--yes", "-o", "json")
    assert result.code == 0, result.err
    assert result.json["verdict"] == "passed"
    (ended,) = plans.alpha.called("handover.run")
    assert (ended["on_timeout"], ended["shutdown_seconds"]) == ("suspend", 600.0)
    (begun,) = plans.beta.called("switchover.run")
    assert (begun["number"], begun["epoch"], begun["generation"]) == (13, "a" * 32, 2)
    assert begun["auto"] == {"action": "rollback", "after_seconds": 14400.0}
    assert len(plans.beta.called("failover.hold")) == 1, "it has proven well, so it is not rolled back by itself"
    assert "drctl rollback web" in plans(*SWITCHOVER, "--yes").err


def test_calls_carry_the_lease_of_their_group(plans) -> None:
    assert plans(*SWITCHOVER, "--yes").code == 0
    assert plans.alpha.called("handover.run")[0]["lease"] == "t"
    assert plans.beta.called("switchover.run")[0]["lease"] == "t"
    (taken,) = plans.beta.called("lease.take")
    assert taken["verb"] == "plan run"
    assert len(plans.beta.called("lease.release")) == 1


@pytest.mark.parametrize("arguments", [(*SWITCHOVER, "--yes"), (*FAILOVER, *DOWN)])
def test_a_group_that_somebody_works_on_is_13_and_nothing_is_done(plans, arguments) -> None:
    plans.beta.replies["lease.take"] = Locked("ann@host works on web until 12:00")
    assert plans(*arguments).code == 13
    assert order_of(plans) == ["lease.take"]
    assert runs_of(plans) == []


def test_a_failover_by_plan(plans) -> None:
    plans.alpha.down = True
    result = plans(*FAILOVER, *DOWN, "-k", "#11", "-o", "json")
    assert result.code == 0, result.err
    assert result.json["verdict"] == "passed"
    (ordered,) = plans.beta.called("failover.run")
    assert (ordered["source_is_down"], ordered["confirmed"], ordered["auto"]) == ("fire", "web", None)
    first, *_ = record_of(plans)
    assert (first["source_is_down"], first["checkpoints"], first["loss_seconds"]) == (
        "fire",
        {"web": "#12"},
        {"web": 4.0},
    )
    told = next(event for event in record_of(plans) if event["event"] == "end" and "recover" in event["step"])
    assert (told["loss_seconds"], told["source_is_down"], told["checkpoint"]) == (4.0, "fire", 12)


def test_a_failover_needs_the_plans_name(plans) -> None:
    down = ("--source-is-down", "fire")
    assert plans(*FAILOVER, *down, "--yes").code == 14
    assert plans(*FAILOVER, *down, "--confirm", "wep").code == 14
    assert plans(*FAILOVER, *down, typed="wep\n").code == 41
    assert (order_of(plans), runs_of(plans)) == ([], [])
    assert plans(*FAILOVER, *down, typed="web\n").code == 0


def test_a_failover_beside_a_source_that_runs_is_15(plans) -> None:
    result = plans(*FAILOVER, "--confirm", "web")
    assert (result.code, "db, front run there" in result.err) == (15, True)
    assert (order_of(plans), runs_of(plans)) == ([], [])
    dry = plans(*FAILOVER, "--dry-run")
    assert (dry.code, "in the way: the source alpha/a1 of web answers" in dry.err) == (0, True)


def test_a_failover_whose_source_is_not_known_to_be_down_is_14(plans) -> None:
    plans.alpha.down = True
    assert plans(*FAILOVER, "--confirm", "web").code == 14
    assert order_of(plans) == []


def test_what_is_wrong_at_the_source_or_with_one_machine_holds_no_failover_up(plans) -> None:
    """It is what a disaster looks like. A switchover or a test is refused for the same."""
    plan = plans.beta.call("failover.plan", {"group": "web"})
    finding = {"severity": "error", "subject": "front", "message": "name taken", "hint": ""}
    plans.beta.replies["failover.plan"] = plan | {"findings": [finding]}
    plans.alpha.machines = plans.alpha.machines[1:]
    assert plans(*SWITCHOVER, "--yes").code == 42
    result = plans(*FAILOVER, *DOWN)
    assert result.code == 0
    assert "machine 'db' is not on its source host" in result.err


def test_the_source_is_fenced_within_the_run_and_the_record_says_so(plans) -> None:
    file = plans.directory / "drctl.toml"
    file.write_text(file.read_text().replace('name = "a1"', 'name = "a1"\nfence = ["/bin/true"]', 1))
    assert plans(*FAILOVER, "--confirm", "web").code == 15, "it runs there"
    plans.alpha.down = True
    result = plans(*FAILOVER, "--confirm", "web")
    assert result.code == 0, result.err
    assert plans.beta.called("failover.run")[0]["source_is_down"].startswith("it was fenced: true fenced it")
    assert any("it was fenced" in str(event.get("source_is_down")) for event in record_of(plans))


def test_a_fence_that_fails_fails_the_run(plans) -> None:
    file = plans.directory / "drctl.toml"
    file.write_text(file.read_text().replace('name = "a1"', 'name = "a1"\nfence = ["/bin/false"]', 1))
    plans.alpha.down = True
    result = plans(*FAILOVER, "--confirm", "web")
    assert (result.code, "could not be fenced" in result.err) == (40, True)
    assert not plans.beta.called("failover.run")


def test_what_stands_in_the_way_of_a_switchover_is_42(plans) -> None:
    reasons = {"generation": 1, "phase": "live", "handover": None, "reasons": ["db is paused"]}
    plans.alpha.replies["handover.plan"] = reasons
    for arguments in (("--yes",), ("--dry-run",)):
        result = plans(*SWITCHOVER, *arguments)
        assert (result.code, "db is paused" in result.err) == (42, True)
    assert (order_of(plans), runs_of(plans)) == ([], [])
    plans.alpha.down = True
    assert plans(*SWITCHOVER, "--yes").code == 22


def test_options_that_a_mode_does_not_have(plans) -> None:
    assert plans(*SWITCHOVER, "-k", "#11", "--yes").code == 2
    assert plans(*FAILOVER, "--keep", *DOWN).code == 2


def test_a_machine_can_not_be_left_off_yet(plans) -> None:
    path = plans.directory / "plans/web.toml"
    path.write_text(path.read_text().replace('all_of = ["web"]', '[[stage.vm]]\nname = "front"\nboot = false'))
    result = plans(*SWITCHOVER, "--yes")
    assert (result.code, "'front' can't be left off" in result.err) == (42, True)
    assert plans("plan", "run", "web", "--mode", "test", "--yes").code == 0


@pytest.mark.parametrize("arguments", [(*SWITCHOVER, "--yes"), (*FAILOVER, *DOWN)])
def test_a_check_that_fails_leaves_what_was_moved_and_the_run_goes_on_later(plans, arguments) -> None:
    write(plans, check="test -e well")
    result = plans(*arguments)
    assert result.code == 40
    assert "drctl rollback web" in result.err
    (row,) = runs_of(plans)
    assert (row["state"], len(plans.beta.failovers), plans.beta.called("rollback")) == ("failed", 1, [])
    (plans.directory / "plans/well").touch()
    again = plans("run", "resume", row["run"], "--yes")
    assert again.code == 0, again.err
    moves = [name for name in order_of(plans) if name.endswith(".run")]
    assert len(moves) == len(set(moves)), "what was moved is not moved again"
    assert runs_of(plans)[0]["state"] == "passed"
    assert plans("run", "resume", row["run"], "--yes").code == 12


@pytest.mark.parametrize("arguments", [(*SWITCHOVER, "--yes"), (*FAILOVER, *DOWN)])
def test_a_plan_that_says_so_is_rolled_back(plans, arguments) -> None:
    write(plans, failure="rollback", check="false")
    result = plans(*arguments)
    assert result.code == 40
    assert "roll web back to its source: done" in result.err
    assert plans.beta.failovers == []
    assert order_of(plans)[-2:] == ["rollback", "lease.release"]
    if "switchover" in arguments:
        assert plans.alpha.called("handover.undo")[0]["generation"] == 3
        assert plans.alpha.phases["web"] == "catching-up"


def test_what_had_been_moved_before_is_not_rolled_back(plans) -> None:
    assert plans("failover", "web", "--source-is-down", "x", "--confirm", "web").code == 0
    write(plans, failure="rollback", check="false")
    assert plans(*FAILOVER, *DOWN).code == 40
    assert (len(plans.beta.failovers), plans.beta.called("rollback")) == (1, [])


def test_a_switchover_that_is_called_off_leaves_nothing_to_undo(plans) -> None:
    write(plans, failure="rollback")
    plans.alpha.replies["handover.run"] = StepFailed("db did not power off within 25 s; it was called off")
    result = plans(*SWITCHOVER, "--yes")
    assert (result.code, "db did not power off" in result.err) == (40, True)
    assert (plans.beta.called("switchover.run"), plans.beta.called("rollback")) == ([], [])
    assert "to undo it" not in result.err


def test_what_can_not_be_rolled_back_is_44(plans) -> None:
    write(plans, failure="rollback", check="false")
    plans.beta.replies["rollback"] = ApplianceUnreachable("no answer")
    result = plans(*FAILOVER, *DOWN)
    assert (result.code, "not all was rolled back: group:web/undo: no answer" in result.err) == (44, True)
    (row,) = runs_of(plans)
    del plans.beta.replies["rollback"]
    again = plans("run", "resume", row["run"], "--yes")
    assert (again.code, plans.beta.failovers) == (40, [])
    assert "it was rolling back" in again.err


def test_a_machine_that_failed_is_tried_again_by_resume(plans) -> None:
    machines = [{"name": "db", "state": "running"}, {"name": "front", "state": "failed", "reason": "no memory"}]

    def partly(params, progress):
        plans.beta.failovers = [recovery("failover", "web", state="partly", machines=machines)]
        return plans.beta.failovers[0]

    plans.beta.replies["failover.run"] = partly
    result = plans(*FAILOVER, *DOWN)
    assert (result.code, "stage:front/vm:front/boot: no memory" in result.err) == (40, True)
    del plans.beta.replies["failover.run"]
    assert plans("run", "resume", runs_of(plans)[0]["run"], "--yes").code == 0
    assert len(plans.beta.called("failover.run")) == 2
    assert plans.beta.called("failover.run")[1]["checkpoint"] == plans.beta.called("failover.run")[0]["checkpoint"]


@pytest.mark.parametrize("arguments", [(*SWITCHOVER, "--yes"), (*FAILOVER, *DOWN)])
def test_a_killed_run_goes_on_from_every_line_of_its_record(plans, arguments) -> None:
    write(plans, more='rollback_after = "4h"')
    assert plans(*arguments).code == 0
    (row,) = runs_of(plans)
    path = plans.directory / "runs" / f"{row['run']}.jsonl"
    whole, moved = path.read_text(), plans.beta.failovers
    count = whole[: whole.index('"event":"over"')].count("\n")  # what follows it only shows how machines look
    assert count > 10
    for lines in range(1, count + 1):
        path.write_text("".join(whole.splitlines(keepends=True)[:lines]))
        begun = "group:web/recover" in path.read_text().partition("\n")[2]
        plans.beta.failovers = moved if begun else []
        result = plans("run", "resume", row["run"], "--yes", "-o", "json")
        assert (result.code, result.json["verdict"], len(plans.beta.failovers)) == (0, "passed", 1), lines
        assert plans("run", "verify", row["run"]).code == 0


def test_the_forecast_of_a_dry_run(plans) -> None:
    plans.alpha.down = True
    result = plans(*FAILOVER, "--source-is-down", "x", "--dry-run", "-o", "json")
    assert (result.code, result.json["forecast"]["loss_seconds"]) == (0, {"web": 4.0})
    plans.alpha.down = False
    result = plans(*SWITCHOVER, "--dry-run", "-o", "json")
    assert (result.code, result.json["forecast"]["loss_seconds"]) == (0, {"web": 0.0})
    assert plans.clock.now == NOW
    assert order_of(plans) == []


@pytest.mark.parametrize("arguments", [(*SWITCHOVER, "--yes"), (*FAILOVER, *DOWN)])
def test_what_was_rolled_back_meanwhile_is_not_moved_again_by_resume(plans, arguments) -> None:
    write(plans, check="false")
    assert plans(*arguments).code == 40
    assert plans("rollback", "web", "--yes").code == 0
    result = plans("run", "resume", runs_of(plans)[0]["run"], "--yes")
    assert (result.code, "web: rolled back since" in result.err) == (14, True)
    assert len([name for name in order_of(plans) if name in ("failover.run", "switchover.run")]) == 1
