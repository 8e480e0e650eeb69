"""What the monitoring plugins look at, and what they say about it. Pure.

Rules: what is not known is never 0 and never OK; an unknown recovery point is CRITICAL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drctl.cli.plugin import Perf, Range, State, Verdict, at_least, at_most, judge
from drctl.cli.protection import sends_nothing
from drctl.model.duration import format_duration
from drctl.model.extent import format_bytes

#: A checkpoint every interval is the promise: late is what a hiccup explains, critical what it does not.
RPO_WARNING_INTERVALS = 3.0
RPO_CRITICAL_INTERVALS = 12.0
#: Below them no monitoring system looks often enough to mean anything.
RPO_WARNING_SECONDS = 15.0
RPO_CRITICAL_SECONDS = 60.0
JOURNAL_PERCENT = (80.0, 95.0)
#: A journal that a tag keeps from giving room back stops replication at its limit: time for a person to act.
HELD_BACK_HOURS = 7 * 24.0
BACKLOG_PERCENT = (50.0, 90.0)
SPACE_FREE_PERCENT = (10.0, 2.0)
CLOCK_SECONDS = (1.0, 30.0)
CERTIFICATE_DAYS = (30.0, 7.0)
DAY = 86400.0

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the caller wants instead of the defaults; None: the default."""

    warning: Range | None = None
    critical: Range | None = None

    def over(self, warning: Range, critical: Range) -> tuple[Range, Range]:
        return self.warning or warning, self.critical or critical


def rpo(picture: Facts, limits: Limits) -> Verdict:
    """The age of the newest checkpoint that the recovery site can restore (picture: `protection.merge`)."""
    group = str(picture["group"])
    interval = float(picture["interval_seconds"] or 5.0)
    warning, critical = limits.over(
        at_most(max(RPO_WARNING_INTERVALS * interval, RPO_WARNING_SECONDS)),
        at_most(max(RPO_CRITICAL_INTERVALS * interval, RPO_CRITICAL_SECONDS)),
    )
    age = picture["rpo_seconds"]
    perf = (Perf(f"{group} rpo", age, "s", warning, critical, 0),)
    if age is None:
        failed_over = picture["recovery_mode"] == "failed-over"
        why = "it is failed over and replicated nowhere" if failed_over else _why_unknown(picture)
        return Verdict(State.CRITICAL, f"{group}: no recovery point: {why}", perf)
    state = judge(age, warning, critical)
    text = f"{group}: RPO {format_duration(age)}"
    if state is not State.OK and (reason := str(picture["reason"] or picture["phase"] or "")):
        text += f" ({reason})"
    return Verdict(state, text, perf)


def _why_unknown(picture: Facts) -> str:
    if picture["checkpoints"] is None:
        return "the recovery site does not answer"
    if picture["phase"] == "syncing":
        return "the first sync is not done"
    return str(picture["reason"] or "there is no checkpoint")


def journal(picture: Facts, limits: Limits) -> Verdict:
    """How full a group's journal is, and whether its history will fall below its target."""
    group = str(picture["group"])
    found, history = picture["journal"] or {}, picture["history"] or {}
    used, limit = found.get("bytes"), found.get("limit")
    if used is None or not limit:
        return Verdict(State.UNKNOWN, f"{group}: its journal is unknown: the recovery site does not answer")
    warning, critical = limits.over(at_most(JOURNAL_PERCENT[0]), at_most(JOURNAL_PERCENT[1]))
    percent = 100.0 * used / limit
    state = judge(percent, warning, critical)
    text = f"{group}: journal {percent:.0f} %, {format_bytes(used)} of {format_bytes(limit)}"
    forecast = history.get("forecast")
    if isinstance(forecast, dict) and forecast.get("falls_short"):
        state = max(state, State.WARNING)
        hours = forecast.get("hours_until_short")
        when = f" in {format_duration(3600 * float(hours))}" if isinstance(hours, (int, float)) else ""
        text += f", history falls below {format_duration(float(history.get('target_seconds') or 0))}{when}"
    elif isinstance(forecast, dict) and forecast.get("held_back") and forecast.get("hours_until_full") is not None:
        hours = float(forecast["hours_until_full"])
        state = max(state, State.WARNING) if hours < HELD_BACK_HOURS else state
        text += f", a tag or pin keeps all since {format_duration(float(history.get('seconds') or 0))} ago"
        text += f": full in {format_duration(3600 * hours)}, and then nothing is replicated"
    return Verdict(
        state,
        text,
        (
            Perf(f"{group} journal", round(percent, 2), "%", warning, critical, 0, 100),
            Perf(f"{group} journal_bytes", used, "B", None, None, 0, limit),
            Perf(f"{group} history", history.get("seconds"), "s", None, None, 0),
        ),
    )


def backlog(picture: Facts, limits: Limits) -> Verdict:
    """How full a group's ring and spill are together: beyond them the dirty map takes what is written, and no
    checkpoint is cut until that was read again."""
    group = str(picture["group"])
    ring, spill, dirty = (picture.get(key) or {} for key in ("ring", "spill", "dirty_map"))
    if sends_nothing(picture):
        return Verdict(State.OK, f"{group}: no backlog: it is not replicated")
    if ring.get("used") is None or not ring.get("size"):
        return Verdict(State.UNKNOWN, f"{group}: its backlog is unknown: its source does not answer")
    size, used = ring["size"] + (spill.get("size") or 0), ring["used"] + (spill.get("used") or 0)
    dropped = int(dirty.get("used") or 0)
    warning, critical = limits.over(at_most(BACKLOG_PERCENT[0]), at_most(BACKLOG_PERCENT[1]))
    percent = 100.0 * min(used, size) / size
    state = judge(percent, warning, critical)
    text = f"{group}: backlog {format_bytes(used)} of {format_bytes(size)}"
    if spill.get("state") == "failed":
        state = max(state, State.WARNING)
        text += f", the spill fails: {spill.get('error') or 'unknown'}"
    if dropped or ring.get("dropping"):
        state = State.CRITICAL
        text += f", {format_bytes(dropped)} dropped and to be read again"
    return Verdict(
        state,
        text,
        (
            Perf(f"{group} backlog", round(percent, 2), "%", warning, critical, 0, 100),
            Perf(f"{group} ring", ring["used"], "B", None, None, 0, ring["size"]),
            Perf(f"{group} spill", spill.get("used"), "B", None, None, 0, spill.get("size")),
            Perf(f"{group} dirty_map", dirty.get("used"), "B", None, None, 0, dirty.get("size")),
        ),
    )


def appliance(host: str, facts: Facts | None, problem: str, seconds: float, limits: Limits) -> Verdict:
    """Whether an appliance answers within its time, and finds nothing wrong with itself."""
    warning, critical = limits.over(at_most(1.0), at_most(2.0))
    if facts is None:
        return Verdict(State.CRITICAL, f"{host}: no answer: {problem}", (Perf(f"{host} answer", None, "s"),))
    found = [row for row in facts.get("findings") or [] if row.get("severity") in ("error", "warning")]
    state = judge(seconds, warning, critical)
    if any(row["severity"] == "error" for row in found):
        state = State.CRITICAL
    elif found:
        state = max(state, State.WARNING)
    text = f"{host}: version {facts.get('version') or 'unknown'} answers in {format_duration(seconds)}"
    text += "".join(f"; {row['subject']}: {row['message']}" for row in found)
    return Verdict(state, text, (Perf(f"{host} answer", round(seconds, 3), "s", warning, critical, 0),))


def certificate(host: str, facts: Facts, now: float, limits: Limits) -> Verdict:
    """Days until an appliance's certificate expires."""
    end = (facts.get("certificate") or {}).get("not_after")
    warning, critical = limits.over(at_least(CERTIFICATE_DAYS[0]), at_least(CERTIFICATE_DAYS[1]))
    if end is None:
        return Verdict(State.UNKNOWN, f"{host}: its certificate's end is unknown")
    days = (float(end) - now) / DAY
    perf = (Perf(f"{host} certificate", round(days, 2), "", warning, critical),)
    text = f"expired {-days:.0f} days ago" if days < 0 else f"expires in {days:.0f} days"
    return Verdict(judge(days, warning, critical), f"{host}: certificate {text}", perf)


def clock(host: str, facts: Facts, now: float, patience: float, limits: Limits) -> Verdict:
    """How far an appliance's clock is from ours, less what the way there may have taken."""
    warning, critical = limits.over(at_most(CLOCK_SECONDS[0]), at_most(CLOCK_SECONDS[1]))
    if not facts.get("wall_ns"):
        return Verdict(State.UNKNOWN, f"{host}: its clock is unknown")
    skew = max(0.0, abs(facts["wall_ns"] / 1e9 - now) - patience)
    perf = (Perf(f"{host} clock", round(skew, 3), "s", warning, critical, 0),)
    return Verdict(judge(skew, warning, critical), f"{host}: clock differs by {format_duration(skew)}", perf)


def link_clock(picture: Facts, limits: Limits) -> Verdict | None:
    """How far the clocks of a group's two sites differ, as the link measures it; None where no link runs."""
    offset = (picture["link"] or {}).get("offset_ms")
    if offset is None:
        return None
    warning, critical = limits.over(at_most(CLOCK_SECONDS[0]), at_most(CLOCK_SECONDS[1]))
    skew, group = abs(float(offset)) / 1000, str(picture["group"])
    perf = (Perf(f"{group} clock", round(skew, 3), "s", warning, critical, 0),)
    return Verdict(
        judge(skew, warning, critical), f"{group}: its sites' clocks differ by {format_duration(skew)}", perf
    )


def space(host: str, facts: Facts, limits: Limits) -> list[Verdict]:
    """Free space of an appliance's file systems, in percent."""
    warning, critical = limits.over(at_least(SPACE_FREE_PERCENT[0]), at_least(SPACE_FREE_PERCENT[1]))
    verdicts = []
    for name, place in sorted((facts.get("space") or {}).items()):
        total, free = place.get("total"), place.get("free")
        if not total or free is None:
            verdicts.append(Verdict(State.UNKNOWN, f"{host}: the space of its {name} is unknown"))
            continue
        percent = 100.0 * free / total
        text = f"{host}: {percent:.0f} % of {place.get('path') or name} free, {format_bytes(free)}"
        perf = (
            Perf(f"{host} {name} free", round(percent, 2), "%", warning, critical, 0, 100),
            Perf(f"{host} {name} free_bytes", free, "B", None, None, 0, total),
        )
        verdicts.append(Verdict(judge(percent, warning, critical), text, perf))
    return verdicts or [Verdict(State.UNKNOWN, f"{host}: its space is unknown")]
