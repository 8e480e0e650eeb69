"""What a group's machines would lack or find changed at their recovery host, told before they have to run there.

At the source description.py tells the machines as they travel, without contents; here, at the recovery side, `look`
says what comes of them, and `findings` says so of what the stores hold already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from drctl.appliance.control import Handler
from drctl.appliance.recovery.forecast import examine
from drctl.appliance.recovery.ports import Recoverable, Tools
from drctl.appliance.recovery.state import RecoveryKind, RecoveryRecord
from drctl.appliance.recovery.steps import plan_machine
from drctl.appliance.recovery.store import recoverable_from
from drctl.errors import DrctlError

#: What a store's machines would find here is worked out this often; it changes by somebody's hand only.
FRESH_SECONDS = 60.0

log = logging.getLogger(__name__)

Finding = dict[str, str]


class FitService:
    """The recovery side's half. Methods may be called from any thread."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._known: dict[str, tuple[float, list[Finding]]] = {}

    def handlers(self, describing: Handler) -> dict[str, Handler]:
        """Of the control socket; `describing` is the source's half."""
        return {"group.describe": describing, "group.fit": self.look}

    def look(self, params: Mapping[str, Any], progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """{group, spec, machines, disks: what `describe` told} → {group, findings}."""
        del progress
        source = recoverable_from(params)
        return {"group": source.spec.name, "findings": self._of(source, arriving=True)}

    def findings(self) -> list[Finding]:
        """Of the newest definitions of all groups that are replicated to this host; `info` is left to `look`."""
        found = []
        now = time.monotonic()
        for group in self._tools.stores.groups():
            then, known = self._known.get(group, (float("-inf"), []))
            if now - then >= FRESH_SECONDS:
                known = self._of_store(group)
                self._known[group] = (now, known)
            found += known
        return [one for one in found if one["severity"] != "info"]

    def _of_store(self, group: str) -> list[Finding]:
        try:
            source = self._tools.stores.newest(group)
        except DrctlError as exc:
            log.info("%s: %s", group, exc.message)
            return []
        return self._of(source, arriving=False) if source is not None else []

    def _of(self, source: Recoverable, *, arriving: bool) -> list[Finding]:
        record = RecoveryRecord("fit", RecoveryKind.FAILOVER, source.spec.name, "latest", 0, 0.0, [], generation=1)
        record.machines = [plan_machine(self._tools, record, machine) for machine in source.machines]
        found = examine(self._tools, record, source)
        found += [
            _finding(machine.name, f"{one.what} does not travel: {one.reason}")
            for machine in source.machines
            for one in machine.files.left_out
        ]
        # A machine of that name is no wonder once the group has run here.
        return [one for one in found if arriving or one["severity"] != "error" or "already" not in one["message"]]


def _finding(subject: str, message: str) -> Finding:
    return {"severity": "info", "subject": subject, "message": message, "hint": ""}
