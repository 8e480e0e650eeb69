"""Recoveries (tests, failovers, switchovers) as the command line shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drctl.cli import render
from drctl.cli.context import Context, Progress
from drctl.errors import StepFailed

#: Booting waits for machines; an appliance that is silent for so long is lost.
RUN_TIMEOUT = 3600.0
#: Kinds that let a group reign where they run.
REIGNS = ("failover", "switchover")
COLUMNS = ("id", "kind", "group", "checkpoint", "state", "started", "machines")


#: What an appliance's steps are called where people read them; an unknown one keeps its own name.
_STEPS = {
    "reign": "the group reigns here now: the old source is refused from here on",
    "pin": "the checkpoint is held: nothing may merge or delete it",
    "view": "its disks are served",
}
_MACHINE_STEPS = {"overlay": "has a layer of its own to write to", "started": "switched on"}


def reigning(status: dict[str, Any]) -> dict[str, Any] | None:
    """The failover or switchover by which the group reigns at the recovery side; None when it does not."""
    if status.get("mode") != "failed-over":
        return None
    found = [one for one in status.get("recoveries") or [] if one.get("kind") in REIGNS]
    found = [one for one in found if one.get("state") != "rolled-back"]
    newest = max(found, key=lambda one: (one.get("generation") or 0, one.get("started") or 0), default=None)
    return dict(newest) if newest is not None else None


def standing(status: dict[str, Any]) -> dict[str, Any] | None:
    """The same when all its machines run, or it is final: there is nothing left to boot."""
    newest = reigning(status)
    return newest if newest is not None and newest.get("state") in ("running", "committing", "committed") else None


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


def by_itself(one: dict[str, Any]) -> str:
    """What the recovery site does with it after a time: `rollback in 3h 59m`, why it does not, or a dash."""
    auto = one.get("auto")
    if not isinstance(auto, dict) or one.get("state") in ("committed", "rolled-back"):
        return "-"
    if auto.get("cancelled"):
        return f"no {auto['action']}: {auto['cancelled']}"
    return f"{auto['action']} in {render.duration(auto.get('seconds_left'))}"


def show(context: Context, kind: str, recovery: dict[str, Any], **more: Any) -> int:
    """Print a recovery, and return its exit code: 0 all machines run, 3 some do. Raises StepFailed when none does.

    `more` are further fields of the JSON document."""
    machines = recovery.get("machines") or []
    if context.screen.as_json:
        context.document(kind, recovery=recovery, **more)
    else:
        context.screen.facts(
            [
                *zip(COLUMNS, row(recovery), strict=True),
                ("started in", render.duration(recovery.get("rto_seconds"))),
                *([("by itself", by_itself(recovery))] if recovery.get("auto") else []),
            ]
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


def narrator(context: Context, steps: Mapping[str, str] | None = None) -> Progress:
    """Says each step of a recovery as it happens; `steps` has words for those of a command of its own."""
    known = {**_STEPS, **(steps or {})}
    copied: dict[str, int] = {}

    def tell(step: dict[str, Any]) -> None:
        if step.get("step") == "waiting":
            return
        if step.get("step") == "copy":  # told piece by piece
            disk, tenth = f"{step['machine']}.{step['disk']}", _tenth(step)
            if tenth > copied.get(disk, 0):
                copied[disk] = tenth
                context.screen.say(f"  {disk}: {10 * tenth} % of {render.size(step.get('total_bytes'))} copied")
            return
        if step.get("machine"):
            words = f"{step['machine']}: {_MACHINE_STEPS.get(str(step.get('state')), step.get('state'))}"
        else:
            words = known.get(str(step.get("step")), str(step.get("step")))
        context.screen.say("  " + words)

    return tell


def _tenth(step: Mapping[str, Any]) -> int:
    return 10 * int(step.get("done_bytes") or 0) // max(1, int(step.get("total_bytes") or 0))
