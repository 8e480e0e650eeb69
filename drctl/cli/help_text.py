"""How arguments look in a command's help and manual page: `HOST...`, whatever a version of typer adds to that."""

from __future__ import annotations

from typing import Any


def argument_name(param: Any) -> str:
    """`HOST`, and `HOST...` where several may be named."""
    return str(param.metavar).removesuffix("...") + ("..." if param.nargs != 1 else "")


def usage_name(param: Any) -> str:
    """As in the line of usage: in brackets what may be left out."""
    return argument_name(param) if param.required else f"[{argument_name(param)}]"


def tidy(command: Any) -> Any:
    """The command, its arguments (and those of its commands) shown by their names alone.

    Typer shows their Python types beside them (`HOST <list[str]>`), and braces around what is needed. What it asks for
    these is replaced; a version that asks for something else shows what it likes."""
    for param in command.params:
        if param.param_type_name == "argument":
            param.display_type_rich = _nothing
            param._rich_display_name = lambda param=param: argument_name(param)
            param._usage_display_name = lambda param=param: usage_name(param)
    inner = getattr(command, "commands", None)
    if isinstance(inner, dict):
        for child in inner.values():
            tidy(child)
    return command


def _nothing(ctx: Any) -> None:
    del ctx
