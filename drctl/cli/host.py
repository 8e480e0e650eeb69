"""`drctl host`: the hypervisor hosts, as the configuration names and their appliances describe them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drctl.cli import host_evacuation, render
from drctl.cli.inventory import Answer, ask, in_parallel, info_method
from drctl.cli.options import Format, Output, begin, examples, noun

app = noun("Hypervisor hosts.")

app.command("evacuate", epilog=host_evacuation.EVACUATE_EXAMPLES)(host_evacuation.evacuate)
app.command("return", epilog=host_evacuation.RETURN_EXAMPLES)(host_evacuation.come_back)

_TITLES = {"host_kind": "kind"}


@app.command("list", epilog=examples("drctl host list", "drctl host list --output json"))
def list_(ctx: typer.Context, output: Output = Format.TEXT) -> int:
    """List the hosts. Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    answers = in_parallel(lambda host: ask(context, host, info_method(host)), context.config.hosts)
    if context.screen.as_json:
        context.document("hosts", hosts=[as_json(answer) for answer in answers])
    else:
        columns = ("host", "site", "kind", "appliance", "version", "uri", "store free")
        context.screen.table(columns, [_row(answer) for answer in answers], "the configuration names no host")
    return 3 if any(answer.failed for answer in answers) else 0


@app.command(epilog=examples("drctl host show alpha1"))
def show(
    ctx: typer.Context,
    host: Annotated[str, typer.Argument(metavar="HOST", help="The host's name.")],
    output: Output = Format.TEXT,
) -> int:
    """Show one host: its hypervisor, its appliance and the space there."""
    context = begin(ctx, output)
    named = context.config.host(host)
    answer = ask(context, named, info_method(named))
    facts = as_json(answer)
    if context.screen.as_json:
        context.document("host", **facts)
    else:
        context.screen.facts(_facts(facts))
    return 3 if answer.failed else 0


def as_json(answer: Answer) -> dict[str, Any]:
    """The documented JSON object of a host."""
    host, info = answer.host, answer.result or {}
    return {
        "host": host.name,
        "site": host.site,
        "host_kind": host.kind.value,
        "uri": info.get("uri") or host.uri,
        "control": host.control,
        "link": host.link,
        "appliance": "unreachable" if answer.failed else info.get("state", "running"),
        "problem": str(answer.error) if answer.error else "",
        "evacuation": info.get("evacuation"),
        "version": info.get("version"),
        "versions": info.get("versions") or {},
        "capabilities": info.get("capabilities") or {},
        "space": info.get("space") or {},
    }


def _row(answer: Answer) -> tuple[str, ...]:
    facts = as_json(answer)
    stores = facts["space"]
    place: dict[str, Any] = stores.get("store") or max(
        stores.values(), key=lambda store: store.get("free") or 0, default={}
    )
    free = place.get("free")
    state, version = _state(facts), render.word(facts["version"])
    return (facts["host"], facts["site"], facts["host_kind"], state, version, facts["uri"], render.size(free))


def _state(facts: dict[str, Any]) -> str:
    """The appliance's, and that its host is evacuated: `leaving`, `evacuated` or `returning`."""
    evacuation = facts["evacuation"]
    return f"{facts['appliance']}, {evacuation['phase']}" if evacuation else str(facts["appliance"])


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """One host in full, as people read it."""
    lines = [
        (_TITLES.get(key, key), _plain(value)) for key, value in facts.items() if key not in ("space", "evacuation")
    ]
    if facts["evacuation"]:
        lines.append(("evacuation", _evacuation(facts["evacuation"])))
    for name, place in facts["space"].items():
        free = f"{render.size(place.get('free'))} of {render.size(place.get('total'))} free in {place.get('path')}"
        lines.append((f"{name} space", free))
    return lines


def _evacuation(told: dict[str, Any]) -> str:
    by = f" by {told['by']}" if told.get("by") else ""
    return f"{told['phase']} since {render.moment(told['since'])}{by}; drctl host return {told['host']}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) or "-"
    return render.word(value) or "-"
