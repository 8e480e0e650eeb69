"""One bisection under way: test boots of checkpoints, a check of each, recorded so that it can be gone on with."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drctl.cli import points, render
from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT
from drctl.cli.recovery import RUN_TIMEOUT
from drctl.errors import (
    ApplianceUnreachable,
    DrctlError,
    HypervisorRefused,
    IntegrityError,
    NotFound,
    OutOfSpace,
    SetupFailed,
    StepFailed,
)
from drctl.model.checkpoint import Checkpoint
from drctl.model.site import Host
from drctl.plan.bisect import Answer, Bounds, answer_of, bounds, choose, is_moot
from drctl.plan.output import tame_line
from drctl.plan.script import run_script
from drctl.store.run_log import RunLog

#: What says that this checkpoint can't be tried, and nothing about the next one.
_OF_ONE = (NotFound, StepFailed, HypervisorRefused, IntegrityError)
#: Of the host's available memory, so much may be given to tests.
SHARE = 0.8
#: How long an ending waits for tests that are being removed.
MERCY = 120.0


@dataclass(frozen=True, slots=True)
class Order:
    """What the operator asked for. `machines`: all when it is empty; `time_limit` of one check in seconds."""

    group: str
    check: tuple[str, ...]
    machines: tuple[str, ...]
    time_limit: float
    directory: Path


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of one checkpoint. `answer` is None when it was given up, and then says nothing of it.

    `crowded`: there was no room for one more test beside those that run."""

    answer: Answer | None
    reason: str = ""
    code: int | None = None
    output: str = ""
    seconds: float = 0.0
    crowded: bool = False


@dataclass(slots=True)
class Bisection:
    """Carries one out in the calling thread. Invariant: whatever ends it, no test of its own is left that the appliance
    still answers for; what was found out is in the log."""

    context: Context
    host: Host
    order: Order
    log: RunLog
    name: str
    checkpoints: Sequence[Checkpoint]
    answers: dict[int, Answer]
    parallel: int
    on_step: Callable[[int, Tried, Bounds], None]
    _running: dict[int, threading.Event] = field(default_factory=dict)
    _results: queue.SimpleQueue[tuple[int, Tried | BaseException]] = field(default_factory=queue.SimpleQueue)

    def run(self) -> Bounds:
        """Until there is nothing left to try. Raises DrctlError, KeyboardInterrupt; both leave a log to go on with."""
        try:
            while True:
                self._fill()
                if not self._running:
                    return bounds(len(self.checkpoints), self.answers)
                self._take(*self._results.get())
        finally:
            self._end()

    def _fill(self) -> None:
        while len(self._running) < self.parallel:
            place = choose(len(self.checkpoints), self.answers, frozenset(self._running))
            if place is None:
                return
            cancelled = self._running[place] = threading.Event()
            threading.Thread(target=self._work, args=(place, cancelled), name=f"try-{place}", daemon=True).start()

    def _work(self, place: int, cancelled: threading.Event) -> None:
        result: Tried | BaseException
        try:
            result = self._try(self.checkpoints[place], cancelled)
        except BaseException as exc:  # the edge of the thread: the one that waits raises it again
            result = exc
        self._results.put((place, result))

    def _take(self, place: int, tried: Tried | BaseException) -> None:
        del self._running[place]
        if isinstance(tried, OutOfSpace) and self._running:
            tried = Tried(None, tried.message, crowded=True)
        if isinstance(tried, BaseException):
            raise tried
        if tried.crowded:
            self.parallel = max(1, len(self._running))
            self.context.screen.say(f"  no room for one more at a time: {tried.reason}")
        if tried.answer is None:
            return
        self.answers[place] = tried.answer
        self._record(place, tried)
        self.on_step(place, tried, bounds(len(self.checkpoints), self.answers))
        for other, event in self._running.items():
            if is_moot(other, len(self.checkpoints), self.answers):
                event.set()

    def _record(self, place: int, tried: Tried) -> None:
        told = {"answer": tried.answer, "code": tried.code, "seconds": round(tried.seconds, 3)}
        number = self.checkpoints[place].number
        event = {"event": "tried", "number": number, **told, "reason": tried.reason, "output": tried.output}
        self.log.append(event, self.context.clock.time())

    def _end(self) -> None:
        """Give up what runs, and wait until it is removed; what got no answer is looked for by its label."""
        for event in self._running.values():
            event.set()
        while self._running:
            try:
                place, _ = self._results.get(timeout=MERCY)
            except queue.Empty:
                break
            self._running.pop(place, None)
        with suppress(DrctlError):
            self.remove_strays()

    def remove_strays(self) -> None:
        """Remove tests that this bisection started and does not know of any more."""
        tests = self.context.call(self.host, "test.list", group=self.order.group, timeout=4 * READ_TIMEOUT)
        for test in tests:
            if str(test.get("label") or "").startswith(f"bisect {self.name} ") and test.get("state") != "stopped":
                self.context.call(self.host, "test.stop", id=test["id"], timeout=RUN_TIMEOUT)

    def _try(self, checkpoint: Checkpoint, cancelled: threading.Event) -> Tried:
        order, begun = self.order, self.context.clock.monotonic()
        try:
            test = self.context.call(
                self.host,
                "test.start",
                group=order.group,
                checkpoint=f"#{checkpoint.number}",
                machines=list(order.machines),
                label=f"bisect {self.name} {checkpoint.number}",
                timeout=RUN_TIMEOUT,
            )
        except _OF_ONE as exc:
            return Tried(Answer.SKIP, exc.message, seconds=self.context.clock.monotonic() - begun)
        try:
            tried = self._check(checkpoint, test, cancelled)
        finally:
            self.context.call(self.host, "test.stop", id=test["id"], timeout=RUN_TIMEOUT)
        return tried

    def _check(self, checkpoint: Checkpoint, test: Mapping[str, Any], cancelled: threading.Event) -> Tried:
        machines = test.get("machines") or []
        if test.get("state") == "failed":
            reasons = [str(one["reason"]) for one in machines if one.get("reason")]
            return Tried(Answer.SKIP, f"no machine runs: {(reasons or ['unknown'])[0]}")
        ran = run_script(
            self.order.check,
            environment={
                "DRCTL_GROUP": self.order.group,
                "DRCTL_CHECKPOINT": str(checkpoint.number),
                "DRCTL_CHECKPOINT_TIME": render.moment(checkpoint.time),
                "DRCTL_TEST": str(test["id"]),
                "DRCTL_BISECT": self.name,
                "DRCTL_MACHINES": " ".join(str(one.get("recovery_name") or one["name"]) for one in machines),
            },
            directory=self.order.directory,
            time_limit=self.order.time_limit,
            cancelled=cancelled,
            stdin=json.dumps(test, default=str).encode() + b"\n",
        )
        if ran.code is None:
            raise SetupFailed(ran.reason, hint="--check names a program that can be run here")
        if cancelled.is_set() and not ran.done:
            return Tried(None, "given up")
        last = next((line for line in reversed(ran.output.splitlines()) if line.strip()), "")
        reason = ": ".join(part for part in (ran.reason or "exited with 0", tame_line(last)) if part)
        return Tried(answer_of(ran.code), reason, ran.code, ran.output, ran.seconds)


def known_answers(events: Sequence[Mapping[str, Any]], checkpoints: Sequence[Checkpoint]) -> dict[int, Answer]:
    """By place, what an earlier part of the bisection found out of checkpoints that are still there."""
    places = {checkpoint.number: place for place, checkpoint in enumerate(checkpoints)}
    return {
        places[int(event["number"])]: Answer(event["answer"])
        for event in events
        if event.get("event") == "tried" and int(event["number"]) in places
    }


def fetch_checkpoints(context: Context, host: Host, group: str) -> list[Checkpoint]:
    """All that can be restored, in order of time. Raises NotFound when there is none."""
    found = points.fetch(context, host, group)
    if not found:
        raise NotFound("checkpoint", group, message=f"{group} has no restorable checkpoint yet")
    return found


def room_for(context: Context, host: Host, group: str, machines: Sequence[str], wanted: int) -> tuple[int, str]:
    """How many tests fit into the host's memory beside what runs there, at most `wanted` and at least one; and why."""
    try:
        plan = context.call(host, "failover.plan", group=group, checkpoint="latest", timeout=60)
        memory = context.call(host, "appliance.info", timeout=4 * READ_TIMEOUT).get("memory")
    except ApplianceUnreachable:
        raise
    except DrctlError as exc:
        return 1, f"the memory it takes is not known: {exc.message}"
    each = [one.get("memory") for one in plan.get("machines") or [] if not machines or one["name"] in machines]
    if not memory or not each or None in each:
        return 1, "the memory it takes is not known"
    needed = sum(each)
    room = int(memory["available"] * SHARE // needed) if needed else wanted
    return max(1, min(wanted, room)), f"{render.size(needed)} each, {render.size(memory['available'])} available"
