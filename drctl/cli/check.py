"""`drctl check`: monitoring plugins (Nagios, Icinga, Naemon, checkmk): one line, performance data, exit code 0 to 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from drctl.cli import check_drill, checks
from drctl.cli.checks import Limits
from drctl.cli.context import Context
from drctl.cli.inventory import Answer, ask, in_parallel
from drctl.cli.options import examples, seconds
from drctl.cli.plugin import Range, State, Verdict, at_most, line, parse_range
from drctl.cli.status import look
from drctl.errors import ApplianceUnreachable
from drctl.model.site import Host

app = typer.Typer(help="Monitoring plugins.", add_completion=False, rich_markup_mode=None)


class What(StrEnum):
    RPO = "rpo"
    JOURNAL = "journal"
    BACKLOG = "backlog"
    APPLIANCE = "appliance"
    CERTIFICATE = "certificate"
    CLOCK = "clock"
    SPACE = "space"
    DRILL = "drill"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class _Asked:
    """An appliance's `appliance.info`, our clock in the middle of the call, and how long it took."""

    answer: Answer
    now: float
    seconds: float

    @property
    def facts(self) -> dict[str, Any] | None:
        return self.answer.result if isinstance(self.answer.result, dict) else None


class _Look:
    """Asks each thing once, whatever needs it."""

    def __init__(self, context: Context, group: str) -> None:
        self.context = self._context = context
        self.group = self._group = group
        self.silent: list[dict[str, str]] = []
        self._pictures: list[dict[str, Any]] | None = None
        self._asked: list[_Asked] | None = None

    def pictures(self) -> list[dict[str, Any]]:
        """The groups' pictures. Raises NotFound, ApplianceUnreachable."""
        if self._pictures is None:
            self._pictures, self.silent = look(self._context, self._group)
            if not self._pictures and self.silent:
                raise ApplianceUnreachable(f"no appliance told of any group: {self.silent[0]['message']}")
        return self._pictures

    def of_groups(self, examine: Callable[[dict[str, Any]], Verdict]) -> list[Verdict]:
        """The verdict on each picture. An appliance that is silent may know of groups that no other told of."""
        verdicts = [examine(picture) for picture in self.pictures()]
        if self._group:
            return verdicts
        return verdicts + [
            Verdict(State.UNKNOWN, f"{host['host']}: no answer: {host['message']}") for host in self.silent
        ]

    def asked(self) -> list[_Asked]:
        """Every appliance, or those of the group's two sides."""
        if self._asked is None:
            self._asked = in_parallel(self._ask, self._hosts())
        return self._asked

    def _hosts(self) -> Sequence[Host]:
        if not self._group:
            return self._context.config.hosts
        (picture,) = self.pictures()
        names = [side["host"] for side in (picture["source"], picture["recovery"]) if side]
        return [host for host in self._context.config.hosts if host.name in names]

    def _ask(self, host: Host) -> _Asked:
        before, begun = self._context.clock.time(), self._context.clock.monotonic()
        answer = ask(self._context, host, "appliance.info")
        seconds = self._context.clock.monotonic() - begun
        return _Asked(answer, before + seconds / 2, seconds)


def _rpo(found: _Look, limits: Limits) -> list[Verdict]:
    return found.of_groups(lambda picture: checks.rpo(picture, limits))


def _journal(found: _Look, limits: Limits) -> list[Verdict]:
    return found.of_groups(lambda picture: checks.journal(picture, limits))


def _backlog(found: _Look, limits: Limits) -> list[Verdict]:
    return found.of_groups(lambda picture: checks.backlog(picture, limits))


def _appliance(found: _Look, limits: Limits) -> list[Verdict]:
    return [
        checks.appliance(each.answer.host.name, each.facts, str(each.answer.error), each.seconds, limits)
        for each in found.asked()
    ]


def _certificate(found: _Look, limits: Limits) -> list[Verdict]:
    return [
        _silent(each) if each.facts is None else checks.certificate(each.answer.host.name, each.facts, each.now, limits)
        for each in found.asked()
    ]


def _clock(found: _Look, limits: Limits) -> list[Verdict]:
    hosts = [
        _silent(each)
        if each.facts is None
        else checks.clock(each.answer.host.name, each.facts, each.now, each.seconds / 2, limits)
        for each in found.asked()
    ]
    links = [checks.link_clock(picture, limits) for picture in found.pictures()]
    return [*hosts, *(one for one in links if one is not None)]


def _space(found: _Look, limits: Limits) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for each in found.asked():
        name = each.answer.host.name
        verdicts += [_silent(each)] if each.facts is None else checks.space(name, each.facts, limits)
    return verdicts


def _silent(each: _Asked) -> Verdict:
    return Verdict(State.UNKNOWN, f"{each.answer.host.name}: no answer: {each.answer.error}")


_CHECKS: dict[What, Callable[[_Look, Limits], list[Verdict]]] = {
    What.RPO: _rpo,
    What.JOURNAL: _journal,
    What.BACKLOG: _backlog,
    What.APPLIANCE: _appliance,
    What.CERTIFICATE: _certificate,
    What.CLOCK: _clock,
    What.SPACE: _space,
    What.DRILL: lambda found, limits: check_drill.of_all(found.context, found.group, limits),
}


def _range(text: str) -> Range:
    try:
        return parse_range(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


@app.command(
    epilog=examples(
        "drctl check rpo web",
        "drctl check rpo web --warning 30s --critical 5m",
        "drctl check space --critical 5:",
        "drctl check drill shop --max-age 30d",
        "drctl check all",
    )
)
def check(
    ctx: typer.Context,
    what: Annotated[
        What,
        typer.Argument(
            metavar="WHAT",
            help="rpo, journal, backlog, appliance, certificate, clock, space, drill or all.",
            show_choices=False,
        ),
    ],
    group: Annotated[str, typer.Argument(metavar="NAME", help="One group, or one plan of drill; all without it.")] = "",
    warning: Annotated[
        Range | None,
        typer.Option("--warning", "-w", metavar="RANGE", parser=_range, help="Warn outside of this range."),
    ] = None,
    critical: Annotated[
        Range | None,
        typer.Option("--critical", "-c", metavar="RANGE", parser=_range, help="Critical outside of this range."),
    ] = None,
    max_age: Annotated[
        float | None,
        typer.Option(
            "--max-age", parser=seconds, metavar="DURATION", help="drill: critical when the last good one is older."
        ),
    ] = None,
) -> int:
    """Check one thing for a monitoring system.

    One line, performance data, and exit code 0 OK, 1 WARNING, 2 CRITICAL or 3 UNKNOWN, as monitoring plugins have them.

    RANGE is that of the monitoring-plugins guidelines: 30s (alert above), 10: (alert below), 5:20, @5:20; durations and
    sizes may be written out. rpo in seconds, journal and backlog in percent used, appliance and clock in seconds,
    certificate in days left, space in percent free. Defaults: rpo 3 and 12 times the group's interval (15s and 60s at
    least), journal 80 and 95, backlog 50 and 90, appliance 1s and 2s, certificate 30: and 7:, clock 1s and 30s,
    space 10: and 2:, drill none and 30d.

    backlog is what a group's ring and spill hold; CRITICAL when they overflowed and blocks have to be read again.

    drill looks at the records of this machine's runs: CRITICAL without a good one, when the last one failed, or when it
    is older than --max-age; WARNING when the plan was changed since.

    An unknown recovery point is CRITICAL; a wrong command line or configuration, or an internal failure, is UNKNOWN."""
    context = ctx.obj
    assert isinstance(context, Context)
    if what is What.ALL and (warning or critical):
        raise typer.BadParameter("all has many units: give --warning and --critical to one check")
    if max_age is not None and (what is not What.DRILL or critical):
        raise typer.BadParameter("--max-age goes with drill, and stands for --critical")
    found, limits = _Look(context, group), Limits(warning, at_most(max_age) if max_age is not None else critical)
    if what is What.DRILL and group:
        verdicts = check_drill.of_plan(context, group, limits)
    else:
        chosen = list(_CHECKS) if what is What.ALL else [what]
        verdicts = [verdict for one in chosen for verdict in _CHECKS[one](found, limits)]
    state, text = line(f"drctl {what}", verdicts)
    context.screen.line(text)
    return int(state)
