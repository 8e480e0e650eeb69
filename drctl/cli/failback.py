"""`drctl failback`: replicate a group back to the site that it came from, with its old disks as the beginning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from drctl.cli import failback_estimate, pictures, render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import Inventory, Place, side, take_inventory
from drctl.cli.leased import leased
from drctl.cli.options import DryRun, Format, GroupName, Output, Timeout, Yes, begin, examples, noun
from drctl.cli.replicate import CALL_TIMEOUT, Wait, wait_until_live
from drctl.cli.seeds import SEED_TIMEOUT, way
from drctl.cli.switchover import OnShutdownTimeout, ShutdownTimeout
from drctl.errors import NotFound, PreconditionFailed, WrongPhase
from drctl.model.move import OnTimeout
from drctl.model.site import Host

app = noun("Replicate a group back to the site that it came from.")

#: Looking at disks asks an image's header, one by one.
LOOK_TIMEOUT = 60.0
KEEP_DAYS = 30


@app.command(
    epilog=examples(
        "drctl failback web --dry-run",
        "drctl failback web --yes --wait -o json",
        "drctl failback web --go-home",
        "drctl failback web --go-home --shutdown-timeout 10m --on-shutdown-timeout suspend --yes",
    )
)
def failback(
    ctx: typer.Context,
    group: GroupName,
    wait: Wait = None,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    home: Annotated[
        bool, typer.Option("--go-home", help="All the way: then switch over, commit, and protect it from home again.")
    ] = False,
    shutdown_timeout: ShutdownTimeout = "3m",  # type: ignore[assignment]  # the parser makes seconds of it
    on_shutdown_timeout: OnShutdownTimeout = OnTimeout.ABORT,
    output: Output = Format.TEXT,
) -> int:
    """Protect a group that runs at the other site since a failover or switchover, back to the site that it came from.

    Its old disks there are sealed first, with all that was written last and never came over: checkpoint
    before-failback, kept for 30 days, open to drctl test. Then they are the beginning of the replica, and only what
    differs crosses the link; about how much that is, a sample tells before. A raw image on the file system of the
    replica is moved into it, and takes no second place; others are copied. The old machines are removed there; their
    definitions are kept. The failover has to be committed before.

    When it is live: drctl switchover brings the group home without loss, drctl commit makes that final, and the same
    command again protects it in the first direction. With --go-home all of that is done in one go; home is the source
    in the group's file. Given again after a break, it goes on. Exits with 3 when the time is over and the group is not
    live."""
    context = begin(ctx, output)
    if home:
        from drctl.cli.failback_home import bring_home  # it is made of this command

        limits = {
            "on_timeout": on_shutdown_timeout.value,
            "shutdown_seconds": shutdown_timeout,
            "live_seconds": timeout,
        }
        return bring_home(context, group, limits, dry_run=dry_run, yes=yes)
    inventory = take_inventory(context)
    plan = look(context, inventory, group)
    if plan.protected:
        context.screen.say(f"{group} is replicated from {plan.place} to {plan.back_place} already")
        return _finish(context, plan, {}, wait, timeout)
    before = pictures.take(context, inventory, group)
    pictures.show(context, "before", before)
    plan.demand(context)
    estimate = plan.estimate(context) if dry_run or not yes else None
    if not propose(
        context.screen, plan.steps(), dry_run=dry_run, yes=yes, question=f"Replicate {group} back to {plan.back_place}?"
    ):
        if context.screen.as_json:
            context.document("failback-plan", plan=plan.as_json(), estimate=estimate, before=before)
        return 0
    with leased(context, group, "failback", inventory):
        sealed = plan.carry_out(context)
    return _finish(context, plan, sealed, wait, timeout)


@dataclass(frozen=True, slots=True)
class Plan:
    """What both sites say: `told` by the one that reigns, `old` by the one that the group comes back to."""

    group: str
    host: Host
    back: Host
    told: dict[str, Any]
    old: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.host.site}/{self.host.name}"

    @property
    def back_place(self) -> str:
        return f"{self.back.site}/{self.back.name}"

    @property
    def protected(self) -> bool:
        return bool(self.told["protected"])

    @property
    def begun(self) -> dict[str, Any] | None:
        """What the other site has done already of this failback."""
        record = self.old.get("failback")
        return record if record and int(record["generation"]) > int(self.told["generation"]) else None

    @property
    def generation(self) -> int:
        """Above all that either site has had; that of a failback which was begun."""
        if self.begun:
            return int(self.begun["generation"])
        return max(int(self.told["generation"]), int(self.old["generation"])) + 1

    def demand(self, context: Context) -> None:
        """Raises PreconditionFailed with all that stands in the way."""
        problems = [*self.told["reasons"], *(() if self.begun else self.old["reasons"])]
        for problem in problems:
            context.screen.say(f"  in the way: {problem}")
        if problems:
            raise PreconditionFailed(
                f"{self.group} can't be replicated back now: {problems[0]}"
                + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
                hint=f"nothing was done; see: drctl status {self.group}",
                group=self.group,
            )

    def steps(self) -> list[str]:
        """In words."""
        last = f"replicate {self.group} from {self.place} to {self.back_place} under generation {self.generation}"
        if self.begun:
            return [f"go on with the failback that is {self.begun['phase']} at {self.back_place}", last]
        old = [
            f"seal {disk['name']} ({render.size(disk['size'])}) at {self.back_place} as it is now: {_way(disk)}"
            for disk in self.old["old"]
        ]
        if old:
            old.append(f"keep that as checkpoint before-failback for {KEEP_DAYS} days")
        full = [f"send {one['name']} in full: {one['reason']}" for one in self.old["left_out"]]
        machines = ", ".join(self.old["machines"])
        gone = [f"remove the old {machines} at {self.back_place}; definitions are kept"] if machines else []
        return [*old, *full, *gone, last + (", sending only what differs" if old else "")]

    def estimate(self, context: Context) -> dict[str, Any] | None:
        """About how much differs; None when that can't be told (any more)."""
        if self.begun:
            return None
        seeded = [str(disk["name"]) for disk in self.old["old"]]
        return failback_estimate.tried(context, self.group, self.told["disks"], self.host, self.back, seeded)

    def carry_out(self, context: Context) -> dict[str, Any]:
        """Both halves; the other site's record."""
        with context.screen.bar(f"failback {self.group}") as update:

            def draw(step: dict[str, Any]) -> None:
                done, total = int(step.get("done_bytes") or 0), step.get("total_bytes")
                words = {"disk": str(step.get("disk")), "compare": "compared with the replica there"}
                amount = f", {render.size(done)} of {render.size(total)}" if total else ""
                update(done, total, words.get(str(step.get("step")), "") + amount)

            record = context.call(
                self.back,
                "failback.prepare",
                group=self.group,
                generation=self.generation,
                disks=self.told["disks"],
                number=self.told["newest"],
                spec=self.told["spec"],
                on_progress=draw,
                timeout=SEED_TIMEOUT,
            )
        if record["checkpoint"]:
            context.screen.say(
                f"the old disks at {self.back_place} are checkpoint #{record['checkpoint']}, tag:{record['tag']}, "
                f"until {render.moment(record['kept_until'])}"
            )
        context.call(
            self.host,
            "failback.protect",
            group=self.group,
            generation=self.generation,
            definition_version=self.old["definition_version"],
            timeout=CALL_TIMEOUT,
        )
        return dict(record)

    def as_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "from": {"site": self.host.site, "host": self.host.name},
            "to": {"site": self.back.site, "host": self.back.name},
            "generation": self.generation,
            "disks": self.told["disks"],
            "old": self.old["old"],
            "left_out": self.old["left_out"],
            "needed_bytes": self.old["needed"],
            "free_bytes": self.old["free"],
            "begun": self.begun["phase"] if self.begun else None,
        }


def _way(disk: dict[str, Any]) -> str:
    return "what differs from the replica there is added to it" if disk["way"] == "compare" else way(disk)


def look(context: Context, inventory: Inventory, group: str) -> Plan:
    """Ask both sites. Raises WrongPhase for a group that runs where it always did, ApplianceUnreachable, NotFound."""
    place = reigning(inventory, group)
    if place is None:
        side(context, group, "recovery", inventory)  # who is silent, or that nobody knows it
        raise WrongPhase(
            f"{group} runs at its source: there is nothing to bring back",
            hint=f"see: drctl status {group}",
            group=group,
        )
    try:
        told = context.call(place.host, "failback.plan", group=group, timeout=LOOK_TIMEOUT)
    except NotFound as exc:
        if place.role == "recovery":
            raise
        raise WrongPhase(
            f"{group} runs at its source, {place.host.site}/{place.host.name}, and was never moved: there is nothing "
            "to bring back",
            hint=f"see: drctl status {group}",
            group=group,
        ) from exc
    back = _home(context, inventory, group, told["spec"])
    if told["protected"]:
        return Plan(group, place.host, back, told, {})
    old = context.call(back, "failback.disks", group=group, disks=told["disks"], timeout=LOOK_TIMEOUT)
    return Plan(group, place.host, back, told, old)


def _home(context: Context, inventory: Inventory, group: str, spec: dict[str, Any]) -> Host:
    """The host that the group comes back to. Raises NotFound."""
    if name := str(spec.get("recovery_host") or ""):
        return context.config.host(name)
    known = [place.host for place in inventory.places if place.group == group]
    hosts = [*known, *(answer.host for answer in inventory.silent), *context.config.hosts]
    site = str(spec.get("recovery"))
    found = next((host for host in hosts if host.site == site), None)
    if found is None:
        raise NotFound("site", site, known=[one.name for one in context.config.sites])
    return found


def reigning(inventory: Inventory, group: str) -> Place | None:
    """Where the group runs, by the highest generation: a recovery site that it was failed over to, or its source."""
    found = [place for place in inventory.places if place.group == group]
    reigning = [place for place in found if (place.state == "failed-over") is (place.role == "recovery")]
    return max(reigning, key=lambda place: place.generation, default=None)


def _finish(context: Context, plan: Plan, sealed: dict[str, Any], wait: bool | None, timeout: float | None) -> int:
    """Wait for the group to be live, where that is wished, and say how it goes on."""
    group, screen = plan.group, context.screen
    wait = screen.interactive if wait is None else wait
    live: dict[str, Any] | None = None
    sync: dict[str, Any] = {}
    if wait:
        with screen.bar(group) as update:
            live = wait_until_live(
                context, group, timeout, lambda now: follow(update, now, sync), after=sealed.get("checkpoint") or 0
            )
        if live is None:
            screen.say(f"{group} is not live after {render.duration(timeout)}; it goes on: drctl status {group}")
    after = pictures.take(context, take_inventory(context), group)
    pictures.show(context, "after", after)
    if screen.as_json:
        counts = {key: sync.get(key) for key in ("total_bytes", "matched_bytes", "sent_bytes")}
        newest = live["newest"]["number"] if live else None
        context.document(
            "failback",
            group=group,
            live=live is not None,
            checkpoint=newest,
            sealed=sealed or None,
            **counts,
            after=after,
        )
    else:
        screen.line(f"{group} is replicated from {plan.place} to {plan.back_place}" + (", and live" if live else ""))
    screen.say(
        f"home, when it is live: drctl switchover {group}, drctl commit {group}, and drctl failback {group} again"
    )
    return 3 if wait and live is None else 0


def follow(update: render.Update, picture: dict[str, Any], newest: dict[str, Any]) -> None:
    sync = picture["sync"] or {}
    total, done = sync.get("total_bytes"), sync.get("done_bytes") or 0
    if not total:
        update(0, None, "waiting for a checkpoint" if picture["phase"] == "live" else "waiting for the pass")
        return
    newest.update(sync)
    update(
        done,
        total,
        f"{render.size(done)} of {render.size(total)} compared, {render.size(sync.get('sent_bytes') or 0)} sent",
    )
