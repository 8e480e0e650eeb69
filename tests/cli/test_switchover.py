"""Switchover and rollback at the command line: what is asked of whom, in which order, and what is said of it."""

from __future__ import annotations

import pytest

from drctl.errors import ApplianceUnreachable, StepFailed
from tests.cli.appliance import NOW, recovery


@pytest.fixture
def web(world):
    applied = world.applied()
    applied.alpha.phases["web"] = "live"
    return applied


def methods(appliance, *wanted):
    return [name for name, _ in appliance.calls if name in wanted]


def test_a_dry_run_shows_both_sides_and_changes_nothing(web) -> None:
    result = web("switchover", "web", "--dry-run")
    assert result.code == 0
    for text in (
        "before: alpha/a1 (source): live, generation 1; db running, front running",
        "would shut down front, db at alpha/a1, in this order",
        "would boot db, front at beta/b1, generation 2",
        "network lan -> lan-b",
    ):
        assert text in result.err
    assert not web.alpha.called("handover.run")
    assert not web.beta.called("switchover.run")


def test_the_source_ends_before_the_recovery_begins(web) -> None:
    result = web("switchover", "web", "--shutdown-timeout", "10m", "--on-shutdown-timeout", "suspend", "--yes")
    assert result.code == 0
    (ended,) = web.alpha.called("handover.run")
    assert (ended["on_timeout"], ended["shutdown_seconds"]) == ("suspend", 600.0)
    (begun,) = web.beta.called("switchover.run")
    assert (begun["number"], begun["epoch"], begun["generation"]) == (13, "a" * 32, 2)
    assert "loss: none" in result.err
    assert "after: beta/b1 (recovery): failed-over" in result.err
    assert "drctl rollback web" in result.err


def test_it_asks_and_a_no_changes_nothing(web) -> None:
    assert web("switchover", "web", typed="n\n").code == 41
    assert web("switchover", "web").code == 14
    assert not web.alpha.called("handover.run")


def test_what_stands_in_the_way_is_all_said_and_nothing_is_done(web) -> None:
    web.alpha.replies["handover.plan"] = {
        "generation": 1,
        "phase": "live",
        "handover": None,
        "reasons": ["db is paused"],
    }
    plan = web.beta.call("failover.plan", {"group": "web"})
    error = {"severity": "error", "subject": "front", "message": "name taken", "hint": ""}
    web.beta.replies["failover.plan"] = plan | {"findings": [error]}
    result = web("switchover", "web", "--yes")
    assert result.code == 42
    assert "in the way: db is paused" in result.err
    assert "in the way: front: name taken" in result.err
    assert not web.alpha.called("handover.run")


def test_a_source_that_is_silent_is_no_switchover(web) -> None:
    web.alpha.down = True
    assert web("switchover", "web", "--yes").code == 22
    assert not web.beta.called("switchover.run")


def test_a_recovery_that_fails_tells_both_ways_on(web) -> None:
    web.beta.replies["switchover.run"] = StepFailed("the view server ended")
    result = web("switchover", "web", "--yes")
    assert result.code == 40
    for text in ("are off at the source", "to go on: drctl switchover web", "drctl rollback web"):
        assert text in result.err
    del web.beta.replies["switchover.run"]
    again = web("switchover", "web", "--yes")
    assert again.code == 0
    assert "will go on with the switchover that is handed-over at alpha/a1" in again.err


def test_given_twice_it_does_nothing_the_second_time(web) -> None:
    assert web("switchover", "web", "--yes").code == 0
    again = web("switchover", "web", "--yes")
    assert again.code == 0
    assert "web runs at beta/b1 already" in again.err
    assert len(web.alpha.called("handover.run")) == len(web.beta.called("switchover.run")) == 1


def test_auto_needs_its_time_and_reaches_the_recovery_site(web) -> None:
    assert web("switchover", "web", "--auto", "rollback", "--yes").code == 2
    assert web("switchover", "web", "--after", "4h", "--yes").code == 2
    assert web("switchover", "web", "--auto", "rollback", "--after", "4h", "--yes").code == 0
    assert web.beta.called("switchover.run")[0]["auto"] == {"action": "rollback", "after_seconds": 14400.0}
    result = web("switchover", "web", "--cancel-auto")
    assert result.code == 0
    assert "no rollback: ann called it off" in result.out


def test_the_time_left_is_in_the_status(web) -> None:
    auto = {"action": "commit", "due": NOW + 90, "cancelled": "", "seconds_left": 90.0}
    web.beta.failovers = [recovery("failover", "web", auto=auto)]
    assert "commit in 1m 30s" in web("status", "web").out


def test_rollback_of_a_switchover_stops_there_first_and_starts_here_then(web) -> None:
    web("switchover", "web", "--yes")
    order: list[str] = []
    for appliance, name, method in (
        (web.beta, "rollback", "_rollback"),
        (web.alpha, "handover.undo", "_handover_undo"),
    ):

        def reply(params, progress, appliance=appliance, name=name, method=method):
            order.append(name)
            return getattr(appliance, method)(params)

        appliance.replies[name] = reply
    result = web("rollback", "web", "--yes")
    assert result.code == 0
    assert order == ["rollback", "handover.undo"]
    assert web.alpha.called("handover.undo")[0]["generation"] == 3
    assert "will stop and remove db, front at beta/b1 (switchover s1)" in result.err
    assert "will DISCARD what they wrote there in " in result.err
    assert "will start db, front at alpha/a1, the source" in result.err
    assert "/images/web/db.vda-g2.qcow2" in result.out


def test_rollback_asks(web) -> None:
    web("switchover", "web", "--yes")
    assert web("rollback", "web", typed="n\n").code == 41
    assert web("rollback", "web", "--dry-run").code == 0
    assert not web.beta.called("rollback")


def test_rollback_of_a_failover_whose_source_is_gone(web) -> None:
    web("failover", "web", "--source-is-down", "fire", "--confirm", "web")
    web.alpha.down = True
    result = web("rollback", "web", "--yes")
    assert result.code == 0
    assert "afterwards the group runs nowhere" in result.err


def test_a_switchover_is_not_rolled_back_into_nowhere(web) -> None:
    web("switchover", "web", "--yes")
    web.alpha.down = True
    result = web("rollback", "web", "--yes")
    assert result.code == 22
    assert "would run nowhere" in result.err
    assert not web.beta.called("rollback")


def test_a_switchover_that_ended_between_its_halves_is_rolled_back(web) -> None:
    """The source has handed over, the recovery side knows nothing of it."""
    web.beta.replies["switchover.run"] = ApplianceUnreachable("gone")
    web("switchover", "web", "--yes")
    result = web("rollback", "web", "--yes")
    assert result.code == 0
    assert web.beta.called("rollback")[0]["generation"] == 3
    assert web.alpha.called("handover.undo")[0]["generation"] == 3


def test_a_switchover_before_its_final_checkpoint_is_called_off_at_the_source_alone(web) -> None:
    web.alpha.handover = {"phase": "stopping", "machines": ["db", "front"], "generation": 2, "final": None}
    assert web("rollback", "web", "--yes").code == 0
    assert not web.beta.called("rollback")
    assert web.alpha.called("handover.undo")[0].get("generation") is None


def test_rollback_without_anything_to_roll_back(web) -> None:
    assert web("rollback", "web", "--yes").code == 12


@pytest.mark.parametrize("phase", ["stopping", "final", "handed-over"])
def test_a_switchover_that_is_half_done_is_in_the_status(web, phase: str) -> None:
    status = web.alpha.call("group.status", {"group": "web"})
    web.alpha.replies["group.status"] = status | {"handover": {"phase": phase}}
    shown = web("status", "web").out
    assert f"a switchover is half done ({phase}): drctl switchover web goes on, drctl rollback web goes back" in shown
    web("failover", "web", "--source-is-down", "x", "--confirm", "web")
    assert "half done" not in web("status", "web").out
