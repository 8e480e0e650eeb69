"""`drctl commit`: make a failover or switchover final."""

from __future__ import annotations

from typing import Any

import typer

from drctl.cli import pictures, recovery, render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, side, take_inventory
from drctl.cli.leased import leased
from drctl.cli.options import DryRun, Format, GroupName, Output, Yes, begin, examples, noun
from drctl.errors import WrongPhase
from drctl.model.site import Host

app = noun("Make a failover or switchover final.")

#: Localizing copies whole disks while the machines run; it is waited for as long as something moves.
COMMIT_TIMEOUT = 24 * 3600.0


@app.command(epilog=examples("drctl commit web", "drctl commit web --yes --output json"))
def commit(
    ctx: typer.Context, group: GroupName, dry_run: DryRun = False, yes: Yes = False, output: Output = Format.TEXT
) -> int:
    """Copy what a failed-over group still reads from the replica into its own disks, while it runs.

    Afterwards its machines need neither the journal nor drctl, and it can't be rolled back. It can be interrupted and
    given again. The group is not protected until it is replicated back: drctl failback."""
    context = begin(ctx, output)
    inventory = take_inventory(context)
    host = side(context, group, "recovery", inventory)
    failover = _failover(context, host, group)
    if failover.get("state") == "committed":
        context.screen.say(f"{group} is committed already")
        picture = pictures.take(context, inventory, group)
        return recovery.show(context, "commit", failover, before=picture, after=picture)
    before = pictures.take(context, inventory, group)
    pictures.show(context, "before", before)
    steps = [f"make the disks of {group} at {host.site}/{host.name} stand alone; the view of the checkpoint goes"]
    if not propose(
        context.screen, steps, dry_run=dry_run, yes=yes, question=f"Commit the {failover['kind']} of {group}?"
    ):
        return 0
    with leased(context, group, "commit", inventory), context.screen.bar(f"commit {group}") as update:

        def draw(step: dict[str, Any]) -> None:
            disk = ".".join(str(step[key]) for key in ("machine", "disk") if step.get(key))
            done, total = step.get("done_bytes") or 0, step.get("total_bytes")
            amount = f", {render.size(done)} of {render.size(total)}" if total else ""
            update(done, total, f"{step.get('step') or ''} {disk}{amount}".strip())

        result = context.call(host, "commit", group=group, on_progress=draw, timeout=COMMIT_TIMEOUT)
    after = pictures.take(context, inventory, group)
    pictures.show(context, "after", after)
    code = recovery.show(context, "commit", result, before=before, after=after)
    context.screen.say(f"{group} is replicated nowhere now; back to the other site: drctl failback {group}")
    return code


def _failover(context: Context, host: Host, group: str) -> dict[str, Any]:
    """The failover that reigns at the host. Raises WrongPhase when there is none."""
    status: dict[str, Any] = context.call(host, "group.status", group=group, role="recovery", timeout=READ_TIMEOUT)
    newest = recovery.reigning(status)
    if newest is None:
        raise WrongPhase(
            f"{group} is not failed over to {host.site}/{host.name}: there is nothing to commit",
            hint=f"see: drctl failover {group} --dry-run",
            group=group,
        )
    return newest
