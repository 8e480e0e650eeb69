"""`drctl apply`: groups/*.toml is the truth; the appliances of both sites are told what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.group_file import read_groups, spec_changes, spec_json
from drctl.cli.inventory import READ_TIMEOUT, Inventory, Place, take_inventory
from drctl.cli.options import DryRun, Format, Output, Yes, begin, examples, noun
from drctl.errors import ApplianceUnreachable, NotFound
from drctl.model.bandwidth import UNLIMITED, format_rate
from drctl.model.group import GroupSpec, turned_around
from drctl.model.site import Host

app = noun("Make the appliances do what groups/*.toml says.")


@dataclass(frozen=True, slots=True)
class Change:
    """What one appliance has to be told about one group. `differences` is (key, old, new); `new` when unknown there."""

    group: str
    role: str
    host: Host
    spec: dict[str, Any]
    differences: list[tuple[str, Any, Any]]
    new: bool

    def lines(self) -> list[str]:
        verb = "create" if self.new else "change" if self.differences else "tell"
        head = f"{verb} group {self.group} at {self.host.site}/{self.host.name} ({self.role})"
        if self.new:
            return [f"{head}: {render.word(self.spec['machines'])}"]
        return [head, *(f"  {key}: {render.word(old)} -> {render.word(new)}" for key, old, new in self.differences)]


@dataclass(frozen=True, slots=True)
class LinkChange:
    """What one appliance has to be told about the limits of its links: what it has, and what it should have."""

    host: Host
    old: dict[str, list[dict[str, Any]]]
    new: dict[str, list[dict[str, Any]]]

    def lines(self) -> list[str]:
        return [
            f"limit the link from {self.host.site}/{self.host.name} to {site}: "
            f"{_spell(self.old.get(site, []))} -> {_spell(self.new[site])}"
            for site in self.new
        ]


def _spell(limits: list[dict[str, Any]]) -> str:
    rows = [f"{format_rate(row['rate'])} {row['when'] or 'always'}" for row in limits]
    return ", ".join(rows) or UNLIMITED


@app.command(epilog=examples("drctl apply --dry-run", "drctl apply --yes"))
def apply(ctx: typer.Context, dry_run: DryRun = False, yes: Yes = False, output: Output = Format.TEXT) -> None:
    """Send the groups of groups/*.toml to the appliances of both sites, after showing what differs.

    The limits of links in drctl.toml are sent, too. Nothing starts to replicate by it, and nothing is deleted: a group
    without a file is named, and goes by `drctl group delete`."""
    context = begin(ctx, output)
    specs = read_groups(context.config)
    inventory = take_inventory(context)
    changes = differences(context, specs, inventory)
    links = link_differences(context, specs)
    _name_strangers(context, specs, inventory)
    _name_missing(context, changes)
    if not changes and not links:
        context.screen.say("nothing to do: the appliances have what groups/*.toml says")
    elif propose(
        context.screen,
        [line for change in changes for line in change.lines()] + [line for link in links for line in link.lines()],
        dry_run=dry_run,
        yes=yes,
        question="Apply?",
    ):
        send(context, changes)
        for link in links:
            context.call(link.host, "link.put", limits=link.new)
    if context.screen.as_json:
        limits = [{"host": link.host.name, "old": link.old, "new": link.new} for link in links]
        context.document("apply", dry_run=dry_run, changes=[_as_json(change) for change in changes], links=limits)


def differences(context: Context, specs: Mapping[str, GroupSpec], inventory: Inventory) -> list[Change]:
    """What has to be told to whom; the recovery side comes first, so that it can receive.

    Raises ApplianceUnreachable when an appliance that is concerned did not answer."""
    silent = {answer.host.name: answer for answer in inventory.silent}
    changes: list[Change] = []
    for spec in (as_protected(spec, inventory) for spec in specs.values()):
        sides = []
        for role, name in (("recovery", spec.recovery_host), ("source", spec.source_host)):
            if name in silent:
                raise ApplianceUnreachable(
                    f"{spec.name} can't be applied: {silent[name].error}", hint="see: drctl doctor", host=name
                )
            sides.append(_change(spec, role, context.config.host(name), _at(inventory, spec.name, name)))
        # Both sides are told together: a recovery side learns most of the group from the stream, not from us.
        if any(change.new or change.differences for change in sides):
            changes += sides
    return changes


def as_protected(spec: GroupSpec, inventory: Inventory) -> GroupSpec:
    """The group in the direction in which it is protected now: a failback turns it around, its file stays as it is."""
    source = inventory.find(spec.name, "source")
    away = source is not None and source.host.name == spec.recovery_host != spec.source_host
    return turned_around(spec) if away else spec


def link_differences(context: Context, specs: Mapping[str, GroupSpec]) -> list[LinkChange]:
    """What the hosts that send have to be told about their links. Raises what an appliance says."""
    changes = []
    for name in dict.fromkeys(spec.source_host for spec in specs.values()):
        host = context.config.host(name)
        wanted = context.config.limits_from(host.site)
        has = _limits_at(context, host, needed=any(wanted.values()))
        rows = {site: [asdict(limit) for limit in limits] for site, limits in wanted.items() if site in has}
        new = {site: limits for site, limits in rows.items() if limits != has[site]}
        if new:
            changes.append(LinkChange(host, {site: has[site] for site in new}, new))
    return changes


def _limits_at(context: Context, host: Host, *, needed: bool) -> dict[str, list[dict[str, Any]]]:
    """The limits that a sender has. An older appliance has none, which is wrong only where some are configured."""
    try:
        return {row["site"]: row["limits"] for row in context.call(host, "link.list", timeout=READ_TIMEOUT)}
    except NotFound:
        if needed:
            raise
        return {}


def send(context: Context, changes: list[Change]) -> None:
    """Tell the appliances. Raises the first refusal; what was told before stays (apply again when it is mended)."""
    for change in changes:
        context.call(change.host, "group.put", spec=change.spec)
        context.screen.say(f"{change.group}: done at {change.host.site}/{change.host.name}")


def _at(inventory: Inventory, group: str, host: str) -> Place | None:
    return next((place for place in inventory.places if place.group == group and place.host.name == host), None)


def _change(spec: GroupSpec, role: str, host: Host, place: Place | None) -> Change:
    wanted = spec_json(spec)
    known = place.spec if place else {}
    return Change(spec.name, role, host, wanted, spec_changes(known, wanted) if known else [], place is None)


def _name_strangers(context: Context, specs: Mapping[str, GroupSpec], inventory: Inventory) -> None:
    for name in inventory.groups:
        if name not in specs:
            context.screen.say(f"group {name} has no file in groups/; it is left alone (drctl group delete {name})")


def _name_missing(context: Context, changes: list[Change]) -> None:
    """A group may be written before its guests are made; a typing error should not wait for `replicate start`."""
    for change in (change for change in changes if change.role == "source"):
        known = sorted(machine["name"] for machine in context.call(change.host, "machine.list"))
        for name in change.spec["machines"]:
            if name not in known:
                hint = NotFound("machine", name, known=known).hint
                context.screen.say(
                    f"{change.host.name} has no machine {name!r}, so {change.group} can't replicate yet: {hint}"
                )


def _as_json(change: Change) -> dict[str, Any]:
    return {
        "group": change.group,
        "role": change.role,
        "host": change.host.name,
        "action": "create" if change.new else "change" if change.differences else "tell",
        "differences": [{"key": key, "old": old, "new": new} for key, old, new in change.differences],
    }
