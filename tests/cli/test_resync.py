"""Resync: a dry run tells what differs and what it costs; the real one waits for the first checkpoint after it."""

from __future__ import annotations

import json

import pytest

from tests.cli.appliance import checkpoint

FOUND = {
    "total_bytes": 2**30,
    "done_bytes": 2**30,
    "read_bytes": 2**29,
    "differing_bytes": 12 * 4096,
    "crossing_bytes": 300_000,
    "seconds": 2.5,
}


@pytest.fixture
def web(world):
    return world.applied("live")


def survey(params, progress):
    progress({**FOUND, "done_bytes": 2**28})
    return {"group": "web", **FOUND}


def test_a_dry_run_tells_what_would_cross(web) -> None:
    web.alpha.replies["resync"] = survey
    result = web("resync", "web", "--dry-run")
    assert result.code == 0
    assert "web: 48.0 KiB of 1.0 GiB differ; a resync would send 293.0 KiB and take about 2.5 s or more" in result.out
    assert web.alpha.called("resync")[0]["dry_run"] is True
    assert "256.0 MiB of 1.0 GiB" in result.err


def test_a_dry_run_as_json(web) -> None:
    web.alpha.replies["resync"] = survey
    result = web("resync", "web", "--dry-run", "-o", "json")
    document = json.loads(result.out)
    assert document["kind"] == "resync-plan"
    assert document["crossing_bytes"] == 300_000
    assert document["seconds"] == 2.5


class Pass:
    """The group is `catching-up` for some looks, then live with a new checkpoint."""

    def __init__(self, world) -> None:
        self.world = world
        self.status = world.alpha.call("group.status", {"group": "web"})
        world.alpha.replies["resync"] = self.begin
        world.alpha.replies["group.status"] = self
        self.left = 0

    def begin(self, params, progress):
        assert not params.get("dry_run")
        self.left = 3
        return {"group": "web", "phase": "live"}

    def __call__(self, params, progress):
        if not self.left:
            return self.status
        self.left -= 1
        if not self.left:
            self.world.beta.checkpoints.append(checkpoint(99, 0.0))
            return self.status
        sync = {"mode": "full", "done_bytes": 2**29, "total_bytes": 2**30, "eta": 9.0}
        return self.status | {
            "phase": "catching-up",
            "sync": sync | {"matched_bytes": 2**29 - 4096, "sent_bytes": 4096},
        }


def test_a_resync_waits_for_its_checkpoint(web) -> None:
    Pass(web)
    result = web("resync", "web", "--yes")
    assert result.code == 0
    assert result.out.startswith("web is live again; newest checkpoint #99 at ")
    assert "512.0 MiB of 1.0 GiB compared, 512.0 MiB equal, 4.0 KiB sent, 9.0 s left" in result.err


def test_a_resync_asks_first(web) -> None:
    result = web("resync", "web", typed="n\n")
    assert result.code == 41
    assert "no checkpoint is made until then" in result.err
    assert not web.alpha.called("resync")


@pytest.mark.parametrize(("phase", "verb"), [("paused", "resume"), ("unprotected", "start")])
def test_what_is_not_replicated_is_not_compared(web, phase, verb) -> None:
    web.alpha.phases["web"] = phase
    for extra in (["--dry-run"], ["--yes"]):
        result = web("resync", "web", *extra)
        assert result.code == 12
        assert f"drctl replicate {verb} web" in result.err
        assert not web.alpha.called("resync")
