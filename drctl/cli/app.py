"""The program: which command is in which module, and the one place where an error becomes an exit code.

Modules of commands are imported when one of their commands runs, so that `drctl --help` is there at once."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, MutableMapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import typer.core
import typer.main

from drctl.cli.coercion import lighten
from drctl.cli.context import Context, Settings
from drctl.cli.help_text import tidy
from drctl.cli.render import Screen
from drctl.errors import DrctlError

#: What typer raises for a wrong command line (click's ClickException, which typer carries under a private name).
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
#: Options of the program that may stand behind the command as well, and whether a value follows.
GLOBAL_OPTIONS = {"--config": True, "--home": True, "--debug": False}
_AGO = re.compile(r"-\d[\w.]*")


class Entry(NamedTuple):
    """A command of the first level: its module, and the line that the overview shows."""

    module: str
    summary: str


COMMANDS = {
    "init": Entry("init", "Write a configuration to start from."),
    "doctor": Entry("doctor", "Look for what would stand in the way of a recovery."),
    "status": Entry("status", "Show how every group is protected, and what could be recovered now."),
    "history": Entry("history", "Show what was changed, when and by whom."),
    "check": Entry("check", "Check one thing for a monitoring system."),
    "metrics": Entry("metrics", "Print an appliance's metrics for Prometheus."),
    "support-bundle": Entry("support_bundle", "Collect what helps to find out what went wrong."),
    "explain": Entry("explain", "Explain an exit code or an error's name."),
    "site": Entry("site", "Sites of the configuration."),
    "host": Entry("host", "Hypervisor hosts."),
    "esx": Entry("esx", "ESX hosts."),
    "vm": Entry("vm", "Machines on the hosts, and which of them are protected."),
    "certificate": Entry("certificate", "Certificates of the appliances."),
    "appliance": Entry("appliance", "The replication service of a host."),
    "link": Entry("link", "Links between sites, and how fast they may be used."),
    "apply": Entry("apply", "Make the appliances do what groups/*.toml says."),
    "group": Entry("group", "Protection groups."),
    "replicate": Entry("replicate", "Start, pause, resume and stop the replication of a group."),
    "resync": Entry("resync", "Compare both sides of a group, and send what differs."),
    "checkpoint": Entry("checkpoint", "Points in time that a group can be recovered to."),
    "restore": Entry("restore", "Single disks and files out of a checkpoint."),
    "test": Entry("test", "Boot a group in isolation, while replication goes on."),
    "failover": Entry("failover", "Recover a group at the other site after a disaster."),
    "switchover": Entry("switchover", "Move a group to its recovery site without loss."),
    "plan": Entry("plan", "Recipes of a recovery: check, show and run them."),
    "run": Entry("run", "Executions of plans, as their records tell them."),
    "commit": Entry("commit", "Make a failover or switchover final: its disks stand alone afterwards."),
    "rollback": Entry("rollback", "Undo a failover or switchover that is not committed."),
    "failback": Entry("failback", "Replicate a group back to the site that it came from."),
    "lab": Entry("lab", "Two real libvirt sites on this machine, to try everything."),
}


@cache
def load(name: str) -> Any:
    """The command, its module imported. Raises KeyError."""
    module = import_module(f"drctl.cli.{COMMANDS[name].module}")
    command = tidy(lighten(typer.main.get_command(module.app)))
    command.name = name
    return command


class _Commands(MutableMapping[str, Any]):
    """The commands by name; a value is imported when it is taken out."""

    def __getitem__(self, name: str) -> Any:
        return load(name)

    def __setitem__(self, name: str, command: Any) -> None:
        raise TypeError("commands are listed in COMMANDS")

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands are listed in COMMANDS")

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS


class LazyGroup(typer.core.TyperGroup):
    """The program as a group of commands whose overview needs none of their modules."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, rich_markup_mode=None, context_settings={"max_content_width": 110}
)


def _version(show: bool) -> None:
    if show:
        from drctl import __version__

        typer.echo(f"drctl {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Options of the program may stand behind the command too. Exit codes: drctl explain. Manual: man drctl."
)
def program(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Configuration; else $DRCTL_CONFIG, ./drctl.toml, ~/.config/drctl, /etc/drctl, the local appliance.",
        ),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Use the local appliance in DIR alone, without any configuration ($DRCTL_HOME)."
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Disaster recovery for virtual machines: replicate, checkpoint, recover."""
    if ctx.obj is None:
        ctx.obj = Context(Settings(config, home))
        ctx.call_on_close(ctx.obj.close)


def arrange(arguments: Sequence[str]) -> list[str]:
    """The arguments with the program's own options in front of the command, wherever they stood before `--`.

    A checkpoint like `-10m` gets a `now` in front, so that it is no option; no option begins with a digit."""
    front: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, _ = argument.partition("=")
        if argument == "--":
            rest += [argument, *waiting]
        elif name in GLOBAL_OPTIONS:
            front.append(argument)
            if GLOBAL_OPTIONS[name] and not equals:
                front += [value for value in [next(waiting, None)] if value is not None]
        else:
            rest.append(f"now{argument}" if _AGO.fullmatch(argument) else argument)
    return front + rest


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors shall be JSON: the command line may be too broken to be parsed."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(pair in (("--output", "json"), ("-o", "json")) for pair in pairs) or "--output=json" in arguments


def run(arguments: Sequence[str], context: Context | None = None) -> int:
    """Run one command line and return its exit code. Errors are told on stderr, once."""
    if next((word for word in arrange(arguments) if word in COMMANDS), "") == "check":
        return _run_check(arguments, context)
    as_json = wants_json(arguments)
    screen = context.screen if context else Screen()
    try:
        command = lighten(typer.main.get_command(app))
        code = command.main(arrange(arguments), prog_name="drctl", standalone_mode=False, obj=context)
    except DrctlError as exc:
        screen.fail(exc, as_json=as_json)
        return exc.exit_code
    except USAGE_ERROR as exc:
        return _usage(exc, screen, as_json=as_json)
    except (typer.Abort, KeyboardInterrupt):
        screen.say("interrupted; what an appliance has begun it goes on with, see: drctl status")
        return 130
    except SystemExit as exc:
        return _left(exc)
    except Exception as exc:  # the edge: whatever was not foreseen is told once and logged
        return _unexpected(exc, screen, debug="--debug" in arguments, as_json=as_json)
    return code if isinstance(code, int) else 0


def _run_check(arguments: Sequence[str], context: Context | None) -> int:
    """A monitoring plugin: whatever keeps it from looking is one line on stdout, and 3, which means UNKNOWN."""
    screen = context.screen if context else Screen()
    try:
        command = lighten(typer.main.get_command(app))
        code = command.main(arrange(arguments), prog_name="drctl", standalone_mode=False, obj=context)
    except DrctlError as exc:
        reason = f"{exc.message} ({exc.hint})" if exc.hint else exc.message
    except USAGE_ERROR as exc:
        reason = _usage_text(exc)
    except (typer.Abort, KeyboardInterrupt):
        reason = "interrupted"
    except SystemExit as exc:
        return _left(exc)
    except Exception as exc:  # the edge: a bug is UNKNOWN too, and logged
        _log(traceback.format_exc())
        reason = f"unexpected {type(exc).__name__}: {exc}"
    else:
        return code if isinstance(code, int) else 0
    screen.line(f"DRCTL UNKNOWN: {' '.join(reason.split()).replace('|', '/')}")
    return 3


def _usage_text(error: Any) -> str:
    return str(error.format_message())


def _left(end: SystemExit) -> int:
    """The code when typer itself ends the program: 141 (128 + SIGPIPE) when the reader of our output has left.

    With `| head` that happens; typer makes an exit with 1 of it."""
    if isinstance(end.__context__, BrokenPipeError):
        # What is still in the buffer can be told to nobody, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return end.code if isinstance(end.code, int) else 1


def _usage(error: Any, screen: Screen, *, as_json: bool) -> int:
    if as_json:
        usage = DrctlError(error.format_message(), hint="see: drctl --help")
        screen.say(_json_line(usage.as_dict() | {"error": "usage", "exit_code": error.exit_code}))
    else:
        error.show()
    return int(error.exit_code)


def _json_line(fields: dict[str, Any]) -> str:
    import json

    return json.dumps(fields)


def _unexpected(error: Exception, screen: Screen, *, debug: bool, as_json: bool) -> int:
    text = "".join(traceback.format_exception(error))
    hint = "this is a bug in drctl; add --debug to see where"
    if debug:
        screen.say(text)
    elif log := _log(text):
        hint = f"this is a bug in drctl; the traceback is in {log}"
    screen.fail(DrctlError(f"unexpected {type(error).__name__}: {error}", hint=hint), as_json=as_json)
    return 1


def _log(text: str) -> Path | None:
    """Append to the user's log, if there can be one."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path(os.environ.get("HOME", "/")) / ".local/state")
    file = state / "drctl" / "errors.log"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(UTC).isoformat()} drctl {' '.join(sys.argv[1:])}\n{text}\n")
    except OSError:
        return None
    return file


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
