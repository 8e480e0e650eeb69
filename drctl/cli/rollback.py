"""`drctl rollback`: undo a failover or a switchover that is not committed."""

from __future__ import annotations

from typing import Any

import typer

from drctl.cli import pictures, recovery, render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, Inventory, Place, side, take_inventory
from drctl.cli.leased import leased
from drctl.cli.options import DryRun, Format, GroupName, Output, Yes, begin, examples, noun
from drctl.errors import ApplianceUnreachable
from drctl.model.site import Host

app = noun("Undo a failover or a switchover that is not committed.")

_STEPS = {
    "give-back": "the recovery site takes the source's stream again, and boots nothing",
    "taken-back": "the source reigns again",
}


@app.command(epilog=examples("drctl rollback web --dry-run", "drctl rollback web", "drctl rollback web --yes -o json"))
def rollback(
    ctx: typer.Context, group: GroupName, dry_run: DryRun = False, yes: Yes = False, output: Output = Format.TEXT
) -> int:
    """Stop the machines that a failover or switchover booted, and give the group back to its source.

    What they wrote at the recovery site is taken out of use and kept for a week; where is told. After a switchover the
    source's machines are started again; where the source answers, it replicates again. After a failover whose source is
    gone the group is ready to be failed over again, to any checkpoint. Given again, it goes on with what is not done.

    A group whose commit was asked for can't be rolled back."""
    context = begin(ctx, output)
    inventory = take_inventory(context)
    target = side(context, group, "recovery", inventory)
    source = inventory.find(group, "source")
    stand = _stand(context, source, group)
    before = pictures.take(context, inventory, group)
    pictures.show(context, "before", before)
    plan = _plan(context, target, source, stand, group)
    if not plan["recovery_steps"] and not plan["source_steps"]:
        context.screen.say(f"{group} is rolled back already")
        return _tell(context, plan | {"result": None}, before, before)
    _warn(context, inventory, source, group, plan)
    steps = [*plan["recovery_steps"], *plan["source_steps"]]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Roll {group} back?"):
        if context.screen.as_json:
            context.document("rollback-plan", plan=plan, before=before)
        return 0
    with leased(context, group, "rollback", inventory):
        plan["result"] = _carry_out(context, target, source, plan, group)
    after = pictures.take(context, inventory, group)
    pictures.show(context, "after", after)
    return _tell(context, plan, before, after)


def undo(context: Context, group: str) -> dict[str, Any]:
    """Roll a group back without asking, under the lease that the context carries; empty when nothing is to be undone.

    Raises DrctlError."""
    inventory = take_inventory(context)
    target = side(context, group, "recovery", inventory)
    source = inventory.find(group, "source")
    stand = _stand(context, source, group)
    if not is_moved(context, target, stand, group):
        return {}
    plan = _plan(context, target, source, stand, group)
    if not plan["recovery_steps"] and not plan["source_steps"]:
        return {}
    _warn(context, inventory, source, group, plan)
    return _carry_out(context, target, source, plan, group)


def is_moved(context: Context, target: Host, stand: dict[str, Any], group: str) -> bool:
    """Whether either side has begun to move the group to the recovery site; `stand` is what the source says."""
    if stand.get("handover") or stand.get("phase") == "failed-over":
        return True
    status = context.call(target, "group.status", group=group, role="recovery", timeout=READ_TIMEOUT)
    moves = [one for one in status.get("recoveries") or [] if one.get("kind") in recovery.REIGNS]
    return status.get("mode") == "failed-over" or any(one.get("state") == "rolling-back" for one in moves)


def _stand(context: Context, source: Place | None, group: str) -> dict[str, Any]:
    """What the source says of its part; empty without an answer."""
    if source is None:
        return {}
    return dict(context.call(source.host, "handover.plan", group=group, timeout=READ_TIMEOUT))


def _plan(context: Context, target: Host, source: Place | None, stand: dict[str, Any], group: str) -> dict[str, Any]:
    """What has to be done at each side, in words and in parameters."""
    handover = stand.get("handover") or {}
    plan: dict[str, Any] = {"group": group, "handover": handover or None, "recovery_steps": [], "source_steps": []}
    if handover.get("phase") == "stopping":
        # It did not come to its final checkpoint: the recovery site knows nothing of it.
        plan["source_steps"] = [f"start {', '.join(handover['machines'])} at the source again; replication goes on"]
        return plan | {"recovery": None, "discards": [], "generation": 0}
    away = stand.get("phase") == "failed-over" or handover.get("phase") in ("final", "taking-back")
    wanted = _generation(context, target, stand, handover, group) if away else 0
    told = context.call(target, "rollback.plan", group=group, generation=wanted, timeout=60)
    plan |= {"recovery": told["recovery"], "discards": told["discards"], "generation": told["generation"]}
    if told["recovery"] is not None and told["recovery"]["state"] != "rolled-back":
        plan["recovery_steps"] = _recovery_steps(context, target, told)
    if away and source is not None:
        machines = handover.get("machines") or []
        starts = f"start {', '.join(machines)} at" if machines else "replicate it again from"
        plan["source_steps"] = [f"{starts} {source.host.site}/{source.host.name}, the source"]
    return plan


def _generation(context: Context, target: Host, stand: dict[str, Any], handover: dict[str, Any], group: str) -> int:
    """The one that the source comes back under: above both, unless it is coming back under one already."""
    if handover.get("phase") == "taking-back":
        return int(handover["generation"])
    here = context.call(target, "group.picture", group=group, timeout=READ_TIMEOUT)
    return max(int(stand.get("generation") or 0), int(here.get("generation") or 0)) + 1


def _recovery_steps(context: Context, target: Host, told: dict[str, Any]) -> list[str]:
    one = told["recovery"]
    names = ", ".join(str(machine.get("recovery_name") or machine["name"]) for machine in one["machines"])
    since = render.duration(max(0.0, context.clock.time() - float(one.get("started") or context.clock.time())))
    written = sum(int(disk["written_bytes"]) for disk in told["discards"])
    return [
        f"stop and remove {names} at {target.site}/{target.name} ({one['kind']} {one['id']})",
        f"DISCARD what they wrote there in {since}, {render.size(written)} (kept aside for a week)",
        f"take the group's stream there again, under generation {told['generation']}",
    ]


def _warn(context: Context, inventory: Inventory, source: Place | None, group: str, plan: dict[str, Any]) -> None:
    """Raises ApplianceUnreachable where the group would run nowhere afterwards."""
    if source is not None:
        return
    silent = ", ".join(answer.host.name for answer in inventory.silent) or "it is not in this configuration"
    if (plan.get("recovery") or {}).get("kind") == "switchover":
        raise ApplianceUnreachable(
            f"the source of {group} does not answer ({silent}): rolled back now, the group would run nowhere",
            hint="nothing was done; give it from where both sites are reached",
            group=group,
        )
    context.screen.say(f"  the source of {group} does not answer ({silent}): afterwards the group runs nowhere,")
    context.screen.say(f"  until it is failed over again, or drctl rollback {group} reaches the source")


def _carry_out(
    context: Context, target: Host, source: Place | None, plan: dict[str, Any], group: str
) -> dict[str, Any]:
    narrator = recovery.narrator(context, _STEPS)
    done: dict[str, Any] = {}
    calling_off = (plan["handover"] or {}).get("phase") == "stopping"
    if not calling_off:
        # Before the source: it may only run again when nothing of the group can run at the other side any more.
        wanted = 0 if plan["recovery"] is not None else plan["generation"]
        done = context.call(
            target, "rollback", group=group, on_progress=narrator, timeout=recovery.RUN_TIMEOUT, generation=wanted
        )
    if plan["source_steps"] and source is not None:
        params = {} if calling_off else {"generation": done["generation"]}
        done["source"] = context.call(
            source.host, "handover.undo", group=group, on_progress=narrator, timeout=recovery.RUN_TIMEOUT, **params
        )
    return done


def _tell(context: Context, plan: dict[str, Any], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> int:
    result = plan.get("result") or {}
    if context.screen.as_json:
        context.document(
            "rollback",
            group=plan["group"],
            generation=result.get("generation") or plan["generation"] or None,
            recovery=result.get("recovery") or plan["recovery"],
            kept=result.get("kept") or plan["discards"],
            kept_until=result.get("kept_until"),
            source=result.get("source"),
            before=before,
            after=after,
        )
        return 0
    kept = result.get("kept") or []
    rows = [
        (f"{disk['machine']}.{disk['target']}", render.size(disk["written_bytes"]), str(disk["overlay"]))
        for disk in kept
    ]
    if rows:
        checkpoint = (result.get("recovery") or {}).get("checkpoint") or {}
        context.screen.table(("disk", "written", "kept at"), rows, "")
        context.screen.say(
            f"these layers are readable over checkpoint #{checkpoint.get('number')} alone, which ages like any other; "
            f"to hold it: drctl checkpoint tag {plan['group']} '#{checkpoint.get('number')}' before-rollback"
        )
    return 0
