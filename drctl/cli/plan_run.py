"""One run of a plan from the command line: prepared, shown, carried out, recorded and told."""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from drctl import __version__
from drctl.cli import plan_report, plan_show, render, runs
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.junit import Case, Suite, write_junit
from drctl.cli.person import Person
from drctl.cli.plan_inventory import Stock, from_appliances
from drctl.cli.plan_site import DrillSite
from drctl.errors import CleanUpFailed, Interrupted, PreconditionFailed, StepFailed
from drctl.plan.compile import compile_plan
from drctl.plan.engine import Engine, Verdict
from drctl.plan.execute import Executed, Execution
from drctl.plan.findings import Finding, Severity, examine
from drctl.plan.output import tame_line
from drctl.plan.perform import Performer, Surroundings
from drctl.plan.plan import Mode, Plan
from drctl.plan.read import load_plan
from drctl.plan.record import FORMAT, RunRecord, read_record
from drctl.plan.step import Compiled, Options, Step, StepKind
from drctl.store import atomic
from drctl.store.run_log import RunLog, run_path


def prepare(context: Context, path: Path, mode: Mode, options: Options) -> Attempt:
    """The plan, compiled against what is true now. Raises ConfigInvalid, PreconditionFailed."""
    plan = load_plan(path)
    stock = from_appliances(context, plan.groups)
    findings = examine(plan, stock.known)
    return Attempt(context, path, plan, stock, compile_plan(plan, stock.known, mode, None, options), tuple(findings))


@dataclass(frozen=True, slots=True)
class Attempt:
    """A run that could begin."""

    context: Context
    path: Path
    plan: Plan
    stock: Stock
    compiled: Compiled
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        return [one for one in self.findings if one.severity is Severity.ERROR]

    def dry_run(self, junit: Path | None) -> int:
        """Show what would be done and what stands in its way; 42 when it could not be run."""
        context = self.context
        if junit is not None:
            result = plan_report.Result(self.path, self.plan, self.findings)
            write_junit(junit, [plan_report.suite(result)])
        self._tell_findings()
        if context.screen.as_json:
            context.document(
                "plan-run-plan",
                **plan_show.as_json(self.compiled),
                checkpoint=self.compiled.options.checkpoint,
                forecast=self._forecast(),
                findings=plan_report.as_json(plan_report.Result(self.path, self.plan, self.findings))["findings"],
            )
        else:
            for line in plan_show.lines(self.compiled):
                context.screen.line(line)
            forecast = self._forecast()
            context.screen.say(f"forecast: loss {self._loss()}, time {render.duration(forecast['seconds'])}")
        context.screen.say("dry run: nothing was changed")
        return PreconditionFailed.exit_code if self.errors else 0

    def carry_out(self, junit: Path | None, *, yes: bool) -> int:
        """Run it; 0 when it passed. Raises PreconditionFailed, Refused, Interrupted before anything is done, and
        StepFailed, Interrupted, CleanUpFailed or OutOfSpace afterwards."""
        self._check()
        self._tell_findings()
        steps = [line.strip() for line in plan_show.lines(self.compiled) if not line.endswith(":")]
        question = f"Run plan {self.plan.name} as a {self.compiled.mode}?"
        propose(self.context.screen, steps, dry_run=False, yes=yes, question=question)
        directory = runs.run_directory(self.context)
        atomic.make_directory(directory)
        holder = f"another run of {self.plan.name} from here"
        with atomic.lock(directory / f".{self.plan.name}.lock", wait=False, what=holder):
            return self._carry_out(directory, junit)

    def _carry_out(self, directory: Path, junit: Path | None) -> int:
        context = self.context
        moment = datetime.fromtimestamp(context.clock.time(), UTC)
        name = f"{moment:%Y%m%dT%H%M%SZ}-{self.plan.name}-{secrets.token_hex(2)}"
        site = DrillSite(context, self.plan.groups)
        around = Surroundings(name, self.plan.name, self.compiled.mode, self.path.parent, self._checkpoint())
        person = Person(context.screen)
        with RunLog.create(run_path(directory, name)) as log:
            events = [log.append(self._first(name), context.clock.time())]
            narrator = Narrator(context, self.compiled)

            def record(event: Mapping[str, Any]) -> None:
                events.append(log.append(event, context.clock.time()))
                narrator.tell(event)

            execution = Execution(
                Engine(self.compiled), Performer(site, person.ask, around), record, context.clock.monotonic
            )
            with _stopped_by_sigterm():
                executed = execution.run()
            head = log.head
        outcome = read_record(events)
        assert outcome is not None
        if junit is not None:
            write_junit(junit, [suite(self.compiled, outcome)])
        return self._finish(outcome, executed, head)

    def _finish(self, record: RunRecord, executed: Executed, head: str) -> int:
        context = self.context
        failed = [one for one in record.steps.values() if one.outcome == "failed"]
        took = rto(record)
        if context.screen.as_json:
            context.document(
                "plan-run",
                run=record.run,
                plan=record.plan,
                mode=record.mode,
                verdict=executed.verdict.value,
                why=record.why,
                rto_seconds=took,
                rto_target_seconds=self.plan.rto_target or None,
                steps=[
                    {"id": one.id, "outcome": one.outcome, "seconds": one.seconds, "reason": one.reason}
                    for one in record.steps.values()
                ],
                head=head,
            )
        else:
            context.screen.line(
                f"{record.run}: {executed.verdict}, {render.duration(took)} until all was well or ended"
            )
        if self.plan.rto_target and took is not None and took > self.plan.rto_target:
            context.screen.say(f"warning: the RTO target of {render.duration(self.plan.rto_target)} was missed")
        _raise(record, executed, [f"{one.id}: {one.reason}" for one in failed])
        return 0

    def _check(self) -> None:
        """Raises PreconditionFailed when it could not be run."""
        mode = self.compiled.mode
        if mode is not Mode.TEST:
            raise PreconditionFailed(
                f"plan run carries out tests; a {mode} of this plan is not done by this version",
                hint=f"--dry-run shows its steps; each group by itself: drctl {mode} {self.plan.groups[0]}",
            )
        if self.errors:
            first = self.errors[0]
            more = f" (and {len(self.errors) - 1} more)" if len(self.errors) > 1 else ""
            raise PreconditionFailed(f"{first}{more}", hint=first.hint or f"drctl plan validate {self.plan.name}")

    def _tell_findings(self) -> None:
        for one in self.findings:
            self.context.screen.say(f"{one.severity}: {one}" + (f" ({one.hint})" if one.hint else ""))

    def _checkpoint(self) -> str:
        return self.compiled.options.checkpoint

    def _first(self, name: str) -> dict[str, Any]:
        return {
            "event": "run",
            "format": FORMAT,
            "run": name,
            "plan": self.plan.name,
            "mode": self.compiled.mode.value,
            "file": str(self.path),
            "digest": runs.digest(self.path),
            "checkpoint": self._checkpoint(),
            "keep": self.compiled.options.keep,
            "operator": self.context.settings.operator,
            "version": __version__,
            "steps": [step.id for step in self.compiled.steps],
        }

    def _forecast(self) -> dict[str, Any]:
        """By group the loss that the recovery sites tell, and how long the last run took. Unknown is None."""
        last = runs.last_run(self.context, self.plan.name, self.compiled.mode)
        loss = {name: (self.stock.loss or {}).get(name) for name in self.plan.groups}
        if self.compiled.mode is Mode.SWITCHOVER:
            loss = dict.fromkeys(self.plan.groups, 0.0)
        return {"loss_seconds": loss, "seconds": rto(last) if last else None, "last_run": last.run if last else None}

    def _loss(self) -> str:
        loss = self._forecast()["loss_seconds"]
        return ", ".join(f"{name} {render.duration(value)}" for name, value in loss.items())


def rto(record: RunRecord) -> float | None:
    """From the run's beginning until its last step of the way forward ended."""
    ends = [
        one.begun + one.seconds
        for one in record.steps.values()
        if one.seconds is not None and not one.id.endswith(("/clean-up", "/undo"))
    ]
    return max(0.0, max(ends) - record.began) if ends else None


def _raise(record: RunRecord, executed: Executed, failed: Sequence[str]) -> None:
    """The error that a verdict is, none for a good one."""
    hint = f"drctl run show {record.run}"
    if executed.verdict is Verdict.DIRTY:
        raise CleanUpFailed(f"{record.run}: not all was cleaned up: {failed[-1]}", hint=f"drctl test list; {hint}")
    if executed.unrecorded is not None:
        raise executed.unrecorded
    if executed.verdict is Verdict.INTERRUPTED:
        left = "its copies still run: drctl test list" if record.facts.get("keep") else "its copies are removed"
        raise Interrupted(f"{record.run} was stopped; {left}", hint=hint)
    if executed.verdict is Verdict.FAILED:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise StepFailed(f"{record.run} failed: {failed[0] if failed else record.why}{more}", hint=hint)


class Narrator:
    """Says on stderr what a run does, a line when a step ends."""

    def __init__(self, context: Context, compiled: Compiled) -> None:
        self._screen = context.screen
        self._steps = {step.id: step for step in compiled.steps}

    def tell(self, event: Mapping[str, Any]) -> None:
        step = self._steps.get(str(event.get("step")))
        if event["event"] == "ending" and event["why"] != "done":
            self._screen.say(f"  nothing more is begun: {tame_line(str(event['why']))}")
        elif event["event"] == "end" and step is not None:
            took = render.duration(event.get("seconds"))
            reason = event.get("reason") or event.get("seen") or ""
            words = f"  {tame_line(step.text)}: {event['outcome']}, {took}"
            self._screen.say(words + (f"; {tame_line(str(reason))}" if reason else ""))


def suite(compiled: Compiled, record: RunRecord) -> Suite:
    """A case per step but gates: by machine where it is one's, else by stage, group or plan."""
    name = compiled.plan.name
    return Suite(
        f"plan run {name} {compiled.mode}",
        [_case(name, step, record) for step in compiled.steps if step.kind is not StepKind.GATE],
    )


def _case(plan: str, step: Step, record: RunRecord) -> Case:
    owner = ".".join(part for part in (plan, step.stage, step.group, step.machine) if part)
    told = record.steps.get(step.id)
    if told is None:
        return Case(owner, step.text, skipped=f"not begun: {record.why}")
    failure = (told.reason or "failed") if told.outcome == "failed" else "" if told.outcome else "unfinished"
    return Case(owner, step.text, failure=failure, said=told.output, seconds=told.seconds)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM (a service manager, a CI's time limit) ends a run in the same safe way as ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
