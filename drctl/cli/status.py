"""`drctl status`: every group in one picture, made of what both sides say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from drctl.cli import recovery, render
from drctl.cli.context import Context
from drctl.cli.diagnosis import SKEW_WARNING
from drctl.cli.inventory import Answer, Inventory, Place, ask, in_parallel, take_inventory
from drctl.cli.options import Format, MaybeGroup, Output, begin, examples, noun
from drctl.cli.protection import describe, merge, sends_nothing, sync_share
from drctl.errors import ApplianceUnreachable, NotFound
from drctl.model.bandwidth import format_rate

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
    """The pictures of the groups (of one, when named), and what could not be asked, and why.

    Raises NotFound, or ApplianceUnreachable when the group may be known to an appliance that is silent."""
    inventory = take_inventory(context, status=not group)
    if group and group not in inventory.groups:
        if inventory.silent:
            reason = str(inventory.silent[0].error)
            raise ApplianceUnreachable(f"group {group!r} was not found; {reason}", hint="see: drctl doctor")
        raise NotFound("group", group, known=inventory.groups)
    pictures, failed = draw(context, inventory, [group] if group else inventory.groups)
    return pictures, [
        {"host": answer.host.name, "message": str(answer.error)} for answer in (*inventory.silent, *failed)
    ]


def draw(context: Context, inventory: Inventory, groups: Sequence[str]) -> tuple[list[dict[str, Any]], list[Answer]]:
    """The groups' pictures, all sides asked at once; and the answers that are errors."""
    places = [inventory.find(group, role) for group in groups for role in ("source", "recovery")]
    answers = in_parallel(lambda place: _ask(context, place), places)
    pictures = []
    for group, place, source, target in zip(groups, _pairs(places), answers[::2], answers[1::2], strict=True):
        merged = merge(group, _result(source), _result(target), context.clock.time())
        told = merged.pop("told_source")
        pictures.append(merged | {"source": _where(place[0]) or told, "recovery": _where(place[1])})
    return pictures, [answer for answer in answers if answer is not None and answer.failed]


def _pairs(places: list[Place | None]) -> list[tuple[Place | None, Place | None]]:
    return list(zip(places[::2], places[1::2], strict=True))


def _ask(context: Context, place: Place | None) -> Answer | None:
    if place and place.status:
        return Answer(place.host, place.status)
    return ask(context, place.host, "group.status", group=place.group, role=place.role) if place else None


def _result(answer: Answer | None) -> dict[str, Any] | None:
    return answer.result if answer is not None and isinstance(answer.result, dict) else None


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
    screen.table(
        columns,
        [row(picture) for picture in pictures],
        "no appliance told of any group" if silent else "no groups; drctl apply sends groups/*.toml out",
    )


def row(picture: dict[str, Any]) -> tuple[str, ...]:
    """One line of the overview."""
    newest, journal, history, link = (picture[key] or {} for key in ("newest", "journal", "history", "link"))
    return (
        picture["group"],
        _state(picture),
        _rpo(picture),
        f"#{newest['number']}" if newest else render.UNKNOWN,
        render.word(picture["checkpoints"]),
        render.duration(history.get("seconds")),
        render.size(journal.get("bytes")),
        _told_by_source(picture, render.size(picture["backlog_bytes"])),
        _told_by_source(picture, render.word(link.get("state"))),
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
        *_boot(picture),
        ("generation", render.word(picture["generation"])),
        ("from", _place(picture["source"])),
        ("to", _place(picture["recovery"])),
        ("rpo", _rpo(picture)),
        ("interval", render.duration(picture["interval_seconds"])),
        ("newest", _point(newest)),
        ("oldest", _point(oldest)),
        *_old_disks(picture["failback"] or {}),
        ("checkpoints", render.word(picture["checkpoints"])),
        ("history", f"{render.duration(history.get('seconds'))} of {render.duration(history.get('target_seconds'))}"),
        *_lock(picture["lock"] or {}),
        ("journal", f"{render.size(journal.get('bytes'))} of {render.size(journal.get('limit'))}"),
        ("backlog", _told_by_source(picture, render.size(picture["backlog_bytes"]))),
        *_buffers(picture),
        *_cycle(picture["cycle"] or {}),
        ("link", _told_by_source(picture, _link(link))),
    ]


def _lock(lock: dict[str, Any]) -> list[tuple[str, str]]:
    if not lock:
        return []
    until = f"; what there is now until {render.moment(lock['until'])}" if lock.get("until") else ""
    return [("retention lock", f"{render.duration(lock['seconds'])}{until}")]


def _buffers(picture: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a backlog lies: in the ring, then in the spill, and what did neither fit in the dirty map."""
    lines = []
    for title, key in (("ring", "ring"), ("spill", "spill"), ("dirty map", "dirty_map")):
        part = picture.get(key)
        if not part or part.get("size") is None or part.get("state") == "off":
            continue
        text = f"{render.size(part.get('used'))} of {render.size(part['size'])}"
        if part.get("dropping"):
            text += ", full: what is written goes into the dirty map"
        if part.get("state") in ("full", "failed"):
            text += f", {part['state']}" + (f": {part['error']}" if part.get("error") else "")
        lines.append((title, text))
    return lines


def _cycle(cycle: dict[str, Any]) -> list[tuple[str, str]]:
    """The newest snapshot cycle of a source on ESX: when, how long, what it cost its machines, and what it remarked."""
    if not cycle or not cycle.get("began"):
        return []
    took = cycle.get("seconds")
    lasts = (
        "runs now" if cycle.get("running") else f"took {render.duration(took)}, {render.size(cycle['shipped'])} sent"
    )
    text = f"began at {render.moment(cycle['began'])}, {lasts}"
    if cycle.get("stun") is not None:
        text += f"; a machine stood still for {render.duration(cycle['stun'])}"
    if int(cycle.get("slower") or 1) > 1:
        text += f"; {cycle['slower']} intervals apart for that"
    return [("cycle", text), *(("cycle remark", str(remark)) for remark in (cycle.get("remarks") or [])[-3:])]


def _boot(picture: dict[str, Any]) -> list[tuple[str, str]]:
    """What is special at the source: guests not started at the host's boot, guests that run and may not."""
    boot, lines = picture.get("boot") or {}, []
    if boot.get("state") not in (None, "none"):
        guests = render.word(boot.get("autostart"))
        lines.append(("boot", f"guests {guests}: {boot['state']}" + (f": {boot['reason']}" if boot["reason"] else "")))
    if picture.get("strays"):
        lines.append(("TWO OF ONE", f"{render.word(picture['strays'])} run at the superseded source: power them off"))
    return lines


def _old_disks(failback: dict[str, Any]) -> list[tuple[str, str]]:
    """What was sealed of the disks that lay at the site when the group came back to it."""
    if not failback.get("kept_until"):
        if not failback.get("given_up"):
            return []
        when = render.moment(failback["given_up"])
        return [("old disks", f"checkpoint #{failback['checkpoint']} given up at {when}: the journal needed its room")]
    until = render.moment(failback["kept_until"])
    return [("old disks", f"checkpoint #{failback['checkpoint']}, tag:before-failback, kept until {until}")]


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
    context.screen.table(("machine", "state", "disk", "size", "replication"), disks, _no_machines(picture))
    if picture["recoveries"]:
        rows = [
            (item["id"], item["kind"], item["state"], render.moment(item.get("started")), recovery.by_itself(item))
            for item in picture["recoveries"]
        ]
        context.screen.line()
        context.screen.table(("recovery", "kind", "state", "started", "by itself"), rows, "")


def _no_machines(picture: dict[str, Any]) -> str:
    source = picture["source"]
    if picture["recovery_mode"] == "failed-over":
        return f"its machines run at {_place(picture['recovery'])}: drctl vm list"
    if picture["phase"] is None:
        return f"machines and disks are told by the source {_place(source)}, which was not asked or does not answer"
    return "the source has not looked at the machines yet"


def _state(picture: dict[str, Any]) -> str:
    share = sync_share(picture["sync"])
    return describe(picture) + (f" {100 * share:.0f} %" if share is not None else "")


def _place(place: dict[str, str] | None) -> str:
    return f"{place['site']}/{place['host']}" if place else render.UNKNOWN


def _rpo(picture: dict[str, Any]) -> str:
    """What is replicated nowhere has no recovery point: that is known."""
    return "none" if picture["recovery_mode"] == "failed-over" else render.duration(picture["rpo_seconds"])


def _told_by_source(picture: dict[str, Any], text: str) -> str:
    """A dash where the source side has nothing to say: no stream runs."""
    return "-" if sends_nothing(picture) else text


def _link(link: dict[str, Any]) -> str:
    error = link.get("error")
    reason = error.get("message") if isinstance(error, dict) else error
    skew = abs(float(link.get("offset_ms") or 0)) / 1000
    skewed = f"; the two sites' clocks differ by {render.duration(skew)}" if skew > SKEW_WARNING else ""
    return render.word(link.get("state")) + (f": {reason}" if reason else "") + _limit(link) + skewed


def _limit(link: dict[str, Any]) -> str:
    limit = link.get("limit")
    return f"; limited to {format_rate(limit['rate'])} ({limit['scope']}, {limit['because']})" if limit else ""


def _point(point: dict[str, Any]) -> str:
    if not point:
        return render.UNKNOWN
    return f"#{point['number']} at {render.moment(point['time'])}, {render.duration(point['age_seconds'])} ago"
