"""What a run's record comes to: outcome, times against targets, checkpoints, steps, trend. Pure; shown elsewhere.

Times are seconds; moments are wall seconds since the epoch, `at` is counted from the run's beginning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drctl.plan.record import RunRecord, StepRecord
from drctl.plan.report_pictures import Ages, Console, as_mapping, as_number, read_ages, read_console
from drctl.plan.step import Compiled, StepKind

#: Descriptions of steps in one line of the record: far below its longest line, whatever their texts are.
ROWS_PER_EVENT = 1000
#: Runs that a trend goes back.
TREND = 20
_ENDINGS = (StepKind.CLEAN_UP, StepKind.UNDO)
_HEALTH = (StepKind.BOOT, StepKind.RE_IP, StepKind.CHECK)


@dataclass(frozen=True, slots=True)
class Line:
    """One step. `outcome` is `done`, `failed`, `unfinished`, or `skipped` when it was never begun; `seen` is what a
    check saw. `at` is unknown of a step that was not begun."""

    id: str
    kind: str
    text: str
    stage: str
    group: str
    machine: str
    outcome: str
    at: float | None
    seconds: float | None
    reason: str
    seen: str
    output: str
    attempts: int

    @property
    def end(self) -> float | None:
        return None if self.at is None or self.seconds is None else self.at + self.seconds

    @property
    def failed(self) -> bool:
        return self.outcome in ("failed", "unfinished")


@dataclass(frozen=True, slots=True)
class Timed:
    """A machine or a stage: healthy after `rto` seconds, None when it never was. `target` 0: none.

    `state` is `well`, `failed`, or `not reached`; `checks` of them `passed` did."""

    name: str
    group: str
    stage: str
    state: str
    rto: float | None
    target: float
    checks: int
    passed: int
    reason: str

    @property
    def missed(self) -> bool:
        return bool(self.target) and self.rto is not None and self.rto > self.target


@dataclass(frozen=True, slots=True)
class GroupOutcome:
    """What a group was recovered to. `rpo`: how old its newest checkpoint was at that moment, `age` the chosen one."""

    name: str
    recovery: str
    checkpoint: int | None
    checkpoint_time: float | None
    age: float | None
    rpo: float | None
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Past:
    """One run of the trend."""

    run: str
    began: float
    verdict: str
    rto: float | None
    rpo: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """A run. Targets of 0 are none; `head` is the hash of the record's last line, `damage` what is wrong with it."""

    run: str
    plan: str
    description: str
    mode: str
    verdict: str
    why: str
    began: float
    ended: float | None
    operator: str
    place: str
    versions: Mapping[str, Any]
    commit: str
    digest: str
    checkpoint: str
    rto: float | None
    rto_target: float
    rpo_target: float
    groups: tuple[GroupOutcome, ...]
    stages: tuple[Timed, ...]
    machines: tuple[Timed, ...]
    lines: tuple[Line, ...]
    trend: tuple[Past, ...]
    resumed: int
    consoles: tuple[Console, ...] = ()
    ages: tuple[Ages, ...] = ()
    head: str = ""
    damage: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rpo(self) -> float | None:
        """The worst of the groups; None when one is not known."""
        ages = [group.rpo for group in self.groups]
        return None if not ages or None in ages else max(age for age in ages if age is not None)

    @property
    def rto_missed(self) -> bool:
        return bool(self.rto_target) and self.rto is not None and self.rto > self.rto_target

    @property
    def rpo_missed(self) -> bool:
        return bool(self.rpo_target) and self.rpo is not None and self.rpo > self.rpo_target

    @property
    def failures(self) -> list[Line]:
        return [line for line in self.lines if line.failed]

    def count(self, kind: StepKind, outcome: str = "") -> int:
        """The steps of a kind that ended so."""
        return sum(line.kind == kind and outcome in ("", line.outcome) for line in self.lines)


def described(compiled: Compiled) -> Iterable[dict[str, Any]]:
    """Events that tell a record's readers what its steps are, also those that never begin."""
    targets = {(vm.group, vm.name): vm.rto_target for vm in compiled.plan.vms}
    rows = []
    for step in compiled.steps:
        if step.kind is StepKind.GATE:
            continue
        row = {"id": step.id, "kind": step.kind.value, "text": step.text}
        row |= {"stage": step.stage, "group": step.group, "machine": step.machine}
        if step.kind is StepKind.BOOT and (target := targets.get((step.group, step.machine), 0.0)):
            row["rto_target"] = str(target)
        rows.append({key: value for key, value in row.items() if value})
    for first in range(0, len(rows), ROWS_PER_EVENT):
        yield {"event": "steps", "steps": rows[first : first + ROWS_PER_EVENT]}


def rto(record: RunRecord) -> float | None:
    """From the run's beginning until its last step of the way forward ended."""
    ends = [
        one.begun + one.seconds
        for one in record.steps.values()
        if one.seconds is not None and not one.id.endswith(("/clean-up", "/undo"))
    ]
    return max(0.0, max(ends) - record.began) if ends else None


def make_report(record: RunRecord, earlier: Sequence[RunRecord] = (), *, head: str = "", damage: str = "") -> Report:
    """All that the record tells. `earlier` are other runs of any plan, in any order."""
    facts = record.facts
    lines = _lines(record)
    return Report(
        run=record.run,
        plan=record.plan,
        description=str(facts.get("description") or ""),
        mode=record.mode,
        verdict=record.verdict or "unfinished",
        why=record.why,
        began=record.began,
        ended=record.ended,
        operator=str(facts.get("operator") or ""),
        place=str(facts.get("place") or ""),
        versions={"drctl": facts.get("version"), **as_mapping(facts.get("versions"))},
        commit=str(facts.get("commit") or ""),
        digest=str(facts.get("digest") or ""),
        checkpoint=str(facts.get("checkpoint") or ""),
        rto=rto(record),
        rto_target=as_number(facts.get("rto_target")) or 0.0,
        rpo_target=as_number(facts.get("rpo_target")) or 0.0,
        groups=_groups(record),
        stages=_stages(record, lines),
        machines=_machines(record, lines),
        lines=lines,
        trend=_trend(record, earlier),
        resumed=record.resumed,
        consoles=tuple(read_console(row) for row in record.consoles),
        ages=tuple(read_ages(facts)),
        head=head,
        damage=damage,
        facts=facts,
    )


def _lines(record: RunRecord) -> tuple[Line, ...]:
    ids = dict.fromkeys([*record.described, *record.steps])
    return tuple(
        _line(record, identity, record.described.get(identity) or _guess(identity), record.steps.get(identity))
        for identity in ids
        if identity in record.steps or not _is_idle_ending(record, identity)
    )


def _is_idle_ending(record: RunRecord, identity: str) -> bool:
    """A step aside of the way forward that was not needed: no loss."""
    return record.described[identity].get("kind") in _ENDINGS


def _line(record: RunRecord, identity: str, row: Mapping[str, Any], step: StepRecord | None) -> Line:
    outcome = "skipped" if step is None else step.outcome.value if step.outcome else "unfinished"
    facts = step.facts if step else {}
    return Line(
        id=identity,
        kind=str(row.get("kind") or ""),
        text=str(row.get("text") or identity),
        stage=str(row.get("stage") or ""),
        group=str(row.get("group") or ""),
        machine=str(row.get("machine") or ""),
        outcome=outcome,
        at=max(0.0, step.begun - record.began) if step else None,
        seconds=step.seconds if step else None,
        reason=step.reason if step else "",
        seen=str(facts.get("seen") or ""),
        output=step.output if step else "",
        attempts=int(as_number(facts.get("attempts")) or 0),
    )


def _guess(identity: str) -> dict[str, str]:
    """What an id alone tells, of a record that does not describe its steps."""
    row = {"text": identity}
    kinds = {"check": "check", "before": "script", "after": "script"}
    for part in identity.split("/"):
        word, _, name = part.partition(":")
        if word in ("stage", "group"):
            row[word] = name
        elif word == "vm":
            row["machine"], _, group = name.partition("@")
            row |= {"group": group} if group else {}
        else:
            row["kind"] = kinds.get(word, word)
    return row


def _stages(record: RunRecord, lines: Sequence[Line]) -> tuple[Timed, ...]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line.stage:
            found.setdefault(line.stage, []).append(line)
    targets = as_mapping(record.facts.get("stage_targets"))
    return tuple(_timed(own, name, "", name, as_number(targets.get(name)) or 0.0) for name, own in found.items())


def _machines(record: RunRecord, lines: Sequence[Line]) -> tuple[Timed, ...]:
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if line.machine and line.stage:
            found.setdefault((line.group, line.machine, line.stage), []).append(line)
    made = []
    for (group, name, stage), own in found.items():
        boot = next((line.id for line in own if line.kind == StepKind.BOOT), "")
        target = as_number(record.described.get(boot, {}).get("rto_target")) or 0.0
        made.append(_timed(own, name, group, stage, target))
    return tuple(made)


def _timed(lines: Sequence[Line], name: str, group: str, stage: str, target: float) -> Timed:
    health = [line for line in lines if line.kind in _HEALTH]
    checks = [line for line in health if line.kind == StepKind.CHECK]
    failed = [line for line in lines if line.failed]
    ends = [line.end for line in health or lines]
    reached = [end for end in ends if end is not None]
    well = not failed and len(reached) == len(ends) and all(line.outcome == "done" for line in health)
    return Timed(
        name=name,
        group=group,
        stage=stage,
        state="well" if well else "failed" if failed else "not reached",
        rto=max(reached, default=None) if well else None,
        target=target,
        checks=len(checks),
        passed=sum(line.outcome == "done" for line in checks),
        reason=f"{failed[0].text}: {failed[0].reason or failed[0].outcome}" if failed else "",
    )


def _groups(record: RunRecord) -> tuple[GroupOutcome, ...]:
    forecast = as_mapping(record.facts.get("loss_seconds"))
    newest = record.facts.get("checkpoint") == "latest"
    made = []
    for step in record.steps.values():
        if not (step.id.startswith("group:") and step.id.endswith("/recover")):
            continue
        name = step.id.removeprefix("group:").removesuffix("/recover")
        facts = step.facts
        taken, started = as_number(facts.get("checkpoint_time")), as_number(facts.get("started"))
        age = max(0.0, started - taken) if taken is not None and started is not None else None
        told = as_number(facts.get("loss_seconds"))
        rpo = told if told is not None else age if newest and age is not None else as_number(forecast.get(name))
        number = as_number(facts.get("checkpoint"))
        outcome = step.outcome.value if step.outcome else "unfinished"
        made.append(
            GroupOutcome(
                name,
                str(facts.get("recovery") or ""),
                None if number is None else int(number),
                taken,
                age,
                rpo,
                outcome,
                step.reason,
            )
        )
    return tuple(made)


def _trend(record: RunRecord, earlier: Sequence[RunRecord]) -> tuple[Past, ...]:
    same = {
        one.run: one
        for one in earlier
        if one.verdict and (one.plan, one.mode) == (record.plan, record.mode) and one.began <= record.began
    }
    ordered = sorted([*(one for one in same.values() if one.run != record.run), record], key=lambda one: one.began)
    return tuple(_past(one) for one in ordered[-TREND:])


def _past(record: RunRecord) -> Past:
    ages = [group.rpo for group in _groups(record)]
    known = [age for age in ages if age is not None]
    worst = max(known) if known and len(known) == len(ages) else None
    return Past(record.run, record.began, record.verdict or "unfinished", rto(record), worst)
