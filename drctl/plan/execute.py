"""The engine's shell: a thread per running step, records made durable before steps begin.

Blocking; knows neither what steps do (`perform`) nor where records go (`record`)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from drctl.errors import DrctlError, OutOfSpace, StepFailed
from drctl.plan.engine import Engine, Outcome, Ready, Verdict
from drctl.plan.step import Step

#: Between two looks at the clock, at most.
_TURN = 0.5


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a step; `facts` (reason, output, …) go to its record."""

    outcome: Outcome
    facts: Mapping[str, Any] = field(default_factory=dict)


Perform = Callable[[Step, threading.Event], Result]
Record = Callable[[Mapping[str, Any]], object]


def nothing() -> None:
    """No second place for records."""


@dataclass(frozen=True, slots=True)
class Executed:
    """How it ended. `unrecorded` is why the record could not be written to its end, None when it was."""

    verdict: Verdict
    unrecorded: DrctlError | None = None


class Execution:
    """Carries out one run in the calling thread. Invariant: no step begins before its record is durable; when records
    can't be written any more, nothing of the way forward begins, and a test is cleaned up all the same."""

    def __init__(
        self,
        engine: Engine,
        perform: Perform,
        record: Record,
        monotonic: Callable[[], float],
        flush: Callable[[], None] = nothing,
    ) -> None:
        """`flush` brings all records of a turn to where they are kept besides, before a step of that turn begins."""
        self._engine = engine
        self._perform = perform
        self._record = record
        self._flush = flush
        self._now = monotonic
        #: None: an interrupt. A SimpleQueue may be put to from a signal's handler.
        self._results: queue.SimpleQueue[tuple[Step, Result | BaseException] | None] = queue.SimpleQueue()
        self._cancelled: dict[str, threading.Event] = {}
        self._interrupts = 0
        self._unrecorded: DrctlError | None = None

    def run(self) -> Executed:
        """To the end. Raises whatever a step raises that is no error of ours: a bug."""
        ready = self._engine.begin(self._now())
        while True:
            self._carry_out(ready)
            if ready.verdict is not None:
                return Executed(ready.verdict, self._unrecorded)
            ready = self._wait()

    def interrupt(self) -> None:
        """End it in the safe way; a second time also end scripts that run. For signal handlers and other threads.

        It takes effect between two turns, so no record is cut off by it."""
        self._results.put(None)

    def _wait(self) -> Ready:
        left = self._engine.next_deadline - self._now()
        try:
            item = self._results.get(timeout=max(0.0, min(_TURN, left)))
        except queue.Empty:
            return self._engine.tick(self._now())
        if item is None:
            return self._interrupted()
        step, result = item
        self._cancelled.pop(step.id, None)
        if isinstance(result, BaseException):
            raise result
        return self._engine.ended(step.id, result.outcome, self._now(), **result.facts)

    def _interrupted(self) -> Ready:
        self._interrupts += 1
        if self._interrupts > 1:
            for event in self._cancelled.values():
                event.set()
        return self._engine.interrupt(self._now())

    def _carry_out(self, ready: Ready) -> None:
        for event in ready.records:
            self._write(event)
        if ready.records:
            self._flush()
        for identity in ready.cancel:
            if identity in self._cancelled:
                self._cancelled[identity].set()
        for step in ready.start:
            if self._unrecorded is not None and step.part is None:
                reason = f"not begun: {self._unrecorded.message}"
                self._results.put((step, Result(Outcome.FAILED, {"reason": reason})))
            else:
                self._start(step)

    def _write(self, event: Mapping[str, Any]) -> None:
        if self._unrecorded is not None:
            return
        try:
            self._record(event)
        except OutOfSpace as exc:
            self._unrecorded = exc
        except OSError as exc:
            self._unrecorded = StepFailed(f"the run's record can't be written: {exc.strerror}")

    def _start(self, step: Step) -> None:
        cancelled = self._cancelled[step.id] = threading.Event()
        # Daemons: an appliance's call that never returns must not keep the program from ending.
        threading.Thread(target=self._do, args=(step, cancelled), name=step.id, daemon=True).start()

    def _do(self, step: Step, cancelled: threading.Event) -> None:
        result: Result | BaseException
        try:
            result = self._perform(step, cancelled)
        except DrctlError as exc:
            result = Result(Outcome.FAILED, {"reason": exc.message, "error": exc.slug})
        except BaseException as exc:  # the edge of the thread: the one that waits raises it again
            result = exc
        self._results.put((step, result))
