"""The offset of two clocks from pings."""

from drctl.replication.clock_offset import ClockOffset


def test_the_shortest_round_trip_is_believed():
    clock = ClockOffset()
    assert not clock.known
    clock.sample(1_000_000, 800, 1_005_000)
    clock.sample(2_000_000, 100, 2_003_050)
    clock.sample(3_000_000, 900, 3_009_000)
    assert clock.offset_ns == 3000
    assert clock.round_trip_ns == 100
    assert not clock.skewed


def test_a_skew_of_more_than_five_seconds_is_told():
    clock = ClockOffset()
    clock.sample(0, 10, 6_000_000_000)
    assert clock.skewed
    clock.forget()
    assert clock.offset_ns == 0


def test_old_samples_fade():
    clock = ClockOffset()
    clock.sample(0, 1, 5)
    for _ in range(8):
        clock.sample(0, 10, 1005)
    assert clock.offset_ns == 1000


def test_a_clock_that_was_set_is_believed_at_once_whatever_the_round_trip():
    clock = ClockOffset()
    for _ in range(8):
        clock.sample(0, 100_000, 50_000)
    clock.sample(0, 900_000, 3_600_000_450_000)
    assert clock.offset_ns == 3_600_000_000_000
    assert clock.round_trip_ns == 900_000


def test_a_slow_link_and_a_drift_are_no_step():
    clock = ClockOffset()
    clock.sample(0, 100_000, 50_000)
    clock.sample(0, 40_000_000, 5_000_000)  # all of its 40 ms may have been the way back
    clock.sample(0, 110_000, 6_055_000)
    assert clock.offset_ns == 0
