"""`drctl lab`: two real libvirt sites on this machine, to try everything before it matters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import SCHEMA_VERSION, Context
from drctl.cli.options import DryRun, Format, Output, Yes, examples, noun

app = noun("Two real libvirt sites on this machine, to try everything.")

Directory = Annotated[
    Path | None, typer.Option("--directory", metavar="DIR", help="Where the lab lies; /var/tmp/drctl-lab without it.")
]


@app.command(epilog=examples("drctl lab up", "drctl lab up --guests 1 --directory /var/tmp/mylab --yes"))
def up(
    ctx: typer.Context,
    directory: Directory = None,
    guests: Annotated[int, typer.Option(metavar="N", min=1, max=16, help="Machines at the first site.")] = 2,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> None:
    """Make two sites with a libvirt, an appliance and guests that write and note what they wrote.

    Everything lies in one directory, nothing else on the machine is touched. What is there already is kept; what is
    missing is made."""
    context = _context(ctx, output)
    place = _directory(directory)
    if not propose(context.screen, [f"make a lab with {guests} guests in {place}"], dry_run=dry_run, yes=yes):
        return
    from drctl.lab.lab import up as lab_up
    from drctl.lab.layout import Options

    _show(context, lab_up(place, Options(guests=guests), context.screen.say))
    context.screen.say(f"try: drctl --config {place} doctor")


@app.command(epilog=examples("drctl lab status", "drctl lab status --output json"))
def status(ctx: typer.Context, directory: Directory = None, output: Output = Format.TEXT) -> None:
    """Show what runs of the lab."""
    from drctl.lab.lab import status as lab_status

    _show(_context(ctx, output), lab_status(_directory(directory)))


@app.command(epilog=examples("drctl lab down --yes", "drctl lab down --purge --yes"))
def down(
    ctx: typer.Context,
    directory: Directory = None,
    purge: Annotated[bool, typer.Option("--purge", help="Remove the cache and the lab's user, too.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """End every process of the lab and remove its directory, with all that its guests wrote."""
    context = _context(ctx, Format.TEXT)
    place = _directory(directory)
    steps = [f"end the lab in {place} and delete the directory", *(["remove its cache and its user"] if purge else [])]
    if propose(context.screen, steps, dry_run=dry_run, yes=yes, question="Delete the lab?"):
        from drctl.lab.lab import down as lab_down

        lab_down(place, context.screen.say, purge=purge)
        context.screen.line(f"the lab in {place} is gone")


def _context(ctx: typer.Context, output: Format) -> Context:
    """A lab needs no configuration, so no header is said."""
    context = ctx.obj
    assert isinstance(context, Context)
    context.screen.as_json = output is Format.JSON
    return context


def _directory(directory: Path | None) -> Path:
    from drctl.lab.layout import DEFAULT_DIRECTORY

    return (directory or DEFAULT_DIRECTORY).absolute()


def _show(context: Context, report: Any) -> None:
    import msgspec

    facts = msgspec.to_builtins(report)
    if context.screen.as_json:
        context.screen.json({"schema_version": SCHEMA_VERSION, "kind": "lab", "lab": facts})
        return
    flat = {key: value for key, value in facts.items() if not isinstance(value, (dict, list))}
    context.screen.facts([(key.replace("_", " "), render.word(value) or "-") for key, value in flat.items()])
    for title in ("sites", "processes"):
        context.screen.line()
        rows = [(name, render.word(value)) for name, value in facts[title].items()]
        context.screen.table((title, "runs" if title == "processes" else "uri"), rows, f"no {title}")
    context.screen.line()
    columns = ("guest", "site", "state", "records", "trouble")
    guests = [
        (g["name"], g["site"], g["state"], render.word(g["numbers"]), g["trouble"] or "-") for g in facts["guests"]
    ]
    context.screen.table(columns, guests, "no guests")
