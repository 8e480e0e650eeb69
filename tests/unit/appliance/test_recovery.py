"""Recoveries on a host in memory: what each operation leaves behind, whatever interrupts it."""

from __future__ import annotations

import pytest

from drctl.appliance.recovery.memory import Killed, MemoryWorld
from drctl.appliance.recovery.recoveries import Recovery
from drctl.appliance.recovery.state import MachinePhase, RecoveryFiles, RecoveryPhase
from drctl.errors import Locked, NotFound, OutOfSpace, Refused, StepFailed, WrongPhase
from drctl.model.checkpoint import Checkpoint, CheckpointKind
from drctl.model.extent import GiB, MiB
from drctl.model.machine import MachineState

FAILOVER = {"group": "erp", "checkpoint": "latest", "source_is_down": "fire", "confirmed": "erp"}


class CountedFiles(RecoveryFiles):
    """A save is an effect like any other: the supervisor may die before or after it."""

    def __init__(self, directory, world):
        super().__init__(directory)
        self._world = world

    def save(self, recovery):
        with self._world.effects.effect(f"save {recovery.phase}"):
            super().save(recovery)


class Host:
    """A host whose supervisor can be replaced."""

    def __init__(self, directory):
        self.world = MemoryWorld()
        self.files = CountedFiles(directory, self.world)
        self.boot = "boot-1"
        self.new_supervisor()

    def new_supervisor(self):
        self.recovery = Recovery(
            self.world.tools(), self.files, self.boot, background=lambda _, action: action(), parallel=1
        )

    def restart(self):
        """The host's power is cut: domains stop, transient ones vanish, views die."""
        self.boot += "+"
        self.world.views.running.clear()
        domains = self.world.hypervisor.domains
        for name in [n for n, d in domains.items() if not d.persistent]:
            del domains[name]
        for domain in domains.values():
            domain.state = MachineState.SHUT_OFF
        self.new_supervisor()

    def do(self, method, **params):
        return self.method(method)(params, lambda _: None)

    def method(self, name):
        return {
            "failover_plan": self.recovery.reigns.plan,
            "failover_run": self.recovery.reigns.failover,
            "switchover_run": self.recovery.reigns.switchover,
            "hold": self.recovery.reigns.cancel_auto,
            "rollback_plan": self.recovery.reigns.rollback_plan,
            "rollback": self.recovery.reigns.rollback,
            "commit": self.recovery.reigns.commit,
        }.get(name) or getattr(self.recovery, name)

    def left(self):
        """All that exists besides records, identities made anew each time left out."""
        ids = [name for name in self.files.names()]

        def plain(text):
            for index, identity in enumerate(sorted(ids)):
                text = text.replace(identity, f"ID{index}")
            return text

        return {
            "domains": {plain(n): (d.state, d.persistent) for n, d in self.world.hypervisor.domains.items()},
            "images": {plain(p): plain(b or "") for p, b in self.world.images.files.items()},
            "pins": [plain(p) for p in self.world.stores.pins],
            "views": len(self.world.views.running),
            "generation": self.world.stores.reign_of["erp"],
            "phases": sorted(self.files.load(name).phase for name in ids),
        }


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path / "recoveries")


def test_a_test_boots_every_machine_under_another_name_and_touches_no_reign(host):
    result = host.do("test_start", group="erp")
    assert result["state"] == "running"
    assert result["exit_code"] == 0
    assert result["checkpoint"] == {"number": 3, "time": 999_993.0, "epoch": "0" * 32}
    assert result["rto_seconds"] >= 0
    names = {f"db-test-{result['id']}", f"web-test-{result['id']}"}
    assert set(host.world.hypervisor.domains) == names
    assert not any(d.persistent for d in host.world.hypervisor.domains.values())
    assert host.world.stores.reign_of == {"erp": 1}
    assert host.world.stores.pins == {result["id"]: 3}
    assert all(m["uuid"].startswith("uuid-test-") for m in result["machines"])
    assert result["machines"][0]["notes"] == ["cdrom dropped"]


def test_a_test_with_a_label_is_started_once(host):
    first = host.do("test_start", group="erp", label="run-1")
    assert first["label"] == "run-1"
    assert host.do("test_start", group="erp", label="run-1")["id"] == first["id"]
    host.new_supervisor()
    host.recovery.resume()
    assert host.do("test_start", group="erp", label="run-1")["id"] == first["id"], "it outlives the supervisor"
    others = {host.do("test_start", group="erp", label="run-2")["id"], host.do("test_start", group="erp")["id"]}
    assert len(others | {first["id"]}) == 3
    host.do("test_stop", id=first["id"])
    assert host.do("test_start", group="erp", label="run-1")["id"] != first["id"]


def test_a_test_may_boot_a_subset_at_an_older_checkpoint(host):
    result = host.do("test_start", group="erp", checkpoint="#2", machines=["web"])
    assert [m["name"] for m in result["machines"]] == ["web"]
    assert result["checkpoint"]["number"] == 2
    assert len(host.world.images.files) == 1


def test_stopping_a_test_leaves_nothing_and_may_be_repeated(host):
    before = host.left()
    identity = host.do("test_start", group="erp")["id"]
    assert host.do("test_stop", id=identity) == {"id": identity, "removed": True}
    after = host.left()
    assert after.pop("phases") == [RecoveryPhase.ENDED]
    before.pop("phases")
    assert after == before
    assert host.do("test_stop", id=identity) == {"id": identity, "removed": False}
    assert host.do("test_list", group="erp") == []


def test_one_machine_that_fails_does_not_stop_the_others(host):
    host.world.hypervisor.refuse["db"] = "no such emulator"
    result = host.do("failover_run", **FAILOVER)
    assert result["exit_code"] == 3
    assert result["state"] == "partly"
    states = {m["name"]: (m["state"], m["reason"]) for m in result["machines"]}
    assert states == {"db": ("failed", "no such emulator"), "web": ("running", "")}
    host.world.hypervisor.refuse.clear()
    again = host.do("failover_run", **FAILOVER)
    assert again["exit_code"] == 0
    assert again["generation"] == 2
    assert host.world.stores.reign_of == {"erp": 2}


def test_when_every_machine_fails_the_result_says_so(host):
    host.world.hypervisor.refuse.update(db="x", web="y")
    result = host.do("failover_run", **FAILOVER)
    assert (result["state"], result["exit_code"], result["rto_seconds"]) == ("failed", 40, None)


def test_a_failover_reigns_before_it_chooses(host):
    """A checkpoint that arrives until the reign is the latest one; none can arrive after it."""
    stores = host.world.stores
    real = stores.reign

    def reign(group, generation):
        stores.listed.append(Checkpoint(4, 999_999.0, CheckpointKind.CRASH, "0" * 32, 1, 40))
        real(group, generation)

    stores.reign = reign
    result = host.do("failover_run", **FAILOVER)
    assert result["checkpoint"]["number"] == 4
    assert host.world.stores.pins == {result["id"]: 4}
    order = host.world.effects.log
    assert order.index("reign erp 2") < order.index("pin 4") < order.index("view") < order.index("define db")
    assert host.world.hypervisor.domains["db"].persistent


def test_a_failover_needs_a_reason_and_the_typed_name(host):
    for lacking in ({"source_is_down": ""}, {"confirmed": "other"}, {"confirmed": None}):
        with pytest.raises(Refused):
            host.do("failover_run", **{**FAILOVER, **lacking})
    assert host.world.stores.reign_of == {"erp": 1}
    assert host.files.names() == []


def test_a_failover_twice_does_nothing_the_second_time(host):
    first = host.do("failover_run", **FAILOVER)
    effects = list(host.world.effects.log)
    second = host.do("failover_run", **FAILOVER)
    assert second["id"] == first["id"]
    assert host.world.effects.log == effects


def test_a_machine_of_the_same_name_is_left_alone(host):
    host.world.hypervisor.domains.clear()
    host.world.hypervisor.define("name=web;uuid=uuid-other;/images/own.qcow2")
    plan = host.do("failover_plan", group="erp")
    assert [f["subject"] for f in plan["findings"] if f["severity"] == "error"] == ["web"]
    result = host.do("failover_run", **FAILOVER)
    assert {m["name"]: m["state"] for m in result["machines"]} == {"db": "running", "web": "failed"}
    assert host.world.hypervisor.domains["web"].definition == "name=web;uuid=uuid-other;/images/own.qcow2"


def test_the_plan_tells_loss_generation_and_space_and_does_nothing(host):
    plan = host.do("failover_plan", group="erp")
    assert plan["loss_seconds"] == pytest.approx(7.0)
    assert plan["generation"] == 2
    assert plan["space"]["commit_bytes"] == MiB // 2 + MiB // 4
    assert [m["name"] for m in plan["machines"]] == ["db", "web"]
    assert host.world.effects.log == []
    assert host.files.names() == []


def test_unknown_groups_checkpoints_and_machines_are_named(host):
    for params in ({"group": "hr"}, {"group": "erp", "checkpoint": "#9"}, {"group": "erp", "machines": ["x"]}):
        with pytest.raises(NotFound):
            host.do("test_start", **params)
    with pytest.raises(Refused):
        host.do("test_start", group="erp", checkpoint="yesterday")
    with pytest.raises(NotFound):
        host.do("test_stop", id="nope")
    assert host.left()["images"] == {}


def test_a_test_that_cannot_start_removes_itself(host):
    host.world.views.refuse = True
    with pytest.raises(StepFailed):
        host.do("test_start", group="erp")
    left = host.left()
    assert (left["domains"], left["images"], left["pins"], left["views"]) == ({}, {}, [], 0)
    assert host.do("test_list")[0]["state"] == "stopped"


def test_scratch_is_refused_when_it_cannot_fit_and_bounded_by_half_of_what_is_free(host):
    host.world.images.space = GiB
    with pytest.raises(OutOfSpace):
        host.do("test_start", group="erp")
    host.world.images.space = 5 * GiB
    with pytest.raises(OutOfSpace):
        host.do("test_start", group="erp", scratch_limit=8 * GiB)
    assert host.do("test_start", group="erp")["scratch_limit"] == 2 * GiB


def test_commit_localizes_every_disk_and_ends_the_view(host):
    host.do("failover_run", **FAILOVER)
    told = []
    result = host.recovery.reigns.commit({"group": "erp"}, told.append)
    assert result["state"] == "committed"
    assert set(host.world.images.files.values()) == {None}
    assert host.world.views.running == set()
    assert host.world.stores.pins == {}
    assert "<view>" not in host.world.hypervisor.domains["db"].definition
    assert {t["machine"] for t in told} == {"db", "web"}
    assert host.do("commit", group="erp")["id"] == result["id"]
    with pytest.raises(WrongPhase):
        host.do("failover_run", **FAILOVER)


def test_commit_of_a_machine_that_is_off_or_failed_keeps_its_disks(host):
    host.world.hypervisor.refuse["db"] = "no memory"
    host.do("failover_run", **FAILOVER)
    host.world.hypervisor.domains["web"].state = MachineState.SHUT_OFF
    host.do("commit", group="erp")
    assert "localize db.vda-g2.qcow2" in host.world.effects.log
    assert "localize web.vda-g2.qcow2" in host.world.effects.log
    assert set(host.world.images.files.values()) == {None}


def test_commit_is_refused_without_space_and_changes_nothing(host):
    host.do("failover_run", **FAILOVER)
    host.world.images.space = MiB // 2
    with pytest.raises(OutOfSpace):
        host.do("commit", group="erp")
    assert host.files.load(host.files.names()[0]).phase is RecoveryPhase.RUNNING


def test_commit_of_a_group_that_is_not_failed_over_is_refused(host):
    host.do("test_start", group="erp")
    with pytest.raises(WrongPhase):
        host.do("commit", group="erp")


def test_a_second_operation_on_a_busy_recovery_is_refused(host):
    host.do("failover_run", **FAILOVER)
    refused = []

    def during(report):
        if not refused:
            with pytest.raises(Locked):
                host.do("commit", group="erp")
            refused.append(report)

    host.recovery.reigns.commit({"group": "erp"}, during)
    assert refused


def kill_everywhere(tmp_path, prepare, method, params, accepted):
    """Run the operation, dying before and after every effect; a new supervisor must reach an accepted end state."""
    deaths = 0
    for moment in ("die_before", "die_after"):
        for number in range(1, 200):
            host = Host(tmp_path / f"{moment}{number}")
            prepare(host)
            start = host.world.effects.count
            setattr(host.world.effects, moment, start + number)
            try:
                host.do(method, **params(host))
            except Killed:
                deaths += 1
            else:
                break
            host.new_supervisor()
            host.recovery.resume()
            for _ in range(3):
                host.world.clock.sleep(1)
                host.recovery.supervise()
            assert host.left() in accepted, (moment, number, host.world.effects.log)
    return deaths


def end_states(tmp_path, prepare, method, params):
    """What is there without the operation, and what is there after it."""
    states = []
    for name, do in (("without", False), ("with", True)):
        host = Host(tmp_path / name)
        prepare(host)
        if do:
            host.do(method, **params(host))
        states.append(host.left())
    return states


def _nothing(host):
    pass


def test_a_test_killed_at_every_step_is_finished_by_the_next_supervisor(tmp_path):
    params = lambda host: {"group": "erp"}  # noqa: E731
    accepted = end_states(tmp_path, _nothing, "test_start", params)
    assert kill_everywhere(tmp_path, _nothing, "test_start", params, accepted) > 20


def test_a_failover_killed_at_every_step_is_finished_by_the_next_supervisor(tmp_path):
    params = lambda host: FAILOVER  # noqa: E731
    accepted = end_states(tmp_path, _nothing, "failover_run", params)
    assert kill_everywhere(tmp_path, _nothing, "failover_run", params, accepted) > 25


def test_a_stop_killed_at_every_step_is_finished_by_the_next_supervisor(tmp_path):
    prepare = lambda host: host.do("test_start", group="erp")  # noqa: E731
    params = lambda host: {"id": host.files.names()[0]}  # noqa: E731
    accepted = end_states(tmp_path, prepare, "test_stop", params)
    assert kill_everywhere(tmp_path, prepare, "test_stop", params, accepted) > 10


def test_a_commit_killed_at_every_step_is_finished_by_the_next_supervisor(tmp_path):
    prepare = lambda host: host.do("failover_run", **FAILOVER)  # noqa: E731
    params = lambda host: {"group": "erp"}  # noqa: E731
    accepted = end_states(tmp_path, prepare, "commit", params)
    assert kill_everywhere(tmp_path, prepare, "commit", params, accepted) > 10


def test_after_the_hosts_restart_a_failover_runs_again_and_a_test_is_removed(host):
    host.do("failover_run", **FAILOVER)
    test = host.do("test_start", group="erp")["id"]
    host.restart()
    host.recovery.resume()
    assert {n: d.state for n, d in host.world.hypervisor.domains.items()} == {
        "db": MachineState.RUNNING,
        "web": MachineState.RUNNING,
    }
    assert len(host.world.views.running) == 1
    record = host.files.load(test)
    assert (record.phase, record.reason) == (RecoveryPhase.ENDED, "the host was restarted")


def test_a_supervisor_that_restarts_leaves_running_machines_alone(host):
    host.do("failover_run", **FAILOVER)
    effects = list(host.world.effects.log)
    host.new_supervisor()
    host.recovery.resume()
    host.recovery.supervise()
    assert host.world.effects.log == effects


def test_a_stop_interrupts_a_start_that_is_under_way(host):
    """The stop may come from any other control connection while machines are being brought up."""
    stopped = []

    def during(report):
        if report["step"] == "machine" and not stopped:
            work = host.recovery._works.live()[0]
            work.ending = True
            work.steps.cancelled.set()
            stopped.append(work.record.id)

    with pytest.raises(Exception, match="is being stopped"):
        host.recovery.test_start({"group": "erp"}, during)
    host.do("test_stop", id=stopped[0])
    assert host.left()["domains"] == {}
    assert host.left()["images"] == {}


def test_records_survive_a_round_trip_and_a_damaged_one_is_left_alone(host, caplog):
    identity = host.do("test_start", group="erp")["id"]
    loaded = host.files.load(identity)
    assert loaded.machines[0].phase is MachinePhase.RUNNING
    assert loaded.scratch_limit > 0
    (host.files._directory / "bad.json").write_text("{")
    host.new_supervisor()
    host.recovery.resume()
    assert [r["id"] for r in host.do("test_list")] == [identity]
    assert "bad.json" in caplog.text


def test_old_records_of_ended_tests_are_removed(host):
    identity = host.do("test_start", group="erp")["id"]
    host.do("test_stop", id=identity)
    host.world.clock.sleep(8 * 86400)
    host.new_supervisor()
    host.recovery.resume()
    assert host.files.names() == []


def test_what_is_ordered_for_one_machine_is_kept_and_used(host, tmp_path):
    changes = {"db": {"memory": 2 * GiB, "networks": {"lan": "island"}}}
    record = host.do("test_start", group="erp", changes=changes)
    assert host.files.load(record["id"]).changes["db"].memory == 2 * GiB
    with pytest.raises(NotFound):
        host.do("test_start", group="erp", changes={"mail": {}})
    for wrong in ({"db": {"memory": "much"}}, {"db": 7}, [1]):
        with pytest.raises(Refused):
            host.do("test_start", group="erp", changes=wrong)


def running(host):
    return {name for name, domain in host.world.hypervisor.domains.items() if domain.state is MachineState.RUNNING}


def test_a_staged_failover_is_ready_and_off_until_machines_are_told_to_boot(host):
    record = host.do("failover_run", **FAILOVER, staged=True)
    assert (record["state"], record["held"], running(host)) == ("staged", ["db", "web"], set())
    assert set(host.world.hypervisor.domains) == {"db", "web"}, "defined"
    assert len(host.world.images.files) == 3, "all their overlays are there"
    booted = host.do("boot", recovery=record["id"], machines=["db"])
    assert (booted["state"], booted["held"], running(host)) == ("staged", ["web"], {"db"})
    assert host.do("boot", recovery=record["id"], machines=["web"])["state"] == "running"
    count = host.world.effects.count
    assert host.do("boot", recovery=record["id"], machines=["db", "web"])["state"] == "running"
    assert host.world.effects.count == count, "given again, nothing happens"


def test_a_staged_test_leaves_nothing_whenever_it_is_stopped(host):
    record = host.do("test_start", group="erp", staged=True)
    assert (record["state"], host.world.hypervisor.domains) == ("staged", {})
    host.do("boot", recovery=record["id"], machines=["web"])
    assert {name.partition("-test-")[0] for name in running(host)} == {"web"}
    host.do("test_stop", id=record["id"])
    assert (host.world.hypervisor.domains, host.world.images.files, host.world.stores.pins) == ({}, {}, {})
    with pytest.raises(NotFound):
        host.do("boot", recovery=record["id"], machines=["db"])


def test_the_command_for_the_group_boots_all_that_is_held(host):
    host.do("failover_run", **FAILOVER, staged=True)
    assert host.do("failover_run", **FAILOVER, staged=True)["state"] == "staged", "the same order changes nothing"
    assert host.do("failover_run", **FAILOVER)["state"] == "running"
    assert running(host) == {"db", "web"}


def test_a_machine_that_fails_is_not_tried_again_with_the_next_one(host):
    record = host.do("failover_run", **FAILOVER, staged=True)
    host.world.hypervisor.refuse["db"] = "no memory"
    failed = host.do("boot", recovery=record["id"], machines=["db"])
    assert [m["state"] for m in failed["machines"]] == ["failed", "defined"]
    del host.world.hypervisor.refuse["db"]
    host.do("boot", recovery=record["id"], machines=["web"])
    assert running(host) == {"web"}
    assert host.do("boot", recovery=record["id"], machines=["db"])["state"] == "running", "when it is named it is"


def test_what_can_not_be_booted_is_named(host):
    record = host.do("failover_run", **FAILOVER, staged=True)
    with pytest.raises(NotFound):
        host.do("boot", recovery=record["id"], machines=["mail"])
    host.do("commit", group="erp")
    with pytest.raises((NotFound, WrongPhase)):
        host.do("boot", recovery=record["id"], machines=["db"])


def test_held_machines_stay_off_over_a_restart_of_the_host(host):
    record = host.do("failover_run", **FAILOVER, staged=True)
    host.do("boot", recovery=record["id"], machines=["db"])
    host.restart()
    host.recovery.resume()
    assert running(host) == {"db"}
    assert host.do("boot", recovery=record["id"], machines=["web"])["state"] == "running"


def test_a_staged_failover_is_rolled_back_whole(host):
    record = host.do("failover_run", **FAILOVER, staged=True)
    host.do("boot", recovery=record["id"], machines=["db"])
    host.do("rollback", group="erp", generation=0)
    assert host.world.hypervisor.domains == {}


def test_a_boot_killed_at_every_step_is_finished_or_given_again(tmp_path):
    prepare = lambda host: host.do("failover_run", **FAILOVER, staged=True)  # noqa: E731
    params = lambda host: {"recovery": host.files.names()[0], "machines": ["db"]}  # noqa: E731
    accepted = end_states(tmp_path, prepare, "boot", params)
    assert kill_everywhere(tmp_path, prepare, "boot", params, accepted) > 5


def test_a_staged_start_killed_at_every_step_is_finished_by_the_next_supervisor(tmp_path):
    params = lambda host: {**FAILOVER, "staged": True}  # noqa: E731
    accepted = end_states(tmp_path, _nothing, "failover_run", params)
    assert kill_everywhere(tmp_path, _nothing, "failover_run", params, accepted) > 15
