"""The greatest age of the newest checkpoint in each part of a time, against looking at every moment."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.model.ages import worst_ages


def test_a_gap_is_seen_in_the_parts_that_it_touches() -> None:
    assert worst_ages([0, 5, 10, 35, 40], 0, 40, 4) == [5, 10, 20, 25]
    assert worst_ages([], 0, 10, 2) == [None, None]
    assert worst_ages([12], 0, 20, 2) == [None, 8]
    assert worst_ages([-100], 0, 10, 2) == [105, 110]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-20, 60), max_size=12), st.integers(1, 6))
def test_it_is_what_looking_at_every_moment_finds(times: list[int], parts: int) -> None:
    times.sort()
    step = 60 // parts
    found = worst_ages(times, 0, step * parts, parts)
    for part in range(parts):
        ages = [
            age
            for tick in range(part * step, (part + 1) * step + 1)
            # right before a checkpoint of that moment, and right behind it
            for known in ([one for one in times if one < tick], [one for one in times if one <= tick])
            if known and (tick > part * step or known is not None)
            for age in [tick - max(known)]
            if tick > part * step or known == [one for one in times if one <= tick]
        ]
        assert found[part] == (max(ages) if ages else None), (times, part)
