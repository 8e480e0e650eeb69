"""Every command: help, examples that can be parsed, the options its kind must have, its place in the manual."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from drctl.cli import manual
from drctl.cli.app import COMMANDS, app, arrange, load, wants_json
from drctl.cli.codes import all_codes, error_classes

MAN = Path(__file__).parents[2] / "man"

READING = {
    "status", "history", "explain", "doctor", "site list", "site show", "host list", "host show", "vm list", "vm show",
    "appliance list", "group list", "group show", "checkpoint list", "checkpoint show", "checkpoint verify", "test list",
    "lab status", "certificate list", "plan list", "plan validate", "plan show", "run list", "run show", "run verify", "run report", "link show", "link limit show", "checkpoint serve",
}  # fmt: skip
CHANGING = {
    "init", "apply", "group create", "group delete", "replicate start", "replicate pause", "replicate resume",
    "replicate stop", "resync", "checkpoint create", "checkpoint tag", "checkpoint bisect", "test start", "test stop", "failover", "switchover", "commit",
    "rollback", "failback", "appliance build", "appliance install", "appliance upgrade", "appliance uninstall", "appliance bundle", "certificate renew", "certificate seal", "certificate unseal", "plan run", "run resume", "lab up", "lab down",
    "host evacuate", "host return", "link limit set", "link limit clear", "checkpoint export", "restore disk", "restore files",
}  # fmt: skip
#: For other programs: a service, a monitoring plugin and a scraper know no --output.
SERVICE = {"appliance run", "check", "metrics", "plan schema", "support-bundle", "esx capture"}


def commands() -> dict[str, object]:
    def leaves(name: str, command) -> dict[str, object]:
        found = {}
        for verb, inner in getattr(command, "commands", {}).items():
            found |= leaves(f"{name} {verb}", inner)
        return found or {name: command}

    found: dict[str, object] = {}
    for name in COMMANDS:
        found |= leaves(name, load(name))
    return found


def options(command) -> set[str]:
    return {name for param in command.params for name in param.opts}


def examples(command) -> list[str]:
    return [line.strip() for line in inspect.cleandoc(command.epilog or "").splitlines() if line.startswith("  drctl ")]


def test_every_command_is_of_a_known_kind() -> None:
    assert set(commands()) == READING | CHANGING | SERVICE


@pytest.mark.parametrize("name", sorted(READING | CHANGING | SERVICE))
def test_help_says_what_it_does_and_gives_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"])
    assert result.exit_code == 0
    command = commands()[name]
    first = (command.help or "").splitlines()[0]
    assert first.endswith(".")
    assert first[:30] in result.output
    assert examples(command), "no example"
    assert "Examples:" in result.output


@pytest.mark.parametrize("name", sorted(READING | CHANGING | SERVICE))
def test_every_parameter_has_a_help_and_every_argument_a_name(name: str) -> None:
    for param in commands()[name].params:
        assert param.help, param.name
        if param.param_type_name == "argument":
            assert param.metavar, param.name
            assert re.fullmatch(r"[A-Z]+(\.\.\.)?", param.metavar)


@pytest.mark.parametrize("name", sorted(READING | CHANGING | SERVICE))
def test_help_shows_arguments_by_their_names_and_no_python(name: str) -> None:
    shown = CliRunner().invoke(app, [*name.split(), "--help"]).output
    assert not re.search(r"list\[|<(str|int|float|bool|Path|path)>|\{[A-Z]|\.\.\.\.|\.\.\.\]?\.\.\.", shown), shown
    for param in commands()[name].params:
        if param.param_type_name == "argument":
            more = r"\.\.\." if param.nargs == -1 else ""
            word = param.metavar.removesuffix("...") + more
            word = word if param.required else rf"\[{word}\]"
            assert re.search(rf"^Usage:.* {word}( |$)", shown, re.M | re.S), shown


@pytest.mark.parametrize("name", sorted(READING | CHANGING | SERVICE))
def test_the_examples_can_be_parsed(name: str) -> None:
    for line in examples(commands()[name]):
        words = shlex.split(line.split(" | ")[0])
        assert words[0] == "drctl"
        assert words[1 : 1 + len(name.split())] == name.split()
        rest = arrange(words[1 + len(name.split()) :])
        rest = [word for word in rest if word not in ("--home", "/var/lib/drctl")]
        commands()[name].make_context(name, rest)


@pytest.mark.parametrize("name", sorted(READING))
def test_reading_commands_give_json(name: str) -> None:
    assert "--output" in options(commands()[name])


@pytest.mark.parametrize("name", sorted(CHANGING))
def test_changing_commands_can_be_tried_and_need_no_terminal(name: str) -> None:
    assert {"--dry-run", "--yes"} <= options(commands()[name])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_overview_says_what_the_command_says(name: str) -> None:
    command = load(name)
    if hasattr(command, "commands"):
        assert command.help == COMMANDS[name].summary
    shown = CliRunner().invoke(app, ["--help"]).output
    assert name in shown
    assert COMMANDS[name].summary[:40] in shown


def test_the_manual_in_the_repository_is_what_the_commands_say() -> None:
    made = manual.pages()
    assert {path.name for path in MAN.glob("*.[15]")} == set(made), "run: make man"
    for name, text in made.items():
        assert (MAN / name).read_text("utf-8") == text, f"{name} is old; run: make man"


def test_the_manual_has_every_exit_code() -> None:
    page = manual.pages()["drctl.1"].replace("\\-", "-")
    for code in all_codes():
        assert f".B {code.code} {code.slug}\n" in page


def test_roff_takes_no_text_for_a_request() -> None:
    assert manual._escape(".so evil -x \\n") == "\\&.so evil \\-x \\en"


def test_codes_are_unique_but_for_subclasses() -> None:
    for one in error_classes():
        for other in error_classes():
            related = issubclass(one, other) or issubclass(other, one)
            assert one.slug == other.slug if one is other else one.slug != other.slug
            assert related or one.exit_code != other.exit_code
    others = [code.code for code in all_codes() if code.code not in {cls.exit_code for cls in error_classes()}]
    assert len(others) == len(set(others))


def test_options_of_the_program_may_stand_behind_the_command() -> None:
    assert arrange(["status", "web", "--config", "x", "--debug"]) == ["--config", "x", "--debug", "status", "web"]
    assert arrange(["status", "--home=/h", "-w"]) == ["--home=/h", "status", "-w"]
    assert arrange(["x", "--", "--config", "y"]) == ["x", "--", "--config", "y"]
    assert arrange(["status", "--config"]) == ["--config", "status"]


def test_an_age_is_no_option() -> None:
    assert arrange(["checkpoint", "show", "web", "-1h30m"]) == ["checkpoint", "show", "web", "now-1h30m"]
    assert arrange(["-y", "--last", "-k"]) == ["-y", "--last", "-k"]


def test_json_is_wanted_in_each_spelling() -> None:
    assert wants_json(["status", "--output", "json"])
    assert wants_json(["status", "-o", "json"])
    assert wants_json(["status", "--output=json"])
    assert not wants_json(["status", "json"])


def test_completion_knows_the_groups_of_the_configuration(world) -> None:
    from drctl.cli.options import complete_group

    context = typer.Context(typer.main.get_command(app))
    context.params["config"] = str(world.directory)
    assert complete_group(context, "") == ["web"]
    assert complete_group(context, "x") == []
    context.params["config"] = str(world.directory / "absent")
    assert complete_group(context, "") == []


def test_completion_of_commands_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner(env={"_DRCTL_COMPLETE": "complete_bash", "COMP_WORDS": "drctl checkpoint ", "COMP_CWORD": "2"})
    result = runner.invoke(app, [], prog_name="drctl")
    assert {"list", "show", "create", "tag", "verify"} <= set(result.output.split())
