"""Drills against the appliance's own recovery service, on a host in memory: labels, states, what is left."""

from __future__ import annotations

from typing import Any

import pytest

from drctl.appliance.recovery.memory import MemoryWorld
from drctl.appliance.recovery.recoveries import Recovery
from drctl.appliance.recovery.state import RecoveryFiles
from drctl.errors import ApplianceUnreachable

GROUP = """\
name = "erp"
source = "alpha"
recovery = "beta"
machines = ["db", "web"]
"""
PLAN = """\
plan = "erp"
groups = ["erp"]
[[stage]]
name = "db"
[[stage.vm]]
name = "db"
[[stage.vm.check]]
kind = "command"
run = ["/bin/true"]
[[stage]]
name = "web"
after = ["db"]
all_of = ["erp"]
"""


@pytest.fixture
def service(world, tmp_path):
    """The recovery site's `test.*` answered by the real service; its world can be looked at."""
    (world.directory / "groups/web.toml").unlink()
    (world.directory / "groups/erp.toml").write_text(GROUP)
    (world.directory / "plans").mkdir()
    (world.directory / "plans/erp.toml").write_text(PLAN)
    assert world("apply", "--yes").code == 0
    world.alpha.phases["erp"] = "live"
    world.alpha.machines = [
        {**each, "name": name} for each, name in zip(world.alpha.machines, ["db", "web"], strict=False)
    ]
    memory = MemoryWorld()
    recovery = Recovery(
        memory.tools(), RecoveryFiles(tmp_path / "recoveries"), "boot-1", background=lambda _, act: act()
    )

    def through(name: str) -> Any:
        return lambda params, progress: getattr(recovery, name)(params, progress or (lambda _: None))

    for name in ("test_start", "test_list", "test_stop"):
        world.beta.replies[name.replace("_", ".")] = through(name)
    world.memory, world.recovery = memory, recovery
    return world


def drill(service, *arguments: str):
    return service("plan", "run", "erp", "--mode", "test", "--yes", *arguments)


def test_a_drill_boots_checks_and_leaves_nothing(service) -> None:
    result = drill(service, "-o", "json")
    assert (result.code, result.json["verdict"]) == (0, "passed"), result.err
    assert service.memory.hypervisor.domains == {}
    assert service.recovery.test_list({}, print) == []


def test_a_kept_drill_carries_its_runs_label(service) -> None:
    result = drill(service, "--keep", "-o", "json")
    (test,) = service.recovery.test_list({}, print)
    assert (test["label"], test["state"]) == (result.json["run"], "running")
    assert len(service.memory.hypervisor.domains) == 2


def test_a_start_whose_answer_is_lost_is_found_and_removed(service) -> None:
    start = service.beta.replies["test.start"]

    def lost(params, progress):
        start(params, progress)
        raise ApplianceUnreachable("the connection broke")

    service.beta.replies["test.start"] = lost
    assert drill(service).code == 40
    assert service.memory.hypervisor.domains == {}


def test_a_killed_drill_goes_on_with_the_copies_that_stand(service) -> None:
    """Killed after the start: the record knows nothing of it, the recovery site does."""
    result = drill(service, "--keep", "-o", "json")
    path = service.directory / "runs" / f"{result.json['run']}.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    before = set(service.memory.hypervisor.domains)
    again = service("run", "resume", result.json["run"], "--yes", "-o", "json")
    assert (again.code, again.json["verdict"]) == (0, "passed"), again.err
    assert set(service.memory.hypervisor.domains) == before, "nothing was booted twice"


@pytest.fixture
def staged(service):
    """The same appliance says that it boots machine by machine."""
    info = service.beta._appliance_info({})
    service.beta.replies["appliance.info"] = info | {"capabilities": {"staged-boot": True}}
    service.beta.replies["recovery.boot"] = lambda params, progress: service.recovery.boot(
        params, progress or (lambda _: None)
    )
    return service


def boots(service) -> list[str]:
    """The copies in the order in which they were switched on."""
    made = [line.removeprefix("create ") for line in service.memory.effects.log if line.startswith("create ")]
    return [name.partition("-test-")[0] for name in made]


def test_a_stage_boots_when_its_turn_has_come(staged) -> None:
    path = staged.directory / "plans/erp.toml"
    path.write_text(PLAN.replace("/bin/true", "./look").replace("run = [", "interval = '100ms'\nretries = 0\nrun = ["))
    (staged.directory / "plans/look").write_text("#!/bin/sh\nexit 1\n")
    (staged.directory / "plans/look").chmod(0o755)
    assert drill(staged).code == 40
    assert boots(staged) == ["db"], "the front is not switched on before the database is well"
    (staged.directory / "plans/look").write_text("#!/bin/sh\nexit 0\n")
    assert drill(staged).code == 0
    assert boots(staged) == ["db", "db", "web"]
    assert staged.memory.hypervisor.domains == {}


def test_a_machine_that_is_left_off_is(staged) -> None:
    path = staged.directory / "plans/erp.toml"
    path.write_text(PLAN.replace('all_of = ["erp"]', '[[stage.vm]]\nname = "web"\nboot = false'))
    assert drill(staged, "--keep").code == 0
    assert boots(staged) == ["db"]


def test_a_killed_drill_boots_what_was_not_booted(staged) -> None:
    result = drill(staged, "--keep", "-o", "json")
    path = staged.directory / "runs" / f"{result.json['run']}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    begun = next(number for number, line in enumerate(lines) if '"begin"' in line and "vm:web/boot" in line)
    path.write_text("".join(lines[:begun]))
    (record,) = [staged.recovery._works.get(name) for name in staged.recovery._files.names()]
    web = next(machine for machine in record.record.machines if machine.name == "web")
    staged.memory.hypervisor.destroy(web.recovery_name)
    web.phase, record.record.held = type(web.phase).OVERLAY, ["web"]
    again = staged("run", "resume", result.json["run"], "--yes", "-o", "json")
    assert again.code == 0, again.err
    assert len(staged.memory.hypervisor.domains) == 2


DOWN = ("--source-is-down", "fire", "--confirm", "erp")


@pytest.fixture
def moves(staged):
    """Its failovers, too: what reigns there is what the service says."""
    memory, recovery = staged.memory, staged.recovery
    reigns = {
        "failover.plan": recovery.reigns.plan,
        "failover.run": recovery.reigns.failover,
        "failover.hold": recovery.reigns.cancel_auto,
        "rollback.plan": recovery.reigns.rollback_plan,
        "rollback": recovery.reigns.rollback,
    }
    for name, method in reigns.items():
        staged.beta.replies[name] = lambda params, progress, method=method: method(params, progress or (lambda _: None))
    points = staged.beta.checkpoints
    staged.beta.replies["group.status"] = lambda params, progress: {
        "group": "erp",
        "role": "recovery",
        "mode": "failed-over" if "erp" in memory.stores.failed_over else "journal",
        "generation": memory.stores.reign_of["erp"],
        "checkpoints": {"count": len(points), "oldest": None, "newest": None},
        "recoveries": recovery.recoveries("erp"),
    }
    staged.beta.replies["group.picture"] = {
        "site": "beta",
        "host": "b1",
        "role": "recovery",
        "state": "journal",
        "generation": 1,
    }
    staged.alpha.down = True
    return staged


def failover(service, *arguments: str):
    return service("plan", "run", "erp", "--mode", "failover", *DOWN, *arguments)


def started(service) -> list[str]:
    return [line.removeprefix("start ") for line in service.memory.effects.log if line.startswith("start ")]


def up(service) -> set[str]:
    return {name for name, domain in service.memory.hypervisor.domains.items() if domain.state == "running"}


def change(service, *pairs: tuple[str, str]) -> None:
    path = service.directory / "plans/erp.toml"
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_a_failover_by_plan_boots_in_order_and_proves_itself(moves) -> None:
    change(moves, ('groups = ["erp"]', 'groups = ["erp"]\nrollback_after = "4h"'))
    result = failover(moves, "-o", "json")
    assert result.code == 0, result.err
    assert (started(moves), up(moves)) == (["db", "web"], {"db", "web"})
    (one,) = moves.recovery.recoveries("erp")
    assert (one["kind"], one["state"], one["generation"], one["source_is_down"]) == ("failover", "running", 2, "fire")
    assert one["auto"]["cancelled"], "it has proven well"
    again = failover(moves)
    assert (again.code, "runs at beta/b1 already" in again.err, started(moves)) == (0, True, ["db", "web"])


def test_a_failover_by_plan_that_fails_is_left_or_undone(moves) -> None:
    change(moves, ("/bin/true", "/bin/false"), ("run = [", "interval = '100ms'\nretries = 0\nrun = ["))
    assert failover(moves).code == 40
    assert (up(moves), "erp" in moves.memory.stores.failed_over) == ({"db"}, True)
    change(moves, ("/bin/false", "/bin/true"))
    assert failover(moves).code == 0
    assert (started(moves), up(moves)) == (["db", "web"], {"db", "web"}), "it goes on with what stands"


def test_a_plan_that_rolls_back_leaves_nothing_running(moves) -> None:
    change(
        moves,
        ("/bin/true", "/bin/false"),
        ("run = [", "interval = '100ms'\nretries = 0\nrun = ["),
        ('groups = ["erp"]', 'groups = ["erp"]\non_failure = "rollback"'),
    )
    result = failover(moves)
    assert (result.code, "roll erp back to its source: done" in result.err) == (40, True)
    assert (moves.memory.hypervisor.domains, moves.memory.stores.failed_over) == ({}, set())
    assert moves.memory.stores.reign_of["erp"] == 3


def test_a_machine_that_the_plan_leaves_off_is_ready_and_off(moves) -> None:
    change(moves, ('all_of = ["erp"]', '[[stage.vm]]\nname = "web"\nboot = false'))
    assert failover(moves).code == 0
    assert (up(moves), set(moves.memory.hypervisor.domains)) == ({"db"}, {"db", "web"})
    assert moves.recovery.recoveries("erp")[0]["state"] == "staged"


def test_a_killed_failover_goes_on_where_it_was(moves) -> None:
    """Cut off after each line of its record; the host keeps what was done until then."""
    result = failover(moves, "-o", "json")
    path = moves.directory / "runs" / f"{result.json['run']}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    (over,) = (at for at, line in enumerate(lines) if '"event":"over"' in line)
    for count in range(2, over + 1):
        path.write_text("".join(lines[:count]))
        again = moves("run", "resume", result.json["run"], "--yes", "-o", "json")
        assert (again.code, again.json["verdict"]) == (0, "passed"), (count, again.err)
        assert started(moves) == ["db", "web"], "nothing is switched on twice"
