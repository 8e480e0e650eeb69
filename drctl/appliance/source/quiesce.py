"""Quiescing: freeze the guests' file systems for the moment of a mark, and thaw them whatever happens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from drctl.errors import DrctlError, PreconditionFailed

log = logging.getLogger(__name__)

#: A guest that stays frozen longer is thawed by the clock, mark or no mark (design: within 10 s).
THAW_SECONDS = 10.0


class QuiesceHost(Protocol):
    def agent(self, name: str, sent: dict[str, Any], *, timeout_seconds: int = 5) -> Any: ...


class Quiescer:
    """Freezes through qemu-guest-agent. One freeze at a time per host, so that thaws can't be mixed up."""

    def __init__(self, host: QuiesceHost) -> None:
        self._host = host
        self._lock = threading.Lock()

    @contextmanager
    def frozen(self, machines: Sequence[str]) -> Iterator[None]:
        """All machines frozen inside; thawed at the end, or after 10 s. Raises PreconditionFailed when one has no agent
        or can't be frozen; those frozen before it are thawed."""
        with self._lock:
            done: list[str] = []
            timer = threading.Timer(THAW_SECONDS, self._thaw, (done,))
            timer.start()
            try:
                for name in machines:
                    done.append(name)
                    self._freeze(name)
                yield
            finally:
                timer.cancel()
                self._thaw(done)

    def _freeze(self, name: str) -> None:
        try:
            self._host.agent(name, {"execute": "guest-fsfreeze-freeze"})
        except DrctlError as exc:
            raise PreconditionFailed(
                f"{name} can't be quiesced: {exc.message}",
                hint="it needs qemu-guest-agent; a crash-consistent checkpoint needs nothing: leave --quiesce out",
                machine=name,
            ) from exc

    def _thaw(self, machines: Sequence[str]) -> None:
        for name in list(machines):
            try:
                self._host.agent(name, {"execute": "guest-fsfreeze-thaw"})
            except DrctlError as exc:
                log.warning("%s: not thawed: %s", name, exc.message)
