"""`drctl site`: the sites of the configuration, and what each does for which group."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.inventory import Inventory, take_inventory
from drctl.cli.options import Format, Output, begin, examples, noun
from drctl.model.site import Site

app = noun("Sites of the configuration.")


@app.command("list", epilog=examples("drctl site list", "drctl site list --output json"))
def list_(ctx: typer.Context, output: Output = Format.TEXT) -> int:
    """List the sites. Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    inventory = take_inventory(context)
    sites = [_as_json(site, inventory) for site in context.config.sites]
    if context.screen.as_json:
        context.document("sites", sites=sites)
    else:
        columns = ("site", "hosts", "answering", "groups from here", "groups to here")
        rows = [[render.word(value) for value in facts.values()] for facts in sites]
        context.screen.table(columns, rows, "no sites")
    return 3 if inventory.silent else 0


@app.command(epilog=examples("drctl site show alpha"))
def show(
    ctx: typer.Context,
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site's name.")],
    output: Output = Format.TEXT,
) -> int:
    """Show one site: its hosts and the groups it is source or recovery site of."""
    context = begin(ctx, output)
    found = context.config.site(site)
    inventory = take_inventory(context)
    facts = _as_json(found, inventory)
    if context.screen.as_json:
        context.document("site", **facts)
    else:
        context.screen.facts([(key.replace("_", " "), render.word(value)) for key, value in facts.items()])
    return 3 if len(facts["answering"]) < len(facts["hosts"]) else 0


def _as_json(site: Site, inventory: Inventory) -> dict[str, Any]:
    silent = {answer.host.name for answer in inventory.silent}
    hosts = [host.name for host in site.hosts]
    roles = {
        role: sorted(place.group for place in inventory.places if place.role == role and place.host.name in hosts)
        for role in ("source", "recovery")
    }
    return {
        "site": site.name,
        "hosts": hosts,
        "answering": [name for name in hosts if name not in silent],
        "source_of": roles["source"],
        "recovery_of": roles["recovery"],
    }
