"""`drctl replicate`: start, pause, resume and stop the replication of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from drctl.cli import render, seeds
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.fitting import fitting
from drctl.cli.inventory import Inventory, side, take_inventory
from drctl.cli.leased import leased
from drctl.cli.options import DryRun, GroupName, Timeout, Yes, begin, examples, noun, seconds
from drctl.cli.protection import describe
from drctl.cli.retention import demand_unlocked
from drctl.cli.status import draw, look
from drctl.errors import DrctlError, Refused, StepFailed, WrongPhase
from drctl.model.site import Host

app = noun("Start, pause, resume and stop the replication of a group.")

#: Attaching asks libvirt once per disk; a busy host may take its time.
CALL_TIMEOUT = 120.0
POLL = 1.0
#: Phases in which the source replicates, or is about to.
ACTIVE = ("live", "syncing", "catching-up")
#: How long a replica outlives its replication, unless the operator says otherwise.
KEEP_REPLICA = 7 * 86400.0

Wait = Annotated[
    bool | None, typer.Option("--wait/--no-wait", help="Wait until the group is live; on a terminal that is the rule.")
]


@app.command(
    epilog=examples(
        "drctl replicate start web",
        "drctl replicate start web --yes --wait --timeout 2h",
        "drctl replicate start web --seed web-1.vda=/srv/courier/web-1.qcow2 --seed /srv/courier/web-1.vdb.raw",
    )
)
def start(
    ctx: typer.Context,
    group: GroupName,
    seed: seeds.Seed = None,
    move_seeds: seeds.MoveSeeds = False,
    wait: Wait = None,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Attach to the disks of a group and copy them to the recovery site.

    The guests run on. What the recovery site's host lacks of what the machines need, and what they would find changed
    there, is told before it is asked. Nothing can be recovered until the first sync is done; from then on checkpoints
    follow at the group's interval. A group that is live already stays so. Exits with 3 when the time is over and the
    sync is not.

    With --seed, files at the recovery site that hold the disks as they once were are taken as the beginning of the
    replica: a copy that came by courier, a backup, a golden image. They are compared by signatures, and only what
    differs crosses the link. A seed of another size, or of no disk of the group, is refused, and nothing was done."""
    context = begin(ctx)
    inventory, host, picture = _look(context, group)
    if picture["phase"] in ACTIVE:
        if seed:
            raise WrongPhase(f"{group} is replicated already: a seed comes too late", hint=f"drctl resync {group}")
        return _already(context, picture, wait, timeout)
    sown = seeds.plan(context, inventory, group, seed, move=move_seeds) if seed else None
    steps = [f"replicate {group} from {host.site}/{host.name} to {_target(picture)}", *_disks(picture, inventory)]
    steps = [*(sown.steps() if sown else ()), *steps]
    for line in fitting(context, group, host, inventory):
        context.screen.say(line)
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Start replication of {group}?"):
        return 0
    with leased(context, group, "replicate start", inventory):
        if sown:
            sown.carry_out(context)
        context.call(host, "replicate.start", group=group, timeout=CALL_TIMEOUT)
    return _finish(context, picture, wait, timeout)


@app.command(epilog=examples("drctl replicate pause web", "drctl replicate pause web --yes"))
def pause(ctx: typer.Context, group: GroupName, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Detach from the disks of a group; what was replicated stays restorable.

    Until it is resumed no new checkpoint is made, and the RPO grows. QEMU notes what is written meanwhile, so that the
    resume reads no more than that; of a guest that is restarted meanwhile all is compared."""
    context = begin(ctx)
    inventory, host, picture = _look(context, group)
    if picture["phase"] == "paused":
        context.screen.line(f"{group} is paused already")
        return
    steps = [f"detach from all disks of {group}; its RPO grows until: drctl replicate resume {group}"]
    if propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Pause replication of {group}?"):
        with leased(context, group, "replicate pause", inventory):
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
    inventory, host, picture = _look(context, group)
    if picture["phase"] in ACTIVE:
        return _already(context, picture, wait, timeout)
    if picture["phase"] == "unprotected":
        raise WrongPhase(f"{group} was not started", hint=f"drctl replicate start {group}", group=group)
    if not propose(context.screen, [f"attach to all disks of {group} and catch up"], dry_run=dry_run, yes=yes):
        return 0
    with leased(context, group, "replicate resume", inventory):
        context.call(host, "replicate.resume", group=group, timeout=CALL_TIMEOUT)
    return _finish(context, picture, wait, timeout)


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

    Refused when the group's retention lock lasts longer than that.
    Exits with 3 when the recovery site could not be told: it keeps them then."""
    context = begin(ctx)
    inventory = take_inventory(context)
    source, recovery = side(context, group, "source", inventory), side(context, group, "recovery", inventory)
    stopped = inventory.find(group, "source")
    if stopped is not None and stopped.state == "unprotected" and keep_replica is None:
        context.screen.line(f"{group} is not replicated already; change how long its replica is kept: --keep-replica")
        return 0
    kept = KEEP_REPLICA if keep_replica is None else keep_replica
    demand_unlocked(context, recovery, group, kept)
    steps = [
        f"detach from all disks of {group} at {source.site}/{source.name}",
        f"delete its replica and checkpoints at {recovery.site}/{recovery.name} after {render.duration(kept)}",
    ]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Stop replication of {group}?"):
        return 0
    with leased(context, group, "replicate stop", inventory):
        return _stop(context, group, source, recovery, kept)


def _stop(context: Context, group: str, source: Host, recovery: Host, kept: float) -> int:
    _tell(context, group, context.call(source, "replicate.stop", group=group, timeout=CALL_TIMEOUT))
    try:
        result = context.call(recovery, "replicate.stop", group=group, keep_replica_seconds=kept, timeout=CALL_TIMEOUT)
    except DrctlError as exc:
        context.screen.say(f"the replica at {recovery.site}/{recovery.name} is kept without a limit: {exc.message}")
        return 3
    context.screen.line(f"replica kept until {render.moment((result or {}).get('kept_until'))}")
    return 0


def _look(context: Context, group: str) -> tuple[Inventory, Host, dict[str, Any]]:
    """What there is, the group's source host, its picture. Raises Refused for a group that reigns elsewhere."""
    inventory = take_inventory(context)
    host = side(context, group, "source", inventory)
    picture = draw(context, inventory, [group])[0][0]
    if picture["recovery_mode"] == "failed-over" or picture["phase"] == "failed-over":
        raise Refused(
            f"{group} is failed over: it reigns at {_target(picture)} now, and its old source may not replicate it",
            hint=f"see: drctl status {group}",
            group=group,
        )
    return inventory, host, picture


def _already(context: Context, picture: dict[str, Any], wait: bool | None, timeout: float | None) -> int:
    """The group replicates: say so, and wait only for what is not reached yet."""
    context.screen.say(f"{picture['group']} is {picture['phase']} already")
    if picture["phase"] == "live" and picture["newest"]:
        return 0
    return _finish(context, picture | {"newest": None}, wait, timeout)


def _finish(context: Context, before: dict[str, Any], wait: bool | None, timeout: float | None) -> int:
    """Wait for the group to be live, with a checkpoint that was not there before."""
    group = before["group"]
    if wait is None:
        wait = context.screen.interactive
    if not wait:
        context.screen.line(f"{group} is attached; see: drctl status {group} --watch")
        return 0
    after = before["newest"]["number"] if before["newest"] else 0
    with context.screen.bar(group) as update:
        picture = wait_until_live(context, group, timeout, lambda now: _progress(update, now), after=after)
    if picture is None:
        context.screen.say(f"{group} is not live after {render.duration(timeout)}; it goes on: drctl status {group}")
        return 3
    newest = picture["newest"]
    context.screen.line(f"{group} is live; newest checkpoint #{newest['number']} at {render.moment(newest['time'])}")
    return 0


def wait_until_live(
    context: Context, group: str, timeout: float | None, draw: Callable[[dict[str, Any]], None], *, after: int = 0
) -> dict[str, Any] | None:
    """The group's picture once it is live and has a checkpoint newer than number `after`; None when the time is over.

    Raises StepFailed when the group breaks while it is waited for."""
    end = None if timeout is None else context.clock.monotonic() + timeout
    while True:
        picture = look(context, group)[0][0]
        draw(picture)
        if picture["phase"] == "broken":
            raise StepFailed(f"{group} is broken: {picture['reason']}", hint=f"see: drctl status {group}", group=group)
        if picture["phase"] == "live" and picture["newest"] and picture["newest"]["number"] > after:
            return picture
        if end is not None and context.clock.monotonic() >= end:
            return None
        context.clock.sleep(POLL)


def _progress(update: render.Update, picture: dict[str, Any]) -> None:
    sync = picture["sync"] or {}
    total = sync.get("total_bytes")
    eta = f", {render.duration(sync['eta'])} left" if sync.get("eta") is not None else ""
    word = describe(picture)
    waiting = ", waiting for a checkpoint" if word == "live" else ""
    amount = f", {render.size(sync.get('done_bytes') or 0)} of {render.size(total)}{eta}" if total else waiting
    update(sync.get("done_bytes") or 0, total, word + amount)


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
