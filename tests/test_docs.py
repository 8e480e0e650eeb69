"""The documentation says what the program does: every command line in it can be parsed, every file it links to exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from drctl.cli.app import COMMANDS, arrange, load
from drctl.cli.config import load_config
from drctl.cli.context import Context, Settings
from drctl.cli.group_file import read_groups

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Design and research name commands of other tools, and such as are to come.
PLANNED = {"design.md", "prior-art.md"}
#: For what a reader puts in: most words in capitals are as good a name as any.
STAND_INS = {"WHAT": "rpo", "CODE": "35", "DURATION": "5m", "RATE": "1 MiB", "SIZE": "1 MiB", "TIME": "1h"}
GLOBAL = {"--config": 1, "--home": 1, "--debug": 0}


def code_blocks(text: str) -> list[str]:
    fenced = re.findall(r"```(?:\w*)\n(.*?)```", text, re.DOTALL)
    return fenced + re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    """Lines of code blocks that run drctl; placeholders in brackets are no command lines."""
    text = page.read_text("utf-8")
    lines = [
        line.strip().removeprefix("$ ").removeprefix("sudo ")
        for block in code_blocks(text)
        for line in block.splitlines()
    ]
    inline = re.findall(r"`(drctl [^`]+)`", text)
    found = [line for line in [*lines, *inline] if line.startswith("drctl ")]
    return [line for line in found if not re.search(r"[\[\]…|<>]|\.\.\.|python", line.split(" | ")[0])]


def cases() -> list[tuple[str, str]]:
    return [
        (page.name, line)
        for page in PAGES
        if page.name not in PLANNED and "facts" not in page.name
        for line in command_lines(page)
    ]


@pytest.mark.parametrize(("page", "line"), cases())
def test_command_lines_can_be_parsed(page: str, line: str) -> None:
    words = [word for word in arrange(shlex.split(line.split(" | ")[0], comments=True)[1:]) if word != "--debug"]
    while words and words[0].split("=")[0] in GLOBAL:
        words = words[1 if "=" in words[0] else 2 :]
    if not words or words in (["--help"], ["--version"]):
        return
    name, *rest = words
    assert name in COMMANDS, f"{page}: {line}"
    command = load(name)
    while hasattr(command, "commands"):
        if not rest:
            return
        assert rest[0] in command.commands, f"{page}: {line}"
        command, rest = command.commands[rest[0]], rest[1:]
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= options | {"--help"}, f"{page}: {line}"
    if not rest:
        return
    try:
        command.make_context(name, [STAND_INS.get(word, word) for word in rest])
    except typer.BadParameter as exc:
        # Prose names a command by its parts: `drctl plan run PLAN --dry-run`.
        if type(exc).__name__ != "MissingParameter" or not any(word.isupper() for word in rest):
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def toml_blocks(page: str) -> list[str]:
    return re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)


def test_the_documented_configuration_is_one(tmp_path: Path) -> None:
    main, group = toml_blocks("configuration.md")
    (tmp_path / "groups").mkdir()
    (tmp_path / "drctl.toml").write_text(main)
    (tmp_path / "groups/web.toml").write_text(group)
    config = Context(Settings(tmp_path)).config
    assert [host.name for host in config.hosts] == ["alpha-1", "beta-1"]
    assert read_groups(config)["web"].machines == ("db", "front")


def test_documented_defaults_are_the_defaults(tmp_path: Path) -> None:
    main, group = toml_blocks("configuration.md")
    places = []
    for name in ("written", "left-out"):
        place = tmp_path / name
        (place / "groups").mkdir(parents=True)
        (place / "drctl.toml").write_text(main if name == "written" else main.partition("[defaults]")[0])
        text = group if name == "written" else re.sub(r"\[retention\].*?\n\n", "", group, flags=re.DOTALL)
        (place / "groups/web.toml").write_text(text.replace('checkpoint_interval = "5s"\n', ""))
        places.append(load_config(place))
    assert places[0].defaults == places[1].defaults
    assert read_groups(places[0]) == read_groups(places[1])


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs/configuration.md").read_text("utf-8")
    sources = [ROOT / "drctl/cli/config.py", ROOT / "drctl/cli/group_file.py"]
    keys = {
        key
        for source in sources
        for key in re.findall(
            r'\.(?:text|choice|duration|size|strings|mapping|tables?)\(\s*"(\w+)"', source.read_text()
        )
    }
    assert {"name", "journal_limit", "test_networks", "ladder"} <= keys
    for key in keys:
        assert re.search(rf"\b{key}\b", text), key
