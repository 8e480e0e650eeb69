"""What the recovery site does by itself after a time: the options for it, and how it is spoken of."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drctl.cli import recovery
from drctl.cli.context import Context
from drctl.cli.options import seconds
from drctl.model.move import Settlement
from drctl.model.site import Host

Auto = Annotated[
    Settlement | None,
    typer.Option(
        "--auto",
        metavar="commit|rollback",
        help="Do this by itself --after a time, unless a commit, a rollback or --cancel-auto comes before.",
    ),
]
After = Annotated[
    float | None,
    typer.Option("--after", parser=seconds, metavar="DURATION", help="When --auto is done, counted from the order."),
]
CancelAuto = Annotated[
    bool, typer.Option("--cancel-auto", help="Call off what --auto would do; the group stays as it is.")
]


def given(auto: Settlement | None, after: float | None) -> dict[str, Any] | None:
    """The two options as the appliance takes them. Raises BadParameter when one is without the other."""
    if (auto is None) != (after is None):
        raise typer.BadParameter("--auto and --after go together: --auto rollback --after 4h")
    return {"action": auto.value, "after_seconds": after} if auto is not None else None


def cancel(context: Context, host: Host, group: str, kind: str) -> int:
    """Call it off, and show what stands."""
    result = context.call(host, "failover.hold", group=group)
    context.screen.say(f"{group}: nothing is done by itself any more; drctl commit or drctl rollback decides")
    return recovery.show(context, kind, result, before=[], after=[])
