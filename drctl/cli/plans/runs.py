"""Records of runs on this machine and at the sites: where they are, and what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drctl.cli.context import Context
from drctl.cli.inventory import ask_all
from drctl.cli.plans.keeper import Copy, copies
from drctl.plan.engine import Verdict
from drctl.plan.findings import Finding, Severity
from drctl.plan.plan import Mode, Plan
from drctl.plan.record import RunRecord, read_record
from drctl.store.run_log import Verification, list_runs, parse_run, read_run, run_path

#: What stands for the newest run's name.
LATEST = "latest"
#: Runs that are looked at for the last one of a plan.
LOOKED_AT = 200


@dataclass(frozen=True, slots=True)
class Run:
    """One run's log: what it tells, and whether its lines are sound. `place` is where it was read: a path, or a site's
    host; `copies` are those of all sites that have it, `own` the bytes of the one here."""

    name: str
    place: str
    record: RunRecord | None
    found: Verification
    copies: tuple[Copy, ...] = ()
    own: bytes = b""


def run_directory(context: Context) -> Path:
    """`runs/` beside the configuration; without one, in the local appliance's home."""
    directory = context.config.directory
    return (directory if directory is not None else context.settings.home_directory) / "runs"


def look(context: Context, name: str) -> Run:
    """One run; `latest` is the newest that is here. Raises NotFound."""
    if name == LATEST:
        name = max(list_runs(run_directory(context)), default=name)
    path = run_path(run_directory(context), name)
    return _read(name, str(path), *read_run(path))


def find(context: Context, name: str) -> Run:
    """One run wherever it is told most of: here, or at a site. `latest` is the newest anywhere. Raises NotFound."""
    if name == LATEST:
        name = max([*list_runs(run_directory(context)), *(row["run"] for row in at_sites(context, 1))], default=name)
    path = run_path(run_directory(context), name)
    own = path.read_bytes() if path.exists() else b""
    kept = tuple(copies(context, name))
    read = [_read(name, copy.label, *parse_run(copy.data)) for copy in kept]
    if own or not read:
        read.append(look(context, name))
    best = max(read, key=lambda run: run.found.lines)
    return replace(best, copies=kept, own=own)


def at_sites(context: Context, last: int) -> list[dict[str, Any]]:
    """Runs that sites keep, each once, with `kept` naming where; a site that does not answer is passed over."""
    rows: dict[str, dict[str, Any]] = {}
    for answer in ask_all(context, "run.list", last=last):
        for row in () if answer.failed else answer.result:
            known = rows.setdefault(str(row["run"]), {**row, "kept": []})
            known["kept"].append(f"{answer.host.site}/{answer.host.name}")
    return [rows[name] for name in sorted(rows)]


def _read(name: str, place: str, events: list[dict[str, Any]], found: Verification) -> Run:
    try:
        record = read_record(events)
    except (KeyError, TypeError, ValueError):
        record = None  # sound lines, but not those of a run that we know how to read
    return Run(name, place, record, found)


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
        "file": run.place,
        "kept": [copy.label for copy in run.copies],
    }


def listed(context: Context, last: int) -> list[dict[str, Any]]:
    """The newest `last` runs (0: all) that are here or at a site, oldest first, as `as_json` tells them."""
    rows = {run.name: as_json(run) for run in look_all(context, last)}
    for row in at_sites(context, last):
        state_there = str(row.get("verdict") or "unfinished") if row.get("plan") else "damaged"
        there = {key: row.get(key) for key in ("run", "plan", "mode", "began", "ended", "operator", "failed")}
        there |= {"state": state_there, "file": row["kept"][0]}
        known = rows.get(row["run"])
        rows[row["run"]] = (known if known and known["state"] != "unfinished" else there) | {"kept": row["kept"]}
    return [rows[name] for name in sorted(rows)][-last:]
