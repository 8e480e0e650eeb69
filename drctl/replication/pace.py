"""Who may send next over a link that several groups share, and how much: the pure core of bandwidth limits.

A bucket holds what was sent beyond the rate, in bytes; nobody begins a step while it holds anything, so a step may be
of any size and the next one waits for it. Among those that wait the one goes first that has had least so far for its
weight (start-time fair queueing): what nobody else wants may be had by one alone, and nobody starves.

Knows no clock and no file: times are nanoseconds of one monotonic clock that all that share a table have in common."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

#: A slot whose owner did not ask for so long (ns) does not wait any more: it has ended, or lost its link.
STALE = 300_000_000
#: A slot that was silent for so long may be given to another owner.
FORGOTTEN = 60_000_000_000
#: What may be saved up while nobody sends (ns): short silences are no loss, and a long one makes no burst.
SAVED = 50_000_000
#: Nobody waits longer than this (ns) before it asks again: it is not told when its turn comes.
LONGEST = 50_000_000
#: When another one is first (ns): it is to ask at any moment.
SOON = 2_000_000
SLOTS = 128

_HEAD = struct.Struct("<8sqdd")
_SLOT = struct.Struct("<Qqddq")
_MAGIC = b"DRLINK01"
SIZE = _HEAD.size + SLOTS * _SLOT.size


@dataclass(slots=True)
class Slot:
    """One that shares the link. `start`, `finish`: what it had so far, in bytes for each unit of its weight."""

    owner: int
    seen: int = 0
    start: float = 0.0
    finish: float = 0.0
    waits: bool = False


@dataclass(slots=True)
class Shares:
    """All that share one link. Invariant: `owed` > 0 while more was sent than the rate allowed up to `at`."""

    at: int = 0
    owed: float = 0.0
    virtual: float = 0.0
    slots: list[Slot] = field(default_factory=list)

    def ask(self, owner: int, now: int, rate: int) -> int:
        """0: `owner` may send one step, and `charge` it. Else: after how many nanoseconds to ask again."""
        slot = self._slot(owner, now)
        if slot is not None:
            if not slot.waits:
                slot.start, slot.waits = max(self.virtual, slot.finish), True
            slot.seen = now
        self._refill(now, rate)
        if self.owed > 0:
            return max(1, min(LONGEST, int(self.owed * 1e9 / rate)))
        if slot is None:
            return 0
        waiting = [each for each in self.slots if each.waits and now - each.seen < STALE]
        if min(waiting, key=lambda each: (each.start, each.owner)) is not slot:
            return SOON
        self.virtual = max(self.virtual, slot.start)
        slot.waits, slot.finish = False, slot.start
        return 0

    def withdraw(self, owner: int) -> None:
        """It does not want to send any more."""
        for slot in self.slots:
            if slot.owner == owner:
                slot.waits = False

    def charge(self, owner: int, now: int, rate: int, count: int, weight: float) -> None:
        """`count` bytes were sent by it."""
        self._refill(now, rate)
        self.owed += count
        slot = self._slot(owner, now)
        if slot is not None:
            slot.finish = max(slot.finish, self.virtual) + count / weight

    def _refill(self, now: int, rate: int) -> None:
        # A clock that stands before `at` is that of another boot: the file is older than it should be.
        passed = now - self.at if now >= self.at else LONGEST
        self.owed = max(self.owed - passed * rate / 1e9, -SAVED * rate / 1e9)
        self.at = now

    def _slot(self, owner: int, now: int) -> Slot | None:
        """Its slot; None when all are taken: then it is served like the first of all that wait."""
        for slot in self.slots:
            if slot.owner == owner:
                return slot
        if len(self.slots) >= SLOTS:
            self.slots = [slot for slot in self.slots if 0 <= now - slot.seen < FORGOTTEN]
        if len(self.slots) >= SLOTS:
            return None
        self.slots.append(Slot(owner, now))
        return self.slots[-1]

    def pack(self) -> bytes:
        parts = [_HEAD.pack(_MAGIC, self.at, self.owed, self.virtual)]
        parts += [_SLOT.pack(s.owner, s.seen, s.start, s.finish, s.waits) for s in self.slots]
        return b"".join(parts).ljust(SIZE, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Shares:
        """What is no table, or torn, is an empty one: nothing is lost but who had how much."""
        if len(data) != SIZE or not data.startswith(_MAGIC):
            return cls()
        _, at, owed, virtual = _HEAD.unpack_from(data)
        slots = []
        for place in range(_HEAD.size, SIZE, _SLOT.size):
            owner, seen, start, finish, waits = _SLOT.unpack_from(data, place)
            if not owner:
                break
            slots.append(Slot(owner, seen, start, finish, bool(waits)))
        return cls(at, owed, virtual, slots)
