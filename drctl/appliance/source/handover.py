"""Handing a group over in a switchover, and taking it back: the source's half, in steps that may be interrupted.

    stopping      its machines are being powered off; called off, they are started again and replication goes on
    final         all are off, the final mark is durable at the other side: nothing that was acknowledged is lost
    handed-over   this side may neither run nor replicate the group; `generation` is for the other side to reign with
    taking-back   it reigns here again, under a higher generation; its machines are being started

The record, `home/handovers/GROUP.json`, is written before what it announces is done. Knows no command line; what it
acts through is `HandoverGroup` and `HandoverHost`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from drctl.appliance.source.handover_record import (
    SHUTDOWN_SECONDS,
    FinalMark,
    Handover,
    HandoverFiles,
    HandoverPhase,
)
from drctl.appliance.source.image_stamp import RUNNING, Stamp
from drctl.errors import (
    DrctlError,
    HypervisorRefused,
    NotFound,
    PreconditionFailed,
    StepFailed,
    WrongPhase,
)
from drctl.model.machine import MachineState
from drctl.model.move import OnTimeout
from drctl.model.phase import Phase

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]

POLL_SECONDS = 0.25
#: A guest that boots hears no power button: it is pressed again at this distance.
PRESS_SECONDS = 15.0
#: Longest that the order of a group whose machines are all off, and then the final mark, are waited for.
FINAL_SECONDS = 60.0
#: Longest wait for tap and shipper to be gone, and for a group that came back clean to be live again.
WITHDRAW_SECONDS = 60.0
LIVE_SECONDS = 20.0


class HandoverGroup(Protocol):
    """The protection of the group, as far as a handover needs it."""

    @property
    def phase(self) -> Phase: ...

    @property
    def generation(self) -> int: ...

    @property
    def epoch(self) -> str:
        """The ring's; empty when nothing is attached and neither tap nor shipper is there."""
        ...

    def machines(self) -> list[str]:
        """Names, in the order of the group."""
        ...

    def why_not_ready(self) -> list[str]:
        """Why a final mark could not be made now, in words; empty when it could."""
        ...

    def drain(self, timeout_seconds: float) -> FinalMark:
        """Cut the final mark; it is proven and durable when this returns, and no other follows."""
        ...

    def undrain(self) -> None:
        """Marks are cut by the clock again. No error when they are, or when no shipper is there."""
        ...

    def published(self) -> int:
        """The sequence of the newest write that any guest was told of."""
        ...

    def stamps(self) -> Mapping[str, Stamp | None]:
        """Every disk's image as it is now, by name."""
        ...

    def give_away(self, reason: str) -> None:
        """This side may neither run nor replicate it any more; durable when this returns."""
        ...

    def take_back(self, generation: int, clean: Mapping[str, Stamp]) -> None:
        """Protect it again. `clean`: images that are known to be what the other side holds, empty when unknown."""
        ...


class HandoverHost(Protocol):
    def state(self, name: str) -> MachineState: ...

    def shutdown(self, name: str) -> None: ...

    def suspend(self, name: str) -> None: ...

    def resume(self, name: str) -> None: ...

    def destroy(self, name: str) -> None: ...

    def start(self, name: str) -> None: ...


class Timer(Protocol):
    def time(self) -> float: ...

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class WallTimer:
    """The host's clocks."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Handing:
    """Does the steps of one group's handover. One thread at a time."""

    def __init__(
        self, group: HandoverGroup, host: HandoverHost, files: HandoverFiles, record: Handover, timer: Timer
    ) -> None:
        self.record = record
        self._group = group
        self._host = host
        self._files = files
        self._timer = timer
        self.progress: Progress = lambda _: None

    def _save(self, phase: HandoverPhase) -> None:
        self.record.phase = phase
        self.record.times.setdefault(phase.value, self._timer.time())
        self._files.save(self.record)

    def _tell(self, step: str, machine: str = "", state: str = "done") -> None:
        self.progress({"step": step, "machine": machine, "state": state})

    # -- over -------------------------------------------------------------------------------------------------------

    def hand_over(self) -> None:
        """From where the record is to `handed-over`. Raises StepFailed after having called it off: then the machines
        run again, and replication goes on."""
        if self.record.phase is HandoverPhase.STOPPING:
            self._files.save(self.record)
            try:
                self._stop_all()
                self._finish()
            except DrctlError as exc:
                log.warning("%s: switchover called off: %s", self.record.group, exc.message)
                self.call_off()
                raise StepFailed(
                    f"{exc.message}; the switchover was called off: the machines of {self.record.group} run at the "
                    "source, and replication goes on",
                    hint=exc.hint,
                    group=self.record.group,
                ) from exc
        if self.record.phase is HandoverPhase.FINAL:
            self._leave()

    def _stop_all(self) -> None:
        """In the reverse of the group's order: what is started first serves the others."""
        for name in reversed(self.record.machines):
            state = self._host.state(name)
            if name in self.record.suspended and state is MachineState.RUNNING:
                self._host.suspend(name)  # it was written down, and then we died
            elif name not in self.record.suspended and state in RUNNING:
                self._stop(name)
            self._tell("machine", name, "suspended" if name in self.record.suspended else "off")

    def _stop(self, name: str) -> None:
        self._tell("machine", name, "shutting down")
        limit = self.record.shutdown_seconds
        end, press = self._timer.monotonic() + limit, 0.0
        while self._host.state(name) in RUNNING:
            now = self._timer.monotonic()
            if now >= end:
                self._too_late(name, limit)
                return
            if now >= press:
                press = now + PRESS_SECONDS
                self._press(name)
            self._timer.sleep(POLL_SECONDS)

    def _press(self, name: str) -> None:
        """Ask it to power off. A guest whose agent is quick is gone before libvirt has ended the call, which says then
        that it does not run; any other trouble shows in time."""
        try:
            self._host.shutdown(name)
        except HypervisorRefused as exc:
            log.info("%s: %s", name, exc.message)

    def _too_late(self, name: str, limit: float) -> None:
        if self.record.on_timeout is OnTimeout.ABORT:
            raise StepFailed(
                f"{name} did not power off within {limit:.0f} s",
                hint="it may still do so; give it longer (--shutdown-timeout), or stop it as it stands "
                "(--on-shutdown-timeout suspend)",
            )
        self.record.suspended.append(name)
        self._files.save(self.record)
        self._host.suspend(name)

    def _finish(self) -> None:
        """The final mark, and the proof that nothing came after it."""
        self._await_ready()
        if up := [name for name in self._group.machines() if self._host.state(name) is MachineState.RUNNING]:
            raise StepFailed(f"{up[0]} was started by somebody during the switchover")
        self.record.final = self._group.drain(FINAL_SECONDS)
        for name in self.record.suspended:
            # It stands still since before the mark, so there is nothing of it that is not in it.
            self._host.destroy(name)
        if up := [name for name in self._group.machines() if self._host.state(name) in RUNNING]:
            raise StepFailed(f"{up[0]} was started by somebody during the switchover")
        if self._group.published() != self.record.final.sequence:
            raise StepFailed("something was written after the final mark")
        self.record.stamps = {name: stamp for name, stamp in self._group.stamps().items() if stamp is not None}
        self._save(HandoverPhase.FINAL)
        self._tell("final")

    def _await_ready(self) -> None:
        end = self._timer.monotonic() + FINAL_SECONDS
        while reasons := self._group.why_not_ready():
            if self._timer.monotonic() >= end:
                raise StepFailed(f"no final mark could be made within {FINAL_SECONDS:.0f} s: {'; '.join(reasons)}")
            self._timer.sleep(POLL_SECONDS)

    def _leave(self) -> None:
        """Neither run nor replicate any more. From here on the way back is `take_back`."""
        assert self.record.final is not None
        self._group.give_away(
            f"handed over by a switchover: it reigns at the other site from checkpoint #{self.record.final.number} on"
        )
        self._await(lambda: not self._group.epoch, WITHDRAW_SECONDS, "tap and shipper did not end")
        self._save(HandoverPhase.HANDED_OVER)
        self._tell("handed-over")

    def _await(self, reached: Callable[[], bool], seconds: float, complaint: str) -> None:
        end = self._timer.monotonic() + seconds
        while not reached():
            if self._timer.monotonic() >= end:
                raise StepFailed(f"{self.record.group}: {complaint} within {seconds:.0f} s")
            self._timer.sleep(POLL_SECONDS)

    # -- back -------------------------------------------------------------------------------------------------------

    def call_off(self) -> None:
        """Before `final`: the machines that were stopped run again, replication was never interrupted.

        One machine that does not start must not keep the others down: it is named in a StepFailed at the end."""
        self._group.undrain()
        self._start_all()
        self._files.remove(self.record.group)

    def take_back(self, generation: int, unguard: Callable[[], None]) -> None:
        """From `final` or later to a group that runs and replicates here under `generation`, which the other side was
        told before. Images that are as they were right after the final mark need no pass.

        `unguard` makes what refuses superseded guests see that these are so no more."""
        if self.record.phase is not HandoverPhase.TAKING_BACK:
            if self._group.phase is not Phase.FAILED_OVER:
                self._group.give_away("a switchover is being rolled back")
            self._await(lambda: not self._group.epoch, WITHDRAW_SECONDS, "tap and shipper did not end")
            self.record.generation = generation
            self._save(HandoverPhase.TAKING_BACK)
        if self._group.phase is Phase.FAILED_OVER:
            self._group.take_back(self.record.generation, self._unchanged())
            self._tell("taken-back")
            # Guests are started when their disks are attached to a stream that is known to be equal, or after a while.
            if self.record.stamps:
                self._await_quietly(lambda: self._group.phase is Phase.LIVE)
        unguard()
        self._start_all()
        self._files.remove(self.record.group)

    def _unchanged(self) -> dict[str, Stamp]:
        """The images' stamps when all are what they were at the final mark, else nothing."""
        now = {name: stamp for name, stamp in self._group.stamps().items() if stamp is not None}
        return now if now and now == self.record.stamps else {}

    def _await_quietly(self, reached: Callable[[], bool]) -> None:
        end = self._timer.monotonic() + LIVE_SECONDS
        while not reached() and self._timer.monotonic() < end:
            self._timer.sleep(POLL_SECONDS)

    def _start_all(self) -> None:
        failed = []
        for name in self.record.machines:
            try:
                self._start(name)
                self._tell("machine", name, "running")
            except DrctlError as exc:
                failed.append(f"{name}: {exc.message}")
        if failed:
            raise StepFailed(
                f"not all machines of {self.record.group} run again: {'; '.join(failed)}",
                hint=f"start them by hand, or: drctl rollback {self.record.group}",
            )

    def _start(self, name: str) -> None:
        state = self._host.state(name)
        if state is MachineState.PAUSED:
            self._host.resume(name)
        elif state not in RUNNING:
            self._host.start(name)


def begin(
    group: HandoverGroup, host: HandoverHost, files: HandoverFiles, name: str, params: Mapping[str, Any]
) -> Handover:
    """The record of a handover: the one that is under way, or a new one, not written yet.

    Raises WrongPhase, or PreconditionFailed with all that stands in the way; then nothing was done."""
    known = files.load(name)
    if known is not None:
        if known.phase is HandoverPhase.TAKING_BACK:
            raise WrongPhase(f"{name} is being taken back", hint=f"drctl rollback {name} goes on with it", group=name)
        return known
    if reasons := why_not(group, host):
        raise PreconditionFailed(
            f"{name} can't be switched over now: {'; '.join(reasons)}", hint=f"see: drctl status {name}", group=name
        )
    return Handover(
        name,
        HandoverPhase.STOPPING,
        group.generation + 1,
        group.machines(),
        on_timeout=OnTimeout(str(params.get("on_timeout") or OnTimeout.ABORT)),
        shutdown_seconds=float(params.get("shutdown_seconds") or SHUTDOWN_SECONDS),
    )


def why_not(group: HandoverGroup, host: HandoverHost) -> list[str]:
    """Why a switchover would be refused now, in words."""
    reasons = []
    for name in group.machines():
        try:
            state = host.state(name)
        except NotFound:
            reasons.append(f"{name} is not on this host")
            continue
        if state is not MachineState.RUNNING:
            reasons.append(f"{name} is {state}")
    if group.phase is not Phase.LIVE:
        reasons.append(f"the group is {group.phase}")
    return reasons + [reason for reason in group.why_not_ready() if reason not in reasons]
