"""How old the newest checkpoint was at each moment of a time: what would have been lost then. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def worst_ages(times: Sequence[float], begin: float, end: float, parts: int) -> list[float | None]:
    """For each of `parts` equal parts of begin..end the greatest age, in seconds, of the newest checkpoint at or before
    a moment in it; None where there was no checkpoint yet. `times` of checkpoints in order; others are passed over.

    An age is greatest right before the next checkpoint, or at a part's end."""
    step = (end - begin) / parts
    found: list[float | None] = []
    place, newest = 0, None
    while place < len(times) and times[place] <= begin:
        newest, place = times[place], place + 1
    for part in range(parts):
        until = begin + (part + 1) * step
        worst = None
        while place < len(times) and times[place] <= until:
            worst = _greater(worst, newest, times[place])
            newest = times[place] if newest is None else max(newest, times[place])
            place += 1
        found.append(_greater(worst, newest, until))
    return found


def _greater(worst: float | None, newest: float | None, moment: float) -> float | None:
    if newest is None:
        return worst
    age = max(0.0, moment - newest)
    return age if worst is None else max(worst, age)
