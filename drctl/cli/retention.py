"""The retention lock, seen before anything is done: what the recovery site would refuse is refused at once."""

from __future__ import annotations

from typing import Any

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.inventory import ask
from drctl.errors import RetentionLocked
from drctl.model.site import Host


def demand_unlocked(context: Context, recovery: Host, group: str, seconds: float, *, must: bool = False) -> None:
    """Raises RetentionLocked when the group's history there may not be deleted so many seconds from now.

    A site that does not answer is asked again by the command itself, and refuses itself; else, with `must`, its silence
    is a refusal: the group is known to have a lock, and only its appliance can tell until when."""
    answer = ask(context, recovery, "group.status", group=group, role="recovery")
    if must and answer.error is not None:
        raise RetentionLocked(
            f"the history of {group} at {recovery.site}/{recovery.name} is under a retention lock, and its appliance "
            f"does not say until when: {answer.error}",
            hint="let the appliance run, then give the command again",
            group=group,
        )
    told: dict[str, Any] = answer.result if isinstance(answer.result, dict) else {}
    lock = told.get("lock") or {}
    wall_ns = told.get("wall_ns")
    now = wall_ns / 1e9 if wall_ns else context.clock.time()
    if lock and float(lock["until"]) > now + seconds:
        moment = render.moment(lock["until"])
        raise RetentionLocked(
            f"the history of {group} at {recovery.site}/{recovery.name} is locked until {moment}; nothing was done",
            hint="it can be deleted after that, not before",
            group=group,
            until=moment,
        )
