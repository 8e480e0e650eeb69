"""groups/*.toml is the truth: what differs is shown, asked for and told to both sides; groups are created and deleted."""

from __future__ import annotations

import pytest

from drctl.errors import Refused
from tests.cli.appliance import machine
from tests.cli.conftest import WEB


def test_a_dry_run_tells_and_changes_nothing(world) -> None:
    result = world("apply", "--dry-run")
    assert result.code == 0
    assert "would create group web at beta/b1 (recovery): db, front" in result.err
    assert "would create group web at alpha/a1 (source): db, front" in result.err
    assert not world.alpha.called("group.put")


def test_nobody_to_ask_is_refused_with_the_flag(world) -> None:
    result = world("apply")
    assert result.code == 14
    assert "add --yes" in result.err
    assert not world.alpha.groups


@pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("yes\n", 0), ("n\n", 41), ("\n", 41), ("", 41)])
def test_somebody_is_asked_after_it_was_told(world, typed: str, code: int) -> None:
    result = world("apply", typed=typed)
    assert result.code == code
    assert bool(world.alpha.groups) == (code == 0)
    assert result.err.index("will create group web") < result.err.index("Apply? [y/N]")


def test_a_machine_that_is_not_there_is_named_with_the_likely_one(world) -> None:
    world.alpha.machines = [machine("db"), machine("front-2")]
    result = world("apply", "--dry-run")
    assert result.code == 0
    assert "a1 has no machine 'front', so web can't replicate yet: did you mean front-2?" in result.err


def test_the_recovery_side_is_told_first(world) -> None:
    order = []
    for appliance in (world.alpha, world.beta):
        appliance.replies["group.put"] = lambda params, progress, host=appliance.host: order.append(host)
    world("apply", "--yes")
    assert order == ["b1", "a1"]


def test_the_spec_that_is_sent(world) -> None:
    world.applied()
    spec = world.alpha.called("group.put")[0]["spec"]
    assert spec["machines"] == ["db", "front"]
    assert spec["networks"] == [["lan", "lan-b"]]
    assert (spec["source_host"], spec["recovery_host"]) == ("a1", "b1")
    assert spec["retention"]["ladder"][0] == {"within": 3600, "every": 0}


def test_twice_is_once(world) -> None:
    result = world.applied()("apply", "--yes")
    assert result.code == 0
    assert "nothing to do" in result.err
    assert len(world.alpha.called("group.put")) == 1


def test_only_what_differs_is_shown_and_both_are_told(world) -> None:
    world.applied()
    world.beta.groups["web"] = None  # a recovery side learns the group from the stream, maybe later
    world.beta._role = lambda group: "recovery"
    (world.directory / "groups/web.toml").write_text(WEB.replace("5s", "2s"))
    result = world("apply", "--yes", "-o", "json")
    source = next(change for change in result.json["changes"] if change["role"] == "source")
    assert source["differences"] == [{"key": "checkpoint_interval", "old": 5.0, "new": 2.0}]
    assert "checkpoint_interval: 5.0 -> 2.0" in result.err
    assert [change["action"] for change in result.json["changes"]] == ["tell", "change"]


def test_an_unreachable_appliance_is_not_passed_over(world) -> None:
    world.beta.down = True
    result = world("apply", "--yes")
    assert result.code == 22
    assert not world.alpha.called("group.put")


def test_a_refusal_is_passed_on(world) -> None:
    world.alpha.replies["group.put"] = Refused("db is protected elsewhere")
    assert world("apply", "--yes").code == 14


def test_a_group_without_a_file_is_named_and_left_alone(world) -> None:
    world.applied()
    (world.directory / "groups/web.toml").unlink()
    result = world("apply", "--yes")
    assert result.code == 0
    assert "group web has no file in groups/" in result.err
    assert "web" in world.alpha.groups


CREATE = ("group", "create", "shop", "-m", "lonely", "--source", "alpha")


def test_create_writes_the_file_and_applies(world) -> None:
    result = world(*CREATE, "--interval", "2s", "--network", "lan=lan-b", "--yes")
    assert result.code == 0
    text = (world.directory / "groups/shop.toml").read_text()
    assert 'machines = ["lonely"]' in text
    assert 'checkpoint_interval = "2s"' in text
    assert world.alpha.groups["shop"]["recovery"] == "beta"
    assert world.beta.groups["shop"]["networks"] == [["lan", "lan-b"]]
    assert world("apply", "--dry-run").err.count("shop") == 0


def test_create_dry_run_writes_nothing(world) -> None:
    assert world(*CREATE, "--dry-run").code == 0
    assert not (world.directory / "groups/shop.toml").exists()
    assert not world.alpha.groups


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--network", "lan"), 2, "'lan' is not HERE=THERE"),
        (("--recovery", "gamma"), 10, "recovery: 'gamma' is not one of alpha, beta"),
        (("--interval", "90s"), 10, "checkpoint_interval: 1m 30s is out of range"),
        (("--source-host", "b1"), 10, "source_host: 'b1' is not one of a1"),
    ],
)
def test_create_refuses_what_the_file_could_not_be(world, more: tuple[str, ...], code: int, message: str) -> None:
    result = world(*CREATE, *more, "--yes")
    assert result.code == code
    assert message in result.err
    assert not (world.directory / "groups/shop.toml").exists()


def test_create_twice_is_refused(world) -> None:
    assert world("group", "create", "web", "-m", "db", "--source", "alpha", "--yes").code == 12


def test_delete_needs_the_typed_name(world) -> None:
    world.applied("unprotected")
    refused = world("group", "delete", "web", "--yes")
    assert refused.code == 14
    assert "add --confirm web; --yes alone is not enough" in refused.err
    assert world("group", "delete", "web", typed="wbe\n").code == 41
    assert world("group", "delete", "web", "--confirm", "wbe").code == 14
    assert "web" in world.alpha.groups
    assert world("group", "delete", "web", typed="web\n").code == 0
    assert not world.alpha.groups
    assert not world.beta.groups
    assert not (world.directory / "groups/web.toml").exists()


def test_delete_of_a_replicated_group_is_refused(world) -> None:
    assert world.applied()("group", "delete", "web", "--confirm", "web").code == 12
    assert (world.directory / "groups/web.toml").exists()
    assert "web" in world.beta.groups


def test_delete_says_when_the_recovery_site_keeps_the_history(world) -> None:
    from drctl.errors import WrongPhase

    world.applied("unprotected")
    world.beta.replies["group.remove"] = WrongPhase("the history of web is kept at this site", hint="remove it by hand")
    result = world("group", "delete", "web", "--confirm", "web")
    assert result.code == 3
    assert "the history of web is kept at this site: remove it by hand" in result.err
    assert "web is gone but for its history" in result.out


def test_show_spells_units(world) -> None:
    out = world("group", "show", "web").out
    assert "retention.journal_limit  64.0 GiB" in out
    assert "lan -> lan-b" in out
    assert "one each 1m for 1d" in out


def test_show_of_an_unknown_group(world) -> None:
    assert world("group", "show", "x").code == 11


def test_a_recovered_machine_is_shown_with_its_group(world) -> None:
    from tests.cli.appliance import machine

    world.applied("failed-over").beta.phases["web"] = "failed-over"
    world.beta.machines = [machine("db")]
    rows = world("vm", "list", "-o", "json").json["machines"]
    assert [(row["host"], row["group"], row["phase"], row["protected"]) for row in rows if row["machine"] == "db"] == [
        ("a1", "web", "failed-over", False),
        ("b1", "web", "failed-over", False),
    ]
