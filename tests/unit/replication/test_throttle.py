"""The limits of one shipper: which counts, what they share with others, and what a stopped process may not do."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drctl.model.bandwidth import LinkRule, Override, RateLimit
from drctl.model.extent import KiB, MiB
from drctl.replication.shipper_config import ShipperConfig
from drctl.replication.throttle import OVERHEAD, Clocks, Throttle
from drctl.store.link_limits import LinkLimits

S = 1_000_000_000


@dataclass
class Time:
    """A Wednesday, 12:00 at the start."""

    now: int = 100 * S

    def minute(self, wall: float) -> tuple[int, int]:
        minutes = 2 * 1440 + 720 + int(wall // 60)
        return minutes // 1440 % 7, minutes % 1440

    @property
    def clocks(self) -> Clocks:
        return Clocks(lambda: self.now, lambda: self.now / S - 100, self.minute)


@dataclass
class Host:
    """A source host: its limits, and its shippers."""

    directory: Path
    time: Time

    @property
    def limits(self) -> LinkLimits:
        return LinkLimits(self.directory / "links.json")

    def set(self, **changes: Any) -> None:
        self.limits.change("beta", lambda _: LinkRule(**changes))

    def shipper(self, group: str = "web", **changes: Any) -> Throttle:
        paths = dict.fromkeys(("ring", "bell", "control", "tls", "definition"), "")
        config = ShipperConfig(
            group=group,
            host="a1",
            appliance="",
            peer="",
            links=str(self.limits.path),
            share=str(self.directory / "links" / "beta.share"),
            site="beta",
            **paths,
            **changes,
        )
        return Throttle(config, self.time.clocks)

    def run(self, seconds: float, *senders: tuple[Throttle, bool]) -> list[int]:
        """All send as much as they may; what each has sent."""
        sent, due = [0] * len(senders), [0] * len(senders)
        end = self.time.now + int(seconds * S)
        while self.time.now < end:
            for index, (throttle, live) in enumerate(senders):
                if due[index] <= self.time.now:
                    wait = throttle.ask(live=live)
                    due[index] = self.time.now + int(wait * S)
                    if not wait:
                        throttle.charge(throttle.step_bytes, live=live)
                        sent[index] += throttle.step_bytes
            self.time.now += S // 1000
        return sent


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, Time())


def test_without_limits_nothing_is_held_up(host: Host) -> None:
    throttle = host.shipper()
    assert (throttle.rate, throttle.told(), throttle.step_bytes, throttle.room(7)) == (0, None, MiB, 7)
    for _ in range(100):
        throttle.charge(100 * MiB, live=True)
        assert throttle.ask(live=True) == 0
    assert not throttle.behind(10**12)


def test_the_link_is_kept_under_its_limit_with_headers(host: Host) -> None:
    host.set(limits=(RateLimit(2_500_000),))
    throttle = host.shipper()
    (sent,) = host.run(20, (throttle, True))
    assert sent * OVERHEAD == pytest.approx(50_000_000, rel=0.05)
    assert throttle.told() == {"rate": 2_500_000, "scope": "link", "because": "always", "until": None}


def test_the_lower_of_both_limits_counts_and_is_told(host: Host) -> None:
    host.set(limits=(RateLimit(2_500_000),))
    throttle = host.shipper(limits=(RateLimit(1_000_000, "Wed"),))
    (sent,) = host.run(20, (throttle, True))
    assert sent * OVERHEAD == pytest.approx(20_000_000, rel=0.05)
    assert throttle.told() == {"rate": 1_000_000, "scope": "group", "because": "Wed", "until": None}


def test_groups_share_by_priority(host: Host) -> None:
    host.set(limits=(RateLimit(5_000_000),))
    high, low = host.shipper("db", priority="high"), host.shipper("web", priority="low")
    first, second = host.run(20, (high, True), (low, True))
    assert first / second == pytest.approx(4, rel=0.1)
    assert (first + second) * OVERHEAD == pytest.approx(100_000_000, rel=0.05)


def test_a_first_sync_yields_to_the_records_of_another_group(host: Host) -> None:
    host.set(limits=(RateLimit(5_000_000),))
    syncing, live = host.shipper("new", priority="high"), host.shipper("web", priority="low")
    first, second = host.run(20, (syncing, False), (live, True))
    assert second / first == pytest.approx(5, rel=0.15)  # low against high, and live against sync: 20 to 4
    (first,) = host.run(20, (syncing, False))
    assert first * OVERHEAD == pytest.approx(100_000_000, rel=0.05)


def test_a_group_that_syncs_is_not_punished_for_it_when_it_is_live(host: Host) -> None:
    host.set(limits=(RateLimit(5_000_000),))
    one, other = host.shipper("a"), host.shipper("b")
    host.run(20, (one, False), (other, True))
    first, second = host.run(10, (one, True), (other, True))
    assert first == pytest.approx(second, rel=0.1)


def test_a_change_counts_at_the_next_look(host: Host) -> None:
    throttle = host.shipper()
    host.set(limits=(RateLimit(1_000_000),), override=Override(2_000_000, by="root"))
    assert throttle.rate == 0
    throttle.refresh()
    assert throttle.told() == {"rate": 2_000_000, "scope": "link", "because": "set by root", "until": None}
    host.set(limits=(RateLimit(1_000_000),), groups={"web": Override(500_000), "other": Override(8000)})
    throttle.refresh()
    assert (throttle.rate, throttle.told()["scope"]) == (500_000, "group")  # type: ignore[index]


def test_windows_open_and_overrides_end_by_the_clock(host: Host) -> None:
    host.set(limits=(RateLimit(1_000_000, "Wed 12:10-12:20"),), override=Override(8000, until=300.0))
    throttle = host.shipper()
    seen = []
    for _ in range(25):
        throttle.refresh()
        seen.append(throttle.rate)
        host.time.now += 60 * S
    assert seen == [8000] * 5 + [0] * 5 + [1_000_000] * 10 + [0] * 5


def test_a_damaged_file_leaves_the_limits_as_they_were(host: Host) -> None:
    host.set(limits=(RateLimit(1_000_000),))
    throttle = host.shipper()
    host.limits.path.write_text("{")
    throttle.refresh()
    assert throttle.rate == 1_000_000


def test_steps_and_reads_are_small_on_a_slow_link(host: Host) -> None:
    host.set(limits=(RateLimit(2_500_000),))
    throttle = host.shipper()
    assert throttle.step_bytes == 75_000
    assert throttle.room(32 * MiB) == 1_250_000
    assert throttle.behind(2_000_000)
    assert not throttle.behind(1_000_000)
    host.set(limits=(RateLimit(8000),))
    throttle.refresh()
    assert throttle.step_bytes == 16 * KiB


def test_a_table_that_stays_locked_stops_nobody_for_long(host: Host) -> None:
    host.set(limits=(RateLimit(5_000_000),))
    throttle = host.shipper()
    stopped = os.open(host.directory / "links" / "beta.share", os.O_RDWR)
    fcntl.flock(stopped, fcntl.LOCK_EX)
    (sent,) = host.run(21, (throttle, True))
    assert sent * OVERHEAD == pytest.approx(100_000_000, rel=0.05)
    os.close(stopped)
    (sent,) = host.run(20, (throttle, True))
    assert sent * OVERHEAD == pytest.approx(100_000_000, rel=0.05)
