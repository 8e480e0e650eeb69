"""Notices that a group's state changed here, and tells it: phases of sources, modes of stores, states of recoveries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from drctl.model.hook import Hook
from drctl.plan.notify import Notifications

#: Between two looks; a state that comes and goes in between is not told.
LOOK_SECONDS = 2.0

log = logging.getLogger(__name__)

#: What has a state: (kind, name, group) → its state; kinds are `source`, `recovery`, `test`, `failover`, `switchover`.
States = dict[tuple[str, str, str], str]


class StateWatch:
    """Looks when it is told to, from one thread. What is there at the first look is known, and not told."""

    def __init__(self, hook: Hook, place: tuple[str, str], states: Callable[[], States]) -> None:
        self._hook = hook
        self._place = place
        self._states = states
        self._known: States | None = None
        self._looked = float("-inf")
        self._notifications = Notifications(hook, log.warning)

    def stop(self) -> None:
        self._notifications.close()

    def look_again(self) -> None:
        """A look when one is due; none where nobody is told. Call it often."""
        now = time.monotonic()
        if self._hook.command and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self.look()

    def look(self) -> None:
        """Once: tell what is another than at the last look. What is gone is told as `gone`."""
        now = self._states()
        known, self._known = self._known, now
        if known is None:
            return
        for key in [*now, *(key for key in known if key not in now)]:
            before, after = known.get(key, ""), now.get(key, "gone")
            if before != after:
                self._tell(key, before, after)

    def _tell(self, key: tuple[str, str, str], before: str, after: str) -> None:
        kind, name, group = key
        facts: dict[str, Any] = {"kind": kind, "name": name, "group": group, "state": after, "before": before}
        site, host = self._place
        self._notifications.tell("state-changed", {**facts, "site": site, "host": host, "time": time.time()})


def group_states(
    sources: Iterable[tuple[str, str]], stores: Iterable[tuple[str, str]], recoveries: Iterable[dict[str, Any]]
) -> States:
    """All that has a state: sources and stores as (group, phase or mode), recoveries as appliances tell them."""
    states: States = {("source", group, group): phase for group, phase in sources}
    states |= {("recovery", group, group): mode for group, mode in stores}
    return states | {(str(one["kind"]), str(one["id"]), str(one["group"])): str(one["state"]) for one in recoveries}
