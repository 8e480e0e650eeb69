"""The command line against a real control socket: the client, the lines between, errors and progress coming back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from drctl.appliance.control import ControlServer
from drctl.cli.app import run
from drctl.errors import OutOfSpace
from tests.cli.appliance import FakeAppliance, checkpoint, machine, recovery
from tests.cli.conftest import CONFIG, WEB

METHODS = [
    "appliance.info", "appliance.history", "machine.list", "group.put", "group.remove", "group.list", "group.status",
    "replicate.start", "replicate.pause", "replicate.stop", "checkpoint.list", "checkpoint.create", "checkpoint.verify",
    "test.start", "test.list", "test.stop", "failover.plan", "failover.run", "commit",
]  # fmt: skip


def serve(appliance: FakeAppliance, path: Path) -> ControlServer:
    def handler(method: str):
        return lambda params, progress: appliance.call(method, params, on_progress=progress)

    server = ControlServer(path, {method: handler(method) for method in METHODS})
    server.start()
    return server


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeAppliance, FakeAppliance]]:
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups/web.toml").write_text(WEB)
    (tmp_path / "drctl.toml").write_text(CONFIG.replace("/nowhere", str(tmp_path)))
    monkeypatch.setenv("DRCTL_CONFIG", str(tmp_path))
    alpha, beta = FakeAppliance("a1", "alpha"), FakeAppliance("b1", "beta")
    alpha.machines = [machine("db"), machine("front")]
    beta.checkpoints = [checkpoint(11, 9.0), checkpoint(12, 4.0)]
    servers = [serve(alpha, tmp_path / "a1.sock"), serve(beta, tmp_path / "b1.sock")]
    yield alpha, beta
    for server in servers:
        server.stop()


def test_from_apply_to_commit(sites, capsys: pytest.CaptureFixture[str]) -> None:
    alpha, beta = sites

    def run_failover(params, progress):
        progress({"step": "machine", "machine": "db", "state": "started"})
        beta.failovers = [recovery("failover", "web")]
        return beta.failovers[0]

    def start(params, progress):
        alpha.phases["web"] = "live"
        beta.checkpoints.append(checkpoint(13, 0.0))
        return {"group": "web", "phase": "live"}

    beta.replies["failover.run"] = run_failover
    alpha.replies["replicate.start"] = start
    for line in (
        "apply --yes",
        "replicate start web --yes --wait",
        "status",
        "test start web --yes",
        "test stop t1 --yes",
    ):
        assert run(line.split()) == 0, line
    assert run(["failover", "web", "--source-is-down", "drill", "--confirm", "web"]) == 0
    assert "  db: switched on\n" in capsys.readouterr().err
    assert run(["commit", "web", "--yes"]) == 0
    assert alpha.groups["web"]["machines"] == ["db", "front"]


def test_an_error_comes_back_as_it_was_raised(sites, capsys: pytest.CaptureFixture[str]) -> None:
    alpha, _ = sites
    alpha.replies["group.put"] = OutOfSpace("no room for a ring", hint="make room in /run", free=3)
    assert run(["apply", "--yes"]) == 32
    assert capsys.readouterr().err.endswith("drctl: no room for a ring\n  what to do: make room in /run\n")


def test_a_method_that_an_older_appliance_lacks(sites, capsys: pytest.CaptureFixture[str]) -> None:
    alpha, _ = sites
    assert run(["apply", "--yes"]) == 0
    alpha.phases["web"] = "paused"
    assert run(["replicate", "resume", "web", "--yes"]) == 11
    assert "of different versions" in capsys.readouterr().err


def test_the_source_site_is_gone(sites, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["apply", "--yes"]) == 0
    (tmp_path / "a1.sock").unlink()
    assert run(["status"]) == 3
    assert (
        f"no answer from a1: no appliance answers at {tmp_path}/a1.sock: No such file or directory"
        in capsys.readouterr().err
    )
    assert run(["failover", "web", "--source-is-down", "gone", "--confirm", "web"]) == 0
    assert "WARNING" not in capsys.readouterr().err
