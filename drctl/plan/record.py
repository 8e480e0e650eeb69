"""A run's record as values: what was written down, and how far the run has come by it. Knows no file.

Events, in the order in which they happen; the log (store/run_log.py) gives each a number, a time and a hash:

    run      who began what: run, plan, mode, digest of the plan's file, options
    steps    what its steps are: id, kind, text, stage, group, machine
    resumed  somebody goes on with it
    begin    a step is begun: durable before it is
    end      it came to its end: outcome, seconds, reason, output
    ending   nothing more is begun; how the run ends, and why
    over     the verdict
    consoles what machines that stay show at the end
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from drctl.plan.engine import Outcome
from drctl.plan.inventory import Ending, Progress

#: Of the record's format; in the first event.
FORMAT = 1
#: Of a step's end, what StepRecord has fields for.
_TOLD = frozenset(("n", "time", "previous", "event", "step", "outcome", "seconds", "reason", "output", "consoles"))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step as the record tells it. `outcome` is None while it runs, or when the run was killed in it."""

    id: str
    begun: float
    attempts: int = 1
    outcome: Outcome | None = None
    seconds: float | None = None
    reason: str = ""
    output: str = ""
    #: what else its end tells, e.g. `attempts`, `seen`, `checkpoint`
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its record tells it. `verdict` is empty while it runs, or when it was killed.

    `described` says of each step what it is, in the order of the plan; a record of an older version has it not."""

    run: str
    plan: str
    mode: str
    began: float
    facts: Mapping[str, Any]
    steps: Mapping[str, StepRecord] = field(default_factory=dict)
    ending: Ending | None = None
    why: str = ""
    flawed: bool = False
    interrupted: bool = False
    verdict: str = ""
    ended: float | None = None
    resumed: int = 0
    described: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: What recovered machines showed: group, machine, time; png (base64), text or why not
    consoles: tuple[Mapping[str, Any], ...] = ()

    def progress(self) -> Progress:
        """How far it is by the record alone; what is true at the hosts is to be added."""
        done = frozenset(step.id for step in self.steps.values() if step.outcome is Outcome.DONE)
        return Progress(
            done=done,
            begun=frozenset(self.steps),
            ending=self.ending,
            flawed=self.flawed,
            interrupted=self.interrupted,
        )


def read_record(events: Iterable[Mapping[str, Any]]) -> RunRecord | None:
    """The run that events tell of; None when there is not even its beginning. Unknown events are passed over."""
    record: RunRecord | None = None
    steps: dict[str, StepRecord] = {}
    described: dict[str, Mapping[str, Any]] = {}
    consoles: dict[tuple[str, str], Mapping[str, Any]] = {}
    for event in events:
        kind = event.get("event")
        consoles |= _consoles(event)
        if kind == "run":
            record = _first(event)
        elif record is None:
            return None
        elif kind in ("begin", "end"):
            _step(steps, event)
        elif kind == "steps":
            described |= {str(row["id"]): row for row in event["steps"]}
        else:
            record = _whole(record, event)
    if record is None:
        return None
    return replace(record, steps=steps, described=described, consoles=tuple(consoles.values()))


def _consoles(event: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Of an event of its own, or of a clean-up's end; the latest of a machine counts."""
    rows = event.get("consoles")
    told = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    return {(str(row.get("group")), str(row.get("machine"))): {**row, "time": event.get("time")} for row in told}


def _first(event: Mapping[str, Any]) -> RunRecord:
    return RunRecord(
        run=str(event.get("run")),
        plan=str(event.get("plan")),
        mode=str(event.get("mode")),
        began=float(event.get("time") or 0.0),
        facts={key: value for key, value in event.items() if key not in ("event", "n", "previous")},
    )


def _whole(record: RunRecord, event: Mapping[str, Any]) -> RunRecord:
    match event.get("event"):
        case "resumed":
            return replace(reopened(record), resumed=record.resumed + 1)
        case "ending":
            return replace(
                record,
                ending=Ending(event["ending"]),
                why=str(event.get("why", "")),
                flawed=bool(event.get("flawed")),
                interrupted=bool(event.get("interrupted")),
            )
        case "over":
            return replace(record, verdict=str(event["verdict"]), ended=float(event.get("time") or 0.0))
        case _:
            return record


def reopened(record: RunRecord) -> RunRecord:
    """A run that was left as it was goes forward again; one that was cleaning up or undoing goes on with that."""
    record = replace(record, verdict="", ended=None)
    if record.ending is not Ending.LEAVE:
        return record
    return replace(record, ending=None, why="", flawed=False, interrupted=False)


def _step(steps: dict[str, StepRecord], event: Mapping[str, Any]) -> None:
    identity = str(event["step"])
    before = steps.get(identity)
    if event["event"] == "begin":
        attempts = before.attempts + 1 if before else 1
        steps[identity] = StepRecord(identity, float(event.get("time") or 0.0), attempts)
        return
    begun = before or StepRecord(identity, float(event.get("time") or 0.0))
    steps[identity] = replace(
        begun,
        outcome=Outcome(event["outcome"]),
        seconds=event.get("seconds"),
        reason=str(event.get("reason", "")),
        output=str(event.get("output", "")),
        facts={key: value for key, value in event.items() if key not in _TOLD},
    )
