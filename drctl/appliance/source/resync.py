"""Orders of an operator to go over a group's disks: to find out what differs, or to make it good."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.passes import Passes
from drctl.appliance.source.shipper_link import ShipperLink
from drctl.errors import StepFailed, WrongPhase
from drctl.model.machine import Machine

#: How often a survey's progress is told.
TELL_SECONDS = 0.5
#: Longest that a survey waits to begin: another pass may be about to.
BEGIN_SECONDS = 30.0


@dataclass(slots=True)
class SurveyOrder:
    """One survey of a group, ordered by a control request, run by the protection's thread."""

    wanted: bool = False
    running: bool = False
    #: What the shipper is to do, with which parameters; its findings are in its status under `told`.
    mode: str = "survey"
    told: str = "survey"
    parameters: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    findings: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def order(self, group: str, parameters: dict[str, Any] | None = None) -> None:
        """A survey; with parameters a verification. Raises WrongPhase while one is ordered or runs."""
        with self._lock:
            if self.wanted or self.running:
                raise WrongPhase(f"the disks of {group} are being compared already", group=group)
            self.mode, self.told = ("survey", "survey") if parameters is None else ("verify", "verification")
            self.parameters = parameters or {}
            self.wanted, self.error, self.findings = True, "", {}

    def begin(self, passes: Passes, shipper: ShipperLink, state: GroupState, machines: Sequence[Machine]) -> None:
        """Let the shipper read all disks. Raises HypervisorRefused, WrongPhase, ApplianceUnreachable."""
        exports = passes.begin(self.mode, [disk.number for disk in state.disks], state, machines)
        self.wanted, self.running = False, True
        shipper.start_sync(self.mode, exports, "", (), **self.parameters)

    def ended(self, status: dict[str, Any]) -> None:
        """The shipper's status says how it went."""
        sync = status.get("sync") or {}
        self.findings = status.get(self.told) or {}
        if sync.get("job") != "surveyed":
            self.error = str(sync.get("error") or "it was broken off")
        self.running = False

    def withdraw(self) -> None:
        self.wanted = False

    def wait(self, group: str, findings: Callable[[], dict[str, Any]], tell: Callable[[dict[str, Any]], None]) -> Any:
        """The findings, once it is over. Raises StepFailed."""
        end = time.monotonic() + BEGIN_SECONDS
        while self.wanted:
            if time.monotonic() > end:
                self.withdraw()
                raise StepFailed(f"{group}: its disks could not be read within {BEGIN_SECONDS:.0f} s", group=group)
            time.sleep(TELL_SECONDS / 5)
        while self.running:
            tell(findings())
            time.sleep(TELL_SECONDS)
        if self.error:
            raise StepFailed(f"the disks of {group} were not compared: {self.error}", group=group)
        return self.findings
