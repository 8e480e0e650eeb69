"""A run's report as one HTML file to mail, print and keep: no script, nothing that is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from drctl.cli import render
from drctl.cli.plans.report_text import cut, utc
from drctl.plan.output import tame
from drctl.plan.report import Line, Report
from drctl.plan.report_pictures import Ages

#: Of one output so much is shown; of all together so much less what pictures take, in characters.
OUTPUT = 8 * 1024
ALL_OUTPUT = 1024 * 1024
#: Pictures of screens and texts of consoles, all together, in characters.
ALL_PICTURES = 512 * 1024
#: Rows of the timeline. With more machines those that failed and the slowest are shown.
ROWS = 80
#: Texts below the timeline.
TICKS = 4
#: Width of a timeline's row in its own units.
WIDTH = 1000.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A step in the timeline."""

    left: float
    width: float
    kind: str
    failed: bool
    title: str


@dataclass(frozen=True, slots=True)
class Row:
    """A machine, or what is above machines, in the timeline."""

    name: str
    stage: str
    failed: bool
    bars: tuple[Bar, ...]
    end: float
    machine: bool


@dataclass(frozen=True, slots=True)
class Timeline:
    """`left_out` machines are not in it."""

    rows: tuple[Row, ...]
    ticks: tuple[str, ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class Plot:
    """A group's ages over time: `area` is the points of a polygon in 1000 by 100, `target` a height or None, `none` has
    (left, width) of times without any checkpoint."""

    group: str
    area: str
    target: float | None
    highest: float
    begin: float
    end: float
    worst: float | None
    none: tuple[tuple[float, float], ...]

    @property
    def gaps(self) -> bool:
        return bool(self.none)


@dataclass(slots=True)
class _Budget:
    """What is left of the room for outputs."""

    left: int = ALL_OUTPUT
    cut: int = field(default=0)

    def take(self, report: Report, line: Line) -> str:
        limit = min(OUTPUT, self.left)
        if limit < 256:
            self.cut += 1
            return f"[not shown here: drctl run show {report.run} --step {line.id}]"
        text = cut(tame(line.output), limit, report.run, line.id)
        self.cut += len(text) < len(line.output)
        self.left -= len(text)
        return text


def html(report: Report) -> str:
    """The document."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # 50 ms that no other command has to pay

    environment = Environment(
        loader=PackageLoader("drctl.cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": render.duration, "utc": utc, "tame": lambda text: tame(str(text))}
    consoles = _consoles(report)
    budget = _Budget(ALL_OUTPUT - sum(len(one["png"]) + len(one["text"]) for one in consoles))
    return environment.get_template("report.html").render(
        report=report,
        timeline=timeline(report),
        trend=_trend(report),
        aim=round(100 * report.rto_target / _longest(report), 1),
        outputs=_outputs(report, budget),
        cut=budget.cut,
        facts=_facts(report),
        plots=[_plot(one, report.rpo_target) for one in report.ages],
        consoles=consoles,
    )


def timeline(report: Report) -> Timeline:
    """Steps as bars, a row for each machine and for what is none's."""
    span = max((line.end for line in report.lines if line.end is not None), default=0.0) or 1.0
    owners: dict[tuple[str, str, str], list[Line]] = {}
    for line in report.lines:
        if line.at is not None:
            owner = (line.stage, line.group, line.machine) if line.machine else (line.stage, line.group, "")
            owners.setdefault(owner, []).append(line)
    rows = [_row(report, owner, lines, span) for owner, lines in owners.items()]
    kept = _kept(rows)
    ticks = tuple(render.duration(span * number / TICKS) for number in range(TICKS + 1))
    return Timeline(tuple(kept), ticks, len(rows) - len(kept))


def _kept(rows: Sequence[Row]) -> list[Row]:
    """All but machines that went well and were not slow, when there are many."""
    machines = [row for row in rows if row.machine]
    if len(machines) <= ROWS:
        return list(rows)
    chosen = sorted(machines, key=lambda row: (not row.failed, -row.end))[:ROWS]
    names = {id(row) for row in chosen}
    return [row for row in rows if not row.machine or id(row) in names]


def _row(report: Report, owner: tuple[str, str, str], lines: Sequence[Line], span: float) -> Row:
    stage, group, machine = owner
    name = machine or (f"group {group}" if group else f"stage {stage}" if stage else f"plan {report.plan}")
    ends = [line.end for line in lines if line.end is not None]
    bars = tuple(_bar(line, span) for line in lines)
    return Row(name, stage, any(line.failed for line in lines), bars, max(ends, default=span), bool(machine))


def _bar(line: Line, span: float) -> Bar:
    begun = line.at or 0.0
    seconds = line.seconds if line.seconds is not None else max(0.0, span - begun)
    left = min(WIDTH, WIDTH * begun / span)
    width = max(2.0, min(WIDTH - left, WIDTH * seconds / span))
    title = f"{line.text}: {line.outcome}, {render.duration(begun)} + {render.duration(line.seconds)}"
    return Bar(round(left, 1), round(width, 1), line.kind, line.failed, title)


def _trend(report: Report) -> list[dict[str, Any]]:
    """Each run's bar: heights in percent of the longest."""
    if len(report.trend) < 2:
        return []
    longest = _longest(report)
    return [
        {"past": past, "height": round(100 * (past.rto or 0.0) / longest, 1), "own": past.run == report.run}
        for past in report.trend
    ]


def _longest(report: Report) -> float:
    return max([past.rto or 0.0 for past in report.trend] + [report.rto_target]) or 1.0


def _outputs(report: Report, budget: _Budget) -> list[tuple[Line, str]]:
    """What scripts said; of those that failed first, so that they are not the ones that find no room."""
    said = [line for line in report.lines if line.output]
    texts = {line.id: budget.take(report, line) for line in sorted(said, key=lambda line: not line.failed)}
    return [(line, texts[line.id]) for line in said]


def _plot(ages: Ages, target: float) -> Plot:
    known = [age for age in ages.worst if age is not None]
    highest = max([*known, target]) or 1.0
    width = WIDTH / len(ages.worst)
    points = ["0,100"]
    for place, age in enumerate(ages.worst):
        height = 100 - 100 * (age or 0.0) / highest
        points += [f"{place * width:.1f},{height:.1f}", f"{(place + 1) * width:.1f},{height:.1f}"]
    line = 100 - 100 * target / highest if target else None
    worst = max(known, default=None)
    area = " ".join([*points, f"{WIDTH:.0f},100"])
    return Plot(ages.group, area, line, highest, ages.begin, ages.end, worst, tuple(_gaps(ages, width)))


def _gaps(ages: Ages, width: float) -> Iterator[tuple[float, float]]:
    """Parts of the day without any checkpoint, those side by side as one."""
    place = 0
    for missing, parts in groupby(ages.worst, key=lambda age: age is None):
        length = len(list(parts))
        if missing:
            yield round(place * width, 1), round(length * width, 1)
        place += length


def _consoles(report: Report) -> list[dict[str, Any]]:
    """Pictures and texts as far as there is room, of machines that failed first; the others say so."""
    failed = {(one.group, one.name) for one in report.machines if one.state == "failed"}
    left, shown = ALL_PICTURES, {}
    for one in sorted(report.consoles, key=lambda one: (one.group, one.machine) not in failed):
        size = len(one.png) + len(one.text)
        fits = size <= left
        left -= size if fits else 0
        reason = one.reason if fits or not size else "left out here: the file would grow too large"
        text = tame(one.text) if fits else ""
        shown[id(one)] = {"console": one, "png": one.png if fits else "", "text": text, "reason": reason}
    return [shown[id(one)] for one in report.consoles]


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = [
        ("run", report.run),
        ("ordered by", f"{report.operator or render.UNKNOWN} at {report.place or render.UNKNOWN}"),
        ("began", utc(report.began)),
        ("ended", utc(report.ended)),
        ("checkpoint asked for", report.checkpoint or "-"),
        ("source is down because", str(report.facts.get("source_is_down") or "")),
        ("gone on with", f"{report.resumed} times" if report.resumed else ""),
        ("plan's commit", report.commit),
        ("plan's text (SHA-256)", report.digest),
        ("record's head", report.head),
    ]
    for host, told in report.versions.items():
        if isinstance(told, dict):
            facts.append((f"versions at {host}", ", ".join(f"{name} {version}" for name, version in told.items())))
        elif told:
            facts.append((f"{host} here", str(told)))
    return [(name, tame(value)) for name, value in facts if value]
