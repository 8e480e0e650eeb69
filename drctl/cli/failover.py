"""`drctl failover`: recover a group at the other site after a disaster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drctl.cli import points, recovery, render
from drctl.cli.confirm import confirm_name
from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, Inventory, side, take_inventory
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
    if (standing := _standing(context, host, group)) is not None:
        context.screen.say(f"{group} is failed over to {host.site}/{host.name} already")
        return _finish(context, standing)
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
    return _finish(context, result)


def _standing(context: Context, host: Host, group: str) -> dict[str, Any] | None:
    """The failover of this group that runs here with all its machines, or is final; None when there is work to do."""
    status = context.call(host, "group.status", group=group, role="recovery", timeout=READ_TIMEOUT)
    if status.get("mode") != "failed-over":
        return None
    recoveries = [one for one in status.get("recoveries") or [] if one.get("kind") == "failover"]
    newest = max(recoveries, key=lambda one: (one.get("generation") or 0, one.get("started") or 0), default=None)
    done = newest is not None and newest.get("state") in ("running", "committing", "committed")
    return dict(newest) if newest and done else None


def _finish(context: Context, result: dict[str, Any]) -> int:
    code = recovery.show(context, "failover", result)
    if result.get("state") in ("running", "partly"):
        context.screen.say(f"when the service is healthy: drctl commit {result['group']}")
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
    say(f"  loss: {render.duration(plan.get('loss_seconds'))} at most, what the source wrote after the checkpoint")
    # Fencing is not asked about where nothing can be said: it only matters when it is there.
    place = f"{source.get('site')}/{source.get('host')}"
    reachable = {True: "answers", False: "does not answer", None: "was not asked"}[source.get("reachable")]
    say(f"  source {place} {reachable}" + (", and is fenced" if source.get("fenced") else ""))
    for machine in plan.get("machines") or []:
        disks = machine.get("disks") or []
        total = sum(disk.get("size") or 0 for disk in disks)
        say(f"  boot {machine.get('recovery_name') or machine['name']}: {len(disks)} disks, {render.size(total)}")
    for pair in plan.get("networks") or []:
        say(f"  network {pair[0]} -> {pair[1]}")
    for text in _findings(plan):
        say(f"  {text}")


def _findings(plan: dict[str, Any]) -> list[str]:
    """Errors and warnings one a line; what is merely good to know is shared by all the machines it is true of."""
    lines: list[str] = []
    shared: dict[str, list[str]] = {}
    for finding in plan.get("findings") or []:
        subject, message = str(finding.get("subject") or ""), str(finding["message"])
        if finding["severity"] == "info":
            shared.setdefault(message.replace(subject, "NAME") if subject else message, []).append(subject)
        else:
            hint = f" ({finding['hint']})" if finding.get("hint") else ""
            lines.append(f"{finding['severity']}: {subject}: {message}{hint}")
    return lines + [f"note: {', '.join(filter(None, names))}: {message}" for message, names in shared.items()]


def _warn_of_source(context: Context, inventory: Inventory, group: str) -> None:
    """The operator may see a source that the recovery site can't see: a broken link is no disaster."""
    source = inventory.find(group, "source")
    if source is not None and source.state != "failed-over":
        place = f"{source.host.site}/{source.host.name}"
        context.screen.say(
            f"  WARNING: the source {place} answers this machine, and the group is {source.state} there."
        )
        context.screen.say(
            "  If its machines run on there will be two of each, and what those at the source write is lost."
        )


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
