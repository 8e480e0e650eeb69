"""All the way home in one go: each part by what is left of it, told before, in order; interrupted, it goes on."""

from __future__ import annotations

from typing import Any

import pytest

from drctl.cli.failback_home import Stage, stages
from drctl.cli.inventory import Inventory, Place
from drctl.errors import StepFailed
from drctl.model.site import Host, HostKind
from tests.cli.appliance import checkpoint, recovery
from tests.cli.test_failback import DISKS, Sites

BACK, SWITCH, COMMIT, PROTECT = Stage
ALL = [BACK, SWITCH, COMMIT, PROTECT]


def place(site: str, role: str, state: str, generation: int) -> Place:
    return Place("web", role, Host(f"{site[0]}1", site, HostKind.LIBVIRT, "", "", ""), generation, state, {})


@pytest.mark.parametrize(
    ("places", "left"),
    [
        ([place("beta", "recovery", "failed-over", 2), place("alpha", "source", "failed-over", 1)], ALL),
        ([place("beta", "recovery", "failed-over", 2), place("alpha", "recovery", "journal", 3)], ALL),
        ([place("beta", "source", "live", 3), place("alpha", "recovery", "journal", 3)], ALL),
        # Handed over, and booted nowhere.
        (
            [place("beta", "source", "failed-over", 3), place("alpha", "recovery", "journal", 3)],
            [SWITCH, COMMIT, PROTECT],
        ),
        ([place("beta", "source", "failed-over", 3), place("alpha", "recovery", "failed-over", 4)], [COMMIT, PROTECT]),
        ([place("beta", "recovery", "journal", 5), place("alpha", "recovery", "failed-over", 4)], [COMMIT, PROTECT]),
        ([place("beta", "recovery", "journal", 5), place("alpha", "source", "live", 5)], []),
    ],
)
def test_what_is_left_is_told_by_what_is_true(places, left) -> None:
    assert stages(Inventory(tuple(places), ()), "web", "alpha") == left


class Home(Sites):
    """The same two sites, which the group goes home between."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.log: list[str] = []
        self.state = "running"
        spec = {**self.told["spec"], "source": "alpha", "recovery": "beta", "source_host": "a1", "recovery_host": "b1"}
        self.from_home = self.told | {"spec": spec, "generation": 4, "newest": 30, "protected": False}
        self.alpha.replies |= {
            "failback.prepare": lambda *_: self.note("prepare alpha", self.record),
            "switchover.run": self.booted,
            "commit": lambda *_: self.note("commit alpha", {}),
            "failback.plan": lambda *_: self.from_home,
            "failback.protect": self.protect_home,
        }
        self.alpha.replies["failover.plan"] = {
            "group": "web",
            "generation": 4,
            "machines": [],
            "networks": [],
            "findings": [],
        }
        self.beta.replies |= {
            "handover.plan": {"group": "web", "handover": None, "reasons": []},
            "handover.run": lambda *_: self.note(
                "hand over beta", {"group": "web", "generation": 4, "final": {"number": 20, "epoch": "e" * 32}}
            ),
            "failback.disks": lambda *_: self.found | {"generation": 3, "failback": None},
            "failback.prepare": lambda *_: self.note("prepare beta", self.record | {"generation": 5, "checkpoint": 31}),
        }

    def note(self, what: str, result: Any) -> Any:
        self.log.append(what)
        return result

    def protect(self, params: dict[str, Any], progress: Any) -> dict[str, Any]:
        self.log.append("protect beta")
        return super().protect(params, progress)

    def booted(self, params: dict[str, Any], _: Any) -> dict[str, Any]:
        self.log.append("boot alpha")
        self.rows(("source", "phase", "failed-over", 3), ("recovery", "mode", "failed-over", 4))
        return recovery("switchover", "web", state=self.state)

    def protect_home(self, params: dict[str, Any], _: Any) -> dict[str, Any]:
        self.log.append(f"protect alpha {params['generation']}")
        self.rows(("recovery", "mode", "journal", 5), ("source", "phase", "live", 5))
        self.from_home |= {"protected": True}
        self.alpha.replies["group.status"] = self.alpha._source_status("web") | {"phase": "live"}
        self.beta.checkpoints = [checkpoint(31, 900.0), checkpoint(32, 1.0)]
        self.beta.replies["group.status"] = self.beta._recovery_status("web")
        return {"group": "web", "generation": 5, "phase": "syncing"}


@pytest.fixture
def sites(world) -> Home:
    return Home(world.applied())


WAY = [
    "prepare alpha", "protect beta", "hand over beta", "boot alpha", "commit alpha", "prepare beta", "protect alpha 5",
]  # fmt: skip


def test_all_of_it_in_order(sites) -> None:
    result = sites.world("failback", "web", "--go-home", "--yes", "-o", "json")
    assert result.code == 0, result.err
    assert sites.log == WAY
    assert (result.json["home"], result.json["checkpoint"]) == ("alpha", 32)
    assert sites.beta.called("failback.prepare")[0]["disks"] == DISKS


def test_it_is_told_before_and_a_dry_run_does_nothing(sites) -> None:
    result = sites.world("failback", "web", "--go-home", "--dry-run")
    assert result.code == 0
    for line in (
        "would seal db.vda",
        "would when it is live, shut web down",
        "would commit it",
        "would replicate it from alpha",
    ):
        assert line in result.err
    assert sites.log == []


def test_it_goes_on_behind_what_is_done(sites) -> None:
    sites.rows(("source", "phase", "failed-over", 3), ("recovery", "mode", "failed-over", 4))
    assert sites.world("failback", "web", "--go-home", "--yes").code == 0
    assert sites.log == WAY[4:]
    sites.log.clear()
    result = sites.world("failback", "web", "--go-home", "--yes")
    assert (result.code, sites.log) == (0, [])
    assert "web runs at home, at alpha, already" in result.err


def test_a_switchover_that_was_half_done_is_gone_on_with(sites) -> None:
    sites.rows(("source", "phase", "failed-over", 3), ("recovery", "mode", "journal", 3))
    assert sites.world("failback", "web", "--go-home", "--yes").code == 0
    assert sites.log == WAY[2:]


def test_machines_that_do_not_boot_at_home_are_not_committed(sites) -> None:
    sites.state = "partly"
    result = sites.world("failback", "web", "--go-home", "--yes")
    assert result.code == StepFailed.exit_code
    assert "not committed" in result.err
    assert sites.log == WAY[:4]


def test_without_a_file_nobody_knows_where_home_is(sites) -> None:
    (sites.world.directory / "groups/web.toml").unlink()
    result = sites.world("failback", "web", "--go-home", "--yes")
    assert result.code == 11
    assert "step by step" in result.err


def test_a_pass_that_takes_too_long_ends_it_before_anything_is_shut_down(sites) -> None:
    def protect(params: dict[str, Any], progress: Any) -> dict[str, Any]:
        told = Home.protect(sites, params, progress)
        sites.beta.replies["group.status"] = sites.beta._source_status("web") | {"phase": "catching-up"}
        return told

    sites.beta.replies["failback.protect"] = protect
    result = sites.world("failback", "web", "--go-home", "--timeout", "10s", "--yes")
    assert result.code == StepFailed.exit_code
    assert "web is not live after 10.0 s" in result.err
    assert sites.log == WAY[:2]
