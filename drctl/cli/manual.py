"""The manual pages, made of what `--help` is made of: `python -m drctl.cli.manual DIRECTORY`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from drctl import __version__
from drctl.cli.app import COMMANDS, app, load
from drctl.cli.codes import all_codes
from drctl.cli.help_text import argument_name, usage_name
from drctl.cli.plans.manual_plan import plan_page

_FILES = (
    ("drctl.toml", "Sites, hosts and defaults; see docs/configuration.md for every key."),
    ("groups/NAME.toml", "One protection group each, beside drctl.toml."),
    ("plans/NAME.toml", "One plan each; see docs/plans.md for every key."),
    ("runs/RUN.jsonl", "The record of one run of a plan."),
    ("/var/lib/drctl", "The home of this host's appliance."),
    ("~/.local/state/drctl/errors.log", "Tracebacks of unexpected errors."),
)
_ENVIRONMENT = (
    ("DRCTL_CONFIG", "The configuration, a file or a directory, where --config is not given."),
    ("DRCTL_HOME", "The home of the local appliance, where --home is not given."),
    ("NO_COLOR", "No colours, whatever its value."),
)


def pages() -> dict[str, str]:
    """File name → text of every manual page."""
    program = typer.main.get_command(app)
    made = {"drctl.1": _overview(program)}
    for name, entry in COMMANDS.items():
        made[f"drctl-{name}.1"] = (
            "\n".join([*_head(f"drctl-{name}", entry.summary), *_command(load(name), ["drctl", name])]) + "\n"
        )
    made["drctl-plan.5"] = plan_page(__version__, _escape)
    return made


def _overview(program: Any) -> str:
    lines = [*_head("drctl", "disaster recovery for virtual machines"), *_command(program, ["drctl"], nested=False)]
    lines.append(".SH COMMANDS")
    for name, entry in COMMANDS.items():
        lines += [".TP", f".BR drctl\\-{_escape(name)} (1)", _escape(entry.summary)]
    lines += [".SH EXIT STATUS", "A code that is not listed is a failure."]
    for code in all_codes():
        lines += [".TP", f".B {code.code} {_escape(code.slug)}", _escape(code.meaning), ".br", _escape(code.advice)]
    for title, pairs in (("FILES", _FILES), ("ENVIRONMENT", _ENVIRONMENT)):
        lines.append(f".SH {title}")
        for name, text in pairs:
            lines += [".TP", f".I {_escape(name)}", _escape(text)]
    return "\n".join(lines) + "\n"


def _head(title: str, summary: str) -> list[str]:
    text = _escape(summary.rstrip("."))
    return [
        '.\\" Made by `make man` from the commands; do not edit.',
        f'.TH "{title.upper()}" "1" "" "drctl {__version__}" "drctl"',
        ".SH NAME",
        f"{_escape(title)} \\- {text[0].lower() + text[1:]}",
    ]


def _command(command: Any, path: list[str], *, nested: bool = True) -> Iterator[str]:
    verbs = dict(command.commands) if nested and hasattr(command, "commands") else {}
    if not verbs:
        yield from [".SH SYNOPSIS", *_synopsis(command, path)]
    yield ".SH DESCRIPTION"
    yield from _text(command.help)
    yield from _parameters(command, ".SH")
    yield from _examples(command, ".SH")
    for name, verb in verbs.items():
        yield from _verb(verb, [*path, name])


def _verb(command: Any, path: list[str]) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, verb in command.commands.items():
            yield from _verb(verb, [*path, name])
        return
    yield f'.SH "{_escape(" ".join(path)).upper()}"'
    yield from _synopsis(command, path)
    yield ".PP"
    yield from _text(command.help)
    yield from _parameters(command, ".SS")
    yield from _examples(command, ".SS")


def _synopsis(command: Any, path: list[str]) -> list[str]:
    arguments = [usage_name(param) for param in command.params if param.param_type_name == "argument"]
    rest = ["COMMAND", "[ARGUMENTS]"] if hasattr(command, "commands") else arguments
    return [f".B {_escape(' '.join(path))}", _escape(" ".join(["[OPTIONS]", *rest]))]


def _parameters(command: Any, heading: str) -> Iterator[str]:
    # Names and helps are ours; how typer decorates them differs from version to version.
    if command.params:
        yield f"{heading} {'OPTIONS' if heading == '.SH' else 'Options'}"
    for param in command.params:
        default = param.default
        value = getattr(default, "value", default)
        shown = f" Default: {value}." if isinstance(value, str) and value else ""
        yield from [".TP", f".B {_escape(_name(param))}", _escape(f"{param.help}{shown}")]


def _name(param: Any) -> str:
    if param.param_type_name == "argument":
        return argument_name(param)
    names = ", ".join(param.opts) + (f" / {', '.join(param.secondary_opts)}" if param.secondary_opts else "")
    return f"{names} {param.metavar}" if param.metavar else names


def _examples(command: Any, heading: str) -> Iterator[str]:
    epilog = inspect.cleandoc(command.epilog or "").removeprefix("\b\n")
    if epilog.startswith("Examples:"):
        yield f"{heading} {'EXAMPLES' if heading == '.SH' else 'Examples'}"
        yield ".nf"
        yield from (_escape(line.strip()) for line in epilog.splitlines()[1:])
        yield ".fi"
    elif epilog:
        yield from [".PP", _escape(epilog)]


def _text(text: str | None) -> Iterator[str]:
    for number, paragraph in enumerate(inspect.cleandoc(text or "").split("\n\n")):
        if number:
            yield ".PP"
        yield _escape(" ".join(paragraph.split()))


def _escape(text: str) -> str:
    """The text for roff: backslashes and hyphens kept as they are, no line taken for a request."""
    safe = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{safe}" if safe.startswith((".", "'")) else safe


def write(directory: Path) -> None:
    """Write every page, and remove those of commands that are gone."""
    directory.mkdir(parents=True, exist_ok=True)
    made = pages()
    for old in directory.glob("drctl*.[15]"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (directory / name).write_text(text, "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
