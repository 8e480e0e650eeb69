"""Do one thing for several machines at a time: what one of their QEMUs is late with must not hold up the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from drctl.errors import DrctlError, StepFailed

T = TypeVar("T")
R = TypeVar("R")

#: A call waits for a QEMU's main loop; more at a time would only ask libvirtd for more of its workers (20 by default).
AT_ONCE = 8


def each(act: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `act` returns for each, in their order. When all have ended, the first one's DrctlError is raised."""
    if len(items) < 2:
        return [act(item) for item in items]
    results: dict[int, R] = {}
    errors: dict[int, DrctlError] = {}
    numbered = iter(list(enumerate(items)))
    lock = threading.Lock()

    def work() -> None:
        while (one := _next(numbered, lock)) is not None:
            number, item = one
            try:
                results[number] = act(item)
            except DrctlError as exc:
                errors[number] = exc

    # Daemons: a supervisor that ends does not wait for a QEMU.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(AT_ONCE, len(items)) - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    if len(results) < len(items):  # a bug in a thread, whose traceback is in the log
        raise StepFailed("what was done for several machines at a time broke off unexpectedly; see the log")
    return [results[number] for number in range(len(items))]


def _next(numbered: Iterable[tuple[int, T]], lock: threading.Lock) -> tuple[int, T] | None:
    with lock:
        return next(iter(numbered), None)
