"""The plans in plans/: they compile in every mode, and are what their comments say."""

from __future__ import annotations

from pathlib import Path

import pytest

from drctl.plan.compile import compile_plan
from drctl.plan.engine import Verdict
from drctl.plan.findings import Severity, examine
from drctl.plan.plan import Mode
from drctl.plan.read import load_plan
from tests.unit.plan.world import World, inventory, run

PLANS = sorted((Path(__file__).parents[3] / "plans").glob("*.toml"))
STOCK = inventory(
    wiki="wiki",
    shop="shop-db shop-reports shop-app-1 shop-app-2 shop-front",
    core="dns-1 ldap-1",
    mail="mx-1 mx-2",
    desktops=" ".join(f"desk-{number}" for number in range(40)),
)


def test_there_are_examples() -> None:
    assert {path.stem for path in PLANS} >= {"one-vm", "three-tier", "whole-site", "ransomware", "maintenance"}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
@pytest.mark.parametrize("mode", list(Mode))
def test_an_example_compiles_and_passes(path: Path, mode: Mode) -> None:
    plan = load_plan(path)
    assert not [one for one in examine(plan, STOCK) if one.severity is Severity.ERROR]
    world = World()
    assert run(plan, STOCK, mode, world) is Verdict.PASSED
    booted = {action.rpartition("/vm:")[2].removesuffix("/boot") for action in world.acts if action.endswith("/boot")}
    expected = {machine.name for name in plan.groups for machine in STOCK.groups[name].machines}
    left_off = {vm.name for vm in plan.vms if not vm.boot}
    assert {name.partition("@")[0] for name in booted} == expected - left_off


def test_maintenance_that_fails_brings_all_of_it_home() -> None:
    plan = load_plan(next(path for path in PLANS if path.stem == "maintenance"))
    world = World(failing=frozenset({"stage:shop/check:http"}))
    assert run(plan, STOCK, Mode.SWITCHOVER, world) is Verdict.FAILED
    assert world.acts[-2:] == ["group:shop/undo", "group:mail/undo"], "the last one first"
    assert world.recovered == set()


def test_the_second_group_moves_when_the_first_is_well() -> None:
    plan = load_plan(next(path for path in PLANS if path.stem == "maintenance"))
    world = World(failing=frozenset({"stage:mail/check:tcp"}))
    assert run(plan, STOCK, Mode.SWITCHOVER, world) is Verdict.FAILED
    assert "group:shop/recover" not in world.acts


def test_after_ransomware_nothing_else_is_on_before_the_database_is_judged() -> None:
    plan = load_plan(next(path for path in PLANS if path.stem == "ransomware"))
    world = World(failing=frozenset({"stage:database/vm:shop-db/check:orders-are-whole"}))
    assert run(plan, STOCK, Mode.FAILOVER, world) is Verdict.FAILED
    assert world.up == {("shop", "shop-db")}
    assert world.recovered == {"shop"}, "it is not given back to a source that may be infected"


def test_mail_comes_up_beside_the_shop() -> None:
    plan = load_plan(next(path for path in PLANS if path.stem == "whole-site"))
    after = {step.id: step.after for step in compile_plan(plan, STOCK, Mode.TEST).steps}
    assert after["stage:mail/begin"] == after["stage:shop/begin"] == ("stage:core/done",)
