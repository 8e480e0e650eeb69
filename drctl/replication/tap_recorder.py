"""Where a tap's writes go: the ring's writer, or a sink that keeps nothing; and the bell that wakes the shipper."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from drctl.store.ring import Ring
from drctl.wire.ring import OrderReason, Word


class Recorder(Protocol):
    """Where writes go: a RingWriter, or a Sink."""

    now: int

    def append(self, disk: int, offset: int, data: memoryview | bytes) -> int: ...

    def append_zeroes(self, disk: int, offset: int, length: int) -> int: ...

    def publish(self) -> bool: ...

    def poll(self, now: int) -> bool: ...

    def order_lost(self, reason: OrderReason) -> None: ...

    def connected(self, disk: int) -> int: ...

    def disconnected(self, disk: int) -> None: ...

    def ended(self, disk: int, *, goodbye: bool) -> None: ...


class Sink:
    """Keeps nothing. It lets a mirror whose tap died end softly: QEMU never ends one with a dead target."""

    def __init__(self) -> None:
        self.now = 0
        self._connections = 0

    def append(self, disk: int, offset: int, data: memoryview | bytes) -> int:
        return 0

    def append_zeroes(self, disk: int, offset: int, length: int) -> int:
        return 0

    def publish(self) -> bool:
        return False

    def poll(self, now: int) -> bool:
        return False

    def order_lost(self, reason: OrderReason) -> None: ...
    def disconnected(self, disk: int) -> None: ...
    def ended(self, disk: int, *, goodbye: bool) -> None: ...

    def connected(self, disk: int) -> int:
        self._connections += 1
        return self._connections


class Bell:
    """The FIFO that wakes a waiting shipper. Rung after the replies, so that no guest waits for it."""

    def __init__(self, path: Path, ring: Ring) -> None:
        if not path.exists():
            os.mkfifo(path, 0o600)
        # Open for both, so that it opens without a reader and a ring is kept until one comes.
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._words = ring.words
        self._waiting = int(Word.READER_WAITING)

    def ring(self) -> None:
        if self._words[self._waiting]:
            self._words[self._waiting] = 0
            # A full FIFO is full of rings that nobody heard yet.
            with suppress(BlockingIOError):
                os.write(self._descriptor, b"\0")


def say(text: str) -> None:
    """A line for the log, which is what stderr is."""
    os.write(2, f"tap: {text}\n".encode())
