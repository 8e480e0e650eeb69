"""The run of a plan as a pure machine: what happened in → what to write down, and then what to begin.

Knows no clock (every event carries the time), no thread, no file. Times are seconds of one monotonic clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heappop, heappush
from typing import Any

from drctl.plan.inventory import Ending
from drctl.plan.plan import OnFailure
from drctl.plan.step import Compiled, Step, StepKind

#: Steps at a time. Booting more at once makes none of them faster.
PARALLEL = 32
#: How long an ending waits for steps that are over their time limit and can't be stopped.
GRACE = 60.0
#: Steps that can be given up half-way without harm.
_HARMLESS = (StepKind.CHECK, StepKind.MANUAL)


class Outcome(StrEnum):
    DONE = "done"
    FAILED = "failed"


class Verdict(StrEnum):
    """How a run ended. `dirty`: whatever it was otherwise, something could not be cleaned up or undone."""

    PASSED = "passed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    DIRTY = "dirty"


class _State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    SETTLED = "settled"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Ready:
    """What the shell does now, in this order: make `records` durable; give up `cancel`; begin `start`.

    Invariant: a step is begun only after the record that says so. `verdict` is set once, when the run is over."""

    records: tuple[dict[str, Any], ...] = ()
    cancel: tuple[str, ...] = ()
    start: tuple[Step, ...] = ()
    verdict: Verdict | None = None


@dataclass(slots=True)
class _Turn:
    records: list[dict[str, Any]] = field(default_factory=list)
    cancel: list[str] = field(default_factory=list)
    start: list[Step] = field(default_factory=list)


class Engine:
    """One run. Invariants: a step begins once everything that it waits for is settled; of an ending's steps none begins
    while one of the way forward runs; after an ending is decided nothing of the way forward begins."""

    def __init__(self, compiled: Compiled, *, parallel: int = PARALLEL) -> None:
        self.compiled = compiled
        self.ending: Ending | None = compiled.ending
        self._parallel = parallel
        self._steps = {step.id: step for step in compiled.steps}
        self._state = {step.id: _State.SETTLED if step.satisfied else _State.WAITING for step in compiled.steps}
        self._missing = {step.id: 0 for step in compiled.steps}
        self._waiters: dict[str, list[str]] = {}
        for step in compiled.steps:
            for other in step.after:
                self._missing[step.id] += self._state[other] is not _State.SETTLED
                self._waiters.setdefault(other, []).append(step.id)
        self._place = {step.id: number for number, step in enumerate(compiled.steps)}
        #: heap of places: of those that can begin, the plan's order decides
        self._ready = [self._place[step.id] for step in compiled.forward if self._is_free(step)]
        self._deadlines: dict[str, float] = {}
        self._started: dict[str, float] = {}
        self._busy: set[str] = set()
        self._stage_deadlines: dict[str, float] = {}
        self._plan_deadline = float("inf")
        self._ending_since = 0.0
        self._grace_is_over = False
        self._flawed = compiled.flawed
        self._interrupted = compiled.interrupted
        self._dirty = False
        self._over = False
        self._turn = _Turn()

    def begin(self, now: float) -> Ready:
        """The first steps."""
        self._plan_deadline = now + self.compiled.plan.time_limit
        self._ending_since = now
        return self._advance(now)

    def ended(self, identity: str, outcome: Outcome, now: float, **facts: Any) -> Ready:
        """A begun step came to its end; `facts` go to the record. One that was given up before changes nothing."""
        self._busy.discard(identity)
        if self._state.get(identity) is _State.RUNNING:
            if outcome is Outcome.DONE:
                self._record_end(identity, outcome, now, facts)
                self._settle(identity)
            else:
                self._fail(identity, now, facts)
        return self._advance(now)

    def tick(self, now: float) -> Ready:
        """Time has passed: what is over its limit fails."""
        for identity, deadline in list(self._deadlines.items()):
            if deadline <= now and self._state[identity] is _State.RUNNING:
                self._turn.cancel.append(identity)
                self._fail(identity, now, {"reason": "time limit"})
        for stage, deadline in list(self._stage_deadlines.items()):
            if deadline <= now:
                del self._stage_deadlines[stage]
                self._stage_is_late(stage, now)
        if self._plan_deadline <= now and self.ending is None and not self._over:
            self._flawed = True
            on_failure = self.compiled.plan.on_failure
            self._end(self._ending_of(on_failure), "the plan's time limit", now)
        return self._advance(now)

    def interrupt(self, now: float, why: str = "interrupted", *, undo: bool = False) -> Ready:
        """Somebody wants it to end: nothing more is begun, a test is cleaned up, others stay unless `undo`."""
        self._interrupted = self._interrupted or self.ending is None
        self._end(self._ending_of(OnFailure.ROLLBACK if undo else OnFailure.STOP), why, now)
        return self._advance(now)

    @property
    def next_deadline(self) -> float:
        """When `tick` has to be called at the latest; infinite when nothing is waited for."""
        times = [*self._deadlines.values(), *self._stage_deadlines.values()]
        if self.ending is None:
            times.append(self._plan_deadline)
        elif self._forward_busy() and not self._grace_is_over:
            times.append(self._ending_since + GRACE)
        return min(times, default=float("inf"))

    def _is_free(self, step: Step) -> bool:
        return self._state[step.id] is _State.WAITING and self._missing[step.id] == 0

    def _advance(self, now: float) -> Ready:
        """Begin what can be begun; find out whether it is over."""
        if self.ending is None:
            self._start_ready(now)
            if not self._busy and not self._ready and self._all_over(self.compiled.forward):
                self._end(self._ending_of(OnFailure.STOP), "done", now)
        if self.ending is not None:
            self._grace_is_over = now >= self._ending_since + GRACE
            if self._grace_is_over or not self._forward_busy():
                self._start_ending(now)
        turn, self._turn = self._turn, _Turn()
        verdict = self._verdict()
        if verdict is not None:
            turn.records.append({"event": "over", "verdict": verdict.value})
        return Ready(tuple(turn.records), tuple(turn.cancel), tuple(turn.start), verdict)

    def _start_ready(self, now: float) -> None:
        waiting: list[int] = []
        while self._ready:
            place = heappop(self._ready)
            step = self.compiled.steps[place]
            if self._state[step.id] is not _State.WAITING:
                continue
            if step.kind is StepKind.GATE:
                self._pass_gate(step, now)
            else:
                waiting.append(place)
        waiting.sort()
        room = max(0, self._parallel - len(self._busy))
        for place in waiting[:room]:
            self._begin(self.compiled.steps[place], now)
        self._ready = waiting[room:]  # sorted, so a heap

    def _pass_gate(self, step: Step, now: float) -> None:
        name, _, end = step.id.rpartition("/")
        if end == "begin":
            limit = self._steps[f"{name}/done"].time_limit
            if limit:
                self._stage_deadlines[step.stage] = now + limit
        else:
            self._stage_deadlines.pop(step.stage, None)
        self._settle(step.id)

    def _begin(self, step: Step, now: float) -> None:
        self._state[step.id] = _State.RUNNING
        self._busy.add(step.id)
        self._started[step.id] = now
        if step.time_limit:
            self._deadlines[step.id] = now + step.time_limit
        self._turn.records.append({"event": "begin", "step": step.id})
        self._turn.start.append(step)

    def _settle(self, identity: str, state: _State = _State.SETTLED) -> None:
        self._state[identity] = state
        self._deadlines.pop(identity, None)
        for waiter in self._waiters.get(identity, ()):
            self._missing[waiter] -= 1
            step = self._steps[waiter]
            if step.part is None and self._is_free(step):
                heappush(self._ready, self._place[waiter])

    def _fail(self, identity: str, now: float, facts: dict[str, Any]) -> None:
        step = self._steps[identity]
        self._record_end(identity, Outcome.FAILED, now, facts)
        if step.part is not None:
            self._dirty = True
            self._settle(identity, _State.FAILED)
            return
        self._flawed = True
        self._give_in(step, str(facts.get("reason") or "failed"), now)

    def _give_in(self, step: Step, reason: str, now: float) -> None:
        """What the failure of a step of the way forward means."""
        if step.on_failure is OnFailure.CONTINUE:
            self._settle(step.id, _State.FAILED)
            return
        self._state[step.id] = _State.FAILED
        self._deadlines.pop(step.id, None)
        self._end(self._ending_of(step.on_failure), f"{step.id}: {reason}", now)

    def _record_end(self, identity: str, outcome: Outcome, now: float, facts: dict[str, Any]) -> None:
        seconds = round(now - self._started.get(identity, now), 3)
        self._turn.records.append(
            {"event": "end", "step": identity, "outcome": outcome.value, "seconds": seconds, **facts}
        )

    def _stage_is_late(self, stage: str, now: float) -> None:
        done = self._steps[f"stage:{stage}/done"]
        if self.ending is not None or self._state[done.id] is not _State.WAITING:
            return
        for step in self.compiled.forward:
            if step.stage != stage or step is done:
                continue
            if self._state[step.id] is _State.RUNNING:
                self._turn.cancel.append(step.id)
                self._record_end(step.id, Outcome.FAILED, now, {"reason": "time limit of its stage"})
                self._deadlines.pop(step.id, None)
                self._state[step.id] = _State.FAILED
            elif self._state[step.id] is _State.WAITING:
                self._state[step.id] = _State.SKIPPED
        self._flawed = True
        self._turn.records.append(
            {"event": "end", "step": done.id, "outcome": "failed", "reason": "time limit of the stage"}
        )
        self._give_in(done, "time limit of the stage", now)

    def _ending_of(self, on_failure: OnFailure) -> Ending:
        if self.compiled.ending_steps(Ending.CLEAN_UP):
            return Ending.CLEAN_UP
        undo = on_failure is OnFailure.ROLLBACK and self.compiled.ending_steps(Ending.UNDO)
        return Ending.UNDO if undo else Ending.LEAVE

    def _end(self, ending: Ending, why: str, now: float) -> None:
        """Decide how it ends; a later failure may only turn leaving into undoing."""
        if self.ending is not None and not (self.ending is Ending.LEAVE and ending is Ending.UNDO):
            return
        self.ending = ending
        self._ending_since = now
        self._ready = []
        self._stage_deadlines = {}
        skipped = [step.id for step in self.compiled.forward if self._state[step.id] is _State.WAITING]
        for identity in skipped:
            self._state[identity] = _State.SKIPPED
        self._turn.records.append(
            {
                "event": "ending",
                "ending": ending.value,
                "why": why,
                "flawed": self._flawed,
                "interrupted": self._interrupted,
                "skipped": skipped,
            }
        )
        for step in self.compiled.forward:
            if self._state[step.id] is _State.RUNNING and step.kind in _HARMLESS:
                self._turn.cancel.append(step.id)
                self._record_end(step.id, Outcome.FAILED, now, {"reason": f"given up: {why}"})
                self._state[step.id] = _State.FAILED
                self._deadlines.pop(step.id, None)

    def _start_ending(self, now: float) -> None:
        ending = self.ending or Ending.LEAVE
        for step in self.compiled.ending_steps(ending):
            if not self._touched(step):
                if self._state[step.id] is _State.WAITING:
                    self._settle(step.id, _State.SKIPPED)
            elif self._is_free(step) and len(self._busy) < self._parallel:
                self._begin(step, now)

    def _touched(self, step: Step) -> bool:
        """Whether there may be something to clean up or undo: the group's recovery was begun, now or before."""
        recover = f"group:{step.group}/recover"
        begun = self._state.get(recover) in (_State.RUNNING, _State.SETTLED, _State.FAILED)
        return begun or recover in self.compiled.begun or self.compiled.ending is Ending.CLEAN_UP

    def _forward_busy(self) -> bool:
        return any(self._steps[identity].part is None for identity in self._busy)

    def _all_over(self, steps: Iterable[Step]) -> bool:
        return all(self._state[step.id] not in (_State.WAITING, _State.RUNNING) for step in steps)

    def _verdict(self) -> Verdict | None:
        """Set once: when the ending is through, and nothing runs that could still be waited for."""
        if self._over or self.ending is None or (self._forward_busy() and not self._grace_is_over):
            return None
        if not self._all_over(self.compiled.ending_steps(self.ending)):
            return None
        self._over = True
        if self._dirty:
            return Verdict.DIRTY
        if self._interrupted:
            return Verdict.INTERRUPTED
        return Verdict.FAILED if self._flawed else Verdict.PASSED
