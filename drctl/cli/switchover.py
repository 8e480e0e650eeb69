"""`drctl switchover`: move a group to its recovery site without loss."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drctl.cli import auto, pictures, recovery, render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, side, take_inventory
from drctl.cli.leased import leased
from drctl.cli.options import DryRun, Format, GroupName, Output, Yes, begin, examples, noun, seconds
from drctl.errors import DrctlError, PreconditionFailed, StepFailed
from drctl.model.move import OnTimeout
from drctl.model.site import Host

app = noun("Move a group to its recovery site without loss.")

ShutdownTimeout = Annotated[
    float,
    typer.Option(
        "--shutdown-timeout", parser=seconds, metavar="DURATION", help="Longest wait for each guest to power off."
    ),
]
OnShutdownTimeout = Annotated[
    OnTimeout,
    typer.Option(
        "--on-shutdown-timeout",
        metavar="abort|suspend",
        help="A guest that stays on: call it off (abort), or take it as it stands, as after a power cut (suspend).",
    ),
]
_STEPS = {
    "final": "the final checkpoint is durable at the recovery site: nothing is missing there",
    "handed-over": "the source neither runs nor replicates the group any more",
}


@app.command(
    epilog=examples(
        "drctl switchover web --dry-run",
        "drctl switchover web",
        "drctl switchover web --shutdown-timeout 10m --on-shutdown-timeout suspend --yes",
        "drctl switchover web --auto rollback --after 4h",
    )
)
def switchover(
    ctx: typer.Context,
    group: GroupName,
    shutdown_timeout: ShutdownTimeout = "3m",  # type: ignore[assignment]  # the parser makes seconds of it
    on_shutdown_timeout: OnShutdownTimeout = OnTimeout.ABORT,
    after_time: auto.Auto = None,
    after: auto.After = None,
    cancel_auto: auto.CancelAuto = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Shut a group's guests down, and boot them at the recovery site with all that they had written.

    Both sites must answer, and the group be live with every guest running; else nothing is done. The guests are shut
    down in the reverse order of the group's file. Up to the final checkpoint any failure calls the switchover off: the
    guests are started again at the source and replication goes on. After it, the same command goes on, and
    drctl rollback brings the group back.

    The group is not protected afterwards. Exits with 3 when some machines failed to boot, with 40 when none runs."""
    context = begin(ctx, output)
    order = auto.given(after_time, after)
    inventory = take_inventory(context)
    target = side(context, group, "recovery", inventory)
    if cancel_auto:
        return auto.cancel(context, target, group, "switchover")
    status = context.call(target, "group.status", group=group, role="recovery", timeout=READ_TIMEOUT)
    if (standing := recovery.standing(status)) is not None:
        context.screen.say(f"{group} runs at {target.site}/{target.name} already")
        before = pictures.take(context, inventory, group)
        return recovery.show(context, "switchover", standing, loss_seconds=None, before=before, after=before)
    source = side(context, group, "source", inventory)
    before = pictures.take(context, inventory, group)
    pictures.show(context, "before", before)
    plan = look(context, source, target, group)
    if not propose(
        context.screen, steps_of(plan, source, target), dry_run=dry_run, yes=yes, question=f"Switch {group} over?"
    ):
        if context.screen.as_json:
            context.document("switchover-plan", plan=plan, before=before)
        return 0
    limits = {"on_timeout": on_shutdown_timeout.value, "shutdown_seconds": shutdown_timeout}
    with leased(context, group, "switchover", inventory):
        result, final = carry_out(context, source, target, group, limits | {"auto": order})
    after_it = pictures.take(context, inventory, group)
    pictures.show(context, "after", after_it)
    _say_ways(context, result, final)
    return recovery.show(context, "switchover", result, loss_seconds=0.0, before=before, after=after_it)


def carry_out(
    context: Context, source: Host, target: Host, group: str, order: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both halves; (the recovery, the final checkpoint)."""
    handed = context.call(
        source,
        "handover.run",
        group=group,
        on_timeout=order["on_timeout"],
        shutdown_seconds=order["shutdown_seconds"],
        on_progress=recovery.narrator(context, _STEPS),
        timeout=recovery.RUN_TIMEOUT,
    )
    more: dict[str, Any] = {key: value for key, value in order.items() if key in ("changes", "staged")}
    booted = _boot(context, target, handed, {"auto": order["auto"], **more})
    return booted, handed["final"]


def _say_ways(context: Context, result: dict[str, Any], final: dict[str, Any]) -> None:
    say, group = context.screen.say, result["group"]
    say(f"loss: none; the guests' last write is in checkpoint #{final['number']}, and nothing follows it")
    if result.get("state") == "running":
        say(f"when the service is healthy: drctl commit {group}; to go back: drctl rollback {group}")
    else:
        say(f"again, for those that failed: drctl switchover {group}; to go back: drctl rollback {group}")


def look(context: Context, source: Host, target: Host, group: str) -> dict[str, Any]:
    """What both sides say. Raises PreconditionFailed with all that stands in the way."""
    stand = context.call(source, "handover.plan", group=group, timeout=READ_TIMEOUT)
    forecast = context.call(target, "failover.plan", group=group, checkpoint="latest", timeout=60)
    errors = [f"{one['subject']}: {one['message']}" for one in _errors(forecast)]
    if problems := [*(stand.get("reasons") or []), *errors]:
        for problem in problems:
            context.screen.say(f"  in the way: {problem}")
        raise PreconditionFailed(
            f"{group} can't be switched over now: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
            hint=f"nothing was done; see: drctl status {group}",
            group=group,
        )
    return {"group": group, "source": stand, "recovery": forecast}


def _errors(forecast: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in forecast.get("findings") or [] if one.get("severity") == "error"]


def steps_of(plan: dict[str, Any], source: Host, target: Host) -> list[str]:
    """What would be done by what `look` found, in words."""
    forecast = plan["recovery"]
    names = [str(machine["name"]) for machine in forecast.get("machines") or []]
    done = plan["source"].get("handover")
    if done:
        first = [f"go on with the switchover that is {done['phase']} at {source.site}/{source.name}"]
    else:
        first = [
            f"shut down {', '.join(reversed(names))} at {source.site}/{source.name}, in this order",
            "make a final checkpoint of all that they wrote: no loss",
        ]
    networks = [f"network {pair[0]} -> {pair[1]}" for pair in forecast.get("networks") or []]
    generation = render.word(forecast.get("generation"))
    return [*first, f"boot {', '.join(names)} at {target.site}/{target.name}, generation {generation}", *networks]


def _boot(context: Context, target: Host, handed: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
    """The recovery side's half. Raises StepFailed that tells both ways on."""
    group, final = str(handed["group"]), handed["final"]
    try:
        result = context.call(
            target,
            "switchover.run",
            group=group,
            number=final["number"],
            epoch=final["epoch"],
            generation=handed["generation"],
            on_progress=recovery.narrator(context),
            timeout=recovery.RUN_TIMEOUT,
            **order,
        )
    except DrctlError as exc:
        raise StepFailed(
            f"{exc.message}; the machines of {group} are off at the source, and not all are up at "
            f"{target.site}/{target.name}",
            hint=f"to go on: drctl switchover {group}; to start them at the source again: drctl rollback {group}",
            group=group,
        ) from exc
    return dict(result)
