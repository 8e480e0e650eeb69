"""`drctl failover`: recover a group at the other site after a disaster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from drctl.cli import auto, pictures, points, recovery, render
from drctl.cli.confirm import confirm_name
from drctl.cli.context import Context
from drctl.cli.fencing import fence
from drctl.cli.inventory import READ_TIMEOUT, Inventory, side, take_inventory
from drctl.cli.leased import leased
from drctl.cli.options import Confirm, DryRun, Format, GroupName, Output, Selector, Yes, begin, examples, noun
from drctl.errors import DrctlError, PreconditionFailed, Refused, SourceAlive
from drctl.model.site import Host

app = noun("Recover a group at the other site after a disaster.")

SourceIsDown = Annotated[
    str, typer.Option("--source-is-down", metavar="REASON", help="Say why the source can't run; it is recorded.")
]
#: Newest checkpoints that `--candidates` shows besides every tagged or quiesced one.
CANDIDATES = 20


@app.command(
    epilog=examples(
        "drctl failover web --candidates",
        "drctl failover web --dry-run",
        'drctl failover web --source-is-down "fire in hall 2"',
        'drctl failover web --source-is-down "fire in hall 2" --auto rollback --after 4h',
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
    source_is_down: SourceIsDown = "",
    auto_action: auto.Auto = None,
    after: auto.After = None,
    cancel_auto: auto.CancelAuto = False,
    dry_run: DryRun = False,
    confirm: Confirm = "",
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Boot a whole group at the recovery site, as it was at a checkpoint.

    What was written at the source after that checkpoint is lost; the loss is shown before anything is asked. The old
    source may neither run nor replicate afterwards. The group's name has to be typed, or given by --confirm: --yes
    alone does not start a failover. Neither the other site nor a configuration is needed for it. A source that answers
    and runs the group is no disaster: without --source-is-down that is refused with 15 (see drctl switchover).

    One machine's failure does not stop the others: exits with 3 when some failed, with 40 when none runs (42 from a
    dry run that forecasts it). Given again, it goes on with what has failed."""
    context = begin(ctx, output)
    order = {"source_is_down": source_is_down, "auto": auto.given(auto_action, after)}
    inventory = take_inventory(context)
    host = side(context, group, "recovery", inventory)
    if candidates:
        _candidates(context, host, group)
        return 0
    if cancel_auto:
        return auto.cancel(context, host, group, "failover")
    status = context.call(host, "group.status", group=group, role="recovery", timeout=READ_TIMEOUT)
    if (standing := recovery.standing(status)) is not None:
        context.screen.say(f"{group} is failed over to {host.site}/{host.name} already")
        picture = pictures.take(context, inventory, group)
        return _finish(context, standing, before=picture, after=picture)
    forecast = Forecast.made(context, inventory, host, group, checkpoint)
    forecast.say()
    if dry_run:
        return forecast.leave_it_at_that()
    forecast.check(source_is_down)
    confirm_name(context.screen, group, typed=confirm)
    return forecast.carry_out(order)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a failover would do, as it was shown to the operator: `plan` by the recovery site, `seen` of the source."""

    context: Context
    inventory: Inventory
    host: Host
    group: str
    selector: str
    plan: dict[str, Any]
    seen: dict[str, Any]
    before: list[dict[str, Any]]

    @classmethod
    def made(cls, context: Context, inventory: Inventory, host: Host, group: str, checkpoint: str) -> Forecast:
        """Ask both sides."""
        plan = context.call(host, "failover.plan", group=group, checkpoint=checkpoint, timeout=60)
        before = pictures.take(context, inventory, group)
        seen = _look_at_source(inventory, plan, before, group)
        return cls(context, inventory, host, group, checkpoint, plan, seen, before)

    def say(self) -> None:
        """Say all that was seen."""
        pictures.show(self.context, "before", self.before)
        _show_plan(self.context, self.host, self.plan, self.seen)

    @property
    def chosen(self) -> str:
        """The checkpoint that was shown, as it is ordered then."""
        return points.settle(self.selector, points.decode(self.plan["checkpoint"]))

    def leave_it_at_that(self) -> int:
        """A dry run's end: its document, and its exit code."""
        if self.context.screen.as_json:
            self.context.document("failover-plan", plan=self.plan, source=self.seen, before=self.before)
        self.context.screen.say("dry run: nothing was changed")
        return _forecast(self.plan, self.group)

    def check(self, source_is_down: str) -> None:
        """Raises SourceAlive when the source runs the group, Refused when it may."""
        place, words = self.seen["place"], self.seen["words"]
        if _alive(self.seen) and not source_is_down:
            raise SourceAlive(
                f"the source {place} of {self.group} {words}",
                hint=f"to move it without loss: drctl switchover {self.group}; if it has to be cut off as it stands, "
                'say why: --source-is-down "REASON"',
                group=self.group,
            )
        source = self._source()
        fenced = (self.plan.get("source") or {}).get("fenced") or (source and source.fence)
        if not (fenced or source_is_down):
            raise Refused(
                f"the source of {self.group} is not known to be down: two copies of a machine must never run",
                hint='when you know that it is: --source-is-down "REASON" (it is recorded)',
                group=self.group,
            )

    def _source(self) -> Host | None:
        """The source's host in the configuration."""
        known = self.inventory.find(self.group, "source")
        name = known.host.name if known else (self.plan.get("source") or {}).get("host")
        return next((host for host in self.context.config.hosts if host.name == name), None)

    def fence(self, source_is_down: str) -> dict[str, Any]:
        """Make sure that the source runs nothing any more, where there is a command for that; why it is down.

        Raises Refused when nobody says that it is down, and it could not be fenced."""
        source = self._source()
        outcome = fence(source, group=self.group, reason=source_is_down) if source else None
        if outcome is None:
            return {"source_is_down": source_is_down}
        self.context.screen.say(f"  fence {self.seen['place']}: {outcome}")
        try:
            self.context.call(self.host, "fence.note", group=self.group, fence=str(outcome))
        except DrctlError as exc:  # a failover does not wait for its history
            self.context.screen.say(f"  the fencing is not in the history: {exc.message}")
        if not outcome.fenced and not source_is_down:
            raise Refused(
                f"the source {self.seen['place']} of {self.group} could not be fenced: {outcome.problem}",
                hint='when you know that it is down: --source-is-down "REASON" (it is recorded)',
                group=self.group,
            )
        return {"source_is_down": source_is_down or f"it was fenced: {outcome}"}

    def carry_out(self, order: dict[str, Any]) -> int:
        """Fence the source and boot it; the exit code. It goes to the checkpoint that was shown, or a newer one where
        that was `latest`. Under the group's lease, so that of two operators one alone fences.

        Raises Locked, naming the other one, and Refused when the group is not any more as it was shown."""
        context, group = self.context, self.group
        with leased(context, group, "failover", self.inventory, must=True):
            self._demand_unchanged()
            result = self.boot(order | self.fence(order["source_is_down"]))
        after = pictures.take(context, self.inventory, group)
        pictures.show(context, "after", after)
        return _finish(context, result, before=self.before, after=after)

    def _demand_unchanged(self) -> None:
        """Another operator may have come first, and back: what runs at the source then must not be fenced."""
        status = self.context.call(self.host, "group.status", group=self.group, role="recovery", timeout=READ_TIMEOUT)
        if status.get("generation") != self.plan.get("generation", 0) - 1:
            raise Refused(
                f"{self.group} was changed meanwhile: it is of generation {status.get('generation')} now",
                hint=f"see: drctl history {self.group}; then give the command again",
                group=self.group,
            )

    def boot(self, order: dict[str, Any]) -> dict[str, Any]:
        """The same under the lease that the context carries: the recovery."""
        params = order | {"checkpoint": self.chosen, "confirmed": self.group, "source_seen": self.seen["words"]}
        result: dict[str, Any] = self.context.call(
            self.host,
            "failover.run",
            group=self.group,
            on_progress=recovery.narrator(self.context),
            timeout=recovery.RUN_TIMEOUT,
            **params,
        )
        return result


def _finish(context: Context, result: dict[str, Any], **more: Any) -> int:
    code = recovery.show(context, "failover", result, **more)
    if result.get("state") in ("running", "partly"):
        group = result["group"]
        context.screen.say(f"when the service is healthy: drctl commit {group}; to undo it: drctl rollback {group}")
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


def _look_at_source(
    inventory: Inventory, plan: dict[str, Any], before: list[dict[str, Any]], group: str
) -> dict[str, Any]:
    """What is known of the source, by its own word or by its stream: {place, reachable, running, words}.

    `reachable` is None where nobody could ask it. The operator may see a source that the recovery site can't see, and
    the other way round: a broken link is no disaster."""
    told = plan.get("source") or {}
    place = f"{told.get('site')}/{told.get('host')}"
    known = inventory.find(group, "source")
    if known is not None:
        place = f"{known.host.site}/{known.host.name}"
        running = pictures.running_at_source(before)
        words = f"answers, and the group is {known.state} there; " + (
            f"{', '.join(running)} run there" if running else "none of its machines runs there"
        )
        return {"place": place, "reachable": True, "running": running, "words": words}
    if told.get("reachable"):
        words = "is alive: its stream reaches the recovery site at this moment"
        return {"place": place, "reachable": True, "running": None, "words": words}
    if told.get("silent_seconds") is not None:
        words = f"was last heard {render.duration(told['silent_seconds'])} ago"
    else:
        words = "has not been heard since the receiver was started"
    asked = [answer for answer in inventory.silent if answer.host.site == told.get("site")]
    words += "; it does not answer this machine" if asked else "; this machine can't ask it"
    return {"place": place, "reachable": False if asked else None, "running": None, "words": words}


def _show_plan(context: Context, host: Host, plan: dict[str, Any], seen: dict[str, Any]) -> None:
    say = context.screen.say
    say(f"failover of {plan['group']} to {host.site}/{host.name}, generation {render.word(plan.get('generation'))}")
    say(f"  checkpoint {points.spell(points.decode(plan['checkpoint']), context.clock.time())}")
    say(f"  loss: {render.duration(plan.get('loss_seconds'))} at most, what the source wrote after the checkpoint")
    say(f"  source {seen['place']} {seen['words']}")
    if _alive(seen):
        say("  WARNING: if its machines run on there will be two of each, and what those at the source write is lost")
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


def _alive(seen: dict[str, Any]) -> bool:
    """The source answers and some machine of the group runs there, or its stream stands."""
    return bool(seen["reachable"]) and seen["running"] != []


def _forecast(plan: dict[str, Any], group: str) -> int:
    """Exit code of a dry run: 0, or 3 when some machines would fail. Raises PreconditionFailed when all would."""
    failing = {finding["subject"] for finding in plan.get("findings") or [] if finding["severity"] == "error"}
    machines = {machine["name"] for machine in plan.get("machines") or []}
    if machines <= failing:
        raise PreconditionFailed(f"no machine of {group} would boot", hint="see the errors above", group=group)
    return 3 if failing else 0
