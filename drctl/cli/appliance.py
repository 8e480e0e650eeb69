"""`drctl appliance`: the replication service of a host."""

from __future__ import annotations

import typer

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.inventory import ask_all
from drctl.cli.options import Format, Output, begin, examples, noun

app = noun("The replication service of a host.")


@app.command(epilog=examples("drctl appliance run --home /var/lib/drctl"))
def run(ctx: typer.Context) -> int:
    """Run the appliance of this host in the foreground; systemd does that.

    --home names its directory (default: $DRCTL_HOME, /var/lib/drctl), which holds its appliance.toml."""
    from drctl.appliance.daemon import main

    context = ctx.obj
    assert isinstance(context, Context)
    return main(context.settings.home_directory)


@app.command("list", epilog=examples("drctl appliance list", "drctl appliance list --output json"))
def list_(ctx: typer.Context, output: Output = Format.TEXT) -> int:
    """List the appliances, and whether they answer. Exits with 3 when one does not."""
    context = begin(ctx, output)
    rows = []
    for answer in ask_all(context, "appliance.info"):
        info = answer.result or {}
        rows.append(
            {
                "host": answer.host.name,
                "site": answer.host.site,
                "state": "unreachable" if answer.failed else "running",
                "version": info.get("version"),
                "identity": info.get("appliance"),
                "control": answer.host.control,
                "link": answer.host.link,
                "problem": str(answer.error) if answer.error else "",
            }
        )
    if context.screen.as_json:
        context.document("appliances", appliances=rows)
    else:
        columns = ("host", "site", "state", "version", "identity", "control", "link", "problem")
        context.screen.table(
            columns, [tuple(render.word(row[key]) or "-" for key in columns) for row in rows], "no hosts"
        )
    return 3 if any(row["problem"] for row in rows) else 0
