"""`drctl run report`: one run's report in the format that was asked for, on stdout or in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from drctl.cli.context import SCHEMA_VERSION, Context
from drctl.cli.plans import report_html, report_text, runs
from drctl.cli.plans.junit import render_junit
from drctl.cli.run import ReportFormat
from drctl.errors import IntegrityError, SetupFailed
from drctl.plan.report import TREND, Report, make_report


def look(context: Context, name: str) -> Report:
    """The run's report. Raises NotFound, IntegrityError when not even its beginning can be read."""
    found = runs.find(context, name)
    if found.record is None:
        raise IntegrityError(f"{found.place} does not begin as a run's record does", hint=f"drctl run verify {name}")
    damage = "" if found.found.sound else f"line {found.found.broken}: {found.found.problem}"
    earlier = runs.earlier(context, found.record, TREND)
    return make_report(found.record, earlier, head=found.found.head, damage=damage)


def render(report: Report, kind: ReportFormat) -> str:
    """The whole text."""
    renderers: dict[ReportFormat, Callable[[Report], str]] = {
        ReportFormat.HTML: report_html.html,
        ReportFormat.JUNIT: lambda one: render_junit([report_text.suite(one)]),
        ReportFormat.JSON: _json,
        ReportFormat.MARKDOWN: report_text.markdown,
    }
    return renderers[kind](report)


def _json(report: Report) -> str:
    document = {"schema_version": SCHEMA_VERSION, "kind": "run-report", **report_text.as_json(report)}
    return json.dumps(document, default=str) + "\n"


def write(path: Path, text: str) -> None:
    """Raises SetupFailed when it can't be written there."""
    try:
        path.write_text(text, "utf-8")
    except OSError as exc:
        raise SetupFailed(f"{path} can't be written: {exc.strerror}", hint="--output FILE names where it goes") from exc
