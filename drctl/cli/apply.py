"""`drctl apply`: groups/*.toml is the truth; the appliances of both sites are told what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.group_file import read_groups, spec_changes, spec_json
from drctl.cli.inventory import Inventory, Place, take_inventory
from drctl.cli.options import DryRun, Format, Output, Yes, begin, examples, noun
from drctl.errors import ApplianceUnreachable, NotFound
from drctl.model.group import GroupSpec
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


@app.command(epilog=examples("drctl apply --dry-run", "drctl apply --yes"))
def apply(ctx: typer.Context, dry_run: DryRun = False, yes: Yes = False, output: Output = Format.TEXT) -> None:
    """Send the groups of groups/*.toml to the appliances of both sites, after showing what differs.

    Nothing starts to replicate by it, and nothing is deleted: a group without a file is named, and goes by
    `drctl group delete`."""
    context = begin(ctx, output)
    specs = read_groups(context.config)
    inventory = take_inventory(context)
    changes = differences(context, specs, inventory)
    _name_strangers(context, specs, inventory)
    _name_missing(context, changes)
    if not changes:
        context.screen.say("nothing to do: the appliances have what groups/*.toml says")
    elif propose(
        context.screen,
        [line for change in changes for line in change.lines()],
        dry_run=dry_run,
        yes=yes,
        question="Apply?",
    ):
        send(context, changes)
    if context.screen.as_json:
        context.document("apply", dry_run=dry_run, changes=[_as_json(change) for change in changes])


def differences(context: Context, specs: Mapping[str, GroupSpec], inventory: Inventory) -> list[Change]:
    """What has to be told to whom; the recovery side comes first, so that it can receive.

    Raises ApplianceUnreachable when an appliance that is concerned did not answer."""
    silent = {answer.host.name: answer for answer in inventory.silent}
    changes: list[Change] = []
    for spec in specs.values():
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
