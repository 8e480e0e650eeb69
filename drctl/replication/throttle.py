"""The limits of one shipper's stream: its group's own, and its part of what the link to the other site may carry.

The limits are read anew when they were changed, and looked at by the wall clock ten times a second. Shippers of one
host that send to the same site share a table on tmpfs; who looks at it holds its lock for some microseconds."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from drctl.errors import IntegrityError
from drctl.model.bandwidth import InForce, LinkRule, Local, Priority, in_force
from drctl.model.extent import KiB, MiB
from drctl.replication.pace import SIZE, SOON, Shares
from drctl.replication.shipper_config import ShipperConfig
from drctl.store.link_limits import LinkLimits

#: What goes over the wire beside a message's bytes: TLS records, TCP and IP headers at an MTU of 1500.
OVERHEAD = 1.035
#: One step takes so long (seconds) of a limited link: what is urgent waits for at most one.
STEP_SECONDS = 0.03
SMALLEST_STEP, LARGEST_STEP = 16 * KiB, MiB
#: Of a limited link the reader keeps so much (seconds) between disk and stream: while it is there, the stream is held.
READ_SECONDS = 0.5
#: What the guest writes weighs so much more than what the reader fetches, where groups share a link.
LIVE_WEIGHT = 20
#: A table that was locked for so long (ns) belongs to a process that is stopped; each goes by its own count then.
STUCK = 1_000_000_000

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clocks:
    """Monotonic nanoseconds, wall seconds, and what the wall clock of this place shows."""

    monotonic: Callable[[], int]
    wall: Callable[[], float]
    local: Local


def local_minute(wall: float) -> tuple[int, int]:
    """(day of the week, minute of the day) here."""
    now = time.localtime(wall)
    return now.tm_wday, now.tm_hour * 60 + now.tm_min


REAL = Clocks(time.monotonic_ns, time.time, local_minute)


class ShareTable:
    """The table that the shippers of one host share for one link."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def change(self, work: Callable[[Shares], T]) -> T | None:
        """What `work` returns of the table; None while another holds it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        try:
            shares = Shares.unpack(os.pread(self._file, SIZE, 0))
            result = work(shares)
            os.pwrite(self._file, shares.pack(), 0)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return result


class Throttle:
    """Owned by the event loop. What is in force changes by `refresh` alone."""

    def __init__(self, config: ShipperConfig, clocks: Clocks = REAL) -> None:
        self._config = config
        self._clocks = clocks
        self._weight = Priority(config.priority).weight
        self._file = LinkLimits(Path(config.links)) if config.links else None
        self._stamp: tuple[int, int] | None = None
        self._rule = LinkRule()
        self.link = InForce()
        self.group = InForce()
        self._own = Shares()
        self._table = ShareTable(Path(config.share)) if config.share else None
        #: What this one alone had, while the table can't be had.
        self._alone = Shares()
        self._stuck_since = 0
        #: Owners in the table: of the live stream, and of the reader's.
        self._owners = (secrets.randbits(62) << 1 | 1, secrets.randbits(62) << 1 | 1)
        self._asking: int | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read the limits anew when they were changed; see which of them count now."""
        if self._file is not None and (stamp := self._file.stamp()) != self._stamp:
            try:
                self._rule, self._stamp = self._file.read().get(self._config.site, LinkRule()), stamp
            except IntegrityError as exc:
                log.warning("limits are left as they were: %s", exc)
                self._stamp = stamp
        wall, local = self._clocks.wall(), self._clocks.local
        self.link = in_force(self._rule.limits, self._rule.override, wall, local)
        self.group = in_force(self._config.limits, self._rule.groups.get(self._config.group), wall, local)

    @property
    def rate(self) -> int:
        """Bytes a second that this stream may have at most; 0: there is no limit."""
        rates = [rate for rate in (self.link.rate, self.group.rate) if rate]
        return min(rates, default=0)

    @property
    def step_bytes(self) -> int:
        """How large one step may be."""
        return min(max(SMALLEST_STEP, int(self.rate * STEP_SECONDS)), LARGEST_STEP) if self.rate else LARGEST_STEP

    def room(self, window: int) -> int:
        """How much the reader may have between disk and stream, of `window`."""
        return min(window, int(self.rate * READ_SECONDS)) if self.rate else window

    def behind(self, backlog: int) -> bool:
        """Whether so much waits of what the guest wrote that the reader should rest."""
        return bool(self.rate) and backlog > self.rate * READ_SECONDS

    def ask(self, *, live: bool) -> float:
        """0: one step may be sent, and is to be charged. Else: after how many seconds to ask again."""
        now = self._clocks.monotonic()
        if self.group.rate and (wait := self._own.ask(1, now, self.group.rate)):
            return wait / 1e9
        if not self.link.rate:
            return 0.0
        owner, other = self._owners if live else self._owners[::-1]

        def work(shares: Shares) -> int:
            if self._asking == other:
                shares.withdraw(other)
            return shares.ask(owner, now, self.link.rate)

        wait = self._shared(work, SOON)
        self._asking = owner if wait else None
        return wait / 1e9

    def idle(self) -> None:
        """There is nothing to send that would have to wait."""
        if (asking := self._asking) is not None:
            self._asking = None
            self._shared(lambda shares: shares.withdraw(asking), None)

    def charge(self, count: int, *, live: bool) -> None:
        """`count` bytes went into the connection."""
        if not count:
            return
        now, size = self._clocks.monotonic(), int(count * OVERHEAD)
        if self.group.rate:
            self._own.charge(1, now, self.group.rate, size, 1)
        if self.link.rate:
            weight = self._weight * (LIVE_WEIGHT if live else 1)
            owner = self._owners[0 if live else 1]
            self._shared(lambda shares: shares.charge(owner, now, self.link.rate, size, weight), None)

    def _shared(self, work: Callable[[Shares], T], busy: T) -> T:
        """What `work` returns of the shared table. A table that stays locked is left to whoever stopped with it."""
        if self._table is None:
            return work(self._alone)
        for _ in range(8):
            if done := self._table.change(lambda shares: (work(shares),)):
                self._stuck_since = 0
                return done[0]
        now = self._clocks.monotonic()
        self._stuck_since = self._stuck_since or now
        return work(self._alone) if now - self._stuck_since > STUCK or busy is None else busy

    def told(self) -> dict[str, Any] | None:
        """What the status says: the lowest limit that counts; None when there is none."""
        if not self.rate:
            return None
        scope = "group" if self.group.rate and (not self.link.rate or self.group.rate <= self.link.rate) else "link"
        found = self.group if scope == "group" else self.link
        return {"rate": found.rate, "scope": scope, "because": found.because, "until": found.until or None}
