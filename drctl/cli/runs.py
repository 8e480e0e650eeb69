"""Records of runs on this machine: where they are, and what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drctl.cli.context import Context
from drctl.plan.engine import Verdict
from drctl.plan.findings import Finding, Severity
from drctl.plan.plan import Mode, Plan
from drctl.plan.record import RunRecord, read_record
from drctl.store.run_log import Verification, list_runs, read_run, run_path

#: What stands for the newest run's name.
LATEST = "latest"
#: Runs that are looked at for the last one of a plan.
LOOKED_AT = 200


@dataclass(frozen=True, slots=True)
class Run:
    """One run's log: what it tells, and whether its lines are sound."""

    name: str
    path: Path
    record: RunRecord | None
    found: Verification


def run_directory(context: Context) -> Path:
    """`runs/` beside the configuration; without one, in the local appliance's home."""
    directory = context.config.directory
    return (directory if directory is not None else context.settings.home_directory) / "runs"


def look(context: Context, name: str) -> Run:
    """One run; `latest` is the newest that is here. Raises NotFound."""
    if name == LATEST:
        name = max(list_runs(run_directory(context)), default=name)
    path = run_path(run_directory(context), name)
    events, found = read_run(path)
    try:
        record = read_record(events)
    except (KeyError, TypeError, ValueError):
        record = None  # sound lines, but not those of a run that we know how to read
    return Run(name, path, record, found)


def look_all(context: Context, last: int = 0) -> list[Run]:
    """The newest `last` runs (0: all), oldest first."""
    return [look(context, name) for name in list_runs(run_directory(context))[-last:]]


def ended(context: Context, plan: str, mode: Mode) -> Iterator[RunRecord]:
    """The runs of a plan in a mode that came to their end, newest first, each read when it is asked for."""
    names = [name for name in list_runs(run_directory(context)) if f"-{plan}-" in name]
    for name in reversed(names[-LOOKED_AT:]):
        record = look(context, name).record
        if record is not None and (record.plan, record.mode) == (plan, mode.value) and record.verdict:
            yield record


def last_run(context: Context, plan: str, mode: Mode, *, passed: bool = False) -> RunRecord | None:
    """The newest run of a plan in a mode that came to its end."""
    found = ended(context, plan, mode)
    return next((record for record in found if not passed or record.verdict == Verdict.PASSED), None)


def earlier(context: Context, record: RunRecord, count: int) -> list[RunRecord]:
    """The newest `count` runs of the same plan and mode that are not newer than this one. Their names begin with the
    time and go on with the plan, so that others need not be read."""
    found: list[RunRecord] = []
    names = [name for name in list_runs(run_directory(context)) if f"-{record.plan}-" in name and name < record.run]
    for name in reversed(names[-LOOKED_AT:]):
        other = look(context, name).record
        if other is not None and (other.plan, other.mode) == (record.plan, record.mode):
            found.append(other)
        if len(found) == count:
            break
    return found


def digest(path: Path) -> str:
    """Of a plan's file: what a record says about which text it was."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def drill_findings(context: Context, plan: Plan) -> list[Finding]:
    """Whether the plan was tried as it is now."""
    last = last_run(context, plan.name, Mode.TEST, passed=True)
    line = plan.line("plan")
    if last is None:
        message = f"no drill of {plan.name!r} has passed here yet"
        return [Finding(Severity.WARNING, message, f"drctl plan run {plan.name} --mode test", plan.file, line, "plan")]
    if last.facts.get("digest") != digest(Path(plan.file)):
        message = f"{plan.name!r} was changed since its last good drill, {last.run}"
        return [Finding(Severity.WARNING, message, f"drctl plan run {plan.name} --mode test", plan.file, line, "plan")]
    return []


def state(run: Run) -> str:
    """Its verdict, `unfinished`, or `damaged`."""
    if not run.found.sound or run.record is None:
        return "damaged"
    return run.record.verdict or "unfinished"


def seconds(record: RunRecord) -> float | None:
    return None if record.ended is None else record.ended - record.began


def as_json(run: Run) -> dict[str, Any]:
    """A run in a list."""
    record = run.record
    return {
        "run": run.name,
        "plan": record.plan if record else None,
        "mode": record.mode if record else None,
        "state": state(run),
        "began": record.began if record else None,
        "ended": record.ended if record else None,
        "operator": record.facts.get("operator") if record else None,
        "failed": sum(step.outcome == "failed" for step in record.steps.values()) if record else None,
        "file": str(run.path),
    }
