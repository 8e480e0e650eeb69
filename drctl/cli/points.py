"""Checkpoints as appliances list them, and how they are spoken of. An operator always sees time and age."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from drctl.cli import render
from drctl.cli.context import Context
from drctl.errors import NotFound
from drctl.model.checkpoint import Checkpoint, CheckpointKind, checkpoint_moment, checkpoint_number, resolve
from drctl.model.site import Host

#: Finding one among half a million is quick; opening a store on a busy host may not be.
CHOOSE_TIMEOUT = 30.0


def decode(row: dict[str, Any]) -> Checkpoint:
    """A checkpoint from its JSON object; what an older appliance leaves out gets a neutral value."""
    return Checkpoint(
        number=int(row["number"]),
        time=float(row["time"]),
        kind=CheckpointKind(row.get("kind", CheckpointKind.CRASH)),
        epoch=str(row.get("epoch", "")),
        generation=int(row.get("generation", 0)),
        sequence=int(row.get("sequence", 0)),
        tags=tuple(row.get("tags") or ()),
        pinned=bool(row.get("pinned", False)),
    )


def fetch(context: Context, host: Host, group: str, last: int = 0) -> list[Checkpoint]:
    """The restorable checkpoints of a group, in order of time; the newest `last` of them, 0: all. Raises DrctlError.

    An older appliance, that does not know `last`, tells all."""
    return [decode(row) for row in context.call(host, "checkpoint.list", group=group, last=last)][-last:]


def choose(context: Context, checkpoints: Sequence[Checkpoint], selector: str) -> Checkpoint:
    """The checkpoint that the operator named, echoed with its time and age. Raises NotFound or a usage error."""
    try:
        checkpoint = resolve(selector, checkpoints, context.clock.time())
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    context.screen.say(f"checkpoint {selector}: {spell(checkpoint, context.clock.time())}")
    return checkpoint


def pick(context: Context, host: Host, group: str, selector: str) -> Checkpoint:
    """The same, chosen by the recovery site among all that it has: no list of them comes over. Raises as `choose`.

    A moment like -10m is counted by that site's clock."""
    if selector != "latest" and not selector.startswith("tag:") and checkpoint_number(selector) is None:
        try:
            checkpoint_moment(selector, context.clock.time())
        except ValueError as exc:
            raise typer.BadParameter(str(exc)) from exc
    try:
        row = context.call(host, "checkpoint.choose", group=group, checkpoint=selector, timeout=CHOOSE_TIMEOUT)
    except NotFound as exc:
        if exc.fields.get("kind") != "method":
            raise
        return choose(context, fetch(context, host, group), selector)  # an older appliance
    checkpoint = decode(row)
    context.screen.say(f"checkpoint {selector}: {spell(checkpoint, context.clock.time())}")
    return checkpoint


def settle(selector: str, checkpoint: Checkpoint) -> str:
    """The selector to send: `latest` stays (a newer one is better still), any other is fixed to what was echoed."""
    return selector if selector == "latest" else f"#{checkpoint.number}"


def spell(checkpoint: Checkpoint, now: float) -> str:
    """`#123 at 2026-01-31T02:10:05.000+00:00, 4.2 s ago, crash-consistent`."""
    tags = f", tags {', '.join(checkpoint.tags)}" if checkpoint.tags else ""
    age = render.duration(max(0.0, now - checkpoint.time))
    return f"#{checkpoint.number} at {render.moment(checkpoint.time)}, {age} ago, {checkpoint.kind}{tags}"


def as_json(checkpoint: Checkpoint, now: float) -> dict[str, Any]:
    """The documented JSON object of a checkpoint."""
    return {
        "number": checkpoint.number,
        "time": checkpoint.time,
        "iso": render.moment(checkpoint.time),
        "age_seconds": max(0.0, now - checkpoint.time),
        "kind": checkpoint.kind.value,
        "tags": list(checkpoint.tags),
        "pinned": checkpoint.pinned,
        "generation": checkpoint.generation,
        "epoch": checkpoint.epoch,
        "sequence": checkpoint.sequence,
    }


def row(checkpoint: Checkpoint, now: float) -> tuple[str, ...]:
    """One line of a table."""
    return (
        f"#{checkpoint.number}",
        render.moment(checkpoint.time),
        render.duration(max(0.0, now - checkpoint.time)),
        checkpoint.kind.value,
        ",".join(checkpoint.tags) or "-",
        "yes" if checkpoint.pinned else "no",
        str(checkpoint.generation),
    )


COLUMNS = ("number", "time", "age", "kind", "tags", "pinned", "generation")
