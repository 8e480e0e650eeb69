"""Control methods of the links to other sites: who uses them, how fast they may be used, and limits set by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, Protocol

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.control import Progress
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.shipper_link import ShipperLink
from drctl.errors import NotFound, Refused
from drctl.model.bandwidth import (
    SLOWEST,
    LinkRule,
    Override,
    RateLimit,
    changes_at,
    format_rate,
    in_force,
    parse_window,
)
from drctl.replication.throttle import local_minute
from drctl.store import link_limits
from drctl.store.link_limits import LinkLimits


class Protected(Protocol):
    """A group that is protected on this host, however it is."""

    @property
    def state(self) -> GroupState: ...

    @property
    def shipper(self) -> ShipperLink: ...


class LinkService:
    """The links of one appliance. Shippers read what is changed here by themselves, within a moment.

    `protections` tells the groups that are protected on this host. Methods may be called from any thread."""

    def __init__(self, home: Home, protections: Callable[[], Iterable[Protected]]) -> None:
        self._home = home
        self._protections = protections
        self._limits = LinkLimits(home.path / link_limits.FILE)

    def listed(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        """All links, or the one to `site`."""
        del progress
        rules = self._limits.read()
        wanted = str(params.get("site") or "")
        if wanted:
            self._home.peer(wanted)
        sites = dict.fromkeys(peer.site for peer in self._home.config.peer)
        return [self._told(site, rules.get(site, LinkRule())) for site in sites if wanted in ("", site)]

    def put(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{limits {SITE: [{rate, when}]}}: what the configuration says of each link; overrides stay."""
        del progress
        wanted = {str(site): _decode(rows) for site, rows in dict(params.get("limits") or {}).items()}
        known = self._limits.read()
        changed = []
        for site, limits in wanted.items():
            self._home.peer(site)
            if known.get(site, LinkRule()).limits != limits:
                self._limits.change(site, lambda rule, limits=limits: replace(rule, limits=limits))  # type: ignore[misc]
                changed.append(site)
        return {"changed": changed}

    def limit(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{site, group or "", rate (bytes/s; 0: unlimited; null: clear), seconds (0: until it is cleared), by}."""
        del progress
        site, group = str(params.get("site") or ""), str(params.get("group") or "")
        self._home.peer(site)
        if group and group not in (names := [each.state.spec.name for each in self._groups(site)]):
            raise NotFound("group", group, known=names, hint=f"this host sends no such group to {site}")
        override = _override(params)

        def change(rule: LinkRule) -> LinkRule:
            if not group:
                return replace(rule, override=override)
            others = {name: each for name, each in rule.groups.items() if name != group}
            return replace(rule, groups=others if override is None else {**others, group: override})

        return self._told(site, self._limits.change(site, change))

    def _groups(self, site: str) -> list[Protected]:
        return [each for each in self._protections() if each.state.spec.recovery == site]

    def _told(self, site: str, rule: LinkRule) -> dict[str, Any]:
        peer, wall = self._home.peer(site), time.time()
        return {
            "site": site,
            "host": peer.host,
            "address": peer.link,
            **_limits(rule.limits, rule.override, wall),
            "groups": [_group(each, rule, wall) for each in self._groups(site)],
        }


def _limits(limits: tuple[RateLimit, ...], override: Override | None, wall: float) -> dict[str, Any]:
    counts = in_force(limits, override, wall, local_minute)
    until = counts.until if override is not None and counts.because.startswith("set") else 0.0
    stands = override is not None and (not override.until or wall < override.until)
    return {
        "limits": [asdict(limit) for limit in limits],
        "override": asdict(override) if override is not None and stands else None,
        "rate": counts.rate or None,
        "because": counts.because,
        "until": (until if stands else changes_at(limits, wall, local_minute)) or None,
    }


def _group(protection: Protected, rule: LinkRule, wall: float) -> dict[str, Any]:
    spec, status = protection.state.spec, protection.shipper.status
    link = status.get("link") or {}
    return {
        "group": spec.name,
        "priority": spec.priority,
        **_limits(spec.limits, rule.groups.get(spec.name), wall),
        "state": link.get("state") or "unknown",
        "in_force": link.get("limit"),
        "sent_bytes": link.get("sent_bytes"),
        "backlog_bytes": status.get("backlog_bytes"),
    }


def _decode(rows: Any) -> tuple[RateLimit, ...]:
    try:
        limits = msgspec.convert(rows, tuple[RateLimit, ...])
        for limit in limits:
            _demand(limit.rate)
            if limit.when:
                parse_window(limit.when)
    except (msgspec.ValidationError, ValueError) as exc:
        raise Refused(f"not a limit: {exc}") from exc
    return limits


def _demand(rate: int) -> None:
    if rate and rate < SLOWEST:
        raise Refused(
            f"{format_rate(rate)} is too slow: at least {format_rate(SLOWEST)}",
            hint="drctl replicate pause sends nothing",
        )


def _override(params: dict[str, Any]) -> Override | None:
    if params.get("rate") is None:
        return None
    rate, seconds = int(params["rate"]), float(params.get("seconds") or 0)
    _demand(rate)
    return Override(rate, time.time() + seconds if seconds else 0.0, str(params.get("by") or ""))
