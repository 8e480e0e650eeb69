"""How far the receiver's clock is from ours, as NTP measures it. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

#: More than this and times of checkpoints mislead people (design: ClockSkew).
SKEW_LIMIT = 5.0
#: What two clocks may drift apart while samples are kept (16 s of pings, 500 ppm: the most that adjtime(3) slews).
DRIFT_NS = 8_000_000


@dataclass(slots=True)
class ClockOffset:
    """The sample with the shortest round trip among the last ones is the truest: its error is half its round trip.

    A sample that contradicts it tells that one of the clocks was set: what came before says nothing any more."""

    _samples: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=8))

    def sample(self, sent_wall: int, round_trip: int, their_wall: int) -> None:
        """All in nanoseconds; `round_trip` by the monotonic clock."""
        offset = their_wall - (sent_wall + round_trip // 2)
        if self._samples and abs(offset - self.offset_ns) > (round_trip + self.round_trip_ns) // 2 + DRIFT_NS:
            self._samples.clear()
        self._samples.append((round_trip, offset))

    def forget(self) -> None:
        self._samples.clear()

    @property
    def known(self) -> bool:
        return bool(self._samples)

    @property
    def offset_ns(self) -> int:
        """To be added to our wall time to get the receiver's; 0 while unknown."""
        return min(self._samples)[1] if self._samples else 0

    @property
    def round_trip_ns(self) -> int:
        return min(self._samples)[0] if self._samples else 0

    @property
    def skewed(self) -> bool:
        return abs(self.offset_ns) > SKEW_LIMIT * 1e9
