"""Groups of tasks whose failure leaves nothing behind in the task that waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextvars import Context
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class TaskGroup(asyncio.TaskGroup):
    """As asyncio's; but when one fails while its owner only waits for the end of all, no request to cancel the owner
    stays behind.

    Before Python 3.13 one does (its end does not take back what the failure asked for in the meantime). The owner's
    next `asyncio.timeout` then takes its own cancellation for another's and lets it pass: the task ends, and nobody is
    told. So the owner waits as if in the block, where a failure is taken back everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self._running: set[asyncio.Task[Any]] = set()

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        task = super().create_task(coro, name=name, context=context)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                while self._running:
                    await asyncio.wait(self._running)
            except asyncio.CancelledError as exc:
                kind, error, trace = type(exc), exc, exc.__traceback__
        await super().__aexit__(kind, error, trace)
