"""Recoveries (tests and failovers) as the command line shows them."""

from __future__ import annotations

from typing import Any

from drctl.cli import render
from drctl.cli.context import Context, Progress
from drctl.errors import StepFailed

#: Booting waits for machines; an appliance that is silent for so long is lost.
RUN_TIMEOUT = 3600.0
COLUMNS = ("id", "kind", "group", "checkpoint", "state", "started", "machines")


#: What an appliance's steps are called where people read them; an unknown one keeps its own name.
_STEPS = {
    "reign": "the group reigns here now: the old source is refused from here on",
    "pin": "the checkpoint is held: nothing may merge or delete it",
    "view": "its disks are served",
}
_MACHINE_STEPS = {"overlay": "has a layer of its own to write to", "started": "switched on"}


def row(recovery: dict[str, Any]) -> tuple[str, ...]:
    """One line of a table."""
    checkpoint = recovery.get("checkpoint") or {}
    machines = recovery.get("machines") or []
    running = sum(machine.get("state") == "running" for machine in machines)
    return (
        str(recovery["id"]),
        render.word(recovery.get("kind")),
        render.word(recovery.get("group")),
        f"#{checkpoint.get('number')} {render.moment(checkpoint.get('time'))}",
        render.word(recovery.get("state")),
        render.moment(recovery.get("started")),
        f"{running} of {len(machines)} running",
    )


def show(context: Context, kind: str, recovery: dict[str, Any]) -> int:
    """Print a recovery, and return its exit code: 0 all machines run, 3 some do. Raises StepFailed when none does."""
    machines = recovery.get("machines") or []
    if context.screen.as_json:
        context.document(kind, recovery=recovery)
    else:
        context.screen.facts(
            [*zip(COLUMNS, row(recovery), strict=True), ("started in", render.duration(recovery.get("rto_seconds")))]
        )
        context.screen.line()
        columns = ("machine", "here", "state", "reason")
        rows = [
            (m["name"], m.get("recovery_name") or m["name"], render.word(m.get("state")), m.get("reason") or "-")
            for m in machines
        ]
        context.screen.table(columns, rows, "no machines")
    state = recovery.get("state")
    if state == "failed":
        reason = next((m["reason"] for m in machines if m.get("reason")), recovery.get("reason") or "no machine runs")
        raise StepFailed(f"{recovery['id']} failed: {reason}", hint="see the reasons above, and: drctl explain 40")
    return 3 if state == "partly" else 0


def narrator(context: Context) -> Progress:
    """Says each step of a recovery as it happens."""

    def tell(step: dict[str, Any]) -> None:
        if step.get("machine"):
            words = f"{step['machine']}: {_MACHINE_STEPS.get(str(step.get('state')), step.get('state'))}"
        else:
            words = _STEPS.get(str(step.get("step")), str(step.get("step")))
        context.screen.say("  " + words)

    return tell
