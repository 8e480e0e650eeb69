"""The retention lock: for how long nobody, not even the group's own source, makes its history shorter. Pure.

A group's `lock` (seconds) is told to the recovery site by the operator (`drctl apply`), kept in the store, and then:

    what the ladder keeps of the last `lock` seconds stays restorable, also at the journal's limit: there the source has
                        to wait
    the lock            is lengthened only; history is never shorter than it, the ladder never coarser within it
    tags                of checkpoints younger than it stay
    the store           is not deleted before its newest checkpoint is older than it

Retention that arrives in the stream takes effect only as far as it shortens nothing, and never changes the lock."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from drctl.errors import RetentionLocked
from drctl.model.duration import format_duration
from drctl.model.group import Retention
from drctl.store.retention import interval_at


def weakened(old: Retention, new: Retention) -> list[str]:
    """What of the new retention would shorten what the old one's lock protects, in words; empty when nothing would."""
    if not old.lock:
        return []
    found = []
    if new.lock < old.lock:
        found.append(f"the lock can be lengthened only: {_spell(old.lock)} -> {_spell(new.lock)}")
    if new.history < old.lock:
        found.append(f"history of {_spell(new.history)} is shorter than the lock of {_spell(old.lock)}")
    if any(interval_at(new, age) > interval_at(old, age) for age in _ages(old, new)):
        found.append(f"the ladder would keep less of the last {_spell(old.lock)}")
    return found


def allowed(group: str, old: Retention, new: Retention, until: float) -> Retention:
    """The new retention. Raises RetentionLocked when it shortens what is locked. `until`: see `locked_until`."""
    if why := weakened(old, new):
        raise locked(f"{group} is under a retention lock: {'; '.join(why)}", group, until)
    return new


def strengthened(old: Retention, new: Retention | None) -> Retention:
    """The new retention (None: the old one) as far as it shortens nothing that the old one's lock protects; the lock
    stays as it is."""
    if new is None:
        return old
    if not old.lock:
        return replace(new, lock=0.0)
    coarser = any(interval_at(new, age) > interval_at(old, age) for age in _ages(old, new))
    ladder = old.ladder if coarser else new.ladder
    return replace(new, lock=old.lock, history=max(new.history, old.lock), ladder=ladder)


def locked_until(retention: Retention, newest: float | None) -> float:
    """The moment (seconds since the epoch) from which the store may be deleted; 0.0 when it may be at once."""
    return newest + retention.lock if retention.lock and newest is not None else 0.0


def locked(what: str, group: str, until: float) -> RetentionLocked:
    """The error, with the date."""
    moment = datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds")
    return RetentionLocked(
        f"{what}; what is there now is locked until {moment}",
        hint="nothing shortens it before; a lock can be lengthened: retention.lock in the group's file, drctl apply",
        group=group,
        until=moment,
    )


def _ages(old: Retention, new: Retention) -> list[float]:
    """Within the lock, an age in each stretch in which neither ladder changes: just behind each rung's end, and 0."""
    ends = [rung.within for rung in (*old.ladder, *new.ladder)]
    behind = [end + 1e-3 for end in ends] + [float(end) for end in ends]
    return [0.0, old.lock, *(age for age in behind if age <= old.lock)]


def _spell(seconds: float) -> str:
    return format_duration(seconds) if seconds else "none"
