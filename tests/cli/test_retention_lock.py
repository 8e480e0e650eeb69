"""The retention lock on the command line: in the group's file, in the status, and where it refuses."""

from __future__ import annotations

import pytest

from drctl.cli.retention import demand_unlocked
from drctl.errors import RetentionLocked
from tests.cli.appliance import NOW
from tests.cli.conftest import WEB

DAY = 86400


@pytest.fixture
def locked(world):
    """The recovery site keeps what there is for ten days more."""
    web = world.applied("live")
    status = web.beta.call("group.status", {"group": "web"})
    web.beta.replies["group.status"] = status | {"lock": {"seconds": 30 * DAY, "until": NOW + 10 * DAY}}
    return web


def test_the_key_of_the_groups_file(world) -> None:
    path = world.directory / "groups" / "web.toml"
    path.write_text(WEB + '\n[retention]\nhistory = "10d"\nlock = "7d"\n')
    assert world("apply", "--yes").code == 0
    assert world.beta.called("group.put")[0]["spec"]["retention"]["lock"] == 7 * DAY
    path.write_text(WEB + '\n[retention]\nhistory = "6d"\nlock = "7d"\n')
    result = world("apply", "--yes")
    assert result.code == 10
    assert "lock: is longer than the history" in result.err


def test_apply_tells_the_recovery_site_first_and_stops_at_its_refusal(world) -> None:
    world.applied("live")
    path = world.directory / "groups" / "web.toml"
    path.write_text(WEB + '\n[retention]\nhistory = "1h"\n')
    world.beta.replies["group.put"] = RetentionLocked("web is under a retention lock: locked until 2027-01-25")
    told = len(world.alpha.called("group.put"))
    result = world("apply", "--yes")
    assert result.code == 16
    assert "2027-01-25" in result.err
    assert len(world.alpha.called("group.put")) == told


@pytest.mark.parametrize("options", [("--keep-replica", "0s"), ("--keep-replica", "9d"), ()])
def test_stop_is_refused_with_the_date_before_anything_is_done(locked, options) -> None:
    result = locked("replicate", "stop", "web", "--yes", *options)
    assert result.code == 16
    assert "locked until 2027-01-25T" in result.err
    assert locked.alpha.phases["web"] == "live"
    assert not locked.beta.called("replicate.stop")


def test_stop_may_keep_it_longer_than_the_lock(locked) -> None:
    assert locked("replicate", "stop", "web", "--yes", "--keep-replica", "11d").code == 0
    assert locked.alpha.phases["web"] == "unprotected"


def test_delete_is_refused_with_the_date_before_anything_is_done(locked) -> None:
    locked.alpha.phases["web"] = "unprotected"
    result = locked("group", "delete", "web", "--yes", "--confirm", "web")
    assert result.code == 16
    assert "nothing was done" in result.err
    assert not locked.alpha.called("group.remove")
    assert (locked.directory / "groups" / "web.toml").exists()


def test_status_tells_it(locked) -> None:
    assert "retention lock" in locked("status", "web").out
    assert "30d; what there is now until 2027-01-25T" in locked("status", "web").out
    assert locked("status", "--output", "json").json["groups"][0]["lock"]["seconds"] == 30 * DAY


def test_an_appliance_that_keeps_silent_about_a_lock_is_not_taken_away(locked) -> None:
    """What `appliance uninstall --delete-history` asks of a store whose group.json has a lock."""
    host = locked.context().config.host("b1")
    with pytest.raises(RetentionLocked, match="locked until 2027-01-25T"):
        demand_unlocked(locked.context(), host, "web", 0.0, must=True)
    demand_unlocked(locked.context(), host, "web", 11 * DAY, must=True)
    locked.beta.down = True
    with pytest.raises(RetentionLocked, match="does not say until when"):
        demand_unlocked(locked.context(), host, "web", 0.0, must=True)
