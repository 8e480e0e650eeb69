"""`drctl explain`: what an exit code or an error's name means, and what to do about it."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from typing import Annotated

import typer

from drctl.cli.codes import all_codes
from drctl.cli.context import SCHEMA_VERSION, Context
from drctl.cli.options import Format, Output, examples, noun
from drctl.errors import NotFound

app = noun("Explain an exit code or an error's name.")


@app.command(epilog=examples("drctl explain", "drctl explain 12", "drctl explain wrong-phase"))
def explain(
    ctx: typer.Context,
    code: Annotated[str, typer.Argument(metavar="CODE", help="An exit code or an error's name; all without it.")] = "",
    output: Output = Format.TEXT,
) -> None:
    """Explain an exit code, or an error's name as JSON output has it. A code that is not listed is a failure."""
    context = ctx.obj
    assert isinstance(context, Context)
    screen = context.screen
    screen.as_json = output is Format.JSON
    codes = all_codes()
    found = [one for one in codes if code in ("", str(one.code), one.slug)]
    if not found:
        near = difflib.get_close_matches(code, [one.slug for one in codes], 1)
        hint = f"did you mean {near[0]}?" if near else "a code that is not listed is a failure; all: drctl explain"
        raise NotFound("exit code", code, hint=hint)
    if screen.as_json:
        screen.json({"schema_version": SCHEMA_VERSION, "kind": "codes", "codes": [asdict(one) for one in found]})
    elif code:
        for one in found:
            screen.facts(
                [("code", str(one.code)), ("name", one.slug), ("meaning", one.meaning), ("what to do", one.advice)]
            )
    else:
        screen.table(("code", "name", "meaning"), [(str(one.code), one.slug, one.meaning) for one in found], "")
