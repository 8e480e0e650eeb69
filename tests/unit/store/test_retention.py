from hypothesis import given
from hypothesis import strategies as st

from drctl.model.group import GiB, Retention, Rung
from drctl.store.retention import forecast, keep

LADDER = Retention(history=1000, ladder=(Rung(100, 0), Rung(500, 60)))


def kept(times, now, held=()):
    return sorted(keep([(time, time) for time in times], LADDER, now, held))


def test_every_one_then_one_a_minute_then_none():
    times = list(range(0, 2000, 10))
    found = kept(times, 2000)
    assert [t for t in times if t >= 1900] == [t for t in found if t >= 1900]
    assert [t for t in found if 1500 <= t < 1900] == [1500, 1560, 1620, 1680, 1740, 1800, 1860]
    # Beyond the last rung and within history the last rung goes on; 960, beyond it, had the slot of 1000.
    assert [t for t in found if t < 1500] == [1020, 1080, 1140, 1200, 1260, 1320, 1380, 1440]


def test_the_newest_and_held_ones_stay_however_old():
    assert kept([1.0, 2.0, 3.0], 1e9, held=[2.0]) == [2.0, 3.0]


@given(st.lists(st.integers(0, 2000), min_size=1, unique=True), st.integers(0, 500))
def test_what_is_dropped_is_never_wanted_again(times, later):
    times.sort()
    now = times[-1] + 1
    first = kept(times, now)
    second = kept(times, now + later)
    assert set(second) <= set(first)
    assert kept(first, now + later) == second


def test_a_forecast_tells_when_the_limit_will_cut_history():
    retention = Retention(history=7 * 86400, journal_limit=10 * GiB)
    told = forecast(0.0, 4 * GiB, retention, 86400.0)
    assert told.history == 86400
    assert told.falls_short
    assert told.at_limit == 2.5 * 86400
    assert told.hours_until_short == 36
    fine = forecast(0.0, 1 * GiB, retention, 86400.0)
    assert not fine.falls_short
    assert fine.hours_until_short is None
    assert forecast(None, 0, retention, 5.0).at_limit is None
    assert not fine.held_back
    assert forecast(0.0, GiB, retention, 86400.0, held_back=True).held_back
