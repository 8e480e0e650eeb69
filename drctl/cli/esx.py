"""`drctl esx`: what is about ESX hosts alone."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from drctl.cli.options import begin, examples, noun
from drctl.errors import AlreadyExists, Refused
from drctl.model.site import HostKind

app = noun("ESX hosts.")


@app.callback()
def _group() -> None:
    """ESX hosts."""


@app.command(epilog=examples("drctl esx capture esx1 --file esx1.json"))
def capture(
    ctx: typer.Context,
    host: Annotated[str, typer.Argument(metavar="HOST", help="An ESX host of drctl.toml.")],
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Where to; default HOST.json.")] = None,
    machines: Annotated[
        int, typer.Option("--machines", min=0, max=50, metavar="N", help="Of so many machines everything is asked.")
    ] = 5,
) -> None:
    """Write down what an ESX host answers, names replaced, for drctl's own tests. Changes nothing on the host.

    Only reading commands are given there. Words of values are replaced by other letters, but for those that VMware's
    programs use themselves; the key of that is thrown away. Look at the file before you send it."""
    from drctl.hypervisor.esx import capture as capturing

    context = begin(ctx)
    known = context.config.host(host)
    if known.kind is not HostKind.ESX:
        raise Refused(f"{host} is a {known.kind} host", hint='an ESX host has kind = "esx" in drctl.toml')
    place = file or Path(f"{host}.json")
    if place.exists():
        raise AlreadyExists(f"{place} exists", hint="name another one: --file FILE")
    document = capturing.capture(host, context.shell(known), secrets.token_bytes(32), machines=machines)
    place.write_text(capturing.render(document), "utf-8")
    if document["problem"]:
        context.screen.say(f"not all of it was understood ({document['problem']}): please send the file")
    context.screen.line(f"{place}: {len(document['answers'])} answers, {len(document['files'])} files")
