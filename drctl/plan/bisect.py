"""Which checkpoint to try next until the newest good one is found. Pure.

Checkpoints are places 0 … count - 1 in order of time. What is good is taken to be older than what is bad; places that
can't be judged are skipped. Several can be under way at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

#: As `git bisect run` has it.
SKIP_CODE = 125


class Answer(StrEnum):
    """What the check said of a checkpoint."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


def answer_of(code: int | None) -> Answer:
    """0 is good, 125 can't be judged, all else is bad: also a check that was ended by a signal or its time limit."""
    return Answer.GOOD if code == 0 else Answer.SKIP if code == SKIP_CODE else Answer.BAD


@dataclass(frozen=True, slots=True)
class Bounds:
    """`good`: the newest place known to be good, -1 for none yet; `bad`: the oldest bad one above it, `count` for none.

    `open` are places in between that nobody has judged, `skipped` those in between that can't be. `crooked`: somewhere
    a bad one is older than a good one, so that the answer may depend on where one looked."""

    good: int
    bad: int
    open: tuple[int, ...]
    skipped: tuple[int, ...]
    crooked: bool

    @property
    def done(self) -> bool:
        return not self.open


def bounds(count: int, answers: Mapping[int, Answer]) -> Bounds:
    """How far it is by the answers until now."""
    good = max((place for place, answer in answers.items() if answer is Answer.GOOD), default=-1)
    bads = [place for place, answer in answers.items() if answer is Answer.BAD]
    bad = min((place for place in bads if place > good), default=count)
    between = range(good + 1, bad)
    skipped = tuple(place for place in sorted(answers) if place in between)
    left = tuple(place for place in between if place not in answers)
    return Bounds(good, bad, left, skipped, crooked=any(place < good for place in bads))


def choose(count: int, answers: Mapping[int, Answer], running: frozenset[int]) -> int | None:
    """The place to try next beside those that run; None when there is none.

    First the newest: when that is good nothing is to be looked for. Then the middle of the widest gap between what is
    known or under way: so one at a time halves what is left, and several divide it evenly."""
    now = bounds(count, answers)
    left = [place for place in now.open if place not in running]
    if not left:
        return None
    if now.bad == count and count - 1 in left and count - 1 not in running:
        return count - 1
    fences = [now.good, *sorted(place for place in running if now.good < place < now.bad), now.bad]
    gaps = [[place for place in left if low < place < high] for low, high in pairwise(fences)]
    widest = max(gaps, key=len)
    return widest[len(widest) // 2]


def is_moot(place: int, count: int, answers: Mapping[int, Answer]) -> bool:
    """Whether the answer of one that runs makes no difference any more."""
    now = bounds(count, answers)
    return not now.good < place < now.bad


def at_most(left: int) -> int:
    """How many tries one after the other are needed at most, when none is skipped."""
    return left.bit_length()
