"""Finding the newest good one: whatever the number, the place of the change, what is skipped, and how many at a time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.plan.bisect import Answer, answer_of, at_most, bounds, choose, is_moot


def search(truth: list[Answer], parallel: int, order: list[int] | None = None, known=None):
    """(bounds, places in the order in which they were begun). Those that run end in any order."""
    answers: dict[int, Answer] = dict(known or {})
    running: list[int] = []
    begun: list[int] = []
    turns = iter(order or [])
    while True:
        while len(running) < parallel and (place := choose(len(truth), answers, frozenset(running))) is not None:
            assert place not in answers
            assert place not in running
            running.append(place)
            begun.append(place)
        if not running:
            return bounds(len(truth), answers), begun
        place = running.pop(next(turns, 0) % len(running))
        answers[place] = truth[place]
        running = [other for other in running if not is_moot(other, len(truth), answers)]


def history(good: int, count: int) -> list[Answer]:
    return [Answer.GOOD] * good + [Answer.BAD] * (count - good)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 300), st.data())
def test_the_newest_good_one_is_found(count: int, data) -> None:
    good = data.draw(st.integers(0, count))
    parallel = data.draw(st.integers(1, 6))
    order = data.draw(st.lists(st.integers(0, 5), max_size=60))
    found, begun = search(history(good, count), parallel, order)
    assert (found.good, found.bad, found.open, found.skipped, found.crooked) == (good - 1, good, (), (), False)
    assert len(begun) == len(set(begun)), "none is tried twice"


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 120), st.data())
def test_what_is_skipped_is_told_where_it_hides_the_answer(count: int, data) -> None:
    good = data.draw(st.integers(0, count))
    skipped = data.draw(st.sets(st.integers(0, count - 1)))
    truth = [Answer.SKIP if place in skipped else answer for place, answer in enumerate(history(good, count))]
    found, _ = search(truth, data.draw(st.integers(1, 4)))
    goods = [place for place, answer in enumerate(truth) if answer is Answer.GOOD]
    bads = [place for place, answer in enumerate(truth) if answer is Answer.BAD]
    assert (found.good, found.bad) == (max(goods, default=-1), min(bads, default=count))
    assert set(found.skipped) == {place for place in skipped if found.good < place < found.bad}


def test_one_at_a_time_halves() -> None:
    for count in (1, 2, 3, 10, 1000):
        for good in {0, 1, count // 2, count - 1, count}:
            _, begun = search(history(good, count), 1)
            assert len(begun) <= at_most(count) + 1
    assert search(history(1000, 1000), 1)[1] == [999], "when the newest is good nothing is looked for"


def test_several_at_a_time_take_fewer_turns() -> None:
    answers: dict[int, Answer] = {999: Answer.BAD}
    running: set[int] = set()
    while len(running) < 3:
        running.add(choose(1000, answers, frozenset(running)))
    low, middle, high = sorted(running)
    assert (low, middle, high) == (249, 499, 749)
    assert is_moot(low, 1000, answers | {middle: Answer.GOOD})
    assert not is_moot(high, 1000, answers | {middle: Answer.GOOD})
    assert is_moot(high, 1000, answers | {middle: Answer.BAD})


def test_a_bad_one_below_a_good_one_is_told() -> None:
    found = bounds(10, {3: Answer.BAD, 5: Answer.GOOD, 9: Answer.BAD})
    assert (found.good, found.bad, found.crooked) == (5, 9, True)


def test_exit_codes() -> None:
    assert [answer_of(code) for code in (0, 125, 1, 124, 126, 127, 200, -9)] == [
        Answer.GOOD,
        Answer.SKIP,
        *[Answer.BAD] * 6,
    ]
