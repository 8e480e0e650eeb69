"""`drctl history`: what was changed, when and by whom, as the appliances wrote it down."""

from __future__ import annotations

from typing import Annotated

import typer

from drctl.cli import render
from drctl.cli.inventory import ask_all
from drctl.cli.options import Format, MaybeGroup, Output, begin, examples, noun

app = noun("Show what was changed, when and by whom.")

#: What people gave as a command for a method; the others are called `noun verb`, as their methods.
_COMMANDS = {
    "group.put": "apply",
    "group.remove": "group delete",
    "failover.run": "failover",
    "fence.note": "fence",
    "appliance.note": "appliance",
    "certificate.install": "certificate renew",
    "authority.keep": "certificate seal",
    "authority.fetch": "certificate unseal",
    "failover.hold": "failover --cancel-auto",
    "switchover.run": "switchover (boot)",
    "handover.run": "switchover (hand over)",
    "handover.undo": "rollback (take back)",
}


@app.command(epilog=examples("drctl history", "drctl history web --last 100 --output json"))
def history(
    ctx: typer.Context,
    group: MaybeGroup = "",
    last: Annotated[int, typer.Option("--last", metavar="N", min=1, help="How many of the newest entries.")] = 50,
    output: Output = Format.TEXT,
) -> int:
    """Show the changing commands that the appliances of both sites have carried out, oldest first.

    Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    answers = ask_all(context, "appliance.history", group=group, limit=last)
    entries = [{"host": a.host.name, **entry} for a in answers if not a.failed for entry in a.result]
    entries = sorted(entries, key=lambda entry: float(entry["time"]))[-last:]
    for answer in answers:
        if answer.failed:
            context.screen.say(f"no answer from {answer.host.name}: {answer.error}")
    if context.screen.as_json:
        context.document("history", entries=entries)
    else:
        rows = [
            (
                render.moment(entry["time"]),
                entry["host"],
                render.word(entry.get("user")),
                _command(str(entry.get("method") or render.UNKNOWN)),
                entry.get("group") or "-",
                render.word(entry.get("outcome")),
                entry.get("detail") or "-",
            )
            for entry in entries
        ]
        context.screen.table(
            ("time", "host", "user", "what", "group", "outcome", "detail"), rows, "nothing was changed yet"
        )
    return 3 if any(answer.failed for answer in answers) else 0


def _command(method: str) -> str:
    return _COMMANDS.get(method, method.replace(".", " "))
