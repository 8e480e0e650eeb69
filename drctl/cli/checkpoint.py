"""`drctl checkpoint`: the points in time that a group can be recovered to."""

from __future__ import annotations

from typing import Annotated

import typer

from drctl.cli import bisect, checkpoint_copy, checkpoint_source, points, render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import side
from drctl.cli.options import CheckpointName, DryRun, Format, GroupName, Output, Yes, begin, examples, noun
from drctl.errors import IntegrityError

app = noun("Points in time that a group can be recovered to.")
checkpoint_copy.install(app)
bisect.install(app)

#: Lines of a listing for people; JSON has all.
LAST = 30
#: A quiesced checkpoint waits for the guests' agents, at most 10 s, and for the proof of the other side.
CREATE_TIMEOUT = 120.0
#: Verifying reads a whole journal.
VERIFY_TIMEOUT = 24 * 3600.0


@app.command("list", epilog=examples("drctl checkpoint list web", "drctl checkpoint list web --last 0 --output json"))
def list_(
    ctx: typer.Context,
    group: GroupName,
    output: Output = Format.TEXT,
    last: Annotated[
        int | None,
        typer.Option("--last", metavar="N", min=0, help="How many of the newest; 0: all. Text shows 30, JSON all."),
    ] = None,
) -> None:
    """List what the recovery site can restore, oldest first."""
    context = begin(ctx, output)
    wanted = (0 if context.screen.as_json else LAST) if last is None else last
    # One more than is shown: are there others? A listing of a month's half a million takes many seconds.
    checkpoints = points.fetch(context, side(context, group, "recovery"), group, wanted + 1 if wanted else 0)
    shown = checkpoints[-wanted:]
    now = context.clock.time()
    if context.screen.as_json:
        context.document("checkpoints", group=group, checkpoints=[points.as_json(one, now) for one in shown])
        return
    context.screen.table(
        points.COLUMNS, [points.row(one, now) for one in shown], f"{group} has no restorable checkpoint yet"
    )
    if len(shown) < len(checkpoints):
        context.screen.say(f"the newest {len(shown)}; all: --last 0")


@app.command(epilog=examples("drctl checkpoint show web latest", "drctl checkpoint show web tag:before-upgrade"))
def show(
    ctx: typer.Context, group: GroupName, checkpoint: CheckpointName = "latest", output: Output = Format.TEXT
) -> None:
    """Show one checkpoint, and what a recovery to it would lose."""
    context = begin(ctx, output)
    found = points.pick(context, side(context, group, "recovery"), group, checkpoint)
    now = context.clock.time()
    if context.screen.as_json:
        context.document("checkpoint", group=group, checkpoint=points.as_json(found, now))
        return
    context.screen.facts(
        [
            *zip(points.COLUMNS, points.row(found, now), strict=True),
            ("epoch", found.epoch),
            ("sequence", str(found.sequence)),
        ]
    )


@app.command(
    epilog=examples("drctl checkpoint create web --tag before-upgrade", "drctl checkpoint create web --quiesce")
)
def create(
    ctx: typer.Context,
    group: GroupName,
    quiesce: Annotated[
        bool, typer.Option("--quiesce", help="Have the guests' agents freeze their file systems for it.")
    ] = False,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", "-t", metavar="NAME", help="Keep it under this name; may be repeated.")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> None:
    """Cut a checkpoint now, and wait until the recovery site can restore it.

    A tagged checkpoint is kept until its last tag is removed."""
    context = begin(ctx, output)
    host = side(context, group, "source")
    kind = "quiesced" if quiesce else "crash-consistent"
    names = f", tagged {', '.join(tag)}" if tag else ""
    if not propose(
        context.screen,
        [f"cut a {kind} checkpoint of {group} at {host.site}/{host.name}{names}"],
        dry_run=dry_run,
        yes=yes,
    ):
        return
    row = context.call(host, "checkpoint.create", group=group, kind=kind, tags=tag or [], timeout=CREATE_TIMEOUT)
    now = context.clock.time()
    made = points.decode(row)
    if context.screen.as_json:
        context.document("checkpoint", group=group, checkpoint=points.as_json(made, now))
    else:
        context.screen.line(points.spell(made, now))


@app.command(
    epilog=examples(
        "drctl checkpoint tag web -10m before-incident", "drctl checkpoint tag web '#123' before-incident --remove"
    )
)
def tag(
    ctx: typer.Context,
    group: GroupName,
    checkpoint: CheckpointName,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The tags.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the tags off instead.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Name a checkpoint; it is kept as long as it has a name."""
    context = begin(ctx)
    host = side(context, group, "recovery")
    found = points.pick(context, host, group, checkpoint)
    verb = "untag" if remove else "tag"
    left = [name for name in names if (name in found.tags) is remove]
    if not left:
        said = "does not carry" if remove else "carries"
        already = "" if remove else " already"
        context.screen.line(f"#{found.number} of {group} {said} {', '.join(names)}{already}")
        return
    if not propose(context.screen, [f"{verb} #{found.number} of {group}: {', '.join(left)}"], dry_run=dry_run, yes=yes):
        return
    put, off = ([], left) if remove else (left, [])
    row = context.call(host, "checkpoint.tag", group=group, checkpoint=f"#{found.number}", tags=put, remove=off)
    context.screen.line(points.spell(points.decode(row), context.clock.time()))


@app.command(
    epilog=examples(
        "drctl checkpoint verify web",
        "drctl checkpoint verify web tag:before-upgrade --output json",
        "drctl checkpoint verify web --source --sample 5% --rate '50 MB/s'",
    )
)
def verify(
    ctx: typer.Context,
    group: GroupName,
    checkpoint: CheckpointName = "latest",
    source: Annotated[
        bool, typer.Option("--source", help="Hold the newest state against the disks of the source, which runs on.")
    ] = False,
    sample: Annotated[
        float | None,
        typer.Option(
            "--sample", parser=checkpoint_source.share, metavar="SHARE", help="With --source: a part, e.g. 5%."
        ),
    ] = None,
    rate: Annotated[
        int | None,
        typer.Option(
            "--rate", parser=checkpoint_source.rate, metavar="RATE", help="With --source: read so fast at most."
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="With --source: send again what is wrong, and nothing else.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Read all that a checkpoint is made of, and check every checksum.

    With --source both sides are read and compared while the guests run and checkpoints go on; what differs because it
    is being written is told from what is wrong. A repair mends the newest state: older checkpoints keep what they have.
    Exits with 31 when something is damaged, with 3 when it was and all of it is repaired."""
    context = begin(ctx, output)
    if source:
        if checkpoint != "latest":
            raise typer.BadParameter("--source looks at the newest state; name no checkpoint")
        order = {"share": sample or 1.0, "rate": rate or 0, "repair": repair}
        return checkpoint_source.verify_source(context, group, order, dry_run=dry_run, yes=yes)
    if sample or rate or repair:
        raise typer.BadParameter("--sample, --rate and --repair go with --source")
    if dry_run and not propose(context.screen, [f"read {group} at {checkpoint}"], dry_run=True, yes=yes):
        return 0
    return _verify_checkpoint(context, group, checkpoint)


def _verify_checkpoint(context: Context, group: str, checkpoint: str) -> int:
    host = side(context, group, "recovery")
    found = points.pick(context, host, group, checkpoint)
    with context.screen.bar(f"verify #{found.number}") as update:
        result = context.call(
            host,
            "checkpoint.verify",
            group=group,
            checkpoint=f"#{found.number}",
            on_progress=lambda step: update(step.get("done_bytes") or 0, step.get("total_bytes"), ""),
            timeout=VERIFY_TIMEOUT,
        )
    damaged = result.get("damaged") or []
    if context.screen.as_json:
        context.document(
            "verification",
            group=group,
            number=found.number,
            bytes=result.get("bytes"),
            frames=result.get("frames"),
            damaged=damaged,
        )
    else:
        context.screen.line(f"#{found.number}: {render.size(result.get('bytes'))} read, {len(damaged)} damaged")
    if damaged:
        raise IntegrityError(
            f"checkpoint #{found.number} of {group} is damaged: {damaged[0]}",
            hint="recover to another one: drctl checkpoint list",
        )
    return 0
