"""JUnit XML, as CI systems read it: suites of cases that passed, failed or were skipped. Knows no plan."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drctl.errors import SetupFailed
from drctl.plan.output import tame


@dataclass(frozen=True, slots=True)
class Case:
    """One case. `failure` is empty when it passed; `said` is shown beside it. Seconds may be unknown (None)."""

    owner: str
    name: str
    failure: str = ""
    said: str = ""
    skipped: str = ""
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    name: str
    cases: Sequence[Case]


def render_junit(suites: Sequence[Suite]) -> str:
    """The document. What no XML can hold (control characters) is spelled out."""
    root = ET.Element("testsuites", {"name": "drctl", **_counts([case for suite in suites for case in suite.cases])})
    for suite in suites:
        element = ET.SubElement(root, "testsuite", {"name": tame(suite.name), **_counts(suite.cases)})
        for case in suite.cases:
            element.append(_case(case))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def write_junit(path: Path, suites: Sequence[Suite]) -> None:
    """Write it. Raises SetupFailed when it can't be written there."""
    try:
        path.write_text(render_junit(suites), "utf-8")
    except OSError as exc:
        raise SetupFailed(f"{path} can't be written: {exc.strerror}", hint="--junit FILE names where it goes") from exc


def _counts(cases: Sequence[Case]) -> dict[str, str]:
    return {
        "tests": str(len(cases)),
        "failures": str(sum(bool(case.failure) for case in cases)),
        "skipped": str(sum(bool(case.skipped) for case in cases)),
        "time": f"{sum(case.seconds or 0.0 for case in cases):.3f}",
    }


def _case(case: Case) -> ET.Element:
    time = {} if case.seconds is None else {"time": f"{case.seconds:.3f}"}
    element = ET.Element("testcase", {"classname": tame(case.owner), "name": tame(case.name), **time})
    if case.failure:
        lines = tame(case.failure)
        ET.SubElement(element, "failure", {"message": lines.splitlines()[0]}).text = lines
    if case.skipped:
        ET.SubElement(element, "skipped", {"message": tame(case.skipped)})
    if case.said:
        ET.SubElement(element, "system-out").text = tame(case.said)
    return element
