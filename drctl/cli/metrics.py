"""`drctl metrics`: what an appliance tells Prometheus, printed."""

from __future__ import annotations

from typing import Annotated

import typer

from drctl.cli.context import Context
from drctl.cli.options import examples, noun
from drctl.errors import NotFound

app = noun("Print an appliance's metrics for Prometheus.")


@app.command(epilog=examples("drctl metrics alpha-1", "drctl metrics --home /var/lib/drctl"))
def metrics(
    ctx: typer.Context,
    host: Annotated[str, typer.Argument(metavar="HOST", help="The host; the only one without it.")] = "",
) -> None:
    """Print the metrics of one appliance in Prometheus's text format.

    An appliance with the key metrics in its appliance.toml writes the same to that file every 15 s, for node_exporter's
    textfile collector. Alert rules: contrib/prometheus/drctl.rules.yml."""
    context = ctx.obj
    assert isinstance(context, Context)
    known = [one.name for one in context.config.hosts]
    if not host and len(known) != 1:
        raise NotFound("host", host, known=known, message="name the host whose metrics to print")
    place = context.config.host(host or known[0])
    context.screen.line(context.call(place, "appliance.metrics", timeout=30)["text"].rstrip("\n"))
