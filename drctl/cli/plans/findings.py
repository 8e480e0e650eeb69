"""What was found about plans, as text, JSON, JUnit and exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drctl.cli.context import Context
from drctl.cli.plans import runs
from drctl.cli.plans.inventory import Stock
from drctl.cli.plans.junit import Case, Suite
from drctl.cli.render import Screen
from drctl.errors import ConfigInvalid, PreconditionFailed
from drctl.plan.findings import Finding, Severity, examine, of_error
from drctl.plan.output import tame_line
from drctl.plan.plan import Plan
from drctl.plan.read import ReadPlan

#: Characters of a line; one with a file's path, a key and a hint fits.
LONGEST = 1000
COLUMNS = ("plan", "groups", "stages", "machines", "file", "problem")


@dataclass(frozen=True, slots=True)
class Result:
    """A plan's file, and all that was found. `broken`: the file itself is wrong, so there is no plan."""

    path: Path
    plan: Plan | None
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> bool:
        return self.plan is None

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.severity is Severity.ERROR)


def examine_file(context: Context, path: Path, read: ReadPlan, stock: Stock) -> Result:
    """Everything that is found about one file."""
    if read.plan is None:
        return Result(path, None, tuple(of_error(error) for error in read.errors))
    findings = examine(read.plan, stock.known)
    if stock.loss is not None:
        findings += runs.drill_findings(context, read.plan)
    return Result(path, read.plan, tuple(findings))


def exit_code(results: Sequence[Result], *, silent: bool) -> int:
    """10 when a file is wrong, 42 when a plan could not be carried out, 3 when not everybody answered, else 0."""
    if any(one.broken for one in results):
        return ConfigInvalid.exit_code
    if any(one.errors for one in results):
        return PreconditionFailed.exit_code
    return 3 if silent else 0


def print_results(screen: Screen, results: Sequence[Result]) -> None:
    """A line per plan on stdout, and below it what was found."""
    if not results:
        screen.say("no plans")
    for one in results:
        warnings = len(one.findings) - len(one.errors)
        words = [_count(len(one.errors), "error"), _count(warnings, "warning")]
        name = one.plan.name if one.plan else one.path.stem
        screen.line(f"{name}: {', '.join(word for word in words if word) or 'ok'}")
        for finding in one.findings:
            screen.line(f"  {spell(finding)}")


def spell(finding: Finding) -> str:
    """A finding in one line that a terminal can show, whatever names are in it."""
    hint = f" ({finding.hint})" if finding.hint else ""
    return tame_line(f"{finding.severity}: {finding}{hint}", LONGEST)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}" if number else ""


def as_json(one: Result) -> dict[str, Any]:
    return {
        "plan": one.plan.name if one.plan else one.path.stem,
        "file": str(one.path),
        "ok": not one.errors,
        "findings": [asdict(finding) | {"severity": finding.severity.value} for finding in one.findings],
    }


def suite(one: Result) -> Suite:
    """A case for the file, one per group, one per machine that a stage names; each fails by its own errors."""
    name = one.plan.name if one.plan else one.path.stem
    groups = one.plan.groups if one.plan else ()
    named = [(vm.group, vm.name) for vm in one.plan.vms] if one.plan else []
    machines = dict.fromkeys([*named, *((each.group, each.machine) for each in one.findings if each.machine)])
    cases = [_case(name, "file", [each for each in one.findings if not each.group])]
    for group in groups:
        own = [each for each in one.findings if each.group == group and not each.machine]
        cases.append(_case(name, f"group {group}", own))
    for group, machine in machines:
        own = [each for each in one.findings if (each.group, each.machine) == (group, machine)]
        cases.append(_case(name, f"machine {group}/{machine}", own))
    return Suite(f"plan validate {name}", cases)


def _case(owner: str, name: str, findings: Sequence[Finding]) -> Case:
    errors = [f"{each}" + (f"\n  {each.hint}" if each.hint else "") for each in findings if each.severity == "error"]
    warnings = [str(each) for each in findings if each.severity == "warning"]
    return Case(owner, name, failure="\n".join(errors), said="\n".join(warnings))


def summary(path: Path, read: ReadPlan) -> dict[str, Any]:
    """One plan in a list."""
    plan = read.plan
    return {
        "plan": path.stem,
        "description": plan.description if plan else "",
        "groups": list(plan.groups) if plan else [],
        "stages": len(plan.stages) if plan else None,
        "machines": len(plan.vms) if plan else None,
        "file": str(path),
        "problem": read.errors[0].message if read.errors else "",
    }


def row(one: dict[str, Any]) -> tuple[str, ...]:
    cells = {key: "-" if value in (None, "", []) else value for key, value in one.items()}
    cells["groups"] = ", ".join(one["groups"]) or "-"
    return tuple(tame_line(str(cells[key]), LONGEST) for key in COLUMNS)
