"""A recovery site in memory, and a run of a plan in it that can be killed at every point."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from drctl.plan.compile import compile_plan
from drctl.plan.engine import Engine, Outcome, Verdict
from drctl.plan.inventory import Ability, GroupFacts, Inventory, MachineFacts
from drctl.plan.plan import Mode, Plan
from drctl.plan.record import read_record
from drctl.plan.step import Options, Recovery, Step, StepKind


class Killed(Exception):
    """The operator's machine lost its power."""


def inventory(abilities: frozenset[Ability] = frozenset(Ability), **groups: str) -> Inventory:
    """Groups by name, each with its machines, separated by blanks."""
    return Inventory(
        {
            name: GroupFacts(name, tuple(MachineFacts(each) for each in names.split()), abilities=abilities)
            for name, names in groups.items()
        },
        complete=True,
    )


@dataclass
class World:
    """What is true whatever becomes of the run. Every act is idempotent, as the appliance's are."""

    recovered: set[str] = field(default_factory=set)
    up: set[tuple[str, str]] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    effects: set[str] = field(default_factory=set)
    acts: list[str] = field(default_factory=list)
    failing: frozenset[str] = frozenset()
    broken: frozenset[tuple[str, str]] = frozenset()
    log: list[dict[str, Any]] = field(default_factory=list)
    now: float = 0.0

    def do(self, step: Step) -> Outcome:
        self.acts.append(step.id)
        ending = step.kind in (StepKind.CLEAN_UP, StepKind.UNDO)
        if step.id in self.failing and (step.group in self.recovered or not ending):
            return Outcome.FAILED
        match step.kind:
            case StepKind.RECOVER:
                self.recovered.add(step.group)
                assert isinstance(step.action, Recovery)
                if not step.action.staged:
                    booted = {(step.group, machine.name) for machine in step.action.machines if machine.boot}
                    self.up |= booted - self.broken
            case StepKind.BOOT:
                assert step.group in self.recovered, f"{step.id} before its group's recovery"
                self.up.add((step.group, step.machine))
            case StepKind.CHECK:
                if step.machine and (step.group, step.machine) not in self.broken:
                    assert (step.group, step.machine) in self.up, f"{step.id} before its machine is up"
            case StepKind.CLEAN_UP | StepKind.UNDO:
                self.recovered.discard(step.group)
                self.up = {each for each in self.up if each[0] != step.group}
            case StepKind.HOLD:
                self.held.add(step.group)
            case _:
                self.effects.add(step.id)
        return Outcome.DONE

    def end(self) -> tuple[object, ...]:
        """What must be the same, however often the run was interrupted."""
        return frozenset(self.recovered), frozenset(self.up), frozenset(self.held), frozenset(self.effects)


class Fuel:
    """Kills after so many points: before and after each record, before and after each act."""

    def __init__(self, amount: int | None) -> None:
        self.left = amount

    def burn(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1


def run(
    plan: Plan, stock: Inventory, mode: Mode, world: World, fuel: int | None = None, options: Options | None = None
) -> Verdict:
    """Begin the run, or go on with it: one step at a time, in the plan's order. Raises Killed."""
    tank = Fuel(fuel)

    def write(event: dict[str, Any]) -> None:
        tank.burn()
        world.log.append({**event, "time": world.now})
        tank.burn()

    before = read_record(world.log)
    write({"event": "resumed"} if before else {"event": "run", "run": "r1", "plan": plan.name, "mode": mode.value})
    before = read_record(world.log)
    assert before is not None
    progress = replace(before.progress(), recovered=frozenset(world.recovered), up=frozenset(world.up))
    compiled = compile_plan(plan, stock, mode, progress, options)
    boots = [each for each in compiled.steps if each.kind is StepKind.BOOT and each.id in world.failing]
    world.broken = frozenset((each.group, each.machine) for each in boots)
    engine = Engine(compiled, parallel=1)
    ready = engine.begin(world.now)
    pending: list[Step] = []
    while True:
        for event in ready.records:
            write(event)
        if ready.verdict is not None:
            return ready.verdict
        pending = [step for step in [*pending, *ready.start] if step.id not in ready.cancel]
        assert pending, "nothing runs, and it is not over"
        step = pending.pop(0)
        tank.burn()
        outcome = world.do(step)
        tank.burn()
        world.now += 1
        facts = {} if outcome is Outcome.DONE else {"reason": "it fails here"}
        ready = engine.ended(step.id, outcome, world.now, **facts)
