"""The monitoring-plugin convention: thresholds, performance data, one line, exit codes 0 to 3. Pure.

https://www.monitoring-plugins.org/doc/guidelines.html: `LABEL STATE: text | 'label'=value[UOM];warn;crit;min;max`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from drctl.model.duration import parse_duration
from drctl.model.extent import parse_bytes

_INFINITE = float("inf")
_NUMBER = re.compile(r"-?\d+(\.\d*)?|-?\.\d+")


class State(IntEnum):
    """The exit codes. `worst` orders them: what is not known is worse than a warning, and a failure is the worst."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


_RANK = (State.OK, State.WARNING, State.UNKNOWN, State.CRITICAL)


def worst(states: Sequence[State]) -> State:
    """The gravest; OK of none."""
    return max(states, key=_RANK.index, default=State.OK)


@dataclass(frozen=True, slots=True)
class Range:
    """A range of the guidelines: an alert is raised outside of `start`..`end`, or inside where it is `inverted`."""

    start: float = 0.0
    end: float = _INFINITE
    inverted: bool = False

    def alerts(self, value: float) -> bool:
        return (self.start <= value <= self.end) is self.inverted

    def __str__(self) -> str:
        start = "~:" if self.start == -_INFINITE else "" if self.start == 0 else f"{plain(self.start)}:"
        end = "" if self.end == _INFINITE else plain(self.end)
        if not start and not end:
            return ("@" if self.inverted else "") + "0:"
        return ("@" if self.inverted else "") + start + end


def parse_range(text: str) -> Range:
    """`10`, `10:`, `~:10`, `10:20`, `@10:20`; a number may be a duration (`30s`, `2h`) or a size (`5 GiB`).

    Raises ValueError."""
    inverted = text.startswith("@")
    before, colon, after = text.removeprefix("@").partition(":")
    if not before and not after:
        raise ValueError(f"{text!r} is no range")
    if not colon:
        before, after = "0", before
    start = -_INFINITE if before == "~" else _value(before or "0")
    end = _value(after) if after else _INFINITE
    if start > end:
        raise ValueError(f"{text!r}: the start of a range is above its end")
    return Range(start, end, inverted)


def _value(text: str) -> float:
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    for parse in (parse_duration, parse_bytes):
        try:
            return float(parse(text))
        except ValueError:
            continue
    raise ValueError(f"{text!r} is no number, duration (30s, 2h) or size (5 GiB)")


def at_most(limit: float) -> Range:
    """Alerts above `limit`."""
    return Range(0.0, limit)


def at_least(limit: float) -> Range:
    """Alerts below `limit`."""
    return Range(limit, _INFINITE)


@dataclass(frozen=True, slots=True)
class Perf:
    """One value of the performance data. `unit` is `s`, `%`, `B`, `c` or empty; what is not known is `U`."""

    label: str
    value: float | None
    unit: str = ""
    warning: Range | None = None
    critical: Range | None = None
    minimum: float | None = None
    maximum: float | None = None

    def __str__(self) -> str:
        label = self.label.replace("'", "''").replace("=", "_")
        value = "U" if self.value is None else f"{plain(self.value)}{self.unit}"
        rest = [
            "" if self.warning is None else str(self.warning),
            "" if self.critical is None else str(self.critical),
            "" if self.minimum is None else plain(self.minimum),
            "" if self.maximum is None else plain(self.maximum),
        ]
        return ";".join([f"'{label}'={value}", *rest]).rstrip(";")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check of one thing says: `text` in a few words."""

    state: State
    text: str
    perf: tuple[Perf, ...] = ()


def judge(value: float, warning: Range, critical: Range) -> State:
    """The state of a known value."""
    if critical.alerts(value):
        return State.CRITICAL
    return State.WARNING if warning.alerts(value) else State.OK


def line(name: str, verdicts: Sequence[Verdict]) -> tuple[State, str]:
    """The exit code and the one line. What is wrong comes first; no `|` or line break of a text gets into it."""
    state = worst([verdict.state for verdict in verdicts])
    ordered = sorted(verdicts, key=lambda verdict: -_RANK.index(verdict.state))
    text = ", ".join(verdict.text for verdict in ordered) or "nothing to check"
    perf = " ".join(str(one) for verdict in verdicts for one in verdict.perf)
    whole = f"{name.upper()} {state.name}: {clean(text)}"
    return state, f"{whole} | {clean(perf, bar=False)}" if perf else whole


def clean(text: str, *, bar: bool = True) -> str:
    """In one line; without the bar that begins performance data."""
    flat = " ".join(text.split())
    return flat.replace("|", "/") if bar else flat.replace("|", "_")


def plain(value: float) -> str:
    """A number without exponent and without noise."""
    return str(int(value)) if value == int(value) else f"{value:.3f}".rstrip("0").rstrip(".")
