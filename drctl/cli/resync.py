"""`drctl resync`: compare both sides of a group, and send what differs."""

from __future__ import annotations

from typing import Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import side, take_inventory
from drctl.cli.leased import leased
from drctl.cli.options import DryRun, Format, GroupName, Output, Timeout, Yes, begin, examples, noun
from drctl.cli.replicate import CALL_TIMEOUT, wait_until_live
from drctl.cli.status import look
from drctl.errors import WrongPhase
from drctl.model.site import Host

app = noun("Compare both sides of a group, and send what differs.")

#: A dry run reads all disks.
SURVEY_TIMEOUT = 24 * 3600.0


@app.command(
    epilog=examples("drctl resync web --dry-run", "drctl resync web --yes", "drctl resync web --dry-run -o json")
)
def resync(
    ctx: typer.Context,
    group: GroupName,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Read all disks of a group, compare them with the replica by signatures, and send only what differs.

    The guests run on, and all older checkpoints stay; no new one is made until it is done, so the RPO grows. With
    --dry-run nothing is sent and checkpoints go on: it tells how much differs, and what that would cost. Exits with 3
    when the time is over and the resync is not."""
    context = begin(ctx, output)
    inventory = take_inventory(context)
    host = side(context, group, "source", inventory)
    picture = look(context, group)[0][0]
    if picture["phase"] in ("unprotected", "paused", "failed-over"):
        verb = {"paused": "resume", "unprotected": "start"}.get(picture["phase"])
        raise WrongPhase(
            f"{group} is {picture['phase']}: its disks are compared while it is replicated",
            hint=f"drctl replicate {verb} {group}" if verb else f"see: drctl status {group}",
            group=group,
        )
    if dry_run:
        return _survey(context, host, group)
    steps = [f"compare all disks of {group} with the replica and send what differs; no checkpoint is made until then"]
    if not propose(context.screen, steps, dry_run=False, yes=yes, question=f"Resync {group}?"):
        return 0
    with leased(context, group, "resync", inventory):
        context.call(host, "resync", group=group, timeout=CALL_TIMEOUT)
    newest = picture["newest"]["number"] if picture["newest"] else 0
    sync: dict[str, Any] = {}
    with context.screen.bar(f"resync {group}") as update:
        after = wait_until_live(context, group, timeout, lambda now: _follow(update, now, sync), after=newest)
    if after is None:
        context.screen.say(f"{group} is not live after {render.duration(timeout)}; it goes on: drctl status {group}")
        return 3
    _tell(context, group, after, sync)
    return 0


def _survey(context: Context, host: Host, group: str) -> int:
    with context.screen.bar(f"compare {group}") as update:

        def draw(found: dict[str, Any]) -> None:
            done, total = found.get("done_bytes") or 0, found.get("total_bytes")
            text = (
                f"{render.size(done)} of {render.size(total)}, {render.size(found.get('differing_bytes') or 0)} differ"
            )
            update(done, total, text if total else "")

        found = context.call(host, "resync", group=group, dry_run=True, on_progress=draw, timeout=SURVEY_TIMEOUT)
    if context.screen.as_json:
        context.document("resync-plan", group=group, **{name: found.get(name) for name in FINDINGS})
        return 0
    total = found.get("total_bytes")
    context.screen.line(
        f"{group}: {render.size(found.get('differing_bytes'))} of {render.size(total)} differ; a resync would send "
        f"{render.size(found.get('crossing_bytes'))} and take about {render.duration(found.get('seconds'))} or more"
    )
    return 0


#: What a dry run tells, in JSON as it is on the control socket.
FINDINGS = ("total_bytes", "read_bytes", "differing_bytes", "crossing_bytes", "seconds")


def _follow(update: render.Update, picture: dict[str, Any], newest: dict[str, Any]) -> None:
    sync = picture["sync"] or {}
    total, done = sync.get("total_bytes"), sync.get("done_bytes") or 0
    if not total:
        update(0, None, "waiting for a checkpoint" if picture["phase"] == "live" else "waiting for the pass")
        return
    newest.update(sync)
    parts = [f"{render.size(done)} of {render.size(total)} compared"]
    parts += [f"{render.size(sync[key])} {word}" for key, word in _COUNTS if sync.get(key) is not None]
    if sync.get("eta") is not None:
        parts.append(f"{render.duration(sync['eta'])} left")
    update(done, total, ", ".join(parts))


_COUNTS = (("matched_bytes", "equal"), ("sent_bytes", "sent"))


def _tell(context: Context, group: str, picture: dict[str, Any], sync: dict[str, Any]) -> None:
    newest = picture["newest"]
    if context.screen.as_json:
        counts = {key: sync.get(key) for key in ("total_bytes", "matched_bytes", "sent_bytes")}
        context.document("resync", group=group, checkpoint=newest["number"], **counts)
        return
    context.screen.line(
        f"{group} is live again; newest checkpoint #{newest['number']} at {render.moment(newest['time'])}"
    )
