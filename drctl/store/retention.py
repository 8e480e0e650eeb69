"""Which checkpoints to keep, and how long history will last. Pure: knows neither files nor the clock."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from drctl.model.group import Retention

K = TypeVar("K", bound=Hashable)


def keep(moments: Sequence[tuple[K, float]], retention: Retention, now: float, held: Iterable[K] = ()) -> set[K]:
    """The checkpoints to keep of (key, time), in log order: those that the ladder wants, `held` ones, the newest.

    A rung keeps the first checkpoint of each of its intervals, so that what it keeps stays the same as time goes on."""
    kept = set(held)
    if moments:
        kept.add(moments[-1][0])
    taken: set[tuple[float, int]] = set()
    for key, time in moments:
        every = interval_at(retention, now - time)
        slot = (every, int(time // every)) if every else (0.0, 0)
        # One beyond history has its slot still: what was dropped in its favour is not wanted again.
        if now - time <= max(retention.history, retention.lock) and (not every or slot not in taken):
            kept.add(key)
        taken.add(slot)
    return kept


def interval_at(retention: Retention, age: float) -> float:
    """The interval of the rung for a checkpoint of this age; the last rung goes on for ever."""
    for rung in retention.ladder:
        if age <= rung.within:
            return rung.every
    return retention.ladder[-1].every if retention.ladder else 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """History in seconds, sizes in bytes. `full_in`: seconds until the limit at the rate so far, None when never.
    `at_limit`: how long history will be when the journal is full, None when unknown. `held_back`: the oldest checkpoint
    is kept beyond the target for its tag or pin, so at the limit replication stops and history is not cut."""

    history: float
    target: float
    used: int
    limit: int
    full_in: float | None
    at_limit: float | None
    held_back: bool = False

    @property
    def falls_short(self) -> bool:
        """The limit will cut history below its target."""
        return self.at_limit is not None and self.at_limit < self.target

    @property
    def hours_until_short(self) -> float | None:
        """Hours until the limit begins to cut history below its target, None when it will not."""
        return self.full_in / 3600 if self.falls_short and self.full_in is not None else None


def forecast(oldest: float | None, used: int, retention: Retention, now: float, *, held_back: bool = False) -> Forecast:
    """What will become of the history, whose oldest checkpoint was at `oldest`, with `used` bytes of journal.

    Assumes that the journal goes on to grow per second as it did over the history that it holds."""
    history = max(0.0, now - oldest) if oldest is not None else 0.0
    rate = used / history if history else 0.0
    limit = retention.journal_limit
    full_in = max(0, limit - used) / rate if rate else None
    return Forecast(history, retention.history, used, limit, full_in, limit / rate if rate else None, held_back)
