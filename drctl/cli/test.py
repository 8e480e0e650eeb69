"""`drctl test`: boot a group in isolation, while replication goes on."""

from __future__ import annotations

from typing import Annotated

import typer

from drctl.cli import points, recovery
from drctl.cli.confirm import propose
from drctl.cli.inventory import ask_all, side
from drctl.cli.options import DryRun, Format, GroupName, MaybeGroup, Output, Selector, Yes, begin, examples, noun
from drctl.errors import NotFound

app = noun("Boot a group in isolation, while replication goes on.")


@app.command(epilog=examples("drctl test start web", "drctl test start web --checkpoint -10m --machine db --yes"))
def start(
    ctx: typer.Context,
    group: GroupName,
    checkpoint: Selector = "latest",
    machine: Annotated[
        list[str] | None, typer.Option("--machine", "-m", metavar="NAME", help="Only this machine; may be repeated.")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Boot copies of a group's machines at the recovery site, as they were at a checkpoint.

    They run on overlays and on the test networks alone; replication goes on, the source is not touched.
    Exits with 3 when some machines failed, with 40 when none runs."""
    context = begin(ctx, output)
    host = side(context, group, "recovery")
    found = points.pick(context, host, group, checkpoint)
    who = ", ".join(machine) if machine else "all machines"
    steps = [f"boot {who} of {group} at {host.site}/{host.name} in isolation, as of #{found.number}"]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question="Start the test?"):
        return 0
    result = context.call(
        host,
        "test.start",
        group=group,
        checkpoint=points.settle(checkpoint, found),
        machines=machine or [],
        on_progress=recovery.narrator(context),
        timeout=recovery.RUN_TIMEOUT,
    )
    code = recovery.show(context, "test", result)
    context.screen.say(f"end it with: drctl test stop {result['id']}")
    return code


@app.command("list", epilog=examples("drctl test list", "drctl test list web --output json"))
def list_(ctx: typer.Context, group: MaybeGroup = "", output: Output = Format.TEXT) -> int:
    """List the tests that run now. Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    answers = ask_all(context, "test.list", group=group)
    tests = [item for answer in answers if not answer.failed for item in answer.result]
    for answer in answers:
        if answer.failed:
            context.screen.say(f"no answer from {answer.host.name}: {answer.error}")
    if context.screen.as_json:
        context.document("tests", tests=tests)
    else:
        context.screen.table(recovery.COLUMNS, [recovery.row(item) for item in tests], "no test runs")
    return 3 if any(answer.failed for answer in answers) else 0


@app.command(epilog=examples("drctl test stop 497a19 --yes"))
def stop(
    ctx: typer.Context,
    identity: Annotated[str, typer.Argument(metavar="ID", help="The test, as drctl test list shows it.")],
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Power off a test's machines and remove all that it made."""
    context = begin(ctx)
    answers = ask_all(context, "test.list", group="")
    found = [(a.host, item) for a in answers if not a.failed for item in a.result if item["id"] == identity]
    if not found:
        known = [str(item["id"]) for a in answers if not a.failed for item in a.result]
        raise NotFound("test", identity, known=known, hint="" if known else "no test runs")
    host, item = found[0]
    names = ", ".join(machine["name"] for machine in item.get("machines", [])) or "no machine"
    steps = [f"power off and remove test {identity} at {host.site}/{host.name}: {names}"]
    if propose(context.screen, steps, dry_run=dry_run, yes=yes, question="Stop the test?"):
        context.call(host, "test.stop", id=identity, timeout=recovery.RUN_TIMEOUT)
        context.screen.line(f"{identity} is gone")
