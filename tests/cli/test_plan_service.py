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
