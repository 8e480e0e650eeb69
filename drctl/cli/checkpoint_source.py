"""`drctl checkpoint verify --source`: the newest state of both sides held against each other."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import side, take_inventory
from drctl.cli.leased import leased
from drctl.errors import IntegrityError
from drctl.model.bandwidth import parse_rate
from drctl.model.extent import format_bytes

#: All disks may be read at a slow pace.
TIMEOUT = 7 * 24 * 3600.0
#: Lines of a listing for people.
LISTED = 20


def share(text: str) -> float:
    """`5%` as 0.05. Raises BadParameter."""
    try:
        found = float(text.removesuffix("%")) / 100
    except ValueError:
        found = 0.0
    if not 0 < found <= 1 or not text.endswith("%"):
        raise typer.BadParameter(f"{text!r} is no part of a disk; write e.g. 5%")
    return found


def rate(text: str) -> int:
    """Bytes a second. Raises BadParameter."""
    try:
        return parse_rate(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def verify_source(context: Context, group: str, order: dict[str, Any], *, dry_run: bool, yes: bool) -> int:
    """The exit code: 0, or 3 where all that was wrong is repaired. Raises IntegrityError for what is wrong and left."""
    inventory = take_inventory(context)
    host = side(context, group, "source", inventory)
    how = f"read {order['share']:.0%} of the disks" if order["share"] < 1 else "read all disks"
    steps = [f"{how} of {group} at {host.site}/{host.name} and hold them against the replica"]
    if order["repair"]:
        steps.append("send again what is wrong there; no checkpoint is made meanwhile")
    question = f"Repair {group}?" if order["repair"] else ""
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=question):
        return 0
    with (
        leased(context, group, "verify", inventory) if order["repair"] else nullcontext(),
        context.screen.bar(f"verify {group}") as update,
    ):
        found = context.call(
            host, "source.verify", group=group, **order, on_progress=lambda step: _draw(update, step), timeout=TIMEOUT
        )
    _tell(context, group, found)
    return _judge(group, found)


def _draw(update: render.Update, step: dict[str, Any]) -> None:
    done, total = step.get("done_bytes") or 0, step.get("total_bytes")
    suspect = step.get("suspect_bytes") or 0
    text = f"{render.size(done)} of {render.size(total)}" if total else ""
    update(done, total, f"{text}, {render.size(suspect)} looked at again" if suspect else text)


FIELDS = ("total_bytes", "done_bytes", "read_bytes", "undecided_bytes", "wrong_bytes", "repaired_bytes", "seconds")


def _tell(context: Context, group: str, found: dict[str, Any]) -> None:
    wrong = found.get("wrong") or []
    if context.screen.as_json:
        counts = {name: found.get(name) for name in FIELDS}
        context.document("source-verification", group=group, **counts, wrong=wrong)
        return
    for extent in wrong[:LISTED]:
        context.screen.line(f"wrong: {extent['disk']} at {extent['offset']}, {format_bytes(extent['length'])}")
    if len(wrong) > LISTED:
        context.screen.line(f"and {len(wrong) - LISTED} more: --output json")
    if undecided := found.get("undecided_bytes"):
        context.screen.say(f"{render.size(undecided)} were written too often to be told; verify them at a calmer time")
    context.screen.line(
        f"{group}: {render.size(found.get('done_bytes'))} compared, {render.size(found.get('wrong_bytes'))} wrong, "
        f"{render.size(found.get('repaired_bytes'))} repaired"
    )


def _judge(group: str, found: dict[str, Any]) -> int:
    if wrong := found.get("wrong") or []:
        raise IntegrityError(
            f"{group}: the replica is not what its source is, first at {wrong[0]['disk']}+{wrong[0]['offset']}",
            hint=f"drctl checkpoint verify {group} --source --repair; and look after the storage of the recovery site",
            group=group,
        )
    return 3 if found.get("repaired_bytes") else 0
