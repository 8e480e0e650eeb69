"""Options and arguments that commands share, and how each command begins."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from drctl.cli.context import Context
from drctl.errors import DrctlError
from drctl.model.duration import parse_duration


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"


def noun(text: str) -> typer.Typer:
    """The Typer of one noun; its commands are verbs."""
    return typer.Typer(help=text, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def examples(*lines: str) -> str:
    """The epilog of a command's help and manual page."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def begin(ctx: typer.Context, output: Format = Format.TEXT) -> Context:
    """The command's context, its header said (in JSON the document carries it)."""
    context = ctx.obj
    assert isinstance(context, Context)
    context.screen.as_json = output is Format.JSON
    if not context.screen.as_json:
        context.header()
    return context


def selector(text: str) -> str:
    """A checkpoint's selector; `-10m` reaches us as `now-10m`, since it would look like an option (app.arrange)."""
    return text.removeprefix("now")


def seconds(text: str) -> float:
    """A duration on the command line. Raises BadParameter."""
    try:
        return parse_duration(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def complete_group(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of groups for the shell: those that have a file, no appliance is asked."""
    from drctl.cli.context import Settings
    from drctl.cli.group_file import group_directory

    named = ctx.find_root().params.get("config")
    try:
        directory = group_directory(Context(Settings(Path(named) if named else None)).config)
    except DrctlError:
        return []
    return sorted(path.stem for path in directory.glob("*.toml") if path.stem.startswith(incomplete))


Output = Annotated[
    Format,
    typer.Option(
        "--output",
        "-o",
        metavar="text|json",
        help="How to print the result; json is stable and documented.",
        show_default=True,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, change nothing.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", parser=seconds, metavar="DURATION", help="Stop waiting after this time (the work goes on)."
    ),
]
GroupName = Annotated[str, typer.Argument(metavar="GROUP", help="The protection group.", autocompletion=complete_group)]
MaybeGroup = Annotated[
    str, typer.Argument(metavar="GROUP", help="One protection group; all without it.", autocompletion=complete_group)
]
Selector = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        "-k",
        metavar="CHECKPOINT",
        parser=selector,
        help="latest, -10m, '#123', tag:NAME, or an ISO time with zone.",
    ),
]
CheckpointName = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", parser=selector, help="latest, -10m, '#123', tag:NAME, or an ISO time with zone."
    ),
]
Confirm = Annotated[
    str,
    typer.Option("--confirm", metavar="GROUP", help="The group's name again, where nobody can be asked to type it."),
]
