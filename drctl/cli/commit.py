"""`drctl commit`: make a failover final."""

from __future__ import annotations

from typing import Any

import typer

from drctl.cli import recovery, render
from drctl.cli.confirm import propose
from drctl.cli.inventory import side
from drctl.cli.options import DryRun, Format, GroupName, Output, Yes, begin, examples, noun

app = noun("Make a failover final.")

#: Localizing copies whole disks while the machines run; it is waited for as long as something moves.
COMMIT_TIMEOUT = 24 * 3600.0


@app.command(epilog=examples("drctl commit web", "drctl commit web --yes --output json"))
def commit(
    ctx: typer.Context, group: GroupName, dry_run: DryRun = False, yes: Yes = False, output: Output = Format.TEXT
) -> int:
    """Copy what a failed-over group still reads from the replica into its own disks, while it runs.

    Afterwards its machines need neither the journal nor drctl. It can be interrupted and given again. The group is not
    protected until it is replicated back."""
    context = begin(ctx, output)
    host = side(context, group, "recovery")
    steps = [f"make the disks of {group} at {host.site}/{host.name} stand alone; the view of the checkpoint goes"]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Commit the failover of {group}?"):
        return 0
    with context.screen.bar(f"commit {group}") as update:

        def draw(step: dict[str, Any]) -> None:
            text = " ".join(render.word(step[key]) for key in ("step", "machine") if step.get(key))
            update(step.get("done_bytes") or 0, step.get("total_bytes"), text)

        result = context.call(host, "commit", group=group, on_progress=draw, timeout=COMMIT_TIMEOUT)
    return recovery.show(context, "commit", result)
