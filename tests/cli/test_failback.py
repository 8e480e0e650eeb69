"""A failback tells what it will do and about how much differs, stops for what is in the way, and goes on where it was."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from drctl.cli.protection import merge
from drctl.errors import ApplianceUnreachable, NotFound, OutOfSpace
from tests.cli.appliance import NOW, checkpoint

GIB = 2**30
DISKS = [
    {"number": number, "machine": name, "target": "vda", "size": GIB} for number, name in enumerate(("db", "front"))
]
SPEC = {
    "name": "web",
    "source": "beta",
    "recovery": "alpha",
    "source_host": "b1",
    "recovery_host": "a1",
    "machines": ["db"],
}


def old(name: str, way: str = "move") -> dict[str, Any]:
    return {"number": 0, "name": name, "path": f"/i/{name}", "format": "raw", "size": GIB, "used": GIB, "way": way}


class Sites:
    """beta reigns, alpha has come back with the old disks of one of two machines."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.alpha, self.beta = world.alpha, world.beta
        self.told = {
            "group": "web",
            "generation": 2,
            "protected": False,
            "phase": None,
            "spec": SPEC,
            "disks": DISKS,
            "newest": 12,
            "reasons": [],
        }
        self.found = {
            "group": "web",
            "generation": 1,
            "failback": None,
            "old": [old("db.vda")],
            "left_out": [{"name": "front.vda", "reason": "nothing of it is here"}],
            "machines": ["db"],
            "needed": 0,
            "free": GIB,
            "definition_version": 7,
            "reasons": [],
        }
        self.record = {
            "group": "web",
            "phase": "open",
            "generation": 3,
            "checkpoint": 13,
            "tag": "before-failback",
            "kept_until": NOW + 30 * 86400,
        }
        self.rows(("recovery", "mode", "failed-over", 2), ("source", "phase", "failed-over", 1))
        self.beta.replies |= {"failback.plan": lambda *_: self.told, "failback.protect": self.protect}
        self.alpha.replies |= {"failback.disks": lambda *_: self.found, "failback.prepare": lambda *_: self.record}
        ones, others = (base64.b64encode(bytes([n]) * 8 + bytes(16384 * 8 - 8)).decode() for n in (1, 2))
        self.beta.replies["failback.sample"] = {"seconds": 2.0, "samples": {"db.vda": ones}}
        self.alpha.replies["failback.sample"] = {"seconds": 3.0, "samples": {"db.vda": others}}

    def rows(self, beta: tuple[str, str, str, int], alpha: tuple[str, str, str, int]) -> None:
        for site, (role, key, state, generation) in ((self.beta, beta), (self.alpha, alpha)):
            row = {"group": "web", "role": role, key: state, "generation": generation, "spec": SPEC}
            site.replies["group.list"] = [row]
            site.replies["group.picture"] = {
                "site": site.site,
                "host": site.host,
                "role": role,
                "state": state,
                "generation": generation,
                "machines": [],
            }

    def protect(self, params: dict[str, Any], _: Any) -> dict[str, Any]:
        self.rows(("source", "phase", "live", 3), ("recovery", "mode", "journal", 3))
        self.told |= {"protected": True, "phase": "live"}
        self.beta.replies["group.status"] = self.beta._source_status("web") | {"phase": "live"}
        self.alpha.checkpoints = [checkpoint(13, 900.0), checkpoint(14, 1.0)]
        self.alpha.replies["group.status"] = self.alpha._recovery_status("web") | {"failback": self.record}
        return {"group": "web", "generation": params["generation"], "phase": "syncing"}


@pytest.fixture
def sites(world) -> Sites:
    return Sites(world.applied())


def test_a_dry_run_tells_every_step_and_an_estimate_and_changes_nothing(sites) -> None:
    result = sites.world("failback", "web", "--dry-run")
    assert result.code == 0
    for line in (
        "about 1.0 GiB of 2.0 GiB differ (a sample of 1.0 GiB was compared",
        "would seal db.vda (1.0 GiB) at alpha/a1 as it is now: moved into the replica, no copy",
        "would keep that as checkpoint before-failback for 30 days",
        "would send front.vda in full: nothing of it is here",
        "would remove the old db at alpha/a1",
        "would replicate web from beta/b1 to alpha/a1 under generation 3, sending only what differs",
    ):
        assert line in result.err
    assert not sites.alpha.called("failback.prepare")
    assert not sites.beta.called("failback.protect")
    (asked,) = sites.alpha.called("failback.sample")
    assert [disk["machine"] for disk in asked["disks"]] == ["db"]
    assert asked["key"] == sites.beta.called("failback.sample")[0]["key"]


def test_a_plan_as_json(sites) -> None:
    plan = sites.world("failback", "web", "--dry-run", "-o", "json").json
    assert plan["plan"]["generation"] == 3
    # One block of the 16,384 of the sample, and all of the disk that has no old one.
    assert plan["estimate"]["differing_bytes"] == GIB + 65536
    assert plan["estimate"]["seconds"] == 3.0


def test_an_estimate_that_can_not_be_had_does_not_stop_it(sites) -> None:
    sites.alpha.replies["failback.sample"] = ApplianceUnreachable("gone")
    result = sites.world("failback", "web", "--dry-run")
    assert result.code == 0
    assert "how much differs is not known: gone" in result.err


def test_it_is_sealed_first_and_then_replicated(sites) -> None:
    result = sites.world("failback", "web", "--yes", "--wait", "-o", "json")
    assert result.code == 0
    (prepared,) = sites.alpha.called("failback.prepare")
    assert (prepared["generation"], prepared["number"], prepared["disks"]) == (3, 12, DISKS)
    (protected,) = sites.beta.called("failback.protect")
    assert (protected["generation"], protected["definition_version"]) == (3, 7)
    assert (result.json["live"], result.json["checkpoint"]) == (True, 14)
    assert "checkpoint #13, tag:before-failback" in result.err
    assert not sites.alpha.called("failback.sample"), "nobody asked for an estimate"


def test_given_again_it_says_so(sites) -> None:
    sites.world("failback", "web", "--yes", "--wait")
    result = sites.world("failback", "web", "--yes", "--wait")
    assert result.code == 0
    assert "replicated from beta/b1 to alpha/a1 already" in result.err
    assert len(sites.beta.called("failback.protect")) == 1


def test_it_goes_on_with_what_was_begun(sites) -> None:
    """The old disks are sealed under generation 3, and the command ended there."""
    sites.found |= {"failback": sites.record, "generation": 3, "old": [], "reasons": ["the disks are gone"]}
    sites.rows(("recovery", "mode", "failed-over", 2), ("recovery", "mode", "journal", 3))
    result = sites.world("failback", "web", "--yes")
    assert result.code == 0
    assert "will go on with the failback that is open at alpha/a1" in result.err
    assert sites.alpha.called("failback.prepare")[0]["generation"] == 3
    assert sites.beta.called("failback.protect")[0]["generation"] == 3


def test_an_older_failback_is_none_that_was_begun(sites) -> None:
    sites.found |= {"failback": sites.record | {"generation": 2}, "generation": 5}
    sites.world("failback", "web", "--yes")
    assert sites.alpha.called("failback.prepare")[0]["generation"] == 6


def test_what_stands_in_the_way_of_either_side_is_told_at_once(sites) -> None:
    sites.told["reasons"] = ["first drctl commit web"]
    sites.found["reasons"] = ["db is running"]
    result = sites.world("failback", "web", "--yes")
    assert result.code == 42
    assert "in the way: first drctl commit web" in result.err
    assert "in the way: db is running" in result.err
    assert not sites.alpha.called("failback.prepare")


def test_a_step_that_fails_leaves_the_other_half_alone(sites) -> None:
    sites.alpha.replies["failback.prepare"] = OutOfSpace("the old disks need 2 GiB")
    assert sites.world("failback", "web", "--yes").code == 32
    assert not sites.beta.called("failback.protect")


def test_a_home_that_does_not_answer_is_named(sites) -> None:
    sites.alpha.down = True
    assert sites.world("failback", "web", "--yes").code == 22


def test_a_group_that_was_never_moved_has_no_way_back(world) -> None:
    group = world.applied()
    group.alpha.replies["failback.plan"] = NotFound("group", "web")
    result = group("failback", "web", "--yes")
    assert result.code == 12
    assert "was never moved" in result.err


def test_apply_leaves_a_group_turned_around_as_it_is(sites) -> None:
    """The file says alpha to beta; what is sent is the same group in the direction it has now."""
    sites.rows(("source", "phase", "live", 3), ("recovery", "mode", "journal", 3))
    result = sites.world("apply", "--dry-run", "-o", "json")
    assert result.code == 0
    sent = {change["role"]: change["host"] for change in result.json["changes"]}
    assert sent == {"source": "b1", "recovery": "a1"}


@pytest.mark.parametrize(
    ("source", "recovery", "half"),
    [
        ({"failback": {"phase": "sealing"}}, {"mode": "failed-over"}, True),
        (None, {"mode": "journal", "failback": {"phase": "open", "checkpoint": 13}}, True),
        (None, {"failback": {"phase": "open", "checkpoint": 13}, "checkpoints": {"newest": {"number": 13}}}, True),
        # The site that reigned is lost again: what has come over since tells that it was whole.
        (None, {"failback": {"phase": "open", "checkpoint": 13}, "checkpoints": {"newest": {"number": 14}}}, False),
        ({"phase": "live"}, {"failback": {"phase": "open", "checkpoint": 13}}, False),
        ({"failback": {"phase": "open"}}, {"mode": "journal"}, False),
    ],
)
def test_one_that_is_half_done_is_told(source, recovery, half) -> None:
    assert ("half done" in merge("web", source, recovery, NOW)["reason"]) is half


def test_the_status_tells_of_the_old_disks(sites) -> None:
    sites.protect({"generation": 3}, None)
    result = sites.world("status", "web")
    assert "checkpoint #13, tag:before-failback, kept until" in result.out
