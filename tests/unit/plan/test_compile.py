"""From a plan to steps: what waits for what, in each mode; and that an interruption anywhere changes nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import PreconditionFailed
from drctl.model.move import Settlement
from drctl.plan.compile import compile_plan
from drctl.plan.engine import Verdict
from drctl.plan.inventory import Ability, Ending, Progress
from drctl.plan.plan import Mode
from drctl.plan.read import parse_plan
from drctl.plan.step import Compiled, Options, Recovery, StepKind
from tests.unit.plan.world import Killed, World, inventory, run

TIERS = """\
plan = "shop"
groups = ["shop", "mail"]
rollback_after = "1h"
[[script]]
when = "before"
run = ["announce"]
[[script]]
when = "after"
run = ["report"]
[[manual]]
when = "before"
text = "tell the ward"
modes = ["failover"]
[[stage]]
name = "front"
after = ["database"]
all_of = ["mail"]
[[stage.check]]
kind = "http"
url = "http://shop/"
test_url = "http://island/"
[[stage]]
name = "database"
[[stage.script]]
when = "after"
run = ["warm"]
[[stage.vm]]
name = "db"
group = "shop"
networks = {lan = "lan-b"}
[[stage.vm.check]]
kind = "tcp"
host = "db"
port = 5432
[[stage.vm.check]]
kind = "tcp"
host = "db"
port = 22
[[stage.vm.script]]
when = "before"
run = ["lun"]
[[stage.vm.script]]
when = "after"
where = "guest"
run = ["reindex"]
[[stage.vm]]
name = "spare"
group = "shop"
boot = false
"""
STOCK = inventory(shop="db spare", mail="mx1 mx2")


def compiled(mode: Mode = Mode.TEST, stock=STOCK, text: str = TIERS, **more) -> Compiled:
    return compile_plan(parse_plan(text), stock, mode, **more)


def step(found: Compiled, identity: str):
    return next(each for each in found.steps if each.id == identity)


def behind(found: Compiled, identity: str) -> set[str]:
    """Everything that a step waits for, near and far."""
    seen: set[str] = set()
    pending = [identity]
    while pending:
        for other in step(found, pending.pop()).after:
            if other not in seen:
                seen.add(other)
                pending.append(other)
    return seen


@pytest.mark.parametrize("mode", list(Mode))
def test_steps_come_behind_what_they_wait_for(mode: Mode) -> None:
    found = compiled(mode)
    seen: set[str] = set()
    for each in found.steps:
        assert set(each.after) <= seen, each.id
        assert each.id not in seen
        seen.add(each.id)


def test_what_waits_for_what() -> None:
    found = compiled()
    vm = "stage:database/vm:db@shop"
    assert "plan/before:announce" in behind(found, "group:shop/recover")
    assert {"group:shop/recover", f"{vm}/before:lun"} <= behind(found, f"{vm}/boot")
    assert behind(found, f"{vm}/after:reindex") >= {f"{vm}/check:tcp", f"{vm}/check:tcp-2"}
    assert f"{vm}/check:tcp" not in behind(found, f"{vm}/check:tcp-2"), "checks of a machine run at once"
    assert "stage:database/after:warm" in behind(found, "stage:front/begin")
    assert f"{vm}/after:reindex" in behind(found, "stage:database/after:warm")
    mail = "stage:front/vm:mx1@mail/boot"
    assert {"stage:database/done", "group:mail/recover"} <= behind(found, mail)
    assert "stage:database/done" in behind(found, "group:mail/recover"), "recovered when its first stage begins"
    assert mail not in behind(found, "stage:front/vm:mx2@mail/boot"), "machines of a stage boot at once"
    assert mail in behind(found, "stage:front/check:http")
    assert {"stage:front/done", "stage:database/done"} <= behind(found, "plan/after:report")


def test_a_machine_that_is_left_off_has_no_steps() -> None:
    found = compiled()
    assert not [each for each in found.steps if each.machine == "spare"]
    action = step(found, "group:shop/recover").action
    assert isinstance(action, Recovery)
    assert [(machine.name, machine.boot) for machine in action.machines] == [("db", True), ("spare", False)]


def kinds(found: Compiled) -> set[StepKind]:
    return {each.kind for each in found.steps}


def test_modes_differ_where_they_have_to() -> None:
    test, switchover, failover = (compiled(mode) for mode in Mode)
    assert StepKind.CLEAN_UP in kinds(test)
    assert not {StepKind.UNDO, StepKind.HOLD, StepKind.MANUAL} & kinds(test)
    assert kinds(failover) - kinds(switchover) == {StepKind.MANUAL}
    assert kinds(switchover) >= {StepKind.UNDO, StepKind.HOLD}
    assert [each.group for each in failover.ending_steps(Ending.UNDO)] == ["mail", "shop"], "the last one first"
    for found, url in ((test, "http://island/"), (failover, "http://shop/")):
        assert step(found, "stage:front/check:http").text == f"check: {url} answers 200"
    actions = [step(found, "group:shop/recover").action for found in (test, switchover, failover)]
    assert [action.checkpoint for action in actions] == ["latest", "final", "latest"]
    assert [action.settlement for action in actions] == [None, Settlement.ROLLBACK, Settlement.ROLLBACK]
    assert actions[2].machines[0].networks == (("lan", "lan-b"),)
    assert actions[0].machines[0].networks == (), "a network that is not named for tests is cut off"


def test_a_test_that_is_kept_is_not_cleaned_up() -> None:
    assert StepKind.CLEAN_UP not in kinds(compiled(options=Options("#7", keep=True)))
    assert step(compiled(options=Options("#7")), "group:shop/recover").action.checkpoint == "#7"


def test_without_staged_boot_the_steps_say_so() -> None:
    found = compiled(stock=inventory(frozenset(), shop="db spare", mail="mx1 mx2"))
    assert step(found, "group:shop/recover").text == "boot copies of shop, as of latest: db"
    assert step(found, "stage:front/vm:mx1@mail/boot").text == "see that mx1 runs"
    assert step(compiled(), "group:shop/recover").text == "prepare to boot copies of shop, as of latest"


@pytest.mark.parametrize(
    ("stock", "message"),
    [
        (inventory(shop="db spare"), "group 'mail' is known neither here nor to an appliance"),
        (inventory(shop="db spare new", mail="mx1"), "no stage names machine 'new' of group 'shop'"),
    ],
)
def test_what_can_not_be_compiled(stock, message: str) -> None:
    with pytest.raises(PreconditionFailed, match=message):
        compiled(stock=stock)


def test_names_of_machines_make_plain_ids() -> None:
    text = "plan='p'\ngroups=['g']\n[[stage]]\nname='s'\n[[stage.vm]]\nname=\"a/b 'ä' %\"\n"
    stock = inventory(g="x")
    facts = stock.groups["g"]
    stock = type(stock)({"g": type(facts)("g", (type(facts.machines[0])("a/b 'ä' %"),))})
    found = compiled(stock=stock, text=text)
    assert "stage:s/vm:a%2Fb%20%27ä%27%20%25/boot" in {each.id for each in found.steps}


def test_what_is_true_already_is_not_done_again() -> None:
    progress = Progress(
        done=frozenset({"plan/before:announce", "stage:database/vm:db@shop/check:tcp"}),
        recovered=frozenset({"shop"}),
        up=frozenset({("shop", "db"), ("mail", "mx1")}),
    )
    satisfied = {each.id for each in compiled(progress=progress).steps if each.satisfied}
    assert satisfied == {"plan/before:announce", "group:shop/recover", "stage:database/vm:db@shop/boot"}


def _plans() -> st.SearchStrategy[str]:
    """Up to five stages in any acyclic graph, machines of two groups, scripts, checks and each way to fail."""
    failures = st.sampled_from(["stop", "continue", "rollback"])
    stage = st.tuples(st.sets(st.integers(0, 4), max_size=2), st.integers(0, 2), st.integers(0, 3), failures)
    return st.builds(_spell_plan, st.lists(stage, min_size=1, max_size=5), failures, st.booleans())


def _spell_plan(stages: list[tuple[set[int], int, int, str]], failure: str, settle: bool) -> str:
    lines = ["plan = 'p'", "groups = ['g', 'h']", f"on_failure = '{failure}'"]
    lines += ["rollback_after = '1h'"] if settle else []
    lines += ["[[script]]", "when = 'before'", "run = ['first']", "[[script]]", "when = 'after'", "run = ['last']"]
    for number, (after, vms, extras, on_failure) in enumerate(stages):
        names = [f"s{other}" for other in after if other < number]
        lines += ["[[stage]]", f"name = 's{number}'", f"after = {names}", f"on_failure = '{on_failure}'"]
        lines += ["all_of = ['g', 'h']"] if number == 0 else []
        lines += ["[[stage.script]]", "when = 'after'", "run = ['s']"]
        for vm in range(vms):
            lines += ["[[stage.vm]]", f"name = 'm{number}{vm}'", f"group = '{'gh'[vm % 2]}'"]
            if extras & 1:
                lines += ["[[stage.vm.check]]", "kind = 'guest-agent'"]
            if extras & 2:
                lines += ["[[stage.vm.script]]", "when = 'after'", "run = ['x']"]
    return "\n".join(lines)


@settings(max_examples=80, deadline=None)
@given(_plans(), st.sampled_from(list(Mode)), st.booleans(), st.integers(0, 2**16), st.data())
def test_every_interruption_ends_in_the_same_state(
    text: str, mode: Mode, staged: bool, seed: int, data: st.DataObject
) -> None:
    """Killed at any point, any number of times: the end is that of a run that nobody disturbed."""
    plan = parse_plan(text)
    names = {group: " ".join([f"{group}0", *(vm.name for vm in plan.vms if vm.group == group)]) for group in "gh"}
    stock = inventory(frozenset(Ability) if staged else frozenset(), **names)
    steps = [each.id for each in compile_plan(plan, stock, mode).steps if each.kind is not StepKind.GATE]
    chance = random.Random(seed)
    failing = frozenset(chance.sample(steps, chance.choice([0, 0, 1, 2])) if len(steps) > 2 else ())
    undisturbed = World(failing=failing)
    verdict = run(plan, stock, mode, undisturbed)
    disturbed = World(failing=failing)
    for fuel in data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6)):
        try:
            ended = run(plan, stock, mode, disturbed, fuel)
            break
        except Killed:
            continue
    else:
        ended = run(plan, stock, mode, disturbed)
    assert (disturbed.end(), ended) == (undisturbed.end(), verdict)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("failing", ["", "stage:database/after:warm", "stage:front/check:http"])
def test_every_prefix_interrupted_once_ends_in_the_same_state(mode: Mode, failing: str) -> None:
    """Not sampled: each point of one plan, going forward, cleaning up and undoing."""
    plan = parse_plan(TIERS.replace('rollback_after = "1h"', 'on_failure = "rollback"'))
    undisturbed = World(failing=frozenset({failing}))
    verdict = run(plan, STOCK, mode, undisturbed)
    assert verdict is (Verdict.FAILED if failing else Verdict.PASSED)
    assert bool(undisturbed.recovered) is (mode is not Mode.TEST and not failing)
    for fuel in range(1000):
        disturbed = World(failing=undisturbed.failing)
        try:
            run(plan, STOCK, mode, disturbed, fuel)
        except Killed:
            assert run(plan, STOCK, mode, disturbed) is verdict
            assert disturbed.end() == undisturbed.end(), fuel
        else:
            break
    assert fuel > 40


RE_IP = """
plan = "p"
groups = ["g"]
[[stage]]
name = "all"
[[stage.vm]]
name = "m1"
re_ip = "{way}"
[[stage.vm.address]]
ip = ["{ip}"]
[[stage.vm.check]]
kind = "guest-agent"
"""


def test_addresses_by_the_agent_come_between_boot_and_checks_and_in_their_mode_alone() -> None:
    plan = parse_plan(RE_IP.format(way="guest-agent", ip="10.9.0.11/24"))
    steps = {each.id: each for each in compile_plan(plan, inventory(g="m1"), Mode.FAILOVER).steps}
    boot, given = "stage:all/vm:m1/boot", "stage:all/vm:m1/re-ip"
    assert steps[given].after == (boot,)
    assert steps["stage:all/vm:m1/check:guest-agent"].after == (given,)
    assert steps[given].text == "give m1 10.9.0.11/24 by its agent"
    assert not steps[boot].action.changed, "the appliance has nothing to do for it"
    test = {each.id for each in compile_plan(plan, inventory(g="m1"), Mode.TEST).steps}
    assert given not in test
    assert boot in test


@pytest.mark.parametrize(("way", "ip"), [("cloud-init", "10.9.0.11/24"), ("dhcp", "10.9.0.11")])
def test_addresses_that_the_appliance_gives_are_in_its_order(way: str, ip: str) -> None:
    plan = parse_plan(RE_IP.format(way=way, ip=ip))
    for mode, there in ((Mode.FAILOVER, True), (Mode.TEST, False)):
        compiled = compile_plan(plan, inventory(g="m1"), mode)
        (order,) = next(each for each in compiled.steps if each.kind is StepKind.RECOVER).action.machines
        assert (order.changed, order.re_ip == way, bool(order.addresses)) == (there, there, there)
        assert not [each for each in compiled.steps if each.kind is StepKind.RE_IP]
