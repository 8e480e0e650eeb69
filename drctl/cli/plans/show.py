"""A compiled plan on the screen and as JSON."""

from __future__ import annotations

from typing import Any

from drctl.cli import render
from drctl.cli.render import Screen
from drctl.plan.output import tame
from drctl.plan.step import Compiled, Step, StepKind


def lines(compiled: Compiled) -> list[str]:
    """What would be done, in words, in order; gates are left out. Steps of a stage stand below its heading."""
    found: list[str] = []
    stage = ""
    for step in compiled.steps:
        if step.kind is StepKind.GATE and step.id.endswith("/begin"):
            stage = step.stage
            waits = [gate.stage for gate in compiled.steps if gate.id in step.after and gate.stage]
            found.append(f"stage {stage}" + (f", after {', '.join(waits)}" if waits else "") + ":")
        elif step.kind is not StepKind.GATE:
            if step.stage != stage and step.kind is not StepKind.RECOVER:
                stage = ""
            found.append(("  " if stage else "") + _spell(step))
    return found


def _spell(step: Step) -> str:
    words = [tame(step.text)]
    if step.time_limit:
        words.append(f"at most {render.duration(step.time_limit)}")
    if step.part is None and step.on_failure != "stop":
        words.append("goes on if it fails" if step.on_failure == "continue" else "rolls back if it fails")
    return ("at the end: " if step.part == "clean-up" else "to roll back: " if step.part else "") + ", ".join(words)


def print_steps(screen: Screen, compiled: Compiled) -> None:
    plan = compiled.plan
    screen.facts(
        [
            ("plan", plan.name),
            ("description", tame(plan.description) or "-"),
            ("mode", compiled.mode.value),
            ("groups", ", ".join(plan.groups)),
            ("time limit", render.duration(plan.time_limit)),
            ("RTO target", render.duration(plan.rto_target) if plan.rto_target else "-"),
            ("by itself", f"{plan.settlement} after {render.duration(plan.settle_after)}" if plan.settlement else "-"),
        ]
    )
    screen.line()
    for line in lines(compiled):
        screen.line(line)


def as_json(compiled: Compiled) -> dict[str, Any]:
    plan = compiled.plan
    return {
        "plan": plan.name,
        "description": plan.description,
        "mode": compiled.mode.value,
        "groups": list(plan.groups),
        "time_limit_seconds": plan.time_limit,
        "rto_target_seconds": plan.rto_target or None,
        "steps": [step_json(step) for step in compiled.steps],
    }


def step_json(step: Step) -> dict[str, Any]:
    return {
        "id": step.id,
        "kind": step.kind.value,
        "text": step.text,
        "after": list(step.after),
        "stage": step.stage,
        "group": step.group,
        "machine": step.machine,
        "time_limit_seconds": step.time_limit or None,
        "on_failure": step.on_failure.value,
        "part": step.part.value if step.part else "forward",
    }
