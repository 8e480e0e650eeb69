"""`drctl group`: protection groups, as their files describe them and as the appliances have them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.apply import differences, send
from drctl.cli.config import Config
from drctl.cli.confirm import confirm_name, propose
from drctl.cli.context import Context
from drctl.cli.group_file import decode_group, group_path, read_groups, render_group, spec_json, usual_interval
from drctl.cli.inventory import Inventory, Place, take_inventory
from drctl.cli.options import Confirm, DryRun, Format, GroupName, Output, Yes, begin, examples, noun, seconds
from drctl.cli.replicate import KEEP_REPLICA
from drctl.cli.retention import demand_unlocked
from drctl.errors import AlreadyExists, ApplianceUnreachable, NotFound, WrongPhase
from drctl.model.group import GroupSpec
from drctl.toml.table import parse_toml

app = noun("Protection groups.")


@app.command("list", epilog=examples("drctl group list", "drctl group list --output json"))
def list_(ctx: typer.Context, output: Output = Format.TEXT) -> int:
    """List the groups of groups/*.toml and of the appliances. Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    specs = _specs(context.config)
    inventory = take_inventory(context)
    names = sorted({*specs, *inventory.groups})
    rows = [_summary(name, specs.get(name), inventory) for name in names]
    if context.screen.as_json:
        context.document("groups", groups=rows)
    else:
        columns = ("group", "machines", "source", "recovery", "state", "file")
        context.screen.table(columns, [tuple(render.word(row[key]) for key in columns) for row in rows], "no groups")
    return 3 if inventory.silent else 0


@app.command(epilog=examples("drctl group show web", "drctl group show web --output json"))
def show(ctx: typer.Context, group: GroupName, output: Output = Format.TEXT) -> None:
    """Show one group's settings, and where they come from."""
    context = begin(ctx, output)
    specs = _specs(context.config)
    inventory = take_inventory(context)
    place = inventory.find(group, "source") or inventory.find(group, "recovery")
    if group not in specs and place is None:
        raise NotFound("group", group, known=sorted({*specs, *inventory.groups}))
    settings = spec_json(specs[group]) if group in specs else place.spec if place else {}
    origin = (
        str(group_path(context.config, group))
        if group in specs
        else f"the appliance of {place.host.name if place else ''}"
    )
    if context.screen.as_json:
        context.document("group", group=group, origin=origin, settings=settings)
        return
    facts = [("settings of", origin)]
    for key, value in settings.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        facts += [(f"{key}.{name}".rstrip("."), _spell(name or key, deep)) for name, deep in inner]
    context.screen.facts(facts)


@app.command(
    epilog=examples(
        "drctl group create web --machine db --machine front --source alpha",
        "drctl group create web -m db --source alpha --recovery beta --interval 2s --network lan=lan-b --yes",
    )
)
def create(
    ctx: typer.Context,
    group: GroupName,
    machine: Annotated[
        list[str], typer.Option("--machine", "-m", metavar="NAME", help="A machine of the group; may be repeated.")
    ],
    source: Annotated[str, typer.Option(metavar="SITE", help="Where the machines run.")],
    recovery: Annotated[
        str, typer.Option(metavar="SITE", help="Where they are recovered; the other site, if there are two.")
    ] = "",
    source_host: Annotated[str, typer.Option(metavar="HOST", help="Needed when the site has several.")] = "",
    recovery_host: Annotated[str, typer.Option(metavar="HOST", help="Needed when the site has several.")] = "",
    interval: Annotated[
        float | None,
        typer.Option(
            "--interval", parser=seconds, metavar="DURATION", help="Between checkpoints, 500ms to 60s; ESX: 30s to 1d."
        ),
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(metavar="HERE=THERE", help="A network's name at the recovery site; may be repeated."),
    ] = None,
    test_network: Annotated[
        list[str] | None, typer.Option(metavar="HERE=THERE", help="The same for tests; one not named is cut off.")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Write groups/NAME.toml and send the group to both sites. Replication starts with `drctl replicate start`."""
    context = begin(ctx)
    wanted = GroupSpec(
        name=group,
        source=source,
        recovery=recovery or _other_site(context.config, source),
        machines=tuple(machine),
        source_host=source_host,
        recovery_host=recovery_host,
        checkpoint_interval=interval or usual_interval(context.config, source, source_host),
        networks=_pairs("--network", network),
        test_networks=_pairs("--test-network", test_network),
    )
    path = group_path(context.config, group)
    if path.exists():
        raise AlreadyExists(f"{path} is there already", hint=f"edit it, then: drctl apply; or drctl group show {group}")
    text = render_group(wanted)
    spec = decode_group(parse_toml(text, str(path)), context.config)
    changes = differences(context, {group: spec}, take_inventory(context))
    steps = [f"write {path}", *(line for change in changes for line in change.lines())]
    if propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"Create group {group}?"):
        _write(path, text)
        send(context, changes)
        context.screen.line(f"{group} is there; start it with: drctl replicate start {group}")


@app.command(epilog=examples("drctl group delete web", "drctl group delete web --confirm web --yes"))
def delete(
    ctx: typer.Context, group: GroupName, dry_run: DryRun = False, confirm: Confirm = "", yes: Yes = False
) -> int:
    """Delete a group: its file, and what both sites know of it. Its replica and checkpoints go with it.

    The group's name has to be typed, or given by --confirm. A group that is replicated has to be stopped first, and one
    whose retention lock lasts longer than the 7 days after which history goes is refused, with the date.
    Exits with 3 when the recovery site keeps its history."""
    context = begin(ctx)
    inventory = take_inventory(context)
    path = group_path(context.config, group) if context.config.directory else None
    places = [place for place in inventory.places if place.group == group]
    if inventory.silent:
        raise ApplianceUnreachable(
            f"{group} can't be deleted everywhere: {inventory.silent[0].error}", hint="see: drctl doctor", group=group
        )
    if not places and not (path and path.exists()):
        raise NotFound("group", group, known=inventory.groups)
    for place in places:
        if place.role == "recovery":
            demand_unlocked(context, place.host, group, KEEP_REPLICA)
    # The source first: a recovery side without its group would refuse a source that still sends.
    ordered = sorted(places, key=lambda place: place.role == "recovery")
    steps = [f"remove {group} at {place.host.site}/{place.host.name} ({place.role})" for place in ordered]
    steps += [f"delete {path}"] if path and path.exists() else []
    if propose(context.screen, steps, dry_run=dry_run, yes=yes):
        confirm_name(context.screen, group, typed=confirm)
        kept = [place for place in ordered if not _remove(context, place)]
        if path:
            path.unlink(missing_ok=True)
        context.screen.line(f"{group} is gone" + (" but for its history" if kept else ""))
        return 3 if kept else 0
    return 0


def _remove(context: Context, place: Place) -> bool:
    """Remove a group at one place; False when the recovery side keeps its history. Raises DrctlError."""
    try:
        context.call(place.host, "group.remove", group=place.group)
    except WrongPhase as exc:
        if place.role == "source":
            raise
        context.screen.say(f"{exc.message}" + (f": {exc.hint}" if exc.hint else ""))
        return False
    return True


def _specs(config: Config) -> dict[str, GroupSpec]:
    return read_groups(config) if config.directory else {}


def _summary(name: str, spec: GroupSpec | None, inventory: Inventory) -> dict[str, object]:
    place = inventory.find(name, "source") or inventory.find(name, "recovery")
    known = spec_json(spec) if spec else place.spec if place else {}
    return {
        "group": name,
        "machines": known.get("machines", []),
        "source": known.get("source"),
        "recovery": known.get("recovery"),
        "state": place.state if place else "not applied",
        "file": spec is not None,
    }


def _spell(key: str, value: Any) -> str:
    """A setting as people read it."""
    if key in ("checkpoint_interval", "history", "lock"):
        return render.duration(value)
    if key in ("journal_limit", "ring_size", "spill_size"):
        return render.size(value)
    if key in ("networks", "test_networks"):
        return ", ".join(f"{here} -> {there}" for here, there in value) or "-"
    if key == "ladder":
        return ", ".join(
            f"{'every one' if not rung['every'] else 'one each ' + render.duration(rung['every'])} "
            f"for {render.duration(rung['within'])}"
            for rung in value
        )
    return render.word(value) or "-"


def _other_site(config: Config, source: str) -> str:
    others = [site.name for site in config.sites if site.name != source]
    if len(others) != 1:
        raise typer.BadParameter(
            f"name the recovery site: one of {', '.join(others) or 'none'}", param_hint="--recovery"
        )
    return others[0]


def _pairs(option: str, values: list[str] | None) -> tuple[tuple[str, str], ...]:
    pairs = []
    for value in values or []:
        here, equals, there = value.partition("=")
        if not (here and equals and there):
            raise typer.BadParameter(f"{value!r} is not HERE=THERE", param_hint=option)
        pairs.append((here, there))
    return tuple(pairs)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
