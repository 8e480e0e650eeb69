"""Keeps guests on a view alive: restarts dead view servers, resumes the guests that QEMU paused meanwhile.

Also says when a test has used up its scratch. Called every 250 ms by the supervisor; each look is short."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from drctl.appliance.recovery.ports import Tools
from drctl.appliance.recovery.state import MachinePhase, RecoveredMachine
from drctl.appliance.recovery.steps import Steps
from drctl.errors import DrctlError, HostUnreachable
from drctl.model.extent import format_bytes
from drctl.model.machine import MachineState
from drctl.model.ports import Hypervisor

#: A view that dies again and again is restarted at these distances; a guest that pauses again at once likewise
#: (its overlay's file system is full, or a frame is damaged: neither is healed by haste).
FIRST_DELAY = 0.25
LONGEST_DELAY = 10.0
#: QEMU reconnects to a view lazily: the first few resumes end in the next pause (measured: up to 5). Only a guest that
#: pauses on beyond that has another trouble.
EAGER_RESUMES = 12
EAGER_RESTARTS = 2
#: All is forgiven after this long without trouble.
CALM_SECONDS = 30.0
#: Without trouble in sight the guests are looked at this often; one call to the hypervisor per machine.
CALM_POLL_SECONDS = 1.0
#: How long after a restart guests are looked at on every call.
ALERT_SECONDS = 15.0
SCRATCH_SECONDS = 1.0

log = logging.getLogger(__name__)

#: Runs an action in a thread of that name; tests run it at once.
Background = Callable[[str, Callable[[], None]], None]


@dataclass(slots=True)
class Patience:
    """When something may be tried again: some times at FIRST_DELAY, then at doubling distances. Monotonic seconds."""

    eager: int
    tries: int = 0
    delay: float = FIRST_DELAY
    due: float = 0.0

    def ready(self, now: float) -> bool:
        return now >= self.due

    def tried(self, now: float) -> None:
        if now - self.due > CALM_SECONDS:
            self.tries = 0
        self.tries += 1
        eager = self.tries <= self.eager
        self.delay = FIRST_DELAY if eager else min(self.delay * 2, LONGEST_DELAY)
        self.due = now + self.delay


@dataclass(slots=True)
class Guard:
    """Watches one recovery. One thread calls `look`."""

    tools: Tools
    steps: Steps
    background: Background
    _restarting: bool = False
    _view: Patience = field(default_factory=lambda: Patience(EAGER_RESTARTS))
    _machines: dict[str, Patience] = field(default_factory=dict)
    _alert_until: float = 0.0
    _next_poll: float = 0.0
    _next_scratch: float = 0.0

    def look(self) -> str:
        """One look; the reason why the test must end, or nothing."""
        now = self.tools.clock.monotonic()
        if self._view_stands(now) and (now >= self._next_poll or now < self._alert_until):
            self._next_poll = now + CALM_POLL_SECONDS
            for machine in self.steps.recovery.machines:
                if machine.phase in (MachinePhase.STARTED, MachinePhase.RUNNING):
                    self._look_at_machine(machine, now)
        if self.steps.recovery.test and now >= self._next_scratch:
            self._next_scratch = now + SCRATCH_SECONDS
            try:
                return self._look_at_scratch()
            except HostUnreachable as exc:  # where images lie on another host: that ends no test
                log.debug("%s", exc.message)
        return ""

    def _view_stands(self, now: float) -> bool:
        """Whether guests could run; if not, it is being seen to. Resuming one now would only pause it again."""
        recovery = self.steps.recovery
        if not recovery.needs_view or self.tools.views.alive(recovery):
            return True
        self._alert_until = now + ALERT_SECONDS
        if self._restarting or self.steps.cancelled.is_set() or not self._view.ready(now):
            return False
        self._view.tried(now)
        self._restarting = True
        # Opening a view takes as long as its journal is deep; the other recoveries must not wait for it.
        self.background(f"view-{recovery.id}", self._restart_view)
        return False

    def _restart_view(self) -> None:
        recovery = self.steps.recovery
        try:
            if recovery.needs_view and self.tools.views.ensure(recovery):
                recovery.view_restarts += 1
                self._machines = {}
                log.warning("%s: the view server had died and was started again", recovery.id)
                self.steps.save()
            if not recovery.needs_view:
                self.tools.views.end(recovery)  # the recovery was ended or committed meanwhile
        except DrctlError as exc:
            log.warning("%s: the view server does not start: %s", recovery.id, exc.message)
        finally:
            self._restarting = False
            self._alert_until = self.tools.clock.monotonic() + ALERT_SECONDS

    def _look_at_machine(self, machine: RecoveredMachine, now: float) -> None:
        patience = self._machines.setdefault(machine.name, Patience(EAGER_RESUMES))
        hypervisor, name = self.tools.hypervisor, machine.recovery_name
        try:
            if hypervisor.state(name) is not MachineState.PAUSED or not _by_error(hypervisor, name):
                return
            self._alert_until = now + ALERT_SECONDS
            if not patience.ready(now):
                return
            patience.tried(now)
            machine.stalls += 1
            log.warning("%s: %s was paused by an I/O error and is resumed", self.steps.recovery.id, name)
            hypervisor.resume(name)
        except DrctlError as exc:
            log.debug("%s: %s", name, exc.message)

    def _look_at_scratch(self) -> str:
        recovery, images, room = self.steps.recovery, self.tools.images, self.tools.room
        used = sum(images.allocated(Path(disk.overlay)) for _, disk in recovery.disks())
        if recovery.scratch_limit and used > recovery.scratch_limit:
            return f"scratch is used up: {format_bytes(used)} of {format_bytes(recovery.scratch_limit)}"
        free = images.free(room.scratch)
        if used and free < room.reserve:
            return f"only {format_bytes(free)} are free at {room.scratch}, {format_bytes(room.reserve)} are kept"
        return ""


def _by_error(hypervisor: Hypervisor, name: str) -> bool:
    """QEMU paused it on an I/O error; a guest that somebody suspended is none of our business."""
    answer = hypervisor.monitor(name, {"execute": "query-status"})
    return bool(answer["status"] == "io-error")
