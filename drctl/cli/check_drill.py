"""`drctl check drill`: how long ago a plan's last good drill was, and what became of the last one."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from drctl.cli.checks import DAY, Limits
from drctl.cli.context import Context
from drctl.cli.plans import runs
from drctl.cli.plans.files import find_plan, plan_paths
from drctl.cli.plugin import Perf, Range, State, Verdict, at_most, judge
from drctl.model.duration import format_duration
from drctl.plan.engine import Verdict as RunVerdict
from drctl.plan.plan import Mode, Plan
from drctl.plan.read import read_plan
from drctl.plan.record import RunRecord
from drctl.plan.report import rto

#: A drill a month is what most rules ask for.
MAXIMUM_AGE = 30 * DAY
#: Drills that are looked through for a good one.
LOOKED_AT = 50
_ABORTED = RunVerdict.INTERRUPTED


def of_plan(context: Context, name: str, limits: Limits) -> list[Verdict]:
    """The verdict on one plan. Raises NotFound, ConfigInvalid."""
    return [_judge(context, find_plan(context.config, name), limits)]


def of_all(context: Context, group: str, limits: Limits) -> list[Verdict]:
    """Every plan's (of those that recover `group`, where one is named); a file that can't be read is UNKNOWN."""
    if context.config.directory is None:
        return []
    verdicts = []
    for path in plan_paths(context.config):
        read = read_plan(path)
        if read.plan is None:
            verdicts.append(Verdict(State.UNKNOWN, f"{path.stem}: {read.errors[0].message}"))
        elif group in ("", *read.plan.groups):
            verdicts.append(_judge(context, read.plan, limits))
    return verdicts


def _judge(context: Context, plan: Plan, limits: Limits) -> Verdict:
    drills = list(islice(runs.ended(context, plan.name, Mode.TEST), LOOKED_AT))
    # One that somebody stopped says nothing of the plan.
    last = next((record for record in drills if record.verdict != _ABORTED), None)
    good = next((record for record in drills if record.verdict == RunVerdict.PASSED), None)
    age = max(0.0, context.clock.time() - good.ended) if good is not None and good.ended is not None else None
    warning, critical = limits.over(Range(), at_most(MAXIMUM_AGE))
    perf = (
        Perf(f"{plan.name} drill age", age, "s", None if warning == Range() else warning, critical, 0),
        Perf(f"{plan.name} drill rto", rto(good) if good is not None else None, "s", minimum=0),
    )
    if good is None or age is None:
        why = f"its last drill {_became(last)}" if last is not None else "it was never drilled"
        return Verdict(State.CRITICAL, f"{plan.name}: no good drill here: {why}", perf)
    text = f"{plan.name}: last good drill {format_duration(age)} ago"
    if last is not None and last is not good:
        return Verdict(State.CRITICAL, f"{plan.name}: its last drill {_became(last)}; {text}", perf)
    state = judge(age, warning, critical)
    if good.facts.get("digest") != runs.digest(Path(plan.file)):
        state = max(state, State.WARNING)
        text += ", and the plan was changed since"
    return Verdict(state, text, perf)


def _became(record: RunRecord) -> str:
    words = {RunVerdict.FAILED: "failed", RunVerdict.DIRTY: "left something behind"}
    found = next((word for verdict, word in words.items() if verdict == record.verdict), record.verdict)
    return f"{found} ({record.run}: {record.why})"
