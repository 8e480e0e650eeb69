"""What illustrates a run's report, out of a record that somebody else may have written. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: A PNG's first bytes, and nothing that could end an attribute of HTML.
_BASE64 = re.compile(r"iVBORw0KGgo[A-Za-z0-9+/]*={0,2}")


@dataclass(frozen=True, slots=True)
class Console:
    """What a recovered machine showed at the end: `png` (base64) of its screen, or `text` of its console; `reason`
    says why there is no picture."""

    group: str
    machine: str
    png: str
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ages:
    """Of a group's newest checkpoint, the greatest in each equal part of begin..end; None: there was none."""

    group: str
    begin: float
    end: float
    worst: tuple[float | None, ...]


def read_console(row: Mapping[str, Any]) -> Console:
    png = str(row.get("png") or "")
    whole = bool(_BASE64.fullmatch(png))
    words = {key: str(row.get(key) or "") for key in ("group", "machine", "text", "reason")}
    return Console(png=png if whole else "", **words)


def read_ages(facts: Mapping[str, Any]) -> Iterable[Ages]:
    """What the record's first line tells of each group's last day."""
    for group, told in as_mapping(facts.get("checkpoint_ages")).items():
        row = as_mapping(told)
        begin, end, worst = as_number(row.get("begin")), as_number(row.get("end")), row.get("worst")
        if begin is not None and end is not None and end > begin and isinstance(worst, list) and worst:
            yield Ages(str(group), begin, end, tuple(as_number(age) for age in worst))


def as_number(value: Any) -> float | None:
    """A number out of a record that somebody else may have written."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
