"""Switchover, rollback, and what is done by the clock, on a host in memory, interrupted wherever it can be."""

from __future__ import annotations

import pytest

from drctl.appliance.recovery.ports import Heard
from drctl.appliance.recovery.state import RecoveryPhase
from drctl.errors import Locked, Refused, SourceAlive, StepFailed, WrongPhase
from drctl.model.checkpoint import Checkpoint, CheckpointKind
from drctl.model.machine import MachineState
from tests.unit.appliance.test_recovery import FAILOVER, Host, end_states, kill_everywhere

FINAL = Checkpoint(4, 999_995.0, CheckpointKind.FINAL, "0" * 32, 1, 40)
SWITCHOVER = {"group": "erp", "number": 4, "epoch": "0" * 32, "generation": 2}


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path / "recoveries")


def handed_over(host):
    """The source's half is done."""
    host.world.stores.listed.append(FINAL)


def running(host):
    return {name: d.state for name, d in host.world.hypervisor.domains.items() if d.state is MachineState.RUNNING}


def auto(action, seconds):
    return {"action": action, "after_seconds": seconds}


# -- switchover -----------------------------------------------------------------------------------------------------


def test_a_switchover_boots_at_the_final_checkpoint(host):
    handed_over(host)
    result = host.do("switchover_run", **SWITCHOVER)
    assert (result["kind"], result["state"], result["generation"]) == ("switchover", "running", 2)
    assert result["checkpoint"]["number"] == 4
    assert set(running(host)) == {"db", "web"}
    assert host.world.stores.failed_over == {"erp"}
    effects = list(host.world.effects.log)
    assert host.do("switchover_run", **SWITCHOVER)["id"] == result["id"]
    assert host.world.effects.log == effects


@pytest.mark.parametrize("wrong", [{"number": 3}, {"epoch": "1" * 32}])
def test_another_checkpoint_than_the_final_one_is_refused(host, wrong):
    handed_over(host)
    with pytest.raises(Refused, match="not the final one"):
        host.do("switchover_run", **SWITCHOVER | wrong)
    assert host.world.effects.log == []


def test_what_came_after_the_final_mark_would_be_lost_and_is_refused(host):
    handed_over(host)
    host.world.stores.listed.append(Checkpoint(5, 999_999.0, CheckpointKind.CRASH, "0" * 32, 1, 50))
    with pytest.raises(Refused):
        host.do("switchover_run", **SWITCHOVER)


def test_a_switchover_of_another_generation_is_refused(host):
    handed_over(host)
    host.world.stores.reign_of["erp"] = 2
    with pytest.raises(WrongPhase, match="is at generation 2"):
        host.do("switchover_run", **SWITCHOVER)


def test_a_switchover_killed_at_every_step_is_finished_by_the_next_supervisor(tmp_path):
    accepted = end_states(tmp_path, handed_over, "switchover_run", lambda host: SWITCHOVER)
    assert kill_everywhere(tmp_path, handed_over, "switchover_run", lambda host: SWITCHOVER, accepted) > 25


# -- failover beside a source that lives ----------------------------------------------------------------------------


def test_a_source_whose_stream_stands_is_no_disaster(host):
    host.world.sources.told = Heard(connected=True, seconds_ago=0.1)
    with pytest.raises(SourceAlive):
        host.do("failover_run", **FAILOVER | {"source_is_down": ""})
    assert host.do("failover_plan", group="erp")["source"]["reachable"] is True
    assert host.do("failover_run", **FAILOVER)["state"] == "running"


def test_the_plan_tells_since_when_the_source_is_silent(host):
    host.world.sources.told = Heard(connected=False, seconds_ago=70.0)
    source = host.do("failover_plan", group="erp")["source"]
    assert (source["reachable"], source["silent_seconds"]) == (None, 70.0)
    host.world.sources.told = None
    assert host.do("failover_plan", group="erp")["source"]["silent_seconds"] is None


# -- rollback -------------------------------------------------------------------------------------------------------


def test_a_rollback_gives_the_reign_back_and_keeps_what_was_written(host):
    first = host.do("failover_run", **FAILOVER)
    plan = host.do("rollback_plan", group="erp")
    assert plan["generation"] == 3
    assert {(d["machine"], d["target"]) for d in plan["discards"]} == {("db", "vda"), ("db", "vdb"), ("web", "vda")}
    effects = len(host.world.effects.log)
    result = host.do("rollback", group="erp")
    assert (result["generation"], result["recovery"]["state"]) == (3, "rolled-back")
    order = host.world.effects.log[effects:]
    assert order.index("destroy web") < order.index("undefine web") < order.index("end view")
    assert order.index("end view") < order.index("give back erp 3")
    assert host.world.hypervisor.domains == {}
    assert host.world.stores.failed_over == set()
    assert host.world.stores.pins == {}
    assert {d["overlay"] for d in result["kept"]} == set(host.world.images.files)
    assert first["id"] == result["recovery"]["id"]


def test_after_a_rollback_it_can_be_failed_over_again_to_an_older_checkpoint(host):
    host.do("failover_run", **FAILOVER)
    host.do("rollback", group="erp")
    again = host.do("failover_run", **FAILOVER | {"checkpoint": "#1"})
    assert (again["generation"], again["checkpoint"]["number"], again["state"]) == (4, 1, "running")
    assert set(running(host)) == {"db", "web"}
    assert len(host.world.images.files) == 6, "what was written before is kept beside"


def test_a_rollback_twice_tells_the_same(host):
    host.do("failover_run", **FAILOVER)
    first = host.do("rollback", group="erp")
    second = host.do("rollback", group="erp")
    assert (second["generation"], second["recovery"]["id"]) == (3, first["recovery"]["id"])


def test_nothing_to_roll_back_is_said(host):
    with pytest.raises(WrongPhase, match="nothing to roll back"):
        host.do("rollback", group="erp")
    host.do("test_start", group="erp")
    with pytest.raises(WrongPhase):
        host.do("rollback_plan", group="erp")


def test_a_handover_that_was_never_recovered_raises_the_generation_alone(host):
    result = host.do("rollback", group="erp", generation=3)
    assert (result["recovery"], result["generation"], result["kept"]) == (None, 3, [])
    assert host.world.stores.reign_of == {"erp": 3}
    assert host.do("rollback", group="erp", generation=3)["generation"] == 3


def test_a_commit_can_not_be_rolled_back(host):
    host.do("failover_run", **FAILOVER)
    host.do("commit", group="erp")
    for generation in (0, 7):
        with pytest.raises(WrongPhase, match="commit"):
            host.do("rollback", group="erp", generation=generation)
    assert set(running(host)) == {"db", "web"}


def test_a_machine_that_can_not_be_stopped_keeps_the_reign_here(host):
    host.do("failover_run", **FAILOVER)
    real, hypervisor = host.world.hypervisor.destroy, host.world.hypervisor
    hypervisor.destroy = lambda name: None
    with pytest.raises(StepFailed, match="still runs"):
        host.do("rollback", group="erp")
    assert host.world.stores.failed_over == {"erp"}
    assert host.world.views.running
    hypervisor.destroy = real
    assert host.do("rollback", group="erp")["recovery"]["state"] == "rolled-back"


def test_a_rollback_while_another_operation_works_waits_for_no_commit(host):
    host.do("failover_run", **FAILOVER)
    refused = []

    def during(report):
        if not refused:
            with pytest.raises(WrongPhase):
                host.do("rollback", group="erp")
            refused.append(report)

    host.recovery.reigns.commit({"group": "erp"}, during)
    assert refused


def test_a_rollback_killed_at_every_step_is_finished_by_the_next_supervisor(tmp_path):
    prepare = lambda host: host.do("failover_run", **FAILOVER)  # noqa: E731
    params = lambda host: {"group": "erp"}  # noqa: E731
    accepted = end_states(tmp_path, prepare, "rollback", params)
    assert kill_everywhere(tmp_path, prepare, "rollback", params, accepted) > 10


def test_what_a_rollback_kept_goes_after_a_week(host):
    host.do("failover_run", **FAILOVER)
    host.do("rollback", group="erp")
    host.world.clock.sleep(6 * 86400)
    host.recovery.supervise()
    assert host.world.images.files
    host.world.clock.sleep(2 * 86400)
    host.recovery.supervise()
    assert host.world.images.files == {}
    assert host.files.names() == []


# -- by the clock ---------------------------------------------------------------------------------------------------


def test_rolled_back_by_the_clock_and_not_before(host):
    told = host.do("failover_run", **FAILOVER, auto=auto("rollback", 60))
    assert told["auto"]["seconds_left"] == 60
    host.world.clock.sleep(59)
    host.recovery.supervise()
    assert set(running(host)) == {"db", "web"}
    host.world.clock.sleep(1)
    host.recovery.supervise()
    assert running(host) == {}
    assert host.world.stores.reign_of == {"erp": 3}
    assert host.do("rollback", group="erp")["recovery"]["state"] == "rolled-back"


def test_committed_by_the_clock_also_after_a_restart(host):
    host.do("failover_run", **FAILOVER, auto=auto("commit", 60))
    host.world.clock.sleep(61)
    host.new_supervisor()
    host.recovery.resume()
    host.recovery.supervise()
    assert host.files.load(host.files.names()[0]).phase is RecoveryPhase.COMMITTED
    assert set(host.world.images.files.values()) == {None}


def test_a_commit_by_the_clock_that_lacks_space_is_tried_again(host):
    host.do("failover_run", **FAILOVER, auto=auto("commit", 60))
    host.world.images.space, space = 0, host.world.images.space
    host.world.clock.sleep(61)
    host.recovery.supervise()
    (told,) = host.recovery.recoveries("erp")
    assert (told["state"], "may need" in told["reason"]) == ("running", True)
    host.world.images.space = space
    host.recovery.supervise()
    assert host.recovery.recoveries("erp")[0]["state"] == "running", "not each quarter of a second"
    host.world.clock.sleep(31)
    host.recovery.supervise()
    assert host.recovery.recoveries("erp")[0]["state"] == "committed"


def test_a_rollback_by_the_clock_never_strikes_once_it_was_called_off(host):
    host.do("failover_run", **FAILOVER, auto=auto("rollback", 60))
    told = host.do("hold", group="erp", by="ann")
    assert (told["auto"]["cancelled"], told["auto"]["seconds_left"]) == ("ann called it off", None)
    host.world.clock.sleep(3600)
    host.new_supervisor()
    host.recovery.resume()
    host.recovery.supervise()
    assert set(running(host)) == {"db", "web"}


def test_a_rollback_by_the_clock_never_strikes_once_a_commit_was_asked_for(host):
    """Also where the commit itself could not be done."""
    host.do("failover_run", **FAILOVER, auto=auto("rollback", 60))
    host.world.images.space = 0
    with pytest.raises(Exception, match="may need"):
        host.do("commit", group="erp")
    host.world.clock.sleep(3600)
    host.recovery.supervise()
    assert set(running(host)) == {"db", "web"}


def test_calling_off_while_it_strikes_is_too_late_and_said(host):
    host.do("failover_run", **FAILOVER, auto=auto("rollback", 60))
    real = host.world.hypervisor.destroy
    refused = []

    def destroy(name):
        if not refused:
            with pytest.raises(Locked):
                host.do("hold", group="erp")
            refused.append(name)
        real(name)

    host.world.hypervisor.destroy = destroy
    host.world.clock.sleep(61)
    host.recovery.supervise()
    assert refused
    assert running(host) == {}


def test_a_rollback_by_the_clock_killed_at_every_step_is_finished_by_the_next_supervisor(tmp_path):
    def prepare(host):
        host.do("failover_run", **FAILOVER, auto=auto("rollback", 60))
        host.world.clock.sleep(61)
        host.supervise = lambda params, progress: host.recovery.supervise()
        host.recovery.supervise_once = host.supervise

    accepted = end_states(tmp_path, prepare, "supervise_once", lambda host: {})
    assert kill_everywhere(tmp_path, prepare, "supervise_once", lambda host: {}, accepted) > 10


@pytest.mark.parametrize("wrong", [auto("perhaps", 60), auto("commit", 0)])
def test_what_can_not_be_done_by_the_clock_is_refused_before_anything_is_done(host, wrong):
    with pytest.raises(Refused):
        host.do("failover_run", **FAILOVER, auto=wrong)
    assert host.world.effects.log == []


def test_nothing_to_call_off_is_said(host):
    host.do("failover_run", **FAILOVER)
    with pytest.raises(WrongPhase):
        host.do("hold", group="erp")
