"""The links of an appliance: limits put and overridden, kept over a restart, refused when they make no sense."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drctl.appliance.config import ApplianceToml, Home, Peer
from drctl.appliance.source.link_service import LinkService
from drctl.errors import NotFound, Refused
from drctl.model.bandwidth import RateLimit
from drctl.model.group import GroupSpec

OFFICE = {"rate": 2_500_000, "when": "Mon-Sun 00:00-24:00"}


def quiet(_: dict[str, Any]) -> None:
    """Nobody is told of progress."""


def service(directory: Path) -> LinkService:
    peers = tuple(Peer(site, f"{site}-1", f"192.0.2.{n}:7077", f"uuid-{n}") for n, site in enumerate(("beta", "gamma")))
    config = ApplianceToml("alpha", "a1", "qemu:///system", "192.0.2.9:7077", "uuid", peer=peers)
    spec = GroupSpec("web", "alpha", "beta", ("db",), limits=(RateLimit(1_000_000),), priority="high")
    limit = {"rate": 1_000_000, "scope": "group", "because": "always", "until": None}
    status = {"link": {"state": "connected", "limit": limit, "sent_bytes": 7}, "backlog_bytes": 9}
    protection = SimpleNamespace(state=SimpleNamespace(spec=spec), shipper=SimpleNamespace(status=status))
    return LinkService(Home(directory, config), lambda: [protection])  # type: ignore[list-item]


def test_all_links_with_their_groups(tmp_path: Path) -> None:
    beta, gamma = service(tmp_path).listed({}, quiet)
    assert (beta["site"], beta["host"], beta["rate"], beta["limits"]) == ("beta", "beta-1", None, [])
    assert gamma["groups"] == []
    (group,) = beta["groups"]
    assert (group["group"], group["priority"], group["rate"], group["because"]) == ("web", "high", 1_000_000, "always")
    assert (group["state"], group["sent_bytes"], group["backlog_bytes"]) == ("connected", 7, 9)


def test_limits_are_kept_and_put_again_changes_nothing(tmp_path: Path) -> None:
    order = {"limits": {"beta": [OFFICE], "gamma": []}}
    assert service(tmp_path).put(order, quiet) == {"changed": ["beta"]}
    assert service(tmp_path).put(order, quiet) == {"changed": []}
    (beta,) = service(tmp_path).listed({"site": "beta"}, quiet)
    assert (beta["limits"], beta["rate"], beta["because"]) == ([OFFICE], 2_500_000, "Mon-Sun 00:00-24:00")


def test_an_override_outlives_the_appliance_until_it_is_cleared(tmp_path: Path) -> None:
    service(tmp_path).put({"limits": {"beta": [OFFICE]}}, quiet)
    told = service(tmp_path).limit({"site": "beta", "rate": 0, "by": "root"}, quiet)
    assert (told["rate"], told["because"], told["until"]) == (None, "set by root", None)
    service(tmp_path).put({"limits": {"beta": [{**OFFICE, "rate": 10_000}]}}, quiet)
    assert service(tmp_path).listed({"site": "beta"}, quiet)[0]["because"] == "set by root"
    told = service(tmp_path).limit({"site": "beta", "rate": None}, quiet)
    assert (told["rate"], told["override"]) == (10_000, None)


def test_an_override_of_one_group_ends_by_itself(tmp_path: Path) -> None:
    links = service(tmp_path)
    (group,) = links.limit({"site": "beta", "group": "web", "rate": 50_000, "seconds": 0.2}, quiet)["groups"]
    assert group["rate"] == 50_000
    assert 0 < group["until"] - time.time() <= 0.2
    time.sleep(0.25)
    (group,) = links.listed({"site": "beta"}, quiet)[0]["groups"]
    assert (group["rate"], group["override"]) == (1_000_000, None)


@pytest.mark.parametrize(
    ("order", "error", "words"),
    [
        ({"site": "delta", "rate": 10_000}, NotFound, "peer site"),
        ({"site": "beta", "group": "mail", "rate": 10_000}, NotFound, "mail"),
        ({"site": "gamma", "group": "web", "rate": 10_000}, NotFound, "web"),
        ({"site": "beta", "rate": 100}, Refused, "too slow"),
    ],
)
def test_a_wrong_order_is_refused(tmp_path: Path, order: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        service(tmp_path).limit(order, quiet)
    assert not (tmp_path / "links.json").exists()


@pytest.mark.parametrize("row", [{"rate": 10_000, "when": "sometimes"}, {"rate": 5}, {"when": "Sat"}, "fast"])
def test_limits_that_are_none_are_refused(tmp_path: Path, row: Any) -> None:
    with pytest.raises(Refused):
        service(tmp_path).put({"limits": {"beta": [row]}}, quiet)
    assert not (tmp_path / "links.json").exists()
