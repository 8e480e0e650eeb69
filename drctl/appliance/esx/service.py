"""Control methods of the groups that are protected on an ESX host, as source/service.py has those of a libvirt host."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import Any

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.control import Handler, Progress
from drctl.appliance.esx.definition import described
from drctl.appliance.esx.guests import TOLD_SECONDS, EsxGuests
from drctl.appliance.esx.protection import EsxProtection
from drctl.appliance.process import Processes
from drctl.appliance.source.demands import demand_free, demand_room, demand_unprotected
from drctl.appliance.source.group_state import Desired, GroupFiles, GroupState, spec_from
from drctl.errors import NotFound, Refused, StepFailed, WrongPhase
from drctl.model.group import GroupSpec
from drctl.model.phase import Event, Phase, advance

#: Longest that `replicate.start` waits until the other site was reached.
START_SECONDS = 30.0
#: Longest that a stop waits for snapshots to be merged; it goes on by itself afterwards.
LEAVE_SECONDS = 100.0


_NO_HANDOVER = "it is on an ESX host: a switchover from there can't be made by this version"


class EsxService:
    """The protections of one ESX host. Methods may be called from any thread."""

    def __init__(self, home: Home, guests: EsxGuests, processes: Processes) -> None:
        self._home = home
        self._guests = guests
        self._processes = processes
        self._files = GroupFiles(home.groups)
        self._protections: dict[str, EsxProtection] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Take up all groups where an earlier appliance left them."""
        for name in self._files.names():
            self._open(name)

    def close(self) -> None:
        for protection in self.protections():
            protection.close()

    def handlers(self) -> dict[str, Handler]:
        return {
            "group.describe": self.group_describe,
            "replicate.start": self.replicate_start,
            "replicate.resume": self.replicate_start,
            "replicate.pause": lambda params, progress: self._leave(params, Desired.PAUSED, progress),
            "checkpoint.create": self.checkpoint_create,
            "handover.undo": self.handover_undo,
            "handover.plan": self.handover_plan,
            "handover.run": self._no_handover,
            "shipper.attest": self._attest,
            "shipper.order": lambda _params, _progress: {"reason": "a snapshot cycle proves it at its end"},
            "shipper.report": self._report,
        }

    def _open(self, name: str) -> EsxProtection:
        with self._lock:
            if name not in self._protections:
                protection = EsxProtection(self._home, self._files, name, self._guests, self._processes)
                self._protections[name] = protection
                protection.run()
            return self._protections[name]

    def protection(self, params: dict[str, Any]) -> EsxProtection:
        """Raises NotFound."""
        name = str(params.get("group"))
        if name not in self._protections:
            raise NotFound("group", name, known=sorted(self._protections), hint="see: drctl apply")
        return self._protections[name]

    def protections(self) -> list[EsxProtection]:
        with self._lock:
            return [self._protections[name] for name in sorted(self._protections)]

    def names(self) -> list[str]:
        return sorted(self._protections)

    def generation(self, name: str) -> int:
        return self.protection({"group": name}).state.generation

    def status(self, name: str) -> dict[str, Any]:
        return status(self.protection({"group": name}))

    def group_list(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        del progress
        return [self._listed(one, params) for one in self.protections()]

    def _listed(self, protection: EsxProtection, params: dict[str, Any]) -> dict[str, Any]:
        state = protection.state
        told = {"status": status(protection)} if params.get("status") else {}
        return told | {
            "group": state.spec.name,
            "role": "source",
            "phase": state.phase.value,
            "generation": state.generation,
            "spec": asdict(state.spec),
        }

    # -- groups -----------------------------------------------------------------------------------------------------

    def group_put(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        spec = spec_from(dict(params.get("spec") or {}))
        return {"group": spec.name, "role": "source", "changed": self._put(spec)}

    def _put(self, spec: GroupSpec) -> bool:
        known = self._protections.get(spec.name)
        if known is not None and known.state.spec == spec:
            return False
        if known is not None and set(known.state.spec.machines) != set(spec.machines):
            demand_unprotected(known.state, "its machines can't be changed")
        demand_free(spec, [other.state for other in self.protections()])
        self._home.peer(spec.recovery)
        self._files.put(spec)
        self._open(spec.name).changed_spec()
        return True

    def group_describe(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The group's machines as they would travel: the recovery site is asked whether they can run there."""
        del progress
        state = self.protection(params).state
        found = [self._guests.machine(name) for name in state.spec.machines]
        return described(self._guests, state if state.disks else state.with_machines(found))

    def remarks(self) -> list[tuple[str, str]]:
        """(machine, what is another where it is recovered), of the machines of all groups. Raises DrctlError."""
        names = [name for one in self.protections() for name in one.state.spec.machines]
        return [(name, remark) for name in names for remark in self._guests.domain(name, TOLD_SECONDS).remarks]

    def group_remove(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        protection = self.protection(params)
        demand_unprotected(protection.state, "it can't be deleted")
        if not protection.left:
            raise WrongPhase(f"{params['group']}: snapshots of it are still being removed: {protection.state.reason}")
        protection.close()
        name = protection.state.spec.name
        with self._lock:
            self._protections.pop(name, None)
            self._files.remove(name)
            protection.cycles.record.remove()
        return {"group": name, "removed": True, "kept_until": None}

    # -- replicate --------------------------------------------------------------------------------------------------

    def replicate_start(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Protect the group, with the disks that its machines have now; returns once the other site was reached."""
        protection = self.protection(params)
        name = protection.state.spec.name
        if protection.state.phase is Phase.FAILED_OVER:
            raise Refused(f"{name} reigns at the other site now; this one may neither run nor replicate it", group=name)
        if not protection.state.epoch:
            demand_room(self._home.run, protection.state.spec.ring_size)
        protection.want(Desired.PROTECTED)
        protection.take_up()
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            report = protection.shipper.report() if protection.state.epoch else None
            if report is not None and report.wants != "unknown":
                return {"group": name, "phase": protection.state.phase.value}
            progress({"step": "attach", "states": [], "reason": protection.state.reason})
            time.sleep(0.2)
        raise StepFailed(
            f"{name} does not replicate after {START_SECONDS:.0f} s: {protection.state.reason}",
            hint=f"it goes on trying; see: drctl status {name}",
        )

    def replicate_stop(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return self._leave(params, Desired.STOPPED, progress)

    def _leave(self, params: dict[str, Any], desired: Desired, progress: Progress) -> dict[str, Any]:
        """End the stream, and wait until the snapshots that are not wanted any more are gone."""
        protection = self.protection(params)
        if desired is Desired.STOPPED and protection.state.phase is Phase.FAILED_OVER:
            return {"group": params["group"], "phase": protection.state.phase.value}
        protection.want(desired)
        deadline = time.monotonic() + LEAVE_SECONDS
        while not protection.left:
            if time.monotonic() > deadline:
                reason = protection.state.reason or "they are merged"
                raise StepFailed(
                    f"{params['group']}: its snapshots are not gone yet: {reason}",
                    hint=f"it goes on by itself; see: drctl status {params['group']}",
                )
            progress({"step": "detach", "reason": protection.state.reason})
            time.sleep(0.1)
        return {"group": params["group"], "phase": protection.state.phase.value}

    def checkpoint_create(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """A snapshot cycle now; returns when it is a checkpoint at the other side."""
        protection = self.protection(params)
        state = protection.state
        if str(params.get("kind") or "") == "quiesced":
            raise Refused(
                f"{state.spec.name} is on an ESX host: its guests can't be quiesced by this version",
                hint="without --quiesce the checkpoint is crash-consistent",
            )
        if state.phase is not Phase.LIVE:
            verb = {Phase.UNPROTECTED: "start", Phase.PAUSED: "resume"}.get(state.phase)
            raise WrongPhase(
                f"{state.spec.name} is {state.phase}; a checkpoint is made while it is live",
                hint=f"drctl replicate {verb} {state.spec.name}" if verb else f"see: drctl status {state.spec.name}",
                group=state.spec.name,
                phase=state.phase.value,
            )
        tags = [str(tag) for tag in params.get("tags") or ()]
        return protection.checkpoint(tags, lambda: progress({"step": "cycle", "reason": protection.state.reason}))

    # -- moves ------------------------------------------------------------------------------------------------------

    def handover_undo(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Take the group back under a higher generation, after a rollback at the other side: all is compared anew."""
        del progress
        protection, generation = self.protection(params), int(params.get("generation") or 0)
        name = protection.state.spec.name
        if generation <= protection.state.generation:
            return {"group": name, "phase": protection.state.phase.value, "generation": generation, "started": []}

        def taken_back(state: GroupState) -> GroupState:
            phase = state.phase
            phase = advance(name, phase, Event.TAKEN_BACK) if phase is Phase.FAILED_OVER else phase
            changes = {"generation": generation, "epoch": "", "reason": "", "desired": Desired.PROTECTED}
            return msgspec.structs.replace(state, phase=phase, **changes)

        protection.change(taken_back)
        return {"group": name, "phase": protection.state.phase.value, "generation": generation, "started": []}

    def handover_plan(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """What a rollback asks, and why a switchover would be refused."""
        del progress
        state = self.protection(params).state
        told = {"group": state.spec.name, "generation": state.generation, "phase": state.phase.value}
        return told | {"handover": None, "reasons": [_NO_HANDOVER]}

    def _no_handover(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        name = self.protection(params).state.spec.name
        raise Refused(
            f"{name}: {_NO_HANDOVER}",
            hint=f"shut its machines down there, drctl checkpoint create {name}, then drctl failover {name}",
            group=name,
        )

    # -- called by shippers -----------------------------------------------------------------------------------------

    def _attest(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        reason = self.protection(params).attest()
        return {"ok": not reason, "reason": reason}

    def _report(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        self.protection(params).shipper.take(params)
        return {}


def status(protection: EsxProtection) -> dict[str, Any]:
    """The source's side of `group.status`, as docs/internals.md lists it, and `cycle`: how the newest went."""
    state, told = protection.state, protection.shipper.status
    newest = protection.shipper.newest
    link = told.get("link") or {}
    news = protection.cycles.news
    ring = told.get("ring")
    return {
        "group": state.spec.name,
        "role": "source",
        "phase": state.phase.value,
        "desired": state.desired.value,
        "reason": state.reason,
        "generation": state.generation,
        "epoch": state.epoch,
        "interval": state.spec.checkpoint_interval,
        "rpo_seconds": max(0.0, time.time() - newest["wall_ns"] / 1e9) if newest else None,
        "last_checkpoint": {"number": newest["number"], "time": newest["time"]} if newest else None,
        "link": {key: link.get(key, "unknown" if key == "state" else None) for key in _LINK},
        "backlog_bytes": told.get("backlog_bytes"),
        "sync": _sync(told, protection),
        "machines": _machines(protection),
        "changes": [],
        "ring": {"size": ring["size"], "used": ring["used"], "dropping": False} if ring else None,
        "boot": None,
        "strays": list(protection.strays.names),
        "processes": {"tap": 0, "shipper": protection.worker.shipper_pid()},
        "cycle": asdict(news) | {"remarks": list(news.remarks)},
    }


_LINK = ("state", "offset_ms", "error", "limit")


def _sync(told: dict[str, Any], protection: EsxProtection) -> dict[str, Any] | None:
    sync = told.get("sync") or {}
    if not sync.get("mode") or sync.get("state") == "done":
        return None
    keys = ("mode", "state", "done_bytes", "total_bytes", "matched_bytes", "sent_bytes")
    return {key: sync.get(key) for key in keys} | {"eta": protection.shipper.sync_eta()}


def _machines(protection: EsxProtection) -> list[dict[str, Any]]:
    names = {disk.name for disk in protection.state.disks} if protection.state.epoch else set()
    return [
        {
            "name": machine.name,
            "state": machine.state.value,
            "disks": [
                {
                    "target": disk.target,
                    "size": disk.size,
                    "state": "attached" if f"{machine.name}.{disk.target}" in names else "not protected",
                }
                for disk in machine.disks
            ],
        }
        for machine in protection.machines
    ]
