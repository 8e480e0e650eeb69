"""`drctl failback --go-home`: all the way, by the steps that there are for each part of it. Given again, it goes on."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from drctl.cli import failback as back
from drctl.cli import pictures, render, switchover
from drctl.cli.commit import COMMIT_TIMEOUT
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.group_file import read_groups
from drctl.cli.inventory import Inventory, side, take_inventory
from drctl.cli.leased import leased
from drctl.cli.replicate import wait_until_live
from drctl.errors import NotFound, StepFailed


def home_of(context: Context, group: str) -> str:
    """The site that the group's file calls its source. Raises NotFound."""
    specs = read_groups(context.config) if context.config.directory else {}
    if group not in specs:
        raise NotFound(
            "group file",
            group,
            message=f"{group} has no file in groups/, which says where its home is",
            hint=f"step by step: drctl failback, switchover and commit {group}, and failback again",
        )
    return specs[group].source


class Stage(StrEnum):
    """What is left to do, in this order."""

    BACK = "back"
    SWITCH = "switch"
    COMMIT = "commit"
    PROTECT = "protect"


def stages(inventory: Inventory, group: str, home: str) -> list[Stage]:
    """What is left, by what is true at the sites; nothing when it runs at home and is protected from there."""
    place = back.reigning(inventory, group)
    if place is None:  # it was handed over, and is booted nowhere yet
        return [Stage.SWITCH, Stage.COMMIT, Stage.PROTECT]
    if place.host.site != home:
        return [Stage.BACK, Stage.SWITCH, Stage.COMMIT, Stage.PROTECT]
    return [] if place.role == "source" else [Stage.COMMIT, Stage.PROTECT]


def bring_home(context: Context, group: str, limits: dict[str, Any], *, dry_run: bool, yes: bool) -> int:
    """From wherever it is to a group that runs at home and is protected from there. `limits`: of the guests' shutdown,
    and `live_seconds`, how long a pass may take (None: as long as it takes).

    Raises what the steps raise; StepFailed when not all machines run at home: then nothing is committed."""
    home, inventory = home_of(context, group), take_inventory(context)
    side(context, group, "recovery", inventory)  # who is silent, or that nobody knows it
    left = stages(inventory, group, home)
    before = pictures.take(context, inventory, group)
    pictures.show(context, "before", before)
    steps = [line for stage in left for line in _words(context, inventory, group, stage, home)]
    if not steps:
        context.screen.say(f"{group} runs at home, at {home}, already")
    if not propose(
        context.screen, steps, dry_run=dry_run, yes=yes, question=f"Bring {group} home to {home}?" if steps else ""
    ):
        if context.screen.as_json:
            context.document("failback-home-plan", group=group, home=home, steps=steps, before=before)
        return 0
    newest = 0
    for stage in left:
        if stage in (Stage.BACK, Stage.PROTECT):
            newest = _protect(context, group, limits["live_seconds"])
        elif stage is Stage.SWITCH:
            _switch(context, group, limits)
        else:
            _commit(context, group)
    after = pictures.take(context, take_inventory(context), group)
    pictures.show(context, "after", after)
    if context.screen.as_json:
        context.document("failback-home", group=group, home=home, checkpoint=newest or None, before=before, after=after)
    elif left:
        context.screen.line(f"{group} runs at home, at {home}, and is protected: checkpoint #{newest}")
    return 0


def _words(context: Context, inventory: Inventory, group: str, stage: Stage, home: str) -> list[str]:
    """A stage as it is told before. Raises PreconditionFailed for what stands in the way of the first."""
    if stage is Stage.BACK:
        plan = back.look(context, inventory, group)
        if plan.protected:
            return [f"wait until {group} is live from {plan.place} to {plan.back_place}"]
        plan.demand(context)
        return plan.steps()
    return {
        Stage.SWITCH: [f"when it is live, shut {group} down, and boot it at {home}: no loss"],
        Stage.COMMIT: [f"commit it: its disks stand alone at {home}"],
        Stage.PROTECT: [f"replicate it from {home} to the other site again"],
    }[stage]


def _protect(context: Context, group: str, seconds: float | None) -> int:
    """Replicated to the other site and live; the newest checkpoint's number. Raises StepFailed when it takes longer."""
    plan = back.look(context, take_inventory(context), group)
    sealed: dict[str, Any] = {}
    if not plan.protected:
        plan.demand(context)
        with leased(context, group, "failback"):
            sealed = plan.carry_out(context)
    after, sync = int(sealed.get("checkpoint") or 0), dict[str, Any]()
    with context.screen.bar(group) as update:
        live = wait_until_live(context, group, seconds, lambda now: back.follow(update, now, sync), after=after)
    if live is None:
        raise StepFailed(
            f"{group} is not live after {render.duration(seconds)}",
            hint=f"its pass goes on (drctl status {group}); give the same command again",
            group=group,
        )
    context.screen.say(f"{group} is live from {plan.place} to {plan.back_place}")
    return int(live["newest"]["number"])


def _switch(context: Context, group: str, limits: dict[str, Any]) -> None:
    inventory = take_inventory(context)
    source, target = side(context, group, "source", inventory), side(context, group, "recovery", inventory)
    switchover.look(context, source, target, group)
    with leased(context, group, "switchover", inventory):
        order = {"auto": None, "on_timeout": limits["on_timeout"], "shutdown_seconds": limits["shutdown_seconds"]}
        result, final = switchover.carry_out(context, source, target, group, order)
    context.screen.say(f"loss: none; the guests' last write is in checkpoint #{final['number']}")
    if result.get("state") != "running":
        raise StepFailed(
            f"{group} is {result.get('state')} at {target.site}/{target.name}: not committed",
            hint=f"again, for those that failed: drctl switchover {group}; to go back: drctl rollback {group}",
            group=group,
        )


def _commit(context: Context, group: str) -> None:
    inventory = take_inventory(context)
    target = side(context, group, "recovery", inventory)
    with leased(context, group, "commit", inventory), context.screen.bar(f"commit {group}") as update:

        def draw(step: dict[str, Any]) -> None:
            done, total = int(step.get("done_bytes") or 0), step.get("total_bytes")
            update(done, total, f"{step.get('machine') or ''} {render.size(done)} of {render.size(total)}")

        context.call(target, "commit", group=group, on_progress=draw, timeout=COMMIT_TIMEOUT)
    context.screen.say(f"{group} is committed at {target.site}/{target.name}")
