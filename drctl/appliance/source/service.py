"""Control methods of the source role: groups that are protected on this host."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from drctl.appliance.config import Home
from drctl.appliance.control import Progress
from drctl.appliance.process import Processes
from drctl.appliance.source.change_tracking import ChangeTracking
from drctl.appliance.source.demands import demand_free, demand_room, demand_unprotected
from drctl.appliance.source.description import describe
from drctl.appliance.source.evacuation_record import EvacuationFile
from drctl.appliance.source.group_state import Desired, GroupFiles, GroupState
from drctl.appliance.source.guest_notes import wanted
from drctl.appliance.source.image_stamp import REACHABLE, RUNNING
from drctl.appliance.source.protection import Protection
from drctl.appliance.source.quiesce import Quiescer
from drctl.appliance.source.reign_guard import ReignGuard
from drctl.appliance.source.status import source_status
from drctl.errors import NotFound, Refused, StepFailed, WrongPhase
from drctl.model.group import GroupSpec
from drctl.model.phase import Phase
from drctl.replication.reign import Answer

#: Longest that `replicate.start` waits for the mirrors; the first sync goes on by itself.
ATTACH_SECONDS = 30.0
#: Longest that an appliance which is told to end waits for checkpoints of machines that have just powered off.
SETTLE_SECONDS = 10.0


class SourceService:
    """The protections of this host. Methods may be called from any thread."""

    def __init__(self, home: Home, host: Any, processes: Processes) -> None:
        self._home = home
        self._host = host
        self._processes = processes
        self._files = GroupFiles(home.groups)
        self._protections: dict[str, Protection] = {}
        self._lock = threading.Lock()
        self._quiescer = Quiescer(host)
        self._tracking = ChangeTracking(host)
        self._reign = ReignGuard(home, host)

    def start(self) -> None:
        """Take up all groups where an earlier supervisor left them. Guests that an evacuation has shut down are started
        by the host's return, and not by its boot."""
        held = EvacuationFile(self._home.path).shut_down()
        for name in self._files.names():
            protection = self._open(name)
            if name not in held:
                self._reign.boot(protection)
        self.refuse_superseded()

    def await_first_answers(self) -> None:
        """Let what comes after us at the host's boot find the boot guard's first answers."""
        self._reign.await_first_answers()

    def refuse_superseded(self) -> None:
        """Keep what libvirt's hook reads as the groups are. Cheap; call it often."""
        self._reign.sync([protection.state for protection in list(self._protections.values())])

    def lifted(self, group: str) -> AbstractContextManager[None]:
        """While a failover brings the group to this host, its guests may be started here."""
        return self._reign.lifted(group)

    def settle(self) -> None:
        """Wait, for some seconds, for the last checkpoints of groups whose machines are all off."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline and not all(map(_settled, list(self._protections.values()))):
            time.sleep(0.1)

    def close(self) -> None:
        self._reign.close()
        for protection in self._protections.values():
            protection.close()

    def happened(self, machine: str, event: str) -> None:
        """Something happened at the hypervisor: look now. From any thread."""
        for protection in list(self._protections.values()):
            protection.happened(machine, event)

    def _open(self, name: str) -> Protection:
        with self._lock:
            if name not in self._protections:
                protection = Protection(self._home, self._files, name, self._host, self._processes)
                self._protections[name] = protection
                protection.run()
            return self._protections[name]

    def _protection(self, params: dict[str, Any]) -> Protection:
        name = str(params.get("group"))
        if name not in self._protections:
            raise NotFound("group", name, known=sorted(self._protections), hint="see: drctl apply")
        return self._protections[name]

    # -- groups -----------------------------------------------------------------------------------------------------

    def who_reigns(self, state: GroupState) -> Answer:
        """What the other site says of a group that was handed over. Blocks for some seconds."""
        return self._reign.who_reigns(state)

    def reigns(self, state: GroupState) -> Answer:
        """What the other site says of a group under the generation that we know. Blocks for some seconds."""
        return self._reign.ask(state)

    def superseded(self, name: str, reason: str) -> None:
        self._protection({"group": name}).superseded(reason)

    def booted(self, name: str) -> None:
        """The group's guests have had their boot."""
        self._reign.marks.set(name)

    def protection(self, group: str) -> Protection:
        """Raises NotFound."""
        return self._protection({"group": group})

    def protections(self) -> list[Protection]:
        with self._lock:
            return [self._protections[name] for name in sorted(self._protections)]

    def names(self) -> list[str]:
        return sorted(self._protections)

    def state(self, name: str) -> GroupState:
        """Raises NotFound."""
        return self._protection({"group": name}).state

    def _states(self) -> list[GroupState]:
        return [protection.state for protection in self._protections.values()]

    def generation(self, name: str) -> int:
        return self.state(name).generation

    def turn(self, name: str, change: Callable[[GroupState | None], GroupState]) -> None:
        """Let a failback make this host the group's source, by another state of it or its first; durable when this
        returns. Raises WrongPhase, AlreadyExists."""
        known = self._protections.get(name)
        if known is not None:
            known.change(change)
            return
        state = change(None)
        demand_free(state.spec, self._states())
        self._files.save(state)
        self._reign.marks.set(name)
        self._open(name)

    def put(self, spec: GroupSpec) -> bool:
        """Create or change a group; True when that changed anything."""
        known = self._protections.get(spec.name)
        if known is not None and known.state.spec == spec:
            return False
        if known is not None and set(known.state.spec.machines) != set(spec.machines):
            demand_unprotected(known.state, "its machines can't be changed")
        demand_free(spec, self._states())
        self._home.peer(spec.recovery)
        self._files.put(spec)
        self._reign.marks.set(spec.name)
        self._open(spec.name).changed_spec()
        return True

    def remove(self, name: str) -> None:
        """Forget a group that is not protected. Raises WrongPhase while it is."""
        protection = self._protection({"group": name})
        demand_unprotected(protection.state, "it can't be deleted")
        if protection.state.phase is not Phase.FAILED_OVER:
            protection.give_back_autostart()
        protection.close()
        with self._lock:
            self._protections.pop(name, None)
            self._files.remove(name)

    def status(self, name: str) -> dict[str, Any]:
        return source_status(self._protection({"group": name}))

    def summary(self, name: str) -> dict[str, Any]:
        state = self._protection({"group": name}).state
        return {"phase": state.phase.value, "generation": state.generation, "spec": asdict(state.spec)}

    def describe(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group} → the group's machines as they would travel, without contents (fit_service)."""
        del progress
        return describe(self._host, self._protection(params).state.spec)

    # -- replicate --------------------------------------------------------------------------------------------------

    def replicate_start(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Protect the group, with the disks that its machines have now; returns once every running one is attached."""
        protection = self._protection(params)
        if protection.state.phase is Phase.FAILED_OVER:
            raise Refused(
                f"{params['group']} reigns at the other site now; this one may neither run nor replicate it",
                hint=f"bring it home: drctl failback {params['group']}",
            )
        if not protection.state.epoch:
            demand_room(self._home.run, protection.state.spec.ring_size)
        protection.want(Desired.PROTECTED)
        protection.take_up()
        deadline = time.monotonic() + ATTACH_SECONDS
        while time.monotonic() < deadline:
            status = source_status(protection)
            states = [disk["state"] for machine in status["machines"] for disk in machine["disks"]]
            if states and all(state in ("attached", "off") for state in states) and protection.state.epoch:
                return {"group": params["group"], "phase": protection.state.phase.value}
            progress({"step": "attach", "states": states, "reason": protection.state.reason})
            time.sleep(0.2)
        raise StepFailed(
            f"{params['group']} is not attached after {ATTACH_SECONDS:.0f} s: {protection.state.reason}",
            hint=f"it goes on trying; see: drctl status {params['group']}",
        )

    def replicate_pause(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Detach; QEMU keeps what is written until the resume."""
        protection = self._protection(params)
        self._tracking.pause(protection, protection.shipper.mark)
        return self._leave(params, Desired.PAUSED, progress)

    def resync(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Compare all disks with the other side's: with `dry_run` to tell what differs, else to make it good."""
        protection = self._protection(params)
        name = protection.state.spec.name
        if protection.state.desired is not Desired.PROTECTED:
            raise WrongPhase(
                f"{name} is {protection.state.phase}; its disks are compared while it is replicated",
                hint=f"drctl replicate resume {name} compares them, too, and sends only what differs",
                group=name,
                phase=protection.state.phase.value,
            )
        if not params.get("dry_run"):
            protection.go_over()
            return {"group": name, "phase": protection.state.phase.value}
        protection.survey.order(name)
        protection.wake()
        findings = protection.survey.wait(name, lambda: protection.shipper.status.get("survey") or {}, progress)
        return {"group": name, **findings}

    def replicate_stop(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        self._tracking.give_up(self._protection(params))
        return self._leave(params, Desired.STOPPED, progress)

    def _leave(self, params: dict[str, Any], desired: Desired, progress: Progress) -> dict[str, Any]:
        """Detach, and wait until that is done."""
        protection = self._protection(params)
        protection.want(desired)
        deadline = time.monotonic() + 2 * ATTACH_SECONDS
        while protection.state.epoch or (desired is Desired.STOPPED and wanted(protection.state)):
            if time.monotonic() > deadline:
                raise StepFailed(f"{params['group']} is not detached: {protection.state.reason}")
            progress({"step": "detach", "reason": protection.state.reason})
            time.sleep(0.1)
        return {"group": params["group"], "phase": protection.state.phase.value}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint_create(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Cut a mark now and wait until it is proven and durable."""
        protection = self._protection(params)
        _demand_live(protection)
        kind = str(params.get("kind") or "crash-consistent")
        order = {"kind": kind, "tags": list(params.get("tags") or ())}
        if kind == "quiesced":
            progress({"step": "freeze"})
            running = [machine.name for machine in protection.machines if machine.state in REACHABLE]
            with self._quiescer.frozen(running):
                # Within the time after which the guests are thawed by the clock.
                return dict(protection.shipper.call("mark", {**order, "timeout": 8.0}, timeout_seconds=9.0))
        return dict(protection.shipper.call("mark", order, timeout_seconds=60.0))

    # -- called by shippers -----------------------------------------------------------------------------------------

    def attest(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        reason = self._protection(params).attest()
        return {"ok": not reason, "reason": reason}

    def order(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The shipper waits for order: look now. It sees the proof in the ring."""
        del progress
        protection = self._protection(params)
        protection.wake()
        return {"reason": protection.state.reason}

    def report(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        self._protection(params).shipper.take(params)
        return {}


def _settled(protection: Protection) -> bool:
    """Not: its machines are all off, and a checkpoint that holds how they left is on its way. Once it is there, a host
    that goes down has to read nothing of them when it is back."""
    state = protection.state
    awaited = any(disk.left is not None and not disk.held for disk in state.disks)
    off = not any(machine.state in RUNNING for machine in protection.machines)
    report = protection.shipper.report() if awaited and off and state.desired is Desired.PROTECTED else None
    return report is None or report.wants != "nothing"


def _demand_live(protection: Protection) -> None:
    """Raises WrongPhase that says how the group becomes live."""
    name, phase = protection.state.spec.name, protection.state.phase
    if phase is Phase.LIVE:
        return
    verb = {Phase.UNPROTECTED: "start", Phase.PAUSED: "resume", Phase.BROKEN: "resume"}.get(phase)
    raise WrongPhase(
        f"{name} is {phase}; a checkpoint is cut while it is live",
        hint=f"drctl replicate {verb} {name}" if verb else f"see: drctl status {name}",
        group=name,
        phase=phase.value,
    )
