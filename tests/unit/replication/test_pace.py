"""Who may send next: the rate is kept, what nobody wants may be had, shares go by weight, and nobody starves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.replication.pace import FORGOTTEN, SIZE, SLOTS, STALE, Shares

S = 1_000_000_000


@dataclass
class Sender:
    owner: int
    step: int
    weight: float = 1.0
    #: Bytes that it has to send at each moment; None: no end of them.
    wants: int | None = None
    due: int = 0
    had: int = 0


def play(senders: list[Sender], rate: int, seconds: float, shares: Shares | None = None) -> Counter[int]:
    """All ask as they are told to, for a while; what each has sent."""
    shares = shares or Shares()
    sent: Counter[int] = Counter()
    now, end = S, S + int(seconds * S)
    while now < end:
        for sender in senders:
            if sender.due > now or (sender.wants is not None and sent[sender.owner] >= sender.wants):
                continue
            while not (wait := shares.ask(sender.owner, now, rate)):
                shares.charge(sender.owner, now, rate, sender.step, sender.weight)
                sent[sender.owner] += sender.step
                if sender.wants is not None and sent[sender.owner] >= sender.wants:
                    break
            sender.due = now + wait
        now += 1_000_000
    return sent


@pytest.mark.parametrize("rate", [8000, 2_500_000, 125_000_000])
def test_one_sender_gets_the_rate_and_no_more(rate: int) -> None:
    sent = play([Sender(1, max(1000, rate // 50))], rate, 10)
    assert rate * 10 * 0.97 <= sent[1] <= rate * 10 * 1.05


def test_shares_go_by_weight() -> None:
    sent = play([Sender(1, 50_000, 4), Sender(2, 50_000, 2), Sender(3, 50_000, 1)], 2_500_000, 20)
    assert sent[1] / sent[3] == pytest.approx(4, rel=0.1)
    assert sent[2] / sent[3] == pytest.approx(2, rel=0.1)
    assert sum(sent.values()) == pytest.approx(50_000_000, rel=0.05)


def test_shares_are_counted_in_bytes_not_in_steps() -> None:
    sent = play([Sender(1, 250_000), Sender(2, 10_000)], 2_500_000, 20)
    assert sent[1] == pytest.approx(sent[2], rel=0.1)


def test_what_one_does_not_want_the_others_have() -> None:
    sent = play([Sender(1, 50_000, 4, wants=100_000), Sender(2, 50_000, 1)], 2_500_000, 10)
    assert sent[1] == 100_000
    assert sent[2] == pytest.approx(24_900_000, rel=0.05)


def test_who_was_silent_has_saved_nothing_up() -> None:
    shares = Shares()
    play([Sender(1, 50_000), Sender(2, 50_000, wants=50_000)], 2_500_000, 10, shares)
    sent = play([Sender(1, 50_000), Sender(2, 50_000)], 2_500_000, 10, shares)
    assert sent[1] == pytest.approx(sent[2], rel=0.1)


def test_a_short_burst_is_all_that_silence_gives() -> None:
    shares = Shares(at=S)
    now, count = 100 * S, 0
    while not shares.ask(1, now, 1_000_000):
        shares.charge(1, now, 1_000_000, 10_000, 1)
        count += 10_000
    assert 50_000 <= count <= 70_000


def test_a_step_larger_than_the_rate_is_waited_for() -> None:
    shares = Shares(at=S)
    assert shares.ask(1, S, 1_000_000) == 0
    shares.charge(1, S, 1_000_000, 32_000_000, 1)
    assert shares.ask(1, S + 30 * S, 1_000_000) > 0
    assert shares.ask(1, S + 33 * S, 1_000_000) == 0


def test_a_higher_rate_frees_at_once_whoever_waits_under_the_lower() -> None:
    shares = Shares(at=S)
    shares.charge(1, S, 8000, 10_000_000, 1)
    assert shares.ask(1, S + S, 8000) > 0
    assert shares.ask(1, S + S + S // 10, 1_000_000_000) == 0


def test_one_that_ended_while_it_waited_holds_nobody_up() -> None:
    shares = Shares(at=S)
    shares.charge(2, S, 1_000_000, 1_000_000, 1)
    assert shares.ask(1, S, 1_000_000) > 0  # would be first, having had nothing
    assert shares.ask(2, 2 * S - STALE // 2, 1_000_000) > 0
    assert shares.ask(1, 2 * S - STALE // 2, 1_000_000) > 0
    later = 2 * S + 2 * STALE
    assert shares.ask(2, later, 1_000_000) == 0


def test_one_that_withdrew_holds_nobody_up() -> None:
    shares = Shares(at=S)
    shares.charge(2, S, 1_000_000, 1_000_000, 1)
    assert shares.ask(1, 2 * S - 1000, 1_000_000) > 0
    assert shares.ask(2, 2 * S + 1000, 1_000_000) > 0  # the other is first
    shares.withdraw(1)
    assert shares.ask(2, 2 * S + 1000, 1_000_000) == 0


def test_more_than_the_table_holds_are_served_too() -> None:
    shares = Shares(at=S)
    for owner in range(1, SLOTS + 1):
        shares.charge(owner, S, 10**9, 1, 1)
    assert len(shares.slots) == SLOTS
    assert shares.ask(10_000, 2 * S, 10**9) == 0
    assert len(shares.pack()) == SIZE
    assert shares.ask(10_001, FORGOTTEN + 3 * S, 10**9) == 0
    assert [slot.owner for slot in shares.slots] == [10_001]


def test_a_table_of_another_boot_blocks_nobody() -> None:
    old = Shares(at=10**18, owed=1e12)
    assert old.ask(1, S, 10**9) <= 50_000_000
    assert Shares.unpack(b"\0" * SIZE) == Shares()
    assert Shares.unpack(b"torn") == Shares()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 100_000), st.floats(0.5, 8)), max_size=40),
    st.integers(8000, 10**8),
)
def test_a_table_is_read_back_as_it_was_written(acts: list[tuple[int, int, float]], rate: int) -> None:
    shares, now = Shares(), S
    for owner, count, weight in acts:
        now += count * 1000
        if not shares.ask(owner, now, rate):
            shares.charge(owner, now, rate, count, weight)
    assert Shares.unpack(shares.pack()) == shares


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(50_000, 300_000), st.sampled_from([1, 2, 4, 20, 80])), min_size=1, max_size=6))
def test_whoever_always_wants_gets_its_part(kinds: list[tuple[int, int]]) -> None:
    rate = 10_000_000
    senders = [Sender(index + 1, step, weight) for index, (step, weight) in enumerate(kinds)]
    sent = play(senders, rate, 10)
    total = sum(weight for _, weight in kinds)
    assert sum(sent.values()) <= rate * 10 * 1.02 + sum(step for step, _ in kinds)
    for sender in senders:
        # One step more or less, and what a step of another's takes.
        fair = rate * 10 * sender.weight / total
        assert sent[sender.owner] >= 0.8 * fair - 2 * max(step for step, _ in kinds)
