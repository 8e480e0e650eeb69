"""Turns words of the command line into values without pydantic.

Newer versions of typer build a pydantic adapter for each parameter; its import alone takes longer than all of
`drctl status` (70 of 110 ms on the machine this was measured on). Ours need a handful of types. A typer that keeps its
coercion elsewhere is left as it is: slower, not different; tests/cli/test_startup.py notices."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

_TYPES = (str, int, float, bool, Path)
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def lighten(command: Any) -> Any:
    """The command, its parameters (and those of its commands) with light coercion where typer lets us."""
    # The help option is made on demand and then kept by the command.
    helps = command.get_help_option(typer.Context(command))
    for param in [*command.params, *([helps] if helps else [])]:
        descriptor = getattr(param, "type_descriptor", None)
        if descriptor is not None and hasattr(param, "_runtime_param"):
            one = _element(descriptor.annotation)
            if descriptor.parameter_info.parser or one in _TYPES or _is_enum(one):
                param._runtime_param = _Light(one, descriptor.parameter_info)
    inner = getattr(command, "commands", None)
    if isinstance(inner, dict):
        for child in inner.values():
            lighten(child)
    return command


class _Light:
    """What typer calls with a parameter's raw value. Raises BadParameter."""

    def __init__(self, kind: Any, info: Any) -> None:
        self._kind = kind
        self._parser = info.parser
        self._minimum, self._maximum = info.min, info.max

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        many = param.multiple or param.nargs == -1
        if value is None:
            return () if many else None
        try:
            return [self._one(item) for item in value] if many else self._one(value)
        except typer.BadParameter as exc:
            raise typer.BadParameter(exc.message, ctx=ctx, param=param) from exc

    def _one(self, value: Any) -> Any:
        if self._parser:
            return self._parser(value)
        if self._kind is bool:
            return self._boolean(value)
        try:
            made = self._kind(value)
        except ValueError as exc:
            raise typer.BadParameter(f"{value!r} is not {self._allowed()}") from exc
        if (self._minimum is not None and made < self._minimum) or (self._maximum is not None and made > self._maximum):
            raise typer.BadParameter(f"{made} is out of range: {self._minimum} to {self._maximum or 'any'}")
        return made

    def _boolean(self, value: Any) -> bool:
        word = str(value).lower()
        if word not in _WORDS:
            raise typer.BadParameter(f"{value!r} is not true or false")
        return _WORDS[word]

    def _allowed(self) -> str:
        if _is_enum(self._kind):
            return "one of " + ", ".join(str(member.value) for member in self._kind)
        return "a whole number" if self._kind is int else "a number"


def _element(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is list else annotation


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)
