"""`drctl host evacuate` and `return`: get replication out of the way of a host's maintenance, and take it up again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, Inventory, Place, take_inventory
from drctl.cli.leased import leased
from drctl.cli.options import DryRun, Timeout, Yes, begin, examples, seconds
from drctl.cli.replicate import ACTIVE, CALL_TIMEOUT, wait_until_live
from drctl.errors import DrctlError, PreconditionFailed, Refused, StepFailed
from drctl.model.site import Host, HostKind

HostName = Annotated[str, typer.Argument(metavar="HOST", help="The host's name.")]
#: Longest silence of a return: asking who reigns, attaching, being live, and the start of the first guest.
RETURN_TIMEOUT = 300.0
EVACUATE_EXAMPLES = examples(
    "drctl host evacuate a1 --dry-run",
    "drctl host evacuate a1",
    "drctl host evacuate a1 --shutdown --shutdown-timeout 5m --yes",
)
RETURN_EXAMPLES = examples("drctl host return a1", "drctl host return a1 --yes --wait --timeout 1h")


def evacuate(
    ctx: typer.Context,
    host: HostName,
    shutdown: Annotated[bool, typer.Option("--shutdown", help="Power the guests off too: for a reboot.")] = False,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            "--shutdown-timeout", parser=seconds, metavar="DURATION", help="Longest wait for each guest to power off."
        ),
    ] = "3m",  # type: ignore[assignment]  # the parser makes seconds of it
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Pause every group that is replicated from or to a host, for its maintenance.

    Checkpoints so far stay restorable, no new ones are made, and the groups' RPO grows until drctl host return HOST.
    Guests run on, and QEMU notes what they write, so that the return reads no more than that. With --shutdown they are
    powered off first, in the reverse order of their group's file, until a checkpoint holds how they left: so the host
    can be rebooted, and the return reads nothing; it starts them, and nothing else does.

    Groups whose replicas lie on the host are paused where their guests run, and without recovery meanwhile. Refused
    while a test, failover or switchover is under way there. Given again it goes on with what is left. Exits with 3
    when some group could not be paused."""
    context = begin(ctx)
    named = _host(context, host)
    plan = context.call(named, "host.evacuation", timeout=READ_TIMEOUT)
    if plan["reasons"]:
        raise PreconditionFailed(f"{host} can't be evacuated now: {'; '.join(plan['reasons'])}; nothing was done")
    inventory = take_inventory(context)
    kept = _replicated_to(inventory, named)
    if (plan["evacuation"] or {}).get("phase") == "evacuated" and not plan["sources"] and not kept:
        context.screen.line(f"{host} is evacuated already; take it up again: drctl host return {host}")
        return 0
    _tell_silent(context, inventory, host)
    steps = _leaving(host, plan, kept, shutdown=shutdown)
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Evacuate {host}?"):
        return 0
    groups = sorted({*(row["group"] for row in plan["sources"]), *(place.group for place in kept)})
    with _leases(context, groups, "host evacuate", inventory):
        recoveries = {place.group: f"{place.host.site}/{place.host.name}" for place in kept}
        order: dict[str, Any] = {"shutdown": shutdown, "shutdown_seconds": shutdown_timeout, "recoveries": recoveries}
        # So long nothing may be heard: the appliance speaks before and after each guest, and each group.
        patience = CALL_TIMEOUT + shutdown_timeout
        tell = partial(_progress, context)
        done = context.call(named, "host.evacuate", timeout=patience, on_progress=tell, **order)
        failed = dict(done["failed"]) | _each(context, kept, "replicate.pause", "paused")
    _tell_failed(context, failed)
    if not failed:
        context.screen.line(f"{host} is evacuated; afterwards: drctl host return {host}")
    return 3 if failed else 0


def come_back(
    ctx: typer.Context,
    host: HostName,
    wait: Annotated[
        bool | None, typer.Option("--wait/--no-wait", help="Wait until the groups are live; on a terminal the rule.")
    ] = None,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Take up again what `drctl host evacuate` has paused and shut down.

    Groups attach again and catch up; guests that the evacuation powered off are started, if their group still reigns
    here. What was stopped, or failed over, by somebody meanwhile stays so. Exits with 3 when some group could not be
    taken up: give the command again then."""
    context = begin(ctx)
    named = _host(context, host)
    record = context.call(named, "host.evacuation", timeout=READ_TIMEOUT)["evacuation"]
    if record is None:
        context.screen.line(f"{host} is not evacuated")
        return 0
    inventory = take_inventory(context)
    if not propose(context.screen, _returning(record), dry_run=dry_run, yes=yes, question=f"Let {host} return?"):
        return 0
    with _leases(context, sorted({*record["sources"], *record["recoveries"]}), "host return", inventory):
        places, unknown = _paused(inventory, record["recoveries"])
        missed = unknown | _each(context, places, "replicate.resume", "attached")
        tell = partial(_progress, context)
        done = context.call(named, "host.return", timeout=RETURN_TIMEOUT, on_progress=tell, left=sorted(missed))
    failed = dict(done["failed"]) | missed
    _tell_failed(context, failed)
    live = sorted({*done["returned"], *(place.group for place in places)} - {*failed})
    if not failed:
        context.screen.line(f"{host} is back")
    if context.screen.interactive if wait is None else wait:
        failed |= _wait(context, live, timeout)
    return 3 if failed else 0


def _host(context: Context, name: str) -> Host:
    host = context.config.host(name)
    if host.kind is HostKind.ESX:
        raise Refused(f"{name} is an ESX host: no appliance of drctl runs there", hint="drctl host list")
    return host


def _replicated_to(inventory: Inventory, host: Host) -> list[Place]:
    """The sources of the groups whose replicas lie at the host, where they replicate."""
    here = [place.group for place in inventory.places if place.role == "recovery" and place.host.name == host.name]
    found = [(inventory.find(group, "recovery"), inventory.find(group, "source")) for group in here]
    return [
        source
        for target, source in found
        if target and source and target.host.name == host.name and source.state in ACTIVE
    ]


def _paused(inventory: Inventory, recoveries: dict[str, str]) -> tuple[list[Place], dict[str, str]]:
    """Where to resume the groups, and those of which no source is found. What is not paused any more needs nothing."""
    found = {group: inventory.find(group, "source") for group in recoveries}
    silent = {answer.host.name for answer in inventory.silent}
    unknown = {
        group: f"its source {recoveries[group]} does not answer"
        for group, place in found.items()
        if place is None and recoveries[group].rpartition("/")[2] in silent
    }
    return [place for place in found.values() if place is not None and place.state == "paused"], unknown


def _leaving(host: str, plan: dict[str, Any], kept: Iterable[Place], *, shutdown: bool) -> list[str]:
    steps = []
    for row in plan["sources"]:
        if shutdown and row["running"]:
            steps.append(f"shut down {', '.join(reversed(row['running']))} of {row['group']}")
        steps.append(f"pause {row['group']}: no new checkpoint until drctl host return {host}")
    steps += [
        f"pause {place.group} at {place.host.site}/{place.host.name}: it has no recovery site meanwhile"
        for place in kept
    ]
    return steps or [f"keep replication from beginning at {host}; no group is replicated from or to it"]


def _returning(record: dict[str, Any]) -> list[str]:
    steps = [f"resume {group} at {source}" for group, source in record["recoveries"].items()]
    for group, machines in record["sources"].items():
        steps.append(f"resume {group}" + (f", and start {', '.join(reversed(machines))}" if machines else ""))
    return steps or ["let replication begin there again"]


@contextmanager
def _leases(context: Context, groups: Iterable[str], verb: str, inventory: Inventory) -> Iterator[None]:
    """A lease of each group: nobody moves one of them meanwhile. Raises Locked, and then nothing was done."""
    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(leased(context, group, verb, inventory))
        context.lease = ""  # each group has its own; no method that is called here asks for it
        yield


def _each(context: Context, places: Iterable[Place], method: str, word: str) -> dict[str, str]:
    """{group: why} of those with which it went wrong; the others go on."""
    failed: dict[str, str] = {}
    for place in places:
        try:
            context.call(place.host, method, group=place.group, timeout=CALL_TIMEOUT)
            context.screen.say(f"{place.group}: {word} at {place.host.site}/{place.host.name}")
        except DrctlError as exc:
            failed[place.group] = exc.message
    return failed


def _wait(context: Context, groups: Iterable[str], timeout: float | None) -> dict[str, str]:
    end = None if timeout is None else context.clock.monotonic() + timeout
    failed: dict[str, str] = {}
    for group in groups:
        left = None if end is None else max(0.0, end - context.clock.monotonic())
        try:
            if wait_until_live(context, group, left, lambda _: None) is None:
                failed[group] = f"not live after {render.duration(timeout)}; it goes on: drctl status {group}"
            else:
                context.screen.line(f"{group} is live")
        except StepFailed as exc:
            failed[group] = exc.message
    _tell_failed(context, failed)
    return failed


def _progress(context: Context, told: dict[str, Any]) -> None:
    subject = told.get("machine") or told.get("group")
    context.screen.say(f"{subject}: {told.get('state') if told.get('machine') else _WORDS.get(_key(told), '…')}")


def _key(told: dict[str, Any]) -> tuple[str, str]:
    return str(told.get("step")), str(told.get("state"))


_WORDS = {
    ("pause", "pausing"): "pausing",
    ("pause", "done"): "paused",
    ("resume", "attaching"): "attaching",
    ("resume", "done"): "attached",
    ("held", "given up"): "no checkpoint holds how its guests left: the return will compare their disks",
}


def _tell_failed(context: Context, failed: dict[str, str]) -> None:
    for group, why in failed.items():
        context.screen.say(f"{group}: {why}")


def _tell_silent(context: Context, inventory: Inventory, host: str) -> None:
    for answer in inventory.silent:
        context.screen.say(
            f"no answer from {answer.host.name}: groups that it replicates to {host} are not paused: {answer.error}"
        )
