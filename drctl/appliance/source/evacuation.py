"""A host's maintenance: its groups are paused, and taken up again by the host's return without reading their disks.

    plain         guests run on; QEMU notes what they write, as in any pause
    shut down     guests are powered off while their group is protected, until a checkpoint holds how they left: so the
                  host may be rebooted, and still nothing is read. They are started again by the return, and not before

Groups whose replicas lie here are paused at their sources by the command line, since an appliance speaks to no other
one's control socket; which ones is kept here. Knows no hypervisor; what it acts through is `Sources` and `Guests`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from drctl.appliance.control import Handler, Progress
from drctl.appliance.source.evacuation_record import Evacuation, EvacuationFile, EvacuationPhase
from drctl.appliance.source.group_state import Desired, GroupState
from drctl.appliance.source.handover import Timer, WallTimer
from drctl.appliance.source.image_stamp import RUNNING
from drctl.errors import DrctlError, Locked, NotFound, PreconditionFailed, Refused, StepFailed
from drctl.model.machine import MachineState
from drctl.model.phase import Phase
from drctl.replication.reign import Answer, Reign

log = logging.getLogger(__name__)

#: Longest wait for each guest to power off, unless the operator says otherwise.
SHUTDOWN_SECONDS = 180.0
#: A guest that boots hears no power button: it is pressed again at this distance.
PRESS_SECONDS = 15.0
#: Longest wait for a checkpoint that holds how the guests left; without it their disks are compared at the return.
HELD_SECONDS = 60.0
#: Longest wait for a group to be live before its guests are started: live, they come back without a pass.
LIVE_SECONDS = 60.0
POLL_SECONDS = 0.25

#: What a recovery is when nothing of it is left that a maintenance could hurt.
_OVER = frozenset(("stopped", "committed", "rolled-back", "failed"))


class Sources(Protocol):
    """The groups that are protected at this host (SourceService)."""

    def names(self) -> list[str]: ...

    def state(self, name: str) -> GroupState: ...

    def reigns(self, state: GroupState) -> Answer:
        """What the other site says of the group. Blocks for some seconds."""
        ...

    def superseded(self, name: str, reason: str) -> None: ...

    def booted(self, name: str) -> None:
        """Its guests need not be started by the boot guard any more."""
        ...

    def replicate_pause(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]: ...

    def replicate_start(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]: ...


class Guests(Protocol):
    def state(self, name: str) -> MachineState: ...

    def shutdown(self, name: str) -> None: ...

    def start(self, name: str) -> None: ...


class Evacuations:
    """The evacuation of one host. Methods may be called from any thread.

    `busy` tells what of a group stands in the way, in words."""

    def __init__(
        self,
        file: EvacuationFile,
        host: str,
        sources: Sources,
        guests: Guests,
        busy: Callable[[], list[str]],
        timer: Timer | None = None,
    ) -> None:
        self._file = file
        self._host = host
        self._sources = sources
        self._guests = guests
        self._busy = busy
        self._timer = timer or WallTimer()
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        return {
            "host.evacuation": self.plan,
            "host.evacuate": self.evacuate,
            "host.return": self.come_back,
        }

    def told(self, group: str = "") -> dict[str, Any] | None:
        """For the status of the host, or of one of its groups; null while it is not evacuated."""
        record = self._file.load()
        if record is None or (group and group not in {**record.sources, **record.recoveries}):
            return None
        return {"host": self._host, "since": record.since, "by": record.by, "phase": record.phase.value}

    def plan(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """What an evacuation would do now, and what one has done."""
        del params, progress
        record = self._file.load()
        return {
            "host": self._host,
            "evacuation": record.as_dict() if record else None,
            "sources": [self._seen(name) for name in self._protected()],
            "reasons": self._busy(),
        }

    def guarded(self, handler: Handler) -> Handler:
        """Replication is not begun by hand at an evacuated host: the return would not know of it."""

        def call(params: dict[str, Any], progress: Progress) -> Any:
            if self._file.load() is not None:
                raise Refused(f"{self._host} is evacuated", hint=f"drctl host return {self._host}")
            return handler(params, progress)

        return call

    # -- leaving ----------------------------------------------------------------------------------------------------

    def evacuate(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Pause all groups. Given again it goes on; one group's trouble keeps no other from being paused."""
        if reasons := self._busy():
            raise PreconditionFailed(f"{self._host} can't be evacuated now: {'; '.join(reasons)}")
        with self._alone():
            record = self._file.load() or Evacuation(self._timer.time(), str(params.get("by") or ""))
            record.phase = EvacuationPhase.LEAVING
            record.recoveries |= dict(params.get("recoveries") or {})
            self._file.save(record)
            limit = float(params.get("shutdown_seconds") or SHUTDOWN_SECONDS) if params.get("shutdown") else 0.0
            failed = self._each(self._protected(), lambda name: self._leave(record, name, limit, progress))
            if not failed:
                record.phase = EvacuationPhase.EVACUATED
                self._file.save(record)
            return {"host": self._host, "evacuation": record.as_dict(), "failed": failed}

    def _leave(self, record: Evacuation, name: str, limit: float, progress: Progress) -> None:
        """`limit`: how long each guest may take to power off; 0: they run on."""
        machines = record.sources.setdefault(name, [])
        self._file.save(record)
        if limit:
            for machine in reversed(self._sources.state(name).spec.machines):
                self._shut_down(record, machines, machine, limit, progress)
            self._await_held(name, machines, progress)
        progress({"group": name, "step": "pause", "machine": "", "state": "pausing"})
        self._sources.replicate_pause({"group": name}, lambda _: None)
        progress({"group": name, "step": "pause", "machine": "", "state": "done"})

    def _shut_down(
        self, record: Evacuation, machines: list[str], machine: str, limit: float, progress: Progress
    ) -> None:
        if self._guests.state(machine) not in RUNNING:
            return
        if machine not in machines:
            machines.append(machine)
            self._file.save(record)  # before it is off: whoever comes after a crash here must start it again
        progress({"step": "machine", "machine": machine, "state": "shutting down"})
        end, press = self._timer.monotonic() + limit, 0.0
        while self._guests.state(machine) in RUNNING:
            now = self._timer.monotonic()
            if now >= end:
                raise StepFailed(
                    f"{machine} did not power off within {limit:.0f} s",
                    hint="give it longer (--shutdown-timeout), or power it off by hand, then give the command again",
                )
            if now >= press:
                press = now + PRESS_SECONDS
                self._press(machine)
            self._timer.sleep(POLL_SECONDS)
        progress({"step": "machine", "machine": machine, "state": "off"})

    def _press(self, machine: str) -> None:
        """A guest whose agent is quick is gone before libvirt has ended the call; other trouble shows in time."""
        try:
            self._guests.shutdown(machine)
        except DrctlError as exc:
            log.info("%s: %s", machine, exc.message)

    def _await_held(self, name: str, machines: list[str], progress: Progress) -> None:
        """Until a durable checkpoint holds how its machines left."""
        end = self._timer.monotonic() + HELD_SECONDS
        while not _held(self._sources.state(name), machines):
            if self._timer.monotonic() >= end:
                log.warning("%s: no checkpoint holds how its machines left; their disks will be compared", name)
                progress({"group": name, "step": "held", "machine": "", "state": "given up"})
                return
            self._timer.sleep(POLL_SECONDS)

    # -- coming back ------------------------------------------------------------------------------------------------

    def come_back(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Take all up again. `left`: groups with replicas here that could not be resumed at their sources."""
        with self._alone():
            record = self._file.load()
            if record is None:
                return {"host": self._host, "evacuation": None, "returned": [], "failed": {}}
            record.phase = EvacuationPhase.RETURNING
            left = set(params.get("left") or ())
            record.recoveries = {name: source for name, source in record.recoveries.items() if name in left}
            self._file.save(record)
            names = list(record.sources)
            failed = self._each(names, lambda name: self._take_up(record, name, progress))
            rest = bool(record.sources or record.recoveries)
            if not rest:
                self._file.remove()
            return {
                "host": self._host,
                "evacuation": record.as_dict() if rest else None,
                "returned": [name for name in names if name not in failed],
                "failed": failed,
            }

    def _take_up(self, record: Evacuation, name: str, progress: Progress) -> None:
        """What an operator, or a failover, has decided about the group meanwhile stands."""
        if (state := self._known(name)) is not None and state.desired is not Desired.STOPPED:
            self._demand_reign(state, record.sources[name])
            progress({"group": name, "step": "resume", "machine": "", "state": "attaching"})
            self._sources.replicate_start({"group": name}, lambda _: None)
            if record.sources[name]:
                self._start(name, record.sources[name], progress)
            progress({"group": name, "step": "resume", "machine": "", "state": "done"})
        del record.sources[name]
        self._file.save(record)

    def _demand_reign(self, state: GroupState, machines: list[str]) -> None:
        """Raises Refused when the group reigns elsewhere, or when that is not known and guests wait to be started."""
        answer = self._sources.reigns(state)
        if answer.reign is Reign.ELSEWHERE:
            self._sources.superseded(state.spec.name, answer.reason)
            raise Refused(f"it reigns at {state.spec.recovery} now: {answer.reason}", group=state.spec.name)
        if answer.reign is Reign.UNKNOWN and machines and state.spec.boot_without_peer != "allow":
            raise Refused(
                f"its guests are not started: {answer.reason}; boot_without_peer = {state.spec.boot_without_peer}",
                group=state.spec.name,
            )

    def _start(self, name: str, machines: list[str], progress: Progress) -> None:
        """In the order of the group's file. One guest that does not start must not keep the others down."""
        end = self._timer.monotonic() + LIVE_SECONDS
        while self._sources.state(name).phase is not Phase.LIVE and self._timer.monotonic() < end:
            self._timer.sleep(POLL_SECONDS)
        self._sources.booted(name)
        failed = self._each(
            [machine for machine in self._sources.state(name).spec.machines if machine in machines],
            lambda machine: self._start_one(machine, progress),
        )
        if failed:
            raise StepFailed(f"not started: {'; '.join(f'{machine}: {why}' for machine, why in failed.items())}")

    def _start_one(self, machine: str, progress: Progress) -> None:
        if self._guests.state(machine) not in RUNNING:
            self._guests.start(machine)
        progress({"step": "machine", "machine": machine, "state": "running"})

    # -- inside -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise Locked(f"{self._host} is being evacuated, or returns, right now", hint="drctl host show tells more")
        try:
            yield
        finally:
            self._lock.release()

    def _each(self, names: list[str], act: Callable[[str], None]) -> dict[str, str]:
        """{name: why} of those with which it went wrong."""
        failed: dict[str, str] = {}
        for name in names:
            try:
                act(name)
            except DrctlError as exc:
                log.error("%s: %s", name, exc.message)
                failed[name] = exc.message
        return failed

    def _protected(self) -> list[str]:
        """Of a broken group nothing is attached that could be paused."""
        states = [(name, self._sources.state(name)) for name in self._sources.names()]
        return [name for name, now in states if now.desired is Desired.PROTECTED and now.phase is not Phase.BROKEN]

    def _known(self, name: str) -> GroupState | None:
        try:
            return self._sources.state(name)
        except NotFound:
            return None  # it was deleted meanwhile

    def _seen(self, name: str) -> dict[str, Any]:
        state = self._sources.state(name)
        running = [machine for machine in state.spec.machines if self._runs(machine)]
        return {"group": name, "phase": state.phase.value, "running": running, "recovery": state.spec.recovery}

    def _runs(self, machine: str) -> bool:
        try:
            return self._guests.state(machine) in RUNNING
        except NotFound:
            return False


def in_the_way(
    handovers: Mapping[str, dict[str, Any] | None], recoveries: Mapping[str, list[dict[str, Any]]]
) -> list[str]:
    """What forbids an evacuation, in words: moves that are half done, and guests that live on what lies here.

    A group that was failed over and committed is a guest like any other, and replicated nowhere."""
    reasons = [
        f"a switchover of {name} is under way: drctl status {name}"
        for name, handover in handovers.items()
        if handover and handover.get("phase") != "handed-over"
    ]
    for name, found in recoveries.items():
        for one in found:
            if one.get("state") not in _OVER:
                hint = f"drctl test stop {one['id']}" if one.get("kind") == "test" else f"drctl commit {name}"
                reasons.append(f"a {one.get('kind')} of {name} runs here: {hint}")
    return reasons


def _held(state: GroupState, machines: Collection[str]) -> bool:
    return all(disk.held and disk.left is not None for disk in state.disks if disk.machine in machines)
