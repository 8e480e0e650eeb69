"""Rates and windows as people write them, and which limit counts when: midnight, weeks and clocks that are changed."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drctl.model.bandwidth import (
    DAYS,
    InForce,
    Override,
    RateLimit,
    changes_at,
    format_rate,
    in_force,
    limit_at,
    parse_rate,
    parse_window,
)

BERLIN = ZoneInfo("Europe/Berlin")


def local_in(zone: ZoneInfo):
    def local(wall: float) -> tuple[int, int]:
        now = datetime.fromtimestamp(wall, zone)
        return now.weekday(), now.hour * 60 + now.minute

    return local


def at(text: str, zone: ZoneInfo = BERLIN, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def covers(window: str, moment: str) -> bool:
    day, time = moment.split()
    hours, minutes = time.split(":")
    return parse_window(window).covers(DAYS.index(day), int(hours) * 60 + int(minutes))


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("Mon-Fri 08:00-18:00", ["Mon 08:00", "Fri 17:59", "Wed 12:00"], ["Mon 07:59", "Fri 18:00", "Sat 12:00"]),
        ("22:00-06:00", ["Mon 22:00", "Tue 05:59", "Sun 23:00", "Mon 00:00"], ["Mon 21:59", "Tue 06:00"]),
        ("Fri 22:00-06:00", ["Fri 22:00", "Sat 05:59"], ["Fri 05:00", "Sat 22:00", "Sat 06:00"]),
        ("Sun 22:00-06:00", ["Sun 23:00", "Mon 05:59"], ["Mon 06:00", "Sun 05:00"]),
        ("Sat,Sun", ["Sat 00:00", "Sun 23:59"], ["Fri 23:59", "Mon 00:00"]),
        ("Fri-Mon 00:00-24:00", ["Fri 00:00", "Sat 12:00", "Mon 23:59"], ["Tue 00:00", "Thu 23:59"]),
        ("Mon,Wed-Thu 18:00-24:00", ["Mon 23:59", "Wed 18:00"], ["Tue 00:00", "Tue 19:00", "Wed 17:59"]),
        ("Wed", ["Wed 00:00"], ["Tue 23:59", "Thu 00:00"]),
        ("00:00-00:01", ["Sun 00:00"], ["Sun 00:01"]),
    ],
)
def test_a_window_is_open_when_it_says(window: str, inside: list[str], outside: list[str]) -> None:
    for moment in inside:
        assert covers(window, moment), moment
    for moment in outside:
        assert not covers(window, moment), moment


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is no time window"),
        ("sometimes", "'sometimes'"),
        ("Mo-Fr 08:00-18:00", "'Mo'"),
        ("Mon-Fry 08:00-18:00", "'Fry'"),
        ("Mon-Fri 8:00-18:00", "'8:00-18:00'"),
        ("Mon-Fri 08:00-25:00", "'08:00-25:00'"),
        ("Mon-Fri 08:00-24:30", "ends at 24:00"),
        ("Mon-Fri 24:00-08:00", "ends at 24:00"),
        ("Mon-Fri 08:00", "'08:00'"),
        ("08:00-08:00", "is empty"),
        ("Mon 08:00-09:00 UTC", "is no time window"),
        ("08:00-18:00 Mon-Fri", "'08:00'"),
        ("Mon,,Tue", "''"),
    ],
)
def test_what_is_no_window_is_refused_and_named(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=r"write e\.g\. Mon-Fri 08:00-18:00") as error:
        parse_window(text)
    assert named in str(error.value)


@given(st.sets(st.integers(0, 6), min_size=1), st.integers(0, 1439), st.integers(1, 1440))
def test_a_window_lasts_as_long_as_it_says(days: set[int], start: int, minutes: int) -> None:
    end = start + minutes
    shown = end if end <= 1440 else end - 1440
    if shown == start:  # the whole day from an odd minute on can't be written
        return
    times = f"{start // 60:02}:{start % 60:02}-{shown // 60:02}:{shown % 60:02}"
    window = parse_window(",".join(DAYS[day] for day in sorted(days)) + " " + times)
    opened = {(day * 1440 + start + minute) % 10080 for day in days for minute in range(minutes)}
    assert opened == {minute for minute in range(10080) if window.covers(minute // 1440, minute % 1440)}


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("20 Mbit/s", 2_500_000),
        ("20Mbit/s", 2_500_000),
        ("1 Gbit/s", 125_000_000),
        ("512 kbit/s", 64_000),
        ("2.5 MB/s", 2_500_000),
        ("2 MiB/s", 2 << 20),
        ("8000 B/s", 8000),
        ("unlimited", 0),
    ],
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["20", "20 Mb/s", "20 mbit/s", "20 Mbit", "-1 Mbit/s", "0 Mbit/s", "1 kbit/s", "", "fast"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write e\.g\. 20 Mbit/s|at least 64 kbit/s"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (2_500_000, "20 Mbit/s"),
        (125_000_000, "1 Gbit/s"),
        (64_000, "512 kbit/s"),
        (0, "unlimited"),
        (187_500, "1.5 Mbit/s"),
    ],
)
def test_rates_are_told_as_they_are_written(rate: int, text: str) -> None:
    assert format_rate(rate) == text
    assert parse_rate(text) == rate


LUNCH = (RateLimit(0, "Mon-Fri 12:00-13:00"), RateLimit(2_500_000, "Mon-Fri 08:00-18:00"), RateLimit(12_500_000))


def test_the_first_that_is_open_counts() -> None:
    assert limit_at(LUNCH, 0, 12 * 60) == LUNCH[0]
    assert limit_at(LUNCH, 0, 13 * 60) == LUNCH[1]
    assert limit_at(LUNCH, 6, 13 * 60) == LUNCH[2]
    assert limit_at(LUNCH[:2], 6, 13 * 60) is None


def test_the_wall_clock_of_the_place_counts() -> None:
    noon = datetime(2026, 7, 1, 10, 30, tzinfo=UTC).timestamp()  # 12:30 in Berlin, a Wednesday
    assert in_force(LUNCH, None, noon, local_in(BERLIN)) == InForce(0, "Mon-Fri 12:00-13:00")
    assert in_force(LUNCH, None, noon, local_in(ZoneInfo("UTC"))).rate == 2_500_000


def test_an_override_counts_while_it_lasts() -> None:
    wall, local = at("2026-07-01T12:30"), local_in(BERLIN)
    assert in_force(LUNCH, Override(8000, by="root"), wall, local) == InForce(8000, "set by root", 0.0)
    assert in_force(LUNCH, Override(8000, wall + 1), wall, local) == InForce(8000, "set", wall + 1)
    assert in_force(LUNCH, Override(8000, wall), wall, local).because == "Mon-Fri 12:00-13:00"
    assert in_force((), None, wall, local) == InForce()


NIGHT = (RateLimit(8000, "02:00-03:00"),)


def test_clocks_put_forward_skip_what_is_not_there() -> None:
    local = local_in(BERLIN)  # 2026-03-29: 02:00 becomes 03:00
    before, after = at("2026-03-29T01:59"), at("2026-03-29T03:00")
    assert after - before == 60
    assert not in_force(NIGHT, None, before, local).rate
    assert not in_force(NIGHT, None, after, local).rate


def test_clocks_put_back_open_the_window_twice_as_long() -> None:
    local = local_in(BERLIN)  # 2026-10-25: 03:00 becomes 02:00
    begin = at("2026-10-25T02:00")
    open_minutes = [m for m in range(-60, 180) if in_force(NIGHT, None, begin + 60 * m, local).rate]
    assert open_minutes == list(range(120))
    assert changes_at(NIGHT, begin, local) == begin + 7200


def test_the_next_change() -> None:
    local = local_in(BERLIN)
    assert changes_at(LUNCH, at("2026-07-03T12:30:17"), local) == at("2026-07-03T13:00")
    assert changes_at(LUNCH, at("2026-07-03T19:00"), local) == at("2026-07-06T08:00")  # from Friday to Monday
    assert changes_at((RateLimit(8000),), at("2026-07-03T19:00"), local) == 0
    assert changes_at((), at("2026-07-03T19:00"), local) == 0
    # Over a night in which an hour is missing.
    assert changes_at(LUNCH, at("2026-03-28T19:00"), local) == at("2026-03-30T08:00")
