"""A run's report as JUnit, JSON and Markdown."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from drctl.cli import render
from drctl.cli.plans.junit import Case, Suite
from drctl.plan.output import tame, tame_line
from drctl.plan.report import Line, Report, Timed

#: Of one output so much is shown in a JUnit file or a Markdown text, characters.
JUNIT_OUTPUT = 16 * 1024
MARKDOWN_OUTPUT = 2 * 1024
#: Rows of a table of machines in Markdown.
MARKDOWN_ROWS = 1000
_MARKED = re.compile(r"([\\`*_{}\[\]<>()#+!|~])")


def utc(seconds: float | None) -> str:
    """`2026-01-31 02:10:05 UTC`: a report is read elsewhere, so it names no local time."""
    if seconds is None:
        return render.UNKNOWN
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return render.UNKNOWN


def cut(text: str, limit: int, run: str, step: str) -> str:
    """The text, or its beginning and its end, with a line between them that says how much was left out and where the
    whole is."""
    if len(text) <= limit:
        return text
    head, tail = limit // 4, limit - limit // 4
    note = f"[… {len(text) - limit} characters left out; all that was kept: drctl run show {run} --step {step} …]"
    return f"{text[:head]}\n{note}\n{text[-tail:]}"


def suite(report: Report) -> Suite:
    """A case per step: by machine where it is one's, else by stage, group or plan; a check of a machine is one."""
    return Suite(f"plan run {report.plan} {report.mode}", [_case(report, line) for line in report.lines])


def _case(report: Report, line: Line) -> Case:
    owner = ".".join(part for part in (report.plan, line.stage, line.group, line.machine) if part)
    if line.outcome == "skipped":
        return Case(owner, line.text, skipped=f"not begun: {report.why}")
    failure = (line.reason or line.outcome) if line.failed else ""
    said = "\n".join(part for part in (line.seen, cut(line.output, JUNIT_OUTPUT, report.run, line.id)) if part)
    return Case(owner, line.text, failure=failure, said=said, seconds=line.seconds)


def as_json(report: Report) -> dict[str, Any]:
    """The fields of the document."""
    fields = asdict(report)
    for name, target in (("rto", report.rto_target), ("rpo", report.rpo_target)):
        fields[f"{name}_seconds"] = fields.pop(name) if name in fields else getattr(report, name)
        fields[f"{name}_target_seconds"] = target or None
        del fields[f"{name}_target"]
    del fields["facts"]
    fields["steps"] = fields.pop("lines")
    return fields


def markdown(report: Report) -> str:
    """For a ticket or a CI's summary: outcome first, then what failed, groups, stages, machines."""
    parts = [_head(report), _failures(report), _table_of_groups(report)]
    parts += [_table("Stages", report.stages), _table("Machines", report.machines), _trend(report), _foot(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def mark(text: object) -> str:
    """Text in one line that Markdown takes for nothing else."""
    return _MARKED.sub(r"\\\1", tame_line(str(text), 500))


def _head(report: Report) -> str:
    word = "RTO" if report.verdict == "passed" else "ended after"
    lines = [f"# {report.verdict.upper()}: {mark(report.mode)} of plan {mark(report.plan)}", ""]
    if report.damage:
        lines += [f"**The record is damaged: {mark(report.damage)}**", ""]
    lines += [
        f"- began {utc(report.began)}, by {mark(report.operator or render.UNKNOWN)} at {mark(report.place or '-')}",
        f"- {word} {_against(report.rto, report.rto_target, missed=report.rto_missed)}",
        f"- RPO {_against(report.rpo, report.rpo_target, missed=report.rpo_missed)}",
        f"- machines well: {sum(one.state == 'well' for one in report.machines)} of {len(report.machines)}",
    ]
    return "\n".join(lines)


def _against(value: float | None, target: float, *, missed: bool) -> str:
    words = render.duration(value)
    if not target:
        return words
    return f"{words}, target {render.duration(target)}{' **missed**' if missed else ''}"


def _failures(report: Report) -> str:
    blocks = [_failure(report, line) for line in report.failures]
    return "\n\n".join(["## What failed", *blocks]) if blocks else ""


def _failure(report: Report, line: Line) -> str:
    text = f"- {mark(line.text)}: {mark(line.reason or line.outcome)}"
    if not line.output:
        return text
    said = tame(cut(line.output, MARKDOWN_OUTPUT, report.run, line.id))
    longest = max((len(ticks) for ticks in re.findall("`+", said)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{text}\n\n{fence}text\n{said}\n{fence}"


def _table_of_groups(report: Report) -> str:
    rows = [
        f"| {mark(group.name)} | {group.outcome} | #{group.checkpoint if group.checkpoint is not None else '?'} "
        f"| {utc(group.checkpoint_time)} | {render.duration(group.age)} | {render.duration(group.rpo)} |"
        for group in report.groups
    ]
    if not rows:
        return ""
    head = ["| group | outcome | checkpoint | taken | age | RPO then |", "|---|---|---|---|---|---|"]
    return "\n".join(["## Groups", "", *head, *rows])


def _table(title: str, items: tuple[Timed, ...]) -> str:
    if not items:
        return ""
    head = ["| name | state | well after | target | checks |", "|---|---|---|---|---|"]
    rows = [
        f"| {mark(one.name)} | {one.state} | {render.duration(one.rto)} "
        f"| {render.duration(one.target) if one.target else '-'}{' missed' if one.missed else ''} "
        f"| {one.passed} of {one.checks} |"
        for one in items[:MARKDOWN_ROWS]
    ]
    left = [f"| … {len(items) - MARKDOWN_ROWS} more | | | | |"] if len(items) > MARKDOWN_ROWS else []
    return "\n".join([f"## {title}", "", *head, *rows, *left])


def _trend(report: Report) -> str:
    if len(report.trend) < 2:
        return ""
    head = ["| run | outcome | RTO | RPO |", "|---|---|---|---|"]
    rows = [
        f"| {utc(past.began)} | {mark(past.verdict)} | {render.duration(past.rto)} | {render.duration(past.rpo)} |"
        for past in report.trend
    ]
    return "\n".join([f"## The last {len(rows)}", "", *head, *rows])


def _foot(report: Report) -> str:
    rows = [f"run {mark(report.run)}", f"plan's text {report.digest[:16] or render.UNKNOWN}"]
    if report.commit:
        rows.append(f"commit {mark(report.commit)}")
    if report.head:
        rows.append(f"record's head {report.head}")
    return ", ".join(rows)
