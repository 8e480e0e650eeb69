"""`drctl status`: every group in one picture, made of what both sides say."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.inventory import Inventory, Place, ask, take_inventory
from drctl.cli.options import Format, MaybeGroup, Output, begin, examples, noun
from drctl.cli.protection import describe, merge, sync_share
from drctl.errors import ApplianceUnreachable, NotFound

app = noun("Show how groups are protected.")

#: Seconds between two pictures of `--watch`.
WATCH = 2.0


@app.command(
    epilog=examples(
        "drctl status", "drctl status web --watch", "drctl status --output json | jq '.groups[].rpo_seconds'"
    )
)
def status(
    ctx: typer.Context,
    group: MaybeGroup = "",
    output: Output = Format.TEXT,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every 2 s until Ctrl-C.")] = False,
) -> int:
    """Show how every group is protected, and what could be recovered now.

    RPO is the age of the newest checkpoint that the recovery site can restore. When that site does not answer it is
    unknown, never 0. Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    while True:
        pictures, silent = look(context, group)
        if watch:
            context.screen.clear()
        _show(context, pictures, silent, one=bool(group))
        if not watch:
            return 3 if silent else 0
        context.clock.sleep(WATCH)


def look(context: Context, group: str = "") -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The pictures of the groups (of one, when named), and who did not answer.

    Raises NotFound, or ApplianceUnreachable when the group may be known to an appliance that is silent."""
    inventory = take_inventory(context)
    silent = [{"host": answer.host.name, "message": str(answer.error)} for answer in inventory.silent]
    names = [group] if group else inventory.groups
    if group and group not in inventory.groups:
        if silent:
            raise ApplianceUnreachable(
                f"group {group!r} was not found; {silent[0]['message']}", hint="see: drctl doctor"
            )
        raise NotFound("group", group, known=inventory.groups)
    return [picture(context, inventory, name) for name in names], silent


def picture(context: Context, inventory: Inventory, group: str) -> dict[str, Any]:
    """One group's picture, from both sides at once."""
    places = [inventory.find(group, role) for role in ("source", "recovery")]
    results = [_side(context, place) for place in places]
    merged = merge(group, results[0], results[1], context.clock.time())
    return merged | {"source": _where(places[0]), "recovery": _where(places[1])}


def _side(context: Context, place: Place | None) -> dict[str, Any] | None:
    if place is None:
        return None
    result = ask(context, place.host, "group.status", group=place.group, role=place.role).result
    return result if isinstance(result, dict) else None


def _where(place: Place | None) -> dict[str, str] | None:
    return {"site": place.host.site, "host": place.host.name} if place else None


def _show(context: Context, pictures: list[dict[str, Any]], silent: list[dict[str, str]], *, one: bool) -> None:
    screen = context.screen
    if screen.as_json:
        context.document("status", groups=pictures, unreachable=silent)
        return
    for missing in silent:
        screen.say(f"no answer from {missing['host']}: {missing['message']}")
    if one:
        screen.facts(facts(pictures[0]))
        _details(context, pictures[0])
        return
    columns = ("group", "state", "rpo", "newest", "checkpoints", "history", "journal", "backlog", "link", "from", "to")
    screen.table(columns, [row(picture) for picture in pictures], "no groups; drctl apply sends groups/*.toml out")


def row(picture: dict[str, Any]) -> tuple[str, ...]:
    """One line of the overview."""
    newest, journal, history, link = (picture[key] or {} for key in ("newest", "journal", "history", "link"))
    return (
        picture["group"],
        _state(picture),
        render.duration(picture["rpo_seconds"]),
        f"#{newest['number']}" if newest else render.UNKNOWN,
        render.word(picture["checkpoints"]),
        render.duration(history.get("seconds")),
        render.size(journal.get("bytes")),
        render.size(picture["backlog_bytes"]),
        render.word(link.get("state")),
        _place(picture["source"]),
        _place(picture["recovery"]),
    )


def facts(picture: dict[str, Any]) -> list[tuple[str, str]]:
    """One group in full."""
    newest, oldest, journal, history, link = (
        picture[key] or {} for key in ("newest", "oldest", "journal", "history", "link")
    )
    return [
        ("group", picture["group"]),
        ("state", _state(picture)),
        ("reason", picture["reason"] or "-"),
        ("generation", render.word(picture["generation"])),
        ("from", _place(picture["source"])),
        ("to", _place(picture["recovery"])),
        ("rpo", render.duration(picture["rpo_seconds"])),
        ("interval", render.duration(picture["interval_seconds"])),
        ("newest", _point(newest)),
        ("oldest", _point(oldest)),
        ("checkpoints", render.word(picture["checkpoints"])),
        ("history", f"{render.duration(history.get('seconds'))} of {render.duration(history.get('target_seconds'))}"),
        ("journal", f"{render.size(journal.get('bytes'))} of {render.size(journal.get('limit'))}"),
        ("backlog", render.size(picture["backlog_bytes"])),
        ("link", _link(link)),
    ]


def _details(context: Context, picture: dict[str, Any]) -> None:
    disks = [
        (
            machine["name"],
            render.word(machine.get("state")),
            disk["target"],
            render.size(disk.get("size")),
            render.word(disk.get("state")),
        )
        for machine in picture["machines"]
        for disk in machine.get("disks", [])
    ]
    context.screen.line()
    context.screen.table(
        ("machine", "state", "disk", "size", "replication"), disks, "the source side tells no machines"
    )
    if picture["recoveries"]:
        rows = [
            (item["id"], item["kind"], item["state"], render.moment(item.get("started")))
            for item in picture["recoveries"]
        ]
        context.screen.line()
        context.screen.table(("recovery", "kind", "state", "started"), rows, "")


def _state(picture: dict[str, Any]) -> str:
    share = sync_share(picture["sync"])
    return describe(picture) + (f" {100 * share:.0f} %" if share is not None else "")


def _place(place: dict[str, str] | None) -> str:
    return f"{place['site']}/{place['host']}" if place else render.UNKNOWN


def _link(link: dict[str, Any]) -> str:
    error = link.get("error")
    reason = error.get("message") if isinstance(error, dict) else error
    return render.word(link.get("state")) + (f": {reason}" if reason else "")


def _point(point: dict[str, Any]) -> str:
    if not point:
        return render.UNKNOWN
    return f"#{point['number']} at {render.moment(point['time'])}, {render.duration(point['age_seconds'])} ago"
