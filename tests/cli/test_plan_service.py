"""Drills against the appliance's own recovery service, on a host in memory: labels, states, what is left."""

from __future__ import annotations

from typing import Any

import pytest

from drctl.appliance.recovery import Recovery
from drctl.appliance.recovery_memory import MemoryWorld
from drctl.appliance.recovery_state import RecoveryFiles
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
