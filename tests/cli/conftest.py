"""Two sites with an appliance each in memory, and a command line to speak to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drctl.cli.app import run
from drctl.cli.config import load_config
from drctl.cli.context import Context
from drctl.cli.render import Screen
from tests.cli.appliance import FakeAppliance, FakeClock, checkpoint, machine

CONFIG = """
[[site]]
name = "alpha"
[[site]]
name = "beta"

[[host]]
name = "a1"
site = "alpha"
control = "unix:/nowhere/a1.sock"
link = "127.0.0.1:7001"
[[host]]
name = "b1"
site = "beta"
control = "unix:/nowhere/b1.sock"
link = "127.0.0.1:7002"
"""
WEB = """\
name = "web"
source = "alpha"
recovery = "beta"
machines = ["db", "front"]
checkpoint_interval = "5s"

[networks]
lan = "lan-b"
"""


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class World:
    """A configuration on disk, two appliances, a clock. Calling it runs one command line."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.alpha, self.beta = FakeAppliance("a1", "alpha"), FakeAppliance("b1", "beta")
        self.clock = FakeClock()
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        (directory / "groups").mkdir()
        (directory / "drctl.toml").write_text(CONFIG)
        (directory / "groups" / "web.toml").write_text(WEB)
        self.alpha.machines = [machine("db"), machine("front"), machine("lonely")]
        self.beta.checkpoints = [checkpoint(10, 604.0), checkpoint(11, 9.0, tags=["upgrade"]), checkpoint(12, 4.0)]

    def context(self, *, interactive: bool = False, terminal: bool = False) -> Context:
        return Context(
            config=load_config(self.directory),
            clients={"a1": self.alpha, "b1": self.beta},
            screen=Screen(interactive=interactive, terminal=terminal),
            clock=self.clock,
        )

    def __call__(self, *arguments: str, typed: str | None = None, terminal: bool = False) -> Result:
        """Run `drctl ARGUMENTS`; `typed` is what somebody at a terminal answers, None: nobody can be asked."""
        import io

        self._monkeypatch.setattr("sys.stdin", io.StringIO(typed or ""))
        self._capsys.readouterr()
        code = run(arguments, self.context(interactive=typed is not None, terminal=terminal))
        out, err = self._capsys.readouterr()
        return Result(code, out, err)

    def applied(self, phase: str = "live") -> World:
        """The group is known to both sides, and in this phase."""
        assert self("apply", "--yes").code == 0
        self.alpha.phases["web"] = phase
        return self


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, capsys, monkeypatch)
