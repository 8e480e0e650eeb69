"""`drctl failover`: recover a group at the other site after a disaster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drctl.cli import points, recovery, render
from drctl.cli.confirm import confirm_name
from drctl.cli.context import Context
from drctl.cli.inventory import Inventory, side, take_inventory
from drctl.cli.options import Confirm, DryRun, Format, GroupName, Output, Selector, Yes, begin, examples, noun
from drctl.errors import PreconditionFailed, Refused
from drctl.model.site import Host

app = noun("Recover a group at the other site after a disaster.")

#: Newest checkpoints that `--candidates` shows besides every tagged or quiesced one.
CANDIDATES = 20


@app.command(
    epilog=examples(
        "drctl failover web --candidates",
        "drctl failover web --dry-run",
        'drctl failover web --source-is-down "fire in hall 2"',
        "drctl failover web --checkpoint -30m --source-is-down ransomware --confirm web --yes",
    )
)
def failover(
    ctx: typer.Context,
    group: GroupName,
    checkpoint: Selector = "latest",
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Show the checkpoints to choose from, do nothing.")
    ] = False,
    source_is_down: Annotated[
        str, typer.Option("--source-is-down", metavar="REASON", help="Say why the source can't run; it is recorded.")
    ] = "",
    dry_run: DryRun = False,
    confirm: Confirm = "",
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Boot a whole group at the recovery site, as it was at a checkpoint.

    What was written at the source after that checkpoint is lost; the loss is shown before anything is asked. The old
    source may neither run nor replicate afterwards. The group's name has to be typed, or given by --confirm: --yes
    alone does not start a failover. Neither the other site nor a configuration is needed for it.

    One machine's failure does not stop the others: exits with 3 when some failed, with 40 when none runs (42 from a
    dry run that forecasts it). Given again, it goes on with what has failed."""
    context = begin(ctx, output)
    inventory = take_inventory(context)
    host = side(context, group, "recovery", inventory)
    if candidates:
        _candidates(context, host, group)
        return 0
    plan = context.call(host, "failover.plan", group=group, checkpoint=checkpoint, timeout=60)
    found = points.decode(plan["checkpoint"])
    _show_plan(context, host, plan)
    _warn_of_source(context, inventory, group)
    if dry_run:
        if context.screen.as_json:
            context.document("failover-plan", plan=plan)
        context.screen.say("dry run: nothing was changed")
        return _forecast(plan, group)
    _check(plan, group, source_is_down)
    confirm_name(context.screen, group, typed=confirm)
    result = context.call(
        host,
        "failover.run",
        group=group,
        checkpoint=points.settle(checkpoint, found),
        source_is_down=source_is_down,
        confirmed=group,
        on_progress=recovery.narrator(context),
        timeout=recovery.RUN_TIMEOUT,
    )
    code = recovery.show(context, "failover", result)
    context.screen.say(f"when the service is healthy: drctl commit {group}")
    return code


def _candidates(context: Context, host: Host, group: str) -> None:
    checkpoints = points.fetch(context, host, group)
    newest = checkpoints[-CANDIDATES:]
    marked = [one for one in checkpoints[:-CANDIDATES] if one.tags or one.kind != "crash-consistent"]
    now = context.clock.time()
    if context.screen.as_json:
        context.document("checkpoints", group=group, checkpoints=[points.as_json(one, now) for one in marked + newest])
        return
    rows = [points.row(one, now) for one in marked + newest]
    context.screen.table(points.COLUMNS, rows, f"{group} has no restorable checkpoint yet")
    if len(rows) < len(checkpoints):
        context.screen.say(
            f"newest, tagged and quiesced ones of {len(checkpoints)}; all: drctl checkpoint list {group} --last 0"
        )


def _show_plan(context: Context, host: Host, plan: dict[str, Any]) -> None:
    say = context.screen.say
    source = plan.get("source") or {}
    say(f"failover of {plan['group']} to {host.site}/{host.name}, generation {render.word(plan.get('generation'))}")
    say(f"  checkpoint {points.spell(points.decode(plan['checkpoint']), context.clock.time())}")
    say(f"  loss: {render.duration(plan.get('loss_seconds'))} of writes at the source")
    say(f"  source answers: {render.word(source.get('reachable'))}, fenced: {render.word(source.get('fenced'))}")
    for machine in plan.get("machines") or []:
        disks = machine.get("disks") or []
        total = sum(disk.get("size") or 0 for disk in disks)
        say(f"  boot {machine.get('recovery_name') or machine['name']}: {len(disks)} disks, {render.size(total)}")
    for pair in plan.get("networks") or []:
        say(f"  network {pair[0]} -> {pair[1]}")
    for finding in plan.get("findings") or []:
        say(f"  {finding['severity']}: {finding['message']}" + (f" ({finding['hint']})" if finding.get("hint") else ""))


def _warn_of_source(context: Context, inventory: Inventory, group: str) -> None:
    """The operator may see a source that the recovery site can't see: a broken link is no disaster."""
    source = inventory.find(group, "source")
    if source is not None and source.state != "failed-over":
        place = f"{source.host.site}/{source.host.name}"
        context.screen.say(f"  WARNING: the source {place} answers from here, the group is {source.state} there;")
        context.screen.say("  if its machines run on, both sites have one of each, and what the source writes is lost")


def _check(plan: dict[str, Any], group: str, source_is_down: str) -> None:
    """Raises Refused when the source may still run."""
    if not ((plan.get("source") or {}).get("fenced") or source_is_down):
        raise Refused(
            f"the source of {group} is not known to be down: two copies of a machine must never run",
            hint='when you know that it is: --source-is-down "REASON" (it is recorded)',
            group=group,
        )


def _forecast(plan: dict[str, Any], group: str) -> int:
    """Exit code of a dry run: 0, or 3 when some machines would fail. Raises PreconditionFailed when all would."""
    failing = {finding["subject"] for finding in plan.get("findings") or [] if finding["severity"] == "error"}
    machines = {machine["name"] for machine in plan.get("machines") or []}
    if machines <= failing:
        raise PreconditionFailed(f"no machine of {group} would boot", hint="see the errors above", group=group)
    return 3 if failing else 0
