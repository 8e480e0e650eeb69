"""Bandwidth limits as drctl.toml and groups/*.toml have them: `[[link.limit]]` and `[[limit]]`."""

from __future__ import annotations

from dataclasses import dataclass

from drctl.model.bandwidth import RateLimit, parse_rate, parse_window
from drctl.toml.table import Table


@dataclass(frozen=True, slots=True)
class LinkLimit:
    """A limit of the links from `source` to `target`, names of sites; "": of all."""

    source: str
    target: str
    limit: RateLimit

    def concerns(self, source: str, target: str) -> bool:
        return source != target and self.source in ("", source) and self.target in ("", target)


def read_limits(table: Table, key: str) -> tuple[RateLimit, ...]:
    """The rows `[[key]]` of a table. Raises ConfigInvalid."""
    limits = []
    for row in table.tables(key):
        limits.append(_limit(row))
        row.finish()
    return tuple(limits)


def read_link_limits(top: Table, sites: list[str]) -> tuple[LinkLimit, ...]:
    """The rows `[[link.limit]]`. Raises ConfigInvalid."""
    table = top.table("link")
    limits = []
    for row in table.tables("limit"):
        source, target = row.choice("from", sites, ""), row.choice("to", sites, "")
        if source and source == target:
            raise row.error("to", f"is {target!r}, where the link begins")
        limits.append(LinkLimit(source, target, _limit(row)))
        row.finish()
    table.finish()
    return tuple(limits)


def _limit(row: Table) -> RateLimit:
    when = row.text("when", "")
    try:
        if "when" in row:
            parse_window(when)
    except ValueError as exc:
        raise row.error("when", str(exc)) from exc
    text = row.text("rate")
    try:
        return RateLimit(parse_rate(text), when)
    except ValueError as exc:
        raise row.error("rate", str(exc)) from exc
