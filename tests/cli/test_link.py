"""Limits of links: read from the configuration with the place of every error, told to whom sends, set and cleared."""

from __future__ import annotations

import pytest

from drctl.cli.config import load_config
from drctl.cli.group_file import read_group
from drctl.errors import ConfigInvalid
from drctl.model.bandwidth import RateLimit
from tests.cli.conftest import CONFIG, WEB

OFFICE = """
[[link.limit]]
from = "alpha"
to = "beta"
when = "Mon-Fri 08:00-18:00"
rate = "20 Mbit/s"
[[link.limit]]
rate = "100 Mbit/s"
"""
ROWS = [{"rate": 2_500_000, "when": "Mon-Fri 08:00-18:00"}, {"rate": 12_500_000, "when": ""}]


def configure(world, text: str) -> None:
    (world.directory / "drctl.toml").write_text(CONFIG + text)


def test_limits_are_read_in_their_order(world) -> None:
    configure(world, OFFICE)
    config = load_config(world.directory)
    assert config.limits_from("alpha") == {"beta": (RateLimit(2_500_000, "Mon-Fri 08:00-18:00"), RateLimit(12_500_000))}
    assert config.limits_from("beta") == {"alpha": (RateLimit(12_500_000),)}


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ('when = "Mon-Fry 08:00-18:00"\nrate = "1 Mbit/s"', 18, "link.limit[0].when", "'Fry'"),
        ('when = "sometimes"\nrate = "1 Mbit/s"', 18, "link.limit[0].when", "Mon-Fri 08:00-18:00"),
        ('when = ""\nrate = "1 Mbit/s"', 18, "link.limit[0].when", "is no time window"),
        ('when = "22:00-22:00"\nrate = "1 Mbit/s"', 18, "link.limit[0].when", "is empty"),
        ('rate = "20 Mb/s"', 18, "link.limit[0].rate", "write e.g. 20 Mbit/s"),
        ('rate = "1 bit/s"', 18, "link.limit[0].rate", "at least 64 kbit/s"),
        ("rate = 20", 18, "link.limit[0].rate", "must be a string"),
        ('when = "Sat"', 17, "link.limit[0]", "rate is missing"),
        ('rate = "1 Mbit/s"\nfrom = "gamma"', 19, "link.limit[0].from", "alpha, beta"),
        ('rate = "1 Mbit/s"\nfrom = "beta"\nto = "beta"', 20, "link.limit[0].to", "where the link begins"),
        ('rate = "1 Mbit/s"\nwehn = "Sat"', 19, "link.limit[0].wehn", "did you mean 'when'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(world, text: str, line: int, key: str, words: str) -> None:
    configure(world, f"[[link.limit]]\n{text}\n")
    with pytest.raises(ConfigInvalid) as error:
        load_config(world.directory)
    assert (error.value.fields["line"], error.value.fields["key"]) == (line, key)
    assert words in error.value.message + error.value.hint


def test_a_groups_limits_and_priority(world) -> None:
    file = world.directory / "groups/web.toml"
    file.write_text('priority = "high"\n' + WEB + '[[limit]]\nwhen = "22:00-06:00"\nrate = "1 Gbit/s"\n')
    spec = read_group(load_config(world.directory), "web")
    assert (spec.limits, spec.priority) == ((RateLimit(125_000_000, "22:00-06:00"),), "high")
    file.write_text('priority = "urgent"\n' + WEB)
    with pytest.raises(ConfigInvalid, match="priority: 'urgent' is not one of high, normal, low"):
        read_group(load_config(world.directory), "web")
    file.write_text(WEB + '[[limit]]\nwhen = "at night"\nrate = "1 Gbit/s"\n')
    with pytest.raises(ConfigInvalid, match=r"web\.toml:10: limit\[0\]\.when: 'at night'"):
        read_group(load_config(world.directory), "web")


def test_apply_tells_the_sender_of_its_links_once(world) -> None:
    configure(world, OFFICE)
    told = world("apply", "--dry-run").err
    assert "would limit the link from alpha/a1 to beta: unlimited -> 20 Mbit/s Mon-Fri 08:00-18:00, 100 Mbit/s" in told
    assert not world.alpha.called("link.put")
    result = world("apply", "--yes", "-o", "json")
    assert result.json["links"] == [{"host": "a1", "old": {"beta": []}, "new": {"beta": ROWS}}]
    assert world.alpha.called("link.put")[0]["limits"] == {"beta": ROWS}
    assert not world.beta.called("link.put")
    assert "nothing to do" in world("apply", "--yes").err
    configure(world, "")
    assert "to beta: 20 Mbit/s Mon-Fri 08:00-18:00, 100 Mbit/s always -> unlimited" in world("apply", "--yes").err


def test_a_changed_limit_of_a_group_is_applied_like_any_key(world) -> None:
    world.applied()
    (world.directory / "groups/web.toml").write_text(WEB + '[[limit]]\nrate = "8 Mbit/s"\n')
    world("apply", "--yes")
    assert world.alpha.groups["web"]["limits"] == [{"rate": 1_000_000, "when": ""}]


def test_the_links_and_what_limits_them(world) -> None:
    world.applied()
    world.alpha.in_force = {"rate": 2_500_000, "scope": "link", "because": "Mon-Fri 08:00-18:00", "until": None}
    result = world("link", "show")
    assert result.code == 0
    assert "20 Mbit/s (link, Mon-Fri 08:00-18:00)" in result.out
    link = world("link", "show", "alpha", "beta", "-o", "json").json["links"][0]
    assert (link["from"], link["to"], link["groups"][0]["group"]) == ("alpha", "beta", "web")
    world.beta.down = True
    assert world("link", "show").code == 3


def test_set_for_a_while_and_clear(world) -> None:
    world.applied()
    result = world("link", "limit", "set", "alpha", "beta", "20 Mbit/s", "--for", "2h")
    assert result.code == 0
    assert "will let the link from alpha/a1 to beta be limited to 20 Mbit/s for 2h" in result.err
    assert "20 Mbit/s (set by" in result.out
    sent = world.alpha.called("link.limit")[0]
    assert (sent["site"], sent["group"], sent["rate"], sent["seconds"]) == ("beta", "", 2_500_000, 7200)
    shown = world("link", "limit", "show").out
    assert "20 Mbit/s" in shown
    assert "set by" in shown
    assert world("link", "limit", "clear", "alpha", "beta", "-o", "json").json["links"][0]["override"] is None
    assert "no link is limited" in world("link", "limit", "show", "alpha").err


def test_set_for_one_group_goes_to_its_sender(world) -> None:
    world.applied()
    assert world("link", "limit", "set", "alpha", "beta", "unlimited", "--group", "web", "--dry-run").code == 0
    assert not world.alpha.called("link.limit")
    assert world("link", "limit", "set", "alpha", "beta", "unlimited", "--group", "web").code == 0
    sent = world.alpha.called("link.limit")[0]
    assert (sent["group"], sent["rate"]) == ("web", 0)
    wrong = world("link", "limit", "set", "beta", "alpha", "unlimited", "--group", "web")
    assert wrong.code == 11
    assert "it is sent by alpha" in wrong.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("alpha", "beta", "20 Mb/s"), 2, "write e.g. 20 Mbit/s"),
        (("alpha", "gamma", "20 Mbit/s"), 11, "no site named 'gamma'"),
        (("alpha", "alpha", "20 Mbit/s"), 11, "a link joins two sites"),
    ],
)
def test_a_wrong_order_is_refused(world, words: tuple[str, ...], code: int, said: str) -> None:
    result = world("link", "limit", "set", *words)
    assert result.code == code
    assert said in result.err
    assert not world.alpha.called("link.limit")


def test_status_says_that_a_link_is_limited(world) -> None:
    world.applied()
    limit = {"rate": 2_500_000, "scope": "link", "because": "always", "until": None}
    status = world.alpha._source_status("web")
    world.alpha.replies["group.status"] = status | {"link": status["link"] | {"limit": limit}}
    assert "connected; limited to 20 Mbit/s (link, always)" in world("status", "web").out
    assert world("status", "web", "-o", "json").json["groups"][0]["link"]["limit"] == limit
