"""The command lines of the operator's pages run, against two sites in memory: none is a mistake or meets a bug."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("concepts.md", "operations.md", "troubleshooting.md", "security.md")
#: What the appliances of these tests don't know; other tests run these commands.
ELSEWHERE = ("drctl plan run", "drctl run list", "drctl failback", "drctl appliance upgrade", "drctl certificate")


def lines() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL):
            found += [(page, line.strip()) for line in block.splitlines() if line.strip().startswith("drctl ")]
    return found


def test_there_are_some() -> None:
    assert len(lines()) > 30
    assert {page for page, _ in lines()} == set(PAGES)


@pytest.mark.parametrize(("page", "line"), lines())
def test_it_runs(world, tmp_path, monkeypatch, page: str, line: str) -> None:
    if line.startswith(ELSEWHERE):
        pytest.skip("the appliances here don't know it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if "apply" not in line:
        world.applied()
    words = shlex.split(line, comments=True)[1:]
    typed = "web" if words[0] in ("failover", "commit") else "y"
    result = world(*words, typed=typed)
    # 3: done with warnings, 11: a checkpoint that these sites lack, 42: a finding of doctor. No bug, no wrong command.
    assert result.code in (0, 3, 11, 12, 14, 15, 40, 42), (result.code, result.err)
    assert "this is a bug" not in result.err
