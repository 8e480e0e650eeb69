"""The picture of a group: both sides merged, and the recovery point never better than what can be restored."""

from __future__ import annotations

import threading
import time

import pytest

from drctl.cli.protection import describe, merge, sync_share
from drctl.cli.status import facts
from drctl.errors import ApplianceUnreachable
from tests.cli.appliance import NOW


def group(result) -> dict:
    return result.json["groups"][0]


def test_the_overview_is_a_plain_table_when_piped(world) -> None:
    result = world.applied()("status")
    heading, row = result.out.splitlines()
    assert heading.split() == [
        "GROUP",
        "STATE",
        "RPO",
        "NEWEST",
        "CHECKPOINTS",
        "HISTORY",
        "JOURNAL",
        "BACKLOG",
        "LINK",
        "FROM",
        "TO",
    ]
    assert row.split()[:4] == ["web", "live", "4.0", "s"]
    assert row.split()[-2:] == ["alpha/a1", "beta/b1"]
    assert "config " in result.err
    assert "sites alpha, beta" in result.err


def test_no_colour_leaves_when_it_is_unwanted(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in world.applied()("status", terminal=True).out


def test_a_table_on_a_terminal_breaks_no_word(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = world.applied()("status", terminal=True).out
    assert "checkpoints" in out
    assert "alpha/a1" in out


def test_without_the_recovery_site_the_recovery_point_is_unknown(world) -> None:
    world.applied().beta.down = True
    result = world("status", "-o", "json")
    assert result.code == 3
    assert group(result)["rpo_seconds"] is None
    assert group(result)["checkpoints"] is None
    assert group(result)["phase"] == "live"
    assert result.json["unreachable"] == [{"host": "b1", "message": "no appliance answers at b1"}]
    text = world("status")
    assert text.code == 3
    assert "no answer from b1" in text.err
    assert "unknown" in text.out


def test_without_the_source_site_the_recovery_point_is_still_known(world) -> None:
    world.applied().alpha.down = True
    result = world("status", "-o", "json")
    assert result.code == 3
    assert group(result)["phase"] is None
    assert group(result)["rpo_seconds"] == 4.0
    assert group(result)["source"] is None


def test_no_checkpoint_is_unknown_not_zero(world) -> None:
    world.applied().beta.checkpoints = []
    picture = group(world("status", "-o", "json"))
    assert (picture["rpo_seconds"], picture["newest"], picture["checkpoints"]) == (None, None, 0)
    assert world("status", "web").out.count("unknown") >= 3


def test_the_age_is_counted_on_the_recovery_sites_clock() -> None:
    recovery = {"wall_ns": int((NOW + 100) * 1e9), "checkpoints": {"newest": {"number": 1, "time": NOW + 90}}}
    assert merge("web", None, recovery, NOW)["rpo_seconds"] == pytest.approx(10.0)
    del recovery["wall_ns"]
    assert merge("web", None, recovery, NOW + 95)["rpo_seconds"] == pytest.approx(5.0)


def test_an_age_is_never_negative() -> None:
    recovery = {"wall_ns": int(NOW * 1e9), "checkpoints": {"newest": {"number": 1, "time": NOW + 1}}}
    assert merge("web", None, recovery, NOW)["rpo_seconds"] == 0.0


def test_two_silent_sides_know_nothing() -> None:
    picture = merge("web", None, None, NOW)
    known = {key: value for key, value in picture.items() if value not in (None, "", [])}
    assert known == {"group": "web"}
    assert describe(picture) == "unknown"


def test_a_failed_over_group_is_told_by_the_recovery_side() -> None:
    assert describe(merge("web", {"phase": "live"}, {"mode": "failed-over"}, NOW)) == "failed-over"


def test_sync_share() -> None:
    assert sync_share(None) is None
    assert sync_share({"done_bytes": 5, "total_bytes": 0}) is None
    assert sync_share({"done_bytes": 5, "total_bytes": 20}) == 0.25
    assert sync_share({"done_bytes": 50, "total_bytes": 20}) == 1.0


def test_a_running_sync_is_shown_with_its_share(world) -> None:
    world.applied()
    status = world.alpha.call("group.status", {"group": "web"})
    sync = {"mode": "initial", "done_bytes": 30, "total_bytes": 120, "eta": None}
    world.alpha.replies["group.status"] = status | {"phase": "syncing", "sync": sync}
    assert "syncing 25 %" in world("status").out


def test_old_disks_that_were_given_up_are_told(world) -> None:
    world.applied()
    gone = {"phase": "open", "checkpoint": 41, "kept_until": None, "given_up": 1.8e9, "leftovers": []}
    world.beta.replies["group.status"] = lambda params, _: (
        world.beta._recovery_status(params["group"]) | {"failback": gone}
    )
    assert "checkpoint #41 given up at " in world("status", "web").out


def test_it_tells_where_the_backlog_lies(world) -> None:
    """Ring, spill and dirty map, each with its bound, and what is wrong with them."""
    world.applied()
    full = {"size": 2**30, "used": 2**30, "state": "full", "error": ""}
    parts = {"ring": {"size": 2**28, "used": 2**28, "dropping": True}, "spill": full}
    parts["dirty_map"] = {"size": 2**33, "used": 2**20}
    world.alpha.replies["group.status"] = lambda params, _: world.alpha._source_status(params["group"]) | parts
    told = world("status", "web").out
    assert "256.0 MiB of 256.0 MiB, full: what is written goes into the dirty map" in told
    assert "1.0 GiB of 1.0 GiB, full\n" in told
    assert "1.0 MiB of 8.0 GiB" in told
    parts["spill"] = full | {"used": 0, "state": "failed", "error": "no room there"}
    assert "0 B of 1.0 GiB, failed: no room there" in world("status", "web").out


def test_the_link_tells_why_it_is_down(world) -> None:
    world.applied()
    status = world.alpha.call("group.status", {"group": "web"})
    link = {"state": "reconnecting", "offset_ms": None, "error": {"message": "connection refused"}}
    world.alpha.replies["group.status"] = status | {"link": link}
    assert "reconnecting: connection refused" in world("status", "web").out


def test_an_unknown_group_names_the_known(world) -> None:
    result = world.applied()("status", "wbe")
    assert result.code == 11
    assert "known: web" in result.err


def test_a_group_that_a_silent_appliance_may_know(world) -> None:
    world.alpha.down = world.beta.down = True
    assert world("status", "web").code == 22


def test_watch_shows_it_again(world) -> None:
    world.applied()
    pictures = []

    def sleep(seconds: float) -> None:
        pictures.append(seconds)
        if len(pictures) == 3:
            raise KeyboardInterrupt

    world.clock.sleep = sleep
    result = world("status", "--watch")
    assert result.code == 130
    assert result.out.count("GROUP") == 3
    assert pictures == [2.0, 2.0, 2.0]


def test_one_hung_appliance_does_not_hold_up_the_others(world) -> None:
    world.applied()
    hung = threading.Event()

    def hang(params, progress):
        hung.wait(1.0)
        raise ApplianceUnreachable("no answer within 1 s")

    world.beta.replies["group.list"] = hang
    begin = time.monotonic()
    assert world("status").code == 3
    assert time.monotonic() - begin < 5.0


def test_a_side_that_can_not_tell_its_status_is_named(world) -> None:
    from drctl.errors import IntegrityError

    world.applied().beta.replies["group.status"] = IntegrityError("catalog.sqlite is damaged")
    result = world("status")
    assert result.code == 3
    assert "no answer from b1: catalog.sqlite is damaged" in result.err


def test_many_groups_are_asked_at_once(world) -> None:
    world.applied()
    for number in range(30):
        for appliance in (world.alpha, world.beta):
            appliance.groups[f"g{number}"] = appliance.groups["web"] | {"name": f"g{number}"}
    slow = world.beta._recovery_status

    def wait(params, progress):
        time.sleep(0.1)
        return slow(params["group"])

    world.beta.replies["group.status"] = wait
    begin = time.monotonic()
    assert len(world("status", "-o", "json").json["groups"]) == 31
    assert time.monotonic() - begin < 2.0  # 3.1 s one after the other


def test_a_fleet_is_asked_once_per_appliance(world) -> None:
    """Over SSH each question is the start of a program at the other end; what a listing tells is not asked again."""
    world.applied("live")
    plain = world("status", "--output", "json").json["groups"]
    for fake in (world.alpha, world.beta):
        fake.calls.clear()
        rows = fake.call("group.list", {})
        fake.replies["group.list"] = [row | {"status": fake.call("group.status", {"group": "web"})} for row in rows]
        fake.calls.clear()
    assert world("status", "--output", "json").json["groups"] == plain
    assert [name for fake in (world.alpha, world.beta) for name, _ in fake.calls] == ["group.list", "group.list"]
    assert world.alpha.called("group.list")[0]["status"] is True


def test_one_group_costs_no_other_groups_status(world) -> None:
    world.applied("live")
    world("status", "web")
    assert "status" not in world.alpha.called("group.list")[-1]


def test_a_source_on_esx_tells_its_cycle() -> None:
    cycle = {"running": False, "began": NOW - 60, "seconds": 1.7, "shipped": 3 << 20, "stun": 6.2, "slower": 2}
    told = {"cycle": cycle | {"remarks": ["db stood still for 6.2 s"]}}

    def shown(source: dict) -> list[tuple[str, str]]:
        return facts(merge("web", source, None, NOW) | {"source": None, "recovery": None})

    lines = shown(told)
    text = dict(lines)["cycle"]
    assert "took 1.7 s, 3.0 MiB sent" in text
    assert "stood still for 6.2 s; 2 intervals apart" in text
    assert ("cycle remark", "db stood still for 6.2 s") in lines
    assert "runs now" in dict(shown({"cycle": cycle | {"running": True, "seconds": None}}))["cycle"]
    assert "cycle" not in dict(shown({}))
