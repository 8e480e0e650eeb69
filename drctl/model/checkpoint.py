"""Checkpoints, and the ways an operator may name one without doubt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from drctl.errors import NotFound
from drctl.model.duration import parse_duration


class CheckpointKind(StrEnum):
    CRASH = "crash-consistent"
    QUIESCED = "quiesced"
    RESYNC = "resync"
    FINAL = "final"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A proven, durable point in time of a whole group.

    `time` is the source's wall clock at the mark (seconds since the epoch, UTC) corrected by the link's measured
    offset to the recovery site's clock; `sequence` the last record inside, per stream."""

    number: int
    time: float
    kind: CheckpointKind
    epoch: str
    generation: int
    sequence: int
    tags: tuple[str, ...] = ()
    pinned: bool = False


_NUMBER = re.compile(r"#(\d+)$")


def resolve(selector: str, checkpoints: Sequence[Checkpoint], now: float) -> Checkpoint:
    """The checkpoint that `selector` names: `latest`, `-10m`, `#123`, `tag:NAME`, or an ISO time with zone.

    A time names the newest checkpoint at or before it. `checkpoints` is in order of time.
    Raises NotFound (no such checkpoint) or ValueError (not a selector)."""
    if not checkpoints:
        raise NotFound(
            "checkpoint",
            selector,
            message="the group has no restorable checkpoint yet",
            hint="one comes when the first sync is done; see: drctl status GROUP",
        )
    if selector == "latest":
        return checkpoints[-1]
    if (number := checkpoint_number(selector)) is not None:
        return _find(selector, [c for c in checkpoints if c.number == number], checkpoints)
    if selector.startswith("tag:"):
        return _find(selector, [c for c in checkpoints if selector[4:] in c.tags], checkpoints)
    moment = checkpoint_moment(selector, now)
    return _find(selector, [c for c in checkpoints if c.time <= moment], checkpoints)


def checkpoint_number(selector: str) -> int | None:
    """N of `#N`, None for another selector."""
    match = _NUMBER.match(selector)
    return int(match[1]) if match else None


def checkpoint_moment(selector: str, now: float) -> float:
    """The moment (seconds since the epoch) that `-10m` or an ISO time with zone names. Raises ValueError."""
    return now - parse_duration(selector[1:]) if selector.startswith("-") else _iso(selector)


def _find(selector: str, found: Sequence[Checkpoint], every: Sequence[Checkpoint]) -> Checkpoint:
    if not found:
        span = f"#{every[0].number} of {_spell(every[0])} to #{every[-1].number} of {_spell(every[-1])}"
        tags = ", ".join(sorted({tag for checkpoint in every for tag in checkpoint.tags}))
        raise NotFound("checkpoint", selector, hint=f"restorable: {span}; tags: {tags or 'none'}")
    return found[-1]


def _spell(checkpoint: Checkpoint) -> str:
    return datetime.fromtimestamp(checkpoint.time, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _iso(selector: str) -> float:
    try:
        moment = datetime.fromisoformat(selector)
    except ValueError:
        raise ValueError(
            f"{selector!r} names no checkpoint; write latest, -10m, '#123', tag:NAME or 2026-01-31T02:10:05+00:00"
        ) from None
    if moment.tzinfo is None:
        raise ValueError(f"{selector!r} has no time zone; write e.g. {selector}+00:00 or {selector}Z")
    return moment.timestamp()
