"""How a group is protected: what both sides say, merged into one picture. Pure.

The recovery point is honest: its age is counted from the newest checkpoint that the *recovery* site can restore, on the
clock of that site; when that site can't be asked it is unknown (None), never 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Status = dict[str, Any]
UNPROTECTED = "it runs at the recovery site now and is replicated nowhere"
#: Phases in which nothing is sent, so neither link nor backlog means anything.
_STILL = ("unprotected", "paused")


def merge(group: str, source: Status | None, recovery: Status | None, now: float) -> Status:
    """One group's picture. `source` and `recovery` are the two `group.status` results (None: no answer);
    `now` is this machine's wall clock, used only where the recovery side does not tell its own."""
    newest = point(recovery, "newest", now)
    failed_over = _get(recovery, "mode") == "failed-over"
    return {
        "group": group,
        "phase": _get(source, "phase"),
        "reason": _half_back(group, source, recovery)
        or (UNPROTECTED if failed_over else _half_done(group, source) or _away(source, recovery))
        or "",
        "generation": max((int(side.get("generation") or 0) for side in (source, recovery) if side), default=0) or None,
        # What runs at the recovery site since a failover is replicated nowhere: the old checkpoints are no RPO of it.
        "rpo_seconds": newest["age_seconds"] if newest and not failed_over else None,
        "interval_seconds": _get(source, "interval") or _get(recovery, "interval"),
        "newest": newest,
        "oldest": point(recovery, "oldest", now),
        "checkpoints": _get(recovery, "checkpoints", "count"),
        "history": _history(recovery),
        "journal": _part(recovery, "journal", ("bytes", "limit")),
        "lock": _part(recovery, "lock", ("seconds", "until")),
        "link": _part(source, "link", ("state", "offset_ms", "error", "limit")),
        "backlog_bytes": _get(source, "backlog_bytes"),
        "sync": _get(source, "sync"),
        "ring": _part(source, "ring", ("size", "used", "dropping")),
        "spill": _part(source, "spill", ("size", "used", "state", "error")),
        "dirty_map": _part(source, "dirty_map", ("size", "used")),
        "machines": _get(source, "machines") or [],
        "boot": _part(source, "boot", ("state", "reason", "autostart")),
        "strays": _get(source, "strays"),
        "cycle": _part(source, "cycle", ("running", "began", "seconds", "shipped", "stun", "slower", "remarks")),
        "recovery_mode": _get(recovery, "mode"),
        "recoveries": _get(recovery, "recoveries") or [],
        "failback": _part(recovery, "failback", ("phase", "checkpoint", "kept_until", "given_up", "leftovers")),
        "evacuated": _evacuated(source, recovery),
        "told_source": _told_source(recovery),
    }


def _evacuated(source: Status | None, recovery: Status | None) -> Status | None:
    """The evacuation of the group's host at either side."""
    keys = ("host", "since", "by", "phase")
    return _part(source, "evacuated", keys) or _part(recovery, "evacuated", keys)


def _away(source: Status | None, recovery: Status | None) -> str:
    """What the source says, and that the group is not replicated since a host of it is evacuated."""
    reason = str(_get(source, "reason") or "")
    away = _evacuated(source, recovery)
    if away is None or _get(source, "phase") not in ("paused", None):
        return reason
    return f"host {away['host']} is evacuated: drctl host return {away['host']}"


def _half_done(group: str, source: Status | None) -> str:
    """A switchover that the source has begun, and the recovery site not taken up: it runs nowhere, or in part."""
    phase = _get(source, "handover", "phase")
    if phase is None:
        return ""
    if phase == "taking-back":
        return "it is being taken back by its source"
    return f"a switchover is half done ({phase}): drctl switchover {group} goes on, drctl rollback {group} goes back"


def _half_back(group: str, source: Status | None, recovery: Status | None) -> str:
    """A failback that has begun where the group comes back to, and not where it reigns."""
    begun = _get(recovery, "failback", "phase")
    sealing = "sealing" in (begun, _get(source, "failback", "phase"))
    # Nothing has come over yet, and nobody sends.
    newest = _get(recovery, "checkpoints", "newest", "number") or 0
    alone = source is None and begun == "open" and newest <= (_get(recovery, "failback", "checkpoint") or 0)
    return f"a failback is half done: drctl failback {group} goes on" if sealing or alone else ""


def _told_source(recovery: Status | None) -> dict[str, str] | None:
    """Where the group comes from, as its replica knows it; None before the first definition has arrived."""
    source = _part(recovery, "source", ("site", "host"))
    return source if source and source["site"] else None


def point(recovery: Status | None, which: str, now: float) -> Status | None:
    """The `newest` or `oldest` restorable checkpoint with its age in seconds, or None when unknown."""
    checkpoint = _get(recovery, "checkpoints", which)
    if not checkpoint or checkpoint.get("time") is None:
        return None
    wall_ns = _get(recovery, "wall_ns")
    age = (wall_ns / 1e9 if wall_ns else now) - checkpoint["time"]
    return {"number": checkpoint.get("number"), "time": checkpoint["time"], "age_seconds": max(0.0, age)}


def describe(picture: Status) -> str:
    """The group's state in one word and, where there is one, its reason: `live`, `failed-over at beta`, …"""
    if picture["recovery_mode"] == "failed-over":
        return "failed-over"
    return str(picture["phase"] or "unknown")


def sends_nothing(picture: Mapping[str, Any]) -> bool:
    """Whether no stream of the group runs, so that the source has nothing to say of one."""
    return picture["recovery_mode"] == "failed-over" or picture["phase"] in _STILL


def sync_share(sync: Status | None) -> float | None:
    """How much of a sync is done, 0..1, or None when nothing runs or the total is unknown."""
    if not sync or not sync.get("total_bytes"):
        return None
    return min(1.0, float(sync.get("done_bytes") or 0) / float(sync["total_bytes"]))


def _history(recovery: Status | None) -> Status | None:
    history = _part(recovery, "history", ("seconds", "target", "forecast"))
    if history is None:
        return None
    return {
        "seconds": history["seconds"],
        "target_seconds": history["target"],
        "forecast": history["forecast"],
    }


def _part(side: Status | None, key: str, names: tuple[str, ...]) -> Status | None:
    part = _get(side, key)
    return {name: part.get(name) for name in names} if isinstance(part, dict) else None


def _get(side: Status | None, *keys: str) -> Any:
    value: Any = side
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value
