"""One run of a plan from the command line: prepared, shown, carried out, recorded and told."""

from __future__ import annotations

import os
import platform
import secrets
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from drctl import __version__
from drctl.cli import render
from drctl.cli.confirm import confirm_name, propose
from drctl.cli.context import Context
from drctl.cli.plans import findings as plan_report
from drctl.cli.plans import runs
from drctl.cli.plans import show as plan_show
from drctl.cli.plans.conduct import Conduct
from drctl.cli.plans.files import plan_commit, plan_directory
from drctl.cli.plans.inventory import Stock, checkpoint_ages, from_appliances
from drctl.cli.plans.junit import write_junit
from drctl.cli.plans.keeper import Keeper, KeptRun, catch_up, keep
from drctl.cli.plans.moves import MoveSite, Outlook, move_site
from drctl.cli.plans.site import DrillSite
from drctl.errors import (
    ConfigInvalid,
    DrctlError,
    PreconditionFailed,
    Refused,
    SetupFailed,
    UnsupportedFormat,
    WrongPhase,
)
from drctl.model.move import OnTimeout
from drctl.plan.compile import compile_plan
from drctl.plan.engine import Verdict
from drctl.plan.findings import Finding, Severity, examine
from drctl.plan.inventory import Ending
from drctl.plan.plan import Mode, Plan
from drctl.plan.read import load_plan
from drctl.plan.record import FORMAT, RunRecord, read_record, reopened
from drctl.plan.report import described, rto
from drctl.plan.step import Compiled, Options
from drctl.store import atomic
from drctl.store.run_log import RunLog, run_path


def prepare(context: Context, path: Path, mode: Mode, options: Options) -> Attempt:
    """The plan, compiled against what is true now. Raises ConfigInvalid, PreconditionFailed."""
    plan = load_plan(path)
    stock = from_appliances(context, plan.groups)
    findings = tuple(examine(plan, stock.known, mode))
    compiled = compile_plan(plan, stock.known, mode, None, options)
    site = None if mode is Mode.TEST else move_site(context, plan.groups, mode, options)
    return Attempt(context, path, plan, stock, compiled, findings, site, tuple(site.look()) if site else ())


@dataclass(frozen=True, slots=True)
class Attempt:
    """A run that could begin. A test has no `site` yet, and no `outlooks` of moves."""

    context: Context
    path: Path
    plan: Plan
    stock: Stock
    compiled: Compiled
    findings: tuple[Finding, ...]
    site: MoveSite | None = None
    outlooks: tuple[Outlook, ...] = ()

    @property
    def errors(self) -> list[Finding]:
        """What forbids the run. A failover can't wait for what is wrong at the source, or with one machine."""
        hasty = self.compiled.mode is Mode.FAILOVER
        return [one for one in self.findings if one.severity is Severity.ERROR and not (hasty and one.passable)]

    @property
    def problems(self) -> list[DrctlError]:
        return [one.problem for one in self.outlooks if one.problem is not None]

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
        for problem in self.problems:
            context.screen.say(f"in the way: {problem.message}" + (f" ({problem.hint})" if problem.hint else ""))
        context.screen.say("dry run: nothing was changed")
        # That a source lives is no fault of the plan: in good times a forecast has to be possible all the same.
        hard = [problem for problem in self.problems if not isinstance(problem, Refused)]
        return PreconditionFailed.exit_code if self.errors or hard else 0

    def carry_out(self, junit: Path | None, *, yes: bool, confirm: str = "") -> int:
        """Run it; 0 when it passed. Raises PreconditionFailed, Refused, Interrupted before anything is done, and
        StepFailed, Interrupted, CleanUpFailed or OutOfSpace afterwards."""
        self._check()
        self._tell_findings()
        steps = [line.strip() for line in plan_show.lines(self.compiled) if not line.endswith(":")]
        by_name = self.compiled.mode is Mode.FAILOVER
        question = "" if by_name else f"Run plan {self.plan.name} as a {self.compiled.mode}?"
        propose(self.context.screen, steps, dry_run=False, yes=yes, question=question)
        if by_name:
            confirm_name(self.context.screen, self.plan.name, typed=confirm, what="plan")
        directory = _writable(runs.run_directory(self.context))
        moment = datetime.fromtimestamp(self.context.clock.time(), UTC)
        name = f"{moment:%Y%m%dT%H%M%SZ}-{self.plan.name}-{secrets.token_hex(2)}"
        with (
            _alone(directory, self.plan.name),
            keep(self.context, self.plan.groups, self.plan.name, name) as keeper,
            self.site.alone() if self.site else nullcontext(),
        ):
            return self._carry_out(name, directory, keeper, junit)

    def _carry_out(self, name: str, directory: Path, keeper: Keeper, junit: Path | None) -> int:
        context = self.context
        site = self.site or DrillSite(context, self.plan.groups, name)
        with RunLog.create(run_path(directory, name)) as own:
            log = KeptRun(own, keeper)
            first = [self._first(name), *described(self.compiled)]
            events = [log.append(event, context.clock.time()) for event in first]
            return Conduct(context, self.compiled, site, log, events, self.path.parent).run(name, junit)

    def _check(self) -> None:
        """Raises PreconditionFailed when it could not be run, or what a group's own command would raise."""
        if self.errors:
            first = self.errors[0]
            more = f" (and {len(self.errors) - 1} more)" if len(self.errors) > 1 else ""
            raise PreconditionFailed(f"{first}{more}", hint=first.hint or f"drctl plan validate {self.plan.name}")
        if self.problems:
            raise self.problems[0]

    def _tell_findings(self) -> None:
        for one in self.findings:
            self.context.screen.say(plan_report.spell(one))

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
            "place": platform.node(),
            "version": __version__,
            "versions": dict(self.stock.versions),
            "commit": plan_commit(self.path),
            "loss_seconds": self._forecast()["loss_seconds"],
            "checkpoint_ages": checkpoint_ages(self.context, self.plan.groups),
            **(_order(self.site) if self.site else {}),
            **_aims(self.plan),
        }

    def _forecast(self) -> dict[str, Any]:
        """By group the loss that the recovery sites tell, and how long the last run took. Unknown is None."""
        last = runs.last_run(self.context, self.plan.name, self.compiled.mode)
        loss = {name: (self.stock.loss or {}).get(name) for name in self.plan.groups}
        if self.compiled.mode is Mode.SWITCHOVER:
            loss = dict.fromkeys(self.plan.groups, 0.0)
        loss |= {one.group: one.loss for one in self.outlooks if one.loss is not None}
        return {"loss_seconds": loss, "seconds": rto(last) if last else None, "last_run": last.run if last else None}

    def _loss(self) -> str:
        loss = self._forecast()["loss_seconds"]
        return ", ".join(f"{name} {render.duration(value)}" for name, value in loss.items())


def resume(context: Context, name: str, junit: Path | None, *, dry_run: bool, yes: bool) -> int:
    """Go on with a run that was killed; the exit codes of a run.

    Raises NotFound, Locked when it goes on somewhere, WrongPhase when it has ended, Refused when its plan is another
    one by now, IntegrityError when its record is damaged."""
    directory = runs.run_directory(context)
    catch_up(context, run_path(directory, name))
    own, events = RunLog.open(run_path(directory, name))
    with own:
        record = read_record(events)
        if record is None:
            raise WrongPhase(f"{name} was killed before it began anything", hint="begin a new one: drctl plan run")
        if int(record.facts.get("format") or 0) > FORMAT:
            raise UnsupportedFormat(f"{name} was written by a newer drctl", hint="go on with that one")
        if record.verdict == Verdict.PASSED or (record.verdict and not _has_rest(record)):
            raise WrongPhase(f"{name} has ended: {record.verdict}", hint=f"drctl run show {name}")
        plan, path = _same_plan(context, record)
        mode, options = Mode(record.mode), _options(record)
        site = DrillSite(context, plan.groups, name) if mode is Mode.TEST else _moved(context, plan, record)
        again = reopened(record)
        if isinstance(site, MoveSite) and again.ending is None:
            _demand_there(site, again)
        recovered, up = site.standing(again.ending)
        progress = replace(again.progress(), recovered=recovered, up=up)
        stock = from_appliances(context, plan.groups)
        compiled = compile_plan(plan, stock.known, mode, progress, options)
        steps = [f"go on with {name}: {_left(compiled)}"]
        if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question="Go on with it?"):
            return 0
        with (
            _alone(directory, plan.name),
            keep(context, plan.groups, plan.name, name, own) as keeper,
            site.alone() if isinstance(site, MoveSite) else nullcontext(),
        ):
            log = KeptRun(own, keeper)
            resumed = {"event": "resumed", "operator": context.settings.operator}
            events += [log.append(event, context.clock.time()) for event in (resumed, *described(compiled))]
            return Conduct(context, compiled, site, log, events, path.parent).run(name, junit)


def _aims(plan: Plan) -> dict[str, Any]:
    """What a report compares with, whatever the plan says by then."""
    return {
        "description": plan.description,
        "rto_target": plan.rto_target,
        "rpo_target": plan.rpo_target,
        "stage_targets": {stage.name: stage.rto_target for stage in plan.stages if stage.rto_target},
    }


def _has_rest(record: RunRecord) -> bool:
    """Whether a run that has ended can go on: it left something, or what it recovered stands as it was then."""
    return record.verdict == Verdict.DIRTY or record.ending is Ending.LEAVE


def _options(record: RunRecord) -> Options:
    facts = record.facts
    options = Options(str(facts["checkpoint"]), keep=bool(facts["keep"]))
    if record.mode == Mode.TEST.value:
        return options
    return replace(
        options,
        source_is_down=str(facts["source_is_down"]),
        on_timeout=OnTimeout(facts["on_shutdown_timeout"]),
        shutdown_seconds=float(facts["shutdown_seconds"]),
    )


def _order(site: MoveSite) -> dict[str, Any]:
    """What a resumed run has to know of a move."""
    return {
        "source_is_down": site.options.source_is_down,
        "on_shutdown_timeout": site.options.on_timeout.value,
        "shutdown_seconds": site.options.shutdown_seconds,
        "checkpoints": site.chosen,
        "moved_before": sorted(site.before),
    }


def _demand_there(site: MoveSite, record: RunRecord) -> None:
    """Raises Refused when a group that the run had moved was rolled back since: to move it again is a new decision."""
    if gone := site.gone(record.progress().done):
        raise Refused(
            f"{', '.join(gone)}: rolled back since {record.run} moved it",
            hint=f"begin a new run: drctl plan run {record.plan} --mode {record.mode}",
        )


def _moved(context: Context, plan: Plan, record: RunRecord) -> MoveSite:
    site = move_site(context, plan.groups, Mode(record.mode), _options(record))
    site.chosen = {str(group): str(chosen) for group, chosen in dict(record.facts["checkpoints"]).items()}
    site.before = frozenset(map(str, record.facts["moved_before"]))
    return site


def _writable(directory: Path) -> Path:
    """The directory, made when it is missing. Raises SetupFailed."""
    try:
        atomic.make_directory(directory)
    except OSError as exc:
        hint = "a run is not begun without its record; run it as a user who may write there"
        raise SetupFailed(f"{directory} can't be made: {exc.strerror}", hint=hint) from exc
    if not os.access(directory, os.W_OK):
        raise SetupFailed(f"{directory} can't be written to", hint="run it as a user who may write there")
    return directory


def _alone(directory: Path, plan: str) -> AbstractContextManager[int]:
    """One run of a plan at a time. Raises Locked."""
    return atomic.lock(directory / f".{plan}.lock", wait=False, what=f"another run of {plan} from here")


def _same_plan(context: Context, record: RunRecord) -> tuple[Plan, Path]:
    """The plan that the run was begun with, here or on another machine. Raises Refused, ConfigInvalid."""
    path = Path(str(record.facts["file"]))
    if not path.exists():
        path = plan_directory(context.config) / f"{record.plan}.toml"
    try:
        same = runs.digest(path) == record.facts["digest"]
    except OSError as exc:
        raise ConfigInvalid(str(path), 0, "", f"can't be read: {exc.strerror}") from exc
    if not same:
        raise Refused(
            f"{path} was changed since {record.run} began",
            hint="put the old text back, or remove what the run made (drctl test list) and begin a new one",
        )
    return load_plan(path), path


def _left(compiled: Compiled) -> str:
    """What is left to do, in a few words."""
    if compiled.ending is not None:
        return "it was cleaning up" if compiled.ending is Ending.CLEAN_UP else "it was rolling back"
    left = sum(not step.satisfied for step in compiled.forward)
    return f"{left} of {len(compiled.forward)} steps are left, checks are done again"
