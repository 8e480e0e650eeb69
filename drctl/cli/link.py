"""`drctl link`: the links between sites, who uses them, and how fast they may be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import Answer, ask, in_parallel, side
from drctl.cli.options import DryRun, Format, Output, Yes, begin, complete_group, examples, noun, seconds
from drctl.errors import NotFound
from drctl.model.bandwidth import UNLIMITED, format_rate, parse_rate
from drctl.model.site import Host

app = noun("Links between sites, and how fast they may be used.")
limits = noun("How fast a link may be used: by the configuration, and until further notice.")
app.add_typer(limits, name="limit")


def _rate(text: str) -> int:
    try:
        return parse_rate(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


From = Annotated[str, typer.Argument(metavar="FROM", help="The site that sends.")]
To = Annotated[str, typer.Argument(metavar="TO", help="The site that receives.")]
MaybeFrom = Annotated[str, typer.Argument(metavar="FROM", help="The site that sends; all without it.")]
MaybeTo = Annotated[str, typer.Argument(metavar="TO", help="The site that receives; all without it.")]
OneGroup = Annotated[
    str,
    typer.Option(
        "--group", "-g", metavar="GROUP", help="This group alone, not all of the link.", autocompletion=complete_group
    ),
]


@app.command(epilog=examples("drctl link show", "drctl link show alpha beta --output json"))
def show(ctx: typer.Context, source: MaybeFrom = "", target: MaybeTo = "", output: Output = Format.TEXT) -> int:
    """Show the links, the groups that use them, and the limits in force.

    Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    links, silent = _links(context, source, target)
    if context.screen.as_json:
        context.document("links", links=links, unreachable=silent)
        return 3 if silent else 0
    _name(context, silent)
    rows = [
        (
            link["from"],
            link["to"],
            group["group"],
            render.word(group["state"]),
            group["priority"],
            _spell(group.get("in_force")),
            render.size(group["sent_bytes"]),
            render.size(group["backlog_bytes"]),
        )
        for link in links
        for group in link["groups"]
    ]
    columns = ("from", "to", "group", "state", "priority", "limit in force", "sent", "backlog")
    context.screen.table(columns, rows, "no group is sent over any link")
    return 3 if silent else 0


@limits.command("show", epilog=examples("drctl link limit show", "drctl link limit show alpha beta"))
def limit_show(ctx: typer.Context, source: MaybeFrom = "", target: MaybeTo = "", output: Output = Format.TEXT) -> int:
    """Show all limits of the links and of their groups, and which of them count now.

    Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    links, silent = _links(context, source, target)
    if context.screen.as_json:
        context.document("link-limits", links=links, unreachable=silent)
        return 3 if silent else 0
    _name(context, silent)
    rows = [row for link in links for row in _limit_rows(link)]
    columns = ("from", "host", "to", "of", "rate", "when", "counts now", "until")
    context.screen.table(columns, rows, "no link is limited: [[link.limit]] in drctl.toml, or drctl link limit set")
    return 3 if silent else 0


@limits.command(
    "set",
    epilog=examples(
        "drctl link limit set alpha beta '20 Mbit/s' --for 2h",
        "drctl link limit set alpha beta '5 Mbit/s' --group web",
        "drctl link limit set alpha beta unlimited --for 30m",
    ),
)
def limit_set(
    ctx: typer.Context,
    source: From,
    target: To,
    rate: Annotated[int, typer.Argument(metavar="RATE", parser=_rate, help="'20 Mbit/s', '2.5 MB/s', or unlimited.")],
    group: OneGroup = "",
    lasts: Annotated[
        float | None,
        typer.Option("--for", parser=seconds, metavar="DURATION", help="Then the configuration counts again."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> None:
    """Limit a link, or one group on it, from now on, whatever the configuration says.

    It goes on until it is cleared or its time is over, also when appliances are restarted."""
    context = begin(ctx, output)
    words = UNLIMITED if not rate else f"limited to {format_rate(rate)}"
    until = f" for {render.duration(lasts)}" if lasts else " until it is cleared"
    _order(
        context,
        source,
        target,
        group,
        f"{words}{until}",
        {"rate": rate, "seconds": lasts or 0},
        dry_run=dry_run,
        yes=yes,
    )


@limits.command(
    "clear", epilog=examples("drctl link limit clear alpha beta", "drctl link limit clear alpha beta -g web")
)
def limit_clear(
    ctx: typer.Context,
    source: From,
    target: To,
    group: OneGroup = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> None:
    """Let the configuration count again."""
    context = begin(ctx, output)
    _order(context, source, target, group, "limited as configured", {"rate": None}, dry_run=dry_run, yes=yes)


def _order(
    context: Context,
    source: str,
    target: str,
    group: str,
    words: str,
    order: dict[str, Any],
    *,
    dry_run: bool,
    yes: bool,
) -> None:
    hosts = _hosts(context, source, target)
    if group:
        hosts = [side(context, group, "source")]
        if hosts[0].site != source:
            raise NotFound(f"group at {source}", group, hint=f"it is sent by {hosts[0].site}")
    what = f"group {group}" if group else "the link"
    steps = [f"let {what} from {host.site}/{host.name} to {target} be {words}" for host in hosts]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes):
        return
    told = [_named(host, context.call(host, "link.limit", site=target, group=group, **order)) for host in hosts]
    if context.screen.as_json:
        context.document("link-limits", links=told, unreachable=[])
        return
    for link in told:
        row = next((each for each in link["groups"] if each["group"] == group), link)
        context.screen.line(f"{what} from {link['from']}/{link['from_host']} to {target}: {_counts(row)}")


def _hosts(context: Context, source: str, target: str) -> list[Host]:
    """The hosts whose links are meant. Raises NotFound."""
    for name in filter(None, (source, target)):
        context.config.site(name)
    if source and source == target:
        raise NotFound("link", f"{source} to {target}", hint="a link joins two sites")
    return [host for host in context.config.hosts if source in ("", host.site) and host.site != target]


def _links(context: Context, source: str, target: str) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    hosts = _hosts(context, source, target)
    answers = in_parallel(lambda host: ask(context, host, "link.list", site=target), hosts)
    links = [_named(answer.host, row) for answer in answers if not answer.failed for row in answer.result]
    return links, [_silence(answer) for answer in answers if answer.failed]


def _silence(answer: Answer) -> dict[str, str]:
    return {"host": answer.host.name, "message": str(answer.error)}


def _named(host: Host, row: dict[str, Any]) -> dict[str, Any]:
    """A link as its sender tells it, with the names of both ends."""
    rest = {key: value for key, value in row.items() if key not in ("site", "host")}
    return {"from": host.site, "from_host": host.name, "to": row["site"], "to_host": row["host"], **rest}


def _name(context: Context, silent: Sequence[dict[str, str]]) -> None:
    for missing in silent:
        context.screen.say(f"no answer from {missing['host']}: {missing['message']}")


def _limit_rows(link: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for row in (link, *link["groups"]):
        head = (link["from"], link["from_host"], link["to"], row.get("group", "link"))
        override = row["override"]
        if override:
            counts = render.moment(override["until"]) if override["until"] else "it is cleared"
            by = f"set by {override['by']}" if override["by"] else "set"
            rows.append((*head, format_rate(override["rate"]), by, "yes", counts))
        for limit in row["limits"]:
            now = not override and row["because"] == (limit["when"] or "always")
            until = render.moment(row["until"]) if now and row["until"] else "-"
            rows.append((*head, format_rate(limit["rate"]), limit["when"] or "always", "yes" if now else "no", until))
    return rows


def _counts(row: dict[str, Any]) -> str:
    if not row["because"]:
        return f"{UNLIMITED}: nothing is configured"
    until = f", until {render.moment(row['until'])}" if row["until"] else ""
    return f"{format_rate(row['rate'] or 0)} ({row['because']}{until})"


def _spell(limit: dict[str, Any] | None) -> str:
    return f"{format_rate(limit['rate'])} ({limit['scope']}, {limit['because']})" if limit else "-"
