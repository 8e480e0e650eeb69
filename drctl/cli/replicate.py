"""`drctl replicate`: start, pause, resume and stop the replication of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import Inventory, side, take_inventory
from drctl.cli.options import DryRun, GroupName, Timeout, Yes, begin, examples, noun, seconds
from drctl.cli.protection import describe
from drctl.cli.status import draw, look
from drctl.errors import DrctlError, StepFailed

app = noun("Start, pause, resume and stop the replication of a group.")

#: Attaching asks libvirt once per disk; a busy host may take its time.
CALL_TIMEOUT = 120.0
POLL = 1.0
#: How long a replica outlives its replication, unless the operator says otherwise.
KEEP_REPLICA = 7 * 86400.0

Wait = Annotated[
    bool | None, typer.Option("--wait/--no-wait", help="Wait until the group is live; on a terminal that is the rule.")
]


@app.command(epilog=examples("drctl replicate start web", "drctl replicate start web --yes --wait --timeout 2h"))
def start(
    ctx: typer.Context,
    group: GroupName,
    wait: Wait = None,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Attach to the disks of a group and copy them to the recovery site.

    The guests run on. Nothing can be recovered until the first sync is done; from then on checkpoints follow at the
    group's interval. A group that is live already stays so. Exits with 3 when the time is over and the sync is not."""
    context = begin(ctx)
    inventory = take_inventory(context)
    host = side(context, group, "source", inventory)
    picture = draw(context, inventory, [group])[0][0]
    if picture["phase"] in ("live", "syncing", "catching-up"):
        context.screen.say(f"{group} is {picture['phase']} already")
    else:
        steps = [f"replicate {group} from {host.site}/{host.name} to {_target(picture)}", *_disks(picture, inventory)]
        if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Start replication of {group}?"):
            return 0
        context.call(host, "replicate.start", group=group, timeout=CALL_TIMEOUT)
    return _finish(context, group, wait, timeout)


@app.command(epilog=examples("drctl replicate pause web", "drctl replicate pause web --yes"))
def pause(ctx: typer.Context, group: GroupName, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Detach from the disks of a group; what was replicated stays restorable.

    Until it is resumed no new checkpoint is made, and the RPO grows."""
    context = begin(ctx)
    host = side(context, group, "source")
    steps = [f"detach from all disks of {group}; its RPO grows until: drctl replicate resume {group}"]
    if propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Pause replication of {group}?"):
        _tell(context, group, context.call(host, "replicate.pause", group=group, timeout=CALL_TIMEOUT))


@app.command(epilog=examples("drctl replicate resume web", "drctl replicate resume web --wait"))
def resume(
    ctx: typer.Context,
    group: GroupName,
    wait: Wait = None,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Attach again after a pause or a fault, and catch up."""
    context = begin(ctx)
    host = side(context, group, "source")
    if not propose(context.screen, [f"attach to all disks of {group} and catch up"], dry_run=dry_run, yes=yes):
        return 0
    context.call(host, "replicate.resume", group=group, timeout=CALL_TIMEOUT)
    return _finish(context, group, wait, timeout)


@app.command(epilog=examples("drctl replicate stop web", "drctl replicate stop web --keep-replica 7d --yes"))
def stop(
    ctx: typer.Context,
    group: GroupName,
    keep_replica: Annotated[
        float | None,
        typer.Option(
            "--keep-replica", parser=seconds, metavar="DURATION", help="How long replica and checkpoints are kept."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """End the replication of a group; replica and checkpoints are kept for a while, 7 days by default.

    Exits with 3 when the recovery site could not be told: it keeps them then."""
    context = begin(ctx)
    source, recovery = side(context, group, "source"), side(context, group, "recovery")
    kept = KEEP_REPLICA if keep_replica is None else keep_replica
    steps = [
        f"detach from all disks of {group} at {source.site}/{source.name}",
        f"delete its replica and checkpoints at {recovery.site}/{recovery.name} after {render.duration(kept)}",
    ]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Stop replication of {group}?"):
        return 0
    _tell(context, group, context.call(source, "replicate.stop", group=group, timeout=CALL_TIMEOUT))
    try:
        result = context.call(recovery, "replicate.stop", group=group, keep_replica_seconds=kept, timeout=CALL_TIMEOUT)
    except DrctlError as exc:
        context.screen.say(f"the replica at {recovery.site}/{recovery.name} is kept without a limit: {exc.message}")
        return 3
    context.screen.line(f"replica kept until {render.moment((result or {}).get('kept_until'))}")
    return 0


def _finish(context: Context, group: str, wait: bool | None, timeout: float | None) -> int:
    if wait is None:
        wait = context.screen.interactive
    if not wait:
        context.screen.line(f"{group} started; see: drctl status {group} --watch")
        return 0
    with context.screen.bar(group) as update:
        picture = wait_until_live(context, group, timeout, lambda now: _progress(update, now))
    if picture is None:
        context.screen.say(f"{group} is not live after {render.duration(timeout)}; it goes on: drctl status {group}")
        return 3
    newest = picture["newest"]
    context.screen.line(f"{group} is live; newest checkpoint #{newest['number']} at {render.moment(newest['time'])}")
    return 0


def wait_until_live(
    context: Context, group: str, timeout: float | None, draw: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    """The group's picture once it is live and has a restorable checkpoint; None when the time is over.

    Raises StepFailed when the group breaks while it is waited for."""
    end = None if timeout is None else context.clock.monotonic() + timeout
    while True:
        picture = look(context, group)[0][0]
        draw(picture)
        if picture["phase"] == "broken":
            raise StepFailed(f"{group} is broken: {picture['reason']}", hint=f"see: drctl status {group}", group=group)
        if picture["phase"] == "live" and picture["newest"]:
            return picture
        if end is not None and context.clock.monotonic() >= end:
            return None
        context.clock.sleep(POLL)


def _progress(update: render.Update, picture: dict[str, Any]) -> None:
    sync = picture["sync"] or {}
    total = sync.get("total_bytes")
    eta = f", {render.duration(sync['eta'])} left" if sync.get("eta") is not None else ""
    amount = f" {render.size(sync.get('done_bytes') or 0)} of {render.size(total)}{eta}" if total else ""
    update(sync.get("done_bytes") or 0, total, describe(picture) + amount)


def _tell(context: Context, group: str, result: dict[str, Any] | None) -> None:
    context.screen.line(f"{group} is {(result or {}).get('phase') or render.UNKNOWN}")


def _target(picture: dict[str, Any]) -> str:
    recovery = picture["recovery"]
    return f"{recovery['site']}/{recovery['host']}" if recovery else "the recovery site (it does not answer now)"


def _disks(picture: dict[str, Any], inventory: Inventory) -> list[str]:
    """What will be read. A source that has not looked at its machines yet knows their names alone."""
    place = inventory.find(picture["group"], "source")
    if not picture["machines"] and place is not None:
        return [f"read all disks of {name}" for name in place.spec.get("machines", [])]
    return [
        f"read {machine['name']} {disk['target']}, {render.size(disk.get('size'))}"
        for machine in picture["machines"]
        for disk in machine.get("disks", [])
    ]
