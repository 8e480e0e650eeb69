"""A run under way: carried out, recorded and told as it goes, and what its end comes to. The same for a resumed one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.plans.junit import write_junit
from drctl.cli.plans.keeper import KeptRun
from drctl.cli.plans.person import Person
from drctl.cli.plans.report_text import suite
from drctl.cli.plans.site import GroupSite
from drctl.errors import CleanUpFailed, Interrupted, OutOfSpace, StepFailed
from drctl.plan.engine import Engine, Verdict
from drctl.plan.execute import Executed, Execution
from drctl.plan.inventory import Ending
from drctl.plan.notify import Notifications
from drctl.plan.output import tame_line
from drctl.plan.perform import Performer, Surroundings
from drctl.plan.plan import Mode
from drctl.plan.record import RunRecord, read_record
from drctl.plan.report import make_report, rto
from drctl.plan.step import Compiled, StepKind


@dataclass(frozen=True, slots=True)
class Conduct:
    """One run that goes on now. `events` are those of its log, `directory` is where its scripts run."""

    context: Context
    compiled: Compiled
    site: GroupSite
    log: KeptRun
    events: list[dict[str, Any]]
    directory: Path

    def run(self, name: str, junit: Path | None) -> int:
        """To its end; 0 when it passed. Raises StepFailed, Interrupted, CleanUpFailed or OutOfSpace."""
        attempts = {step.id: step.attempts for step in self._told().steps.values()}
        options = self.compiled.options
        around = Surroundings(
            name, self.compiled.plan.name, self.compiled.mode, self.directory, options.checkpoint, attempts
        )
        performer = Performer(self.site, Person(self.context.screen).ask, around)
        clock = self.context.clock
        execution = Execution(Engine(self.compiled), performer, self._record, clock.monotonic, self.log.flush)
        notifications = Notifications(self.context.config.hook, self.context.screen.say)
        self._tell(notifications, "run-begun", {"resumed": bool(self._told().resumed)})
        try:
            with _signals(execution):
                executed = execution.run()
            told = self._told()
            outcome = {"verdict": executed.verdict.value, "why": told.why, "rto_seconds": rto(told)}
            self._tell(notifications, "run-ended", outcome)
            if junit is not None:
                write_junit(junit, [suite(make_report(told))])
        finally:
            notifications.close()
        self._look(executed)
        self.log.finish()
        return self._finish(self._told(), executed)

    def _look(self, executed: Executed) -> None:
        """What machines that stay show; those of a test that was cleaned up were looked at before."""
        if executed.unrecorded is not None or self._told().ending in (Ending.CLEAN_UP, Ending.UNDO):
            return
        there = {step.group for step in self.compiled.forward if step.kind is StepKind.RECOVER}
        begun = self._told().steps
        for group in sorted(name for name in there if f"group:{name}/recover" in begun):
            rows = [dict(row) for row in self.site.consoles(group)]
            with suppress(OutOfSpace):  # the run itself is recorded
                event = {"event": "consoles", "group": group, "consoles": rows}
                self.events.append(self.log.append(event, self.context.clock.time()))

    def _tell(self, notifications: Notifications, event: str, facts: Mapping[str, Any]) -> None:
        told = self._told()
        about = {"run": told.run, "plan": told.plan, "mode": told.mode, "operator": self.context.settings.operator}
        notifications.tell(event, {**about, **facts, "time": self.context.clock.time()})

    def _told(self) -> RunRecord:
        record = read_record(self.events)
        assert record is not None, "a log begins with its run"
        return record

    def _record(self, event: Mapping[str, Any]) -> None:
        self.events.append(self.log.append(event, self.context.clock.time()))
        with suppress(OSError):  # whoever listened has gone; the run has not
            narrate(self.context, self.compiled, event)

    def _finish(self, record: RunRecord, executed: Executed) -> int:
        context, target = self.context, self.compiled.plan.rto_target
        took = rto(record)
        if context.screen.as_json:
            steps = record.steps.values()
            context.document(
                "plan-run",
                run=record.run,
                plan=record.plan,
                mode=record.mode,
                verdict=executed.verdict.value,
                why=record.why,
                rto_seconds=took,
                rto_target_seconds=target or None,
                steps=[
                    {"id": one.id, "outcome": one.outcome, "seconds": one.seconds, "reason": one.reason}
                    for one in steps
                ],
                head=self.log.head,
            )
        else:
            line = f"{record.run}: {executed.verdict}, {render.duration(took)} until all was well or ended"
            context.screen.line(line)
        if target and took is not None and took > target:
            context.screen.say(f"warning: the RTO target of {render.duration(target)} was missed")
        for line in self.site.ways if record.ending is not Ending.UNDO else ():
            context.screen.say(line)
        _raise(record, executed)
        return 0


def _raise(record: RunRecord, executed: Executed) -> None:
    """The error that a verdict is, none for a good one."""
    failed = [f"{one.id}: {one.reason}" for one in record.steps.values() if one.outcome == "failed"]
    hint = f"drctl run show {record.run}"
    test = record.mode == Mode.TEST.value
    if executed.verdict is Verdict.DIRTY:
        words, look = ("cleaned up", "drctl test list") if test else ("rolled back", "drctl status")
        raise CleanUpFailed(f"{record.run}: not all was {words}: {failed[-1]}", hint=f"{look}; {hint}")
    if executed.unrecorded is not None:
        raise executed.unrecorded
    if executed.verdict is Verdict.INTERRUPTED:
        raise Interrupted(f"{record.run} was stopped; {_left(record, test=test)}", hint=hint)
    if executed.verdict is Verdict.FAILED:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise StepFailed(f"{record.run} failed: {failed[0] if failed else record.why}{more}", hint=hint)


def _left(record: RunRecord, *, test: bool) -> str:
    """What is left of a run that was stopped."""
    if test:
        return "its copies still run: drctl test list" if record.facts.get("keep") else "its copies are removed"
    if record.ending is Ending.UNDO:
        return "what it had moved is rolled back"
    return f"what it had moved stays; to go on: drctl run resume {record.run}"


def narrate(context: Context, compiled: Compiled, event: Mapping[str, Any]) -> None:
    """Say on stderr that a step ended, or why nothing more is begun."""
    if event["event"] == "ending" and event["why"] != "done":
        context.screen.say(f"  nothing more is begun: {tame_line(str(event['why']))}")
    elif event["event"] == "end" and (step := compiled.find(str(event["step"]))) is not None:
        took = render.duration(event.get("seconds"))
        reason = event.get("reason") or event.get("seen") or ""
        words = f"  {tame_line(step.text)}: {event['outcome']}, {took}"
        context.screen.say(words + (f"; {tame_line(str(reason))}" if reason else ""))


@contextmanager
def _signals(execution: Execution) -> Iterator[None]:
    """Ctrl-C and SIGTERM (a service manager, a CI's time limit) end the run in the safe way, a second also ends scripts
    that run, a third leaves at once. A terminal that goes away (SIGHUP) ends nothing: the run survives its operator."""
    heard: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) > 2:
            raise KeyboardInterrupt
        execution.interrupt()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
