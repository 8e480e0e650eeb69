"""Checkpoints that somebody waits for: each is answered by the next cycle that begins, or told why there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drctl.errors import DrctlError, StepFailed

#: Longest that a checkpoint is waited for.
LONGEST_SECONDS = 3600.0


@dataclass(slots=True)
class Order:
    """One of them. Once `ended` is set it has a checkpoint, or an error."""

    tags: tuple[str, ...]
    ended: threading.Event = field(default_factory=threading.Event)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    error: DrctlError | None = None


class Orders:
    """Those of one group. Any thread may give one; the group's own thread takes and answers them."""

    def __init__(self) -> None:
        self._waiting: list[Order] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def give(self, tags: Sequence[str]) -> Order:
        order = Order(tuple(tags))
        with self._lock:
            self._waiting.append(order)
        return order

    def take(self) -> list[Order]:
        """All that wait; whoever takes them ends them or puts them back."""
        with self._lock:
            orders, self._waiting = self._waiting, []
        return orders

    def put_back(self, orders: Sequence[Order]) -> None:
        with self._lock:
            self._waiting = [*orders, *self._waiting]

    def refuse(self, error: DrctlError) -> None:
        """There will be no checkpoint: all that wait are told why."""
        for order in self.take():
            order.error = error
            order.ended.set()


def wait_for(order: Order, told: Callable[[], None], reason: Callable[[], str]) -> dict[str, Any]:
    """The checkpoint that an order became; `told` is called now and then. Raises what the cycle failed with."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not order.ended.wait(1.0):
        told()
        if time.monotonic() > deadline:
            raise StepFailed(f"no checkpoint within {LONGEST_SECONDS:.0f} s: {reason()}")
    if order.error is not None:
        raise order.error
    return order.checkpoint


def answer(orders: Sequence[Order], checkpoint: Mapping[str, Any]) -> None:
    for order in orders:
        order.checkpoint = dict(checkpoint)
        order.ended.set()
