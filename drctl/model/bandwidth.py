"""How fast a link may be used, and when: rates, windows of the week, and which limit is in force. Knows no clock.

A window goes by the wall clock of the site that sends: on the day when clocks are put forward an hour of it may be
missing, when they are put back it may come twice. What begins before midnight belongs to the day on which it begins:
`Fri 22:00-06:00` ends on Saturday morning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY_MINUTES = 24 * 60
WEEK_MINUTES = 7 * DAY_MINUTES
#: Bytes a second. Below it a group's definition alone would take minutes, and no mark would ever be young.
SLOWEST = 8000
UNLIMITED = "unlimited"

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(bit/s|kbit/s|Mbit/s|Gbit/s|B/s|kB/s|MB/s|GB/s|KiB/s|MiB/s|GiB/s)")
_RATE_UNITS = {
    "bit/s": 0.125,
    "kbit/s": 125.0,
    "Mbit/s": 125e3,
    "Gbit/s": 125e6,
    "B/s": 1.0,
    "kB/s": 1e3,
    "MB/s": 1e6,
    "GB/s": 1e9,
    "KiB/s": 1024.0,
    "MiB/s": 1024.0**2,
    "GiB/s": 1024.0**3,
}
_TIMES = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")

#: (day of the week, Monday is 0; minute of that day) of a moment, at the site that sends.
Local = Callable[[float], tuple[int, int]]


class Priority(StrEnum):
    """How a group shares a limited link with the other groups of its host."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def weight(self) -> int:
        """Its part of the link when all want it, against that of others."""
        return {Priority.HIGH: 4, Priority.NORMAL: 2, Priority.LOW: 1}[self]


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `rate` bytes a second (0: as fast as it goes) in the window `when`, as it was written; "": always."""

    rate: int
    when: str = ""


@dataclass(frozen=True, slots=True)
class Override:
    """A limit that an operator set while it runs. `until`: wall seconds, 0: until it is cleared."""

    rate: int
    until: float = 0.0
    by: str = ""


@dataclass(frozen=True, slots=True)
class LinkRule:
    """All limits of the link to one site. `groups`: overrides of single groups."""

    limits: tuple[RateLimit, ...] = ()
    override: Override | None = None
    groups: dict[str, Override] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InForce:
    """The limit that counts now, bytes a second (0: none), and why; `until`: wall seconds, 0: not known to end."""

    rate: int = 0
    because: str = ""
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class Window:
    """A window of the week: it begins on each of `days` at `start` and lasts `minutes`."""

    days: frozenset[int]
    start: int
    minutes: int

    def covers(self, day: int, minute: int) -> bool:
        """Whether the window is open in this minute. One that began the day before may be."""
        now = day * DAY_MINUTES + minute
        return any((now - each * DAY_MINUTES - self.start) % WEEK_MINUTES < self.minutes for each in self.days)


@cache
def parse_window(text: str) -> Window:
    """`Mon-Fri 08:00-18:00`, `Sat,Sun`, `22:00-06:00`. Raises ValueError that says what is wrong."""
    words = text.split()
    days, minutes = frozenset(range(7)), (0, DAY_MINUTES)
    if not words or len(words) > 2:
        raise _unknown(text)
    if len(words) == 2 or not words[0][0].isdigit():
        days = _days(words[0], text)
    if len(words) == 2 or words[0][0].isdigit():
        minutes = _times(words[-1], text)
    start, end = minutes
    return Window(days, start, (end - start) % DAY_MINUTES or DAY_MINUTES)


def _unknown(text: str, problem: str = "is no time window") -> ValueError:
    return ValueError(f"{text!r} {problem}; write e.g. Mon-Fri 08:00-18:00, Sat,Sun or 22:00-06:00")


def _days(word: str, text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in word.split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            wrong = first if first not in DAYS else last
            raise _unknown(text, f"names {wrong!r}, which is no day of the week")
        begin = DAYS.index(first)
        length = (DAYS.index(last) - begin) % 7 if dash else 0
        found |= {(begin + day) % 7 for day in range(length + 1)}
    return frozenset(found)


def _times(word: str, text: str) -> tuple[int, int]:
    match = _TIMES.fullmatch(word)
    if match is None:
        raise _unknown(text, f"has {word!r}, which is not HH:MM-HH:MM")
    start, end = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
    if max(start, end) > DAY_MINUTES or start == DAY_MINUTES:
        raise _unknown(text, f"has {word!r}: a day ends at 24:00")
    if start == end:
        raise _unknown(text, "is empty: it ends when it begins (the whole day is 00:00-24:00)")
    return start, end


def parse_rate(text: str) -> int:
    """Bytes a second of `20 Mbit/s` or `2.5 MB/s`; 0 of `unlimited`. Raises ValueError that says what is right."""
    if text.strip() == UNLIMITED:
        return 0
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a rate; write e.g. 20 Mbit/s, 2.5 MB/s, or {UNLIMITED}")
    rate = int(float(match[1]) * _RATE_UNITS[match[2]])
    if rate < SLOWEST:
        raise ValueError(
            f"{text!r} is too slow: at least {format_rate(SLOWEST)}; to send nothing at all: drctl replicate pause"
        )
    return rate


def format_rate(rate: float) -> str:
    """Bytes a second as `20 Mbit/s`."""
    if not rate:
        return UNLIMITED
    bits, units = rate * 8, ["bit/s", "kbit/s", "Mbit/s"]
    unit = "Gbit/s"
    for each in units:
        if bits < 1000:
            unit = each
            break
        bits /= 1000
    return f"{bits:.3g} {unit}" if bits < 1000 else f"{bits:.0f} {unit}"


def limit_at(limits: Iterable[RateLimit], day: int, minute: int) -> RateLimit | None:
    """The first limit whose window is open; None when there is none."""
    return next((each for each in limits if not each.when or parse_window(each.when).covers(day, minute)), None)


def in_force(limits: Iterable[RateLimit], override: Override | None, wall: float, local: Local) -> InForce:
    """What counts at `wall`: an override while it lasts, else the first limit whose window is open."""
    if override is not None and (not override.until or wall < override.until):
        by = f" by {override.by}" if override.by else ""
        return InForce(override.rate, f"set{by}", override.until)
    found = limit_at(limits, *local(wall))
    return InForce() if found is None else InForce(found.rate, found.when or "always")


def changes_at(limits: tuple[RateLimit, ...], wall: float, local: Local) -> float:
    """The next wall time at which another limit counts, to the minute; 0 when none does within a week."""
    now = limit_at(limits, *local(wall))
    if all(not each.when for each in limits):
        return 0.0
    minute = wall - wall % 60
    for ahead in range(1, WEEK_MINUTES + 1):
        at = minute + 60 * ahead
        if limit_at(limits, *local(at)) != now:
            return at
    return 0.0
