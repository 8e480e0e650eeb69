"""Control methods of a failback at the site that reigns: the group is replicated from here to where it came from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.failback.ports import Deps
from drctl.appliance.failback.turn import spec_back, turned
from drctl.appliance.recovery.store import GroupStores, recoverable_from
from drctl.appliance.source.demands import demand_room
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.handover_record import HandoverFiles
from drctl.appliance.source.tappable import check_machines
from drctl.errors import DrctlError, NotFound, PreconditionFailed, Refused
from drctl.model.group import GroupDisk, GroupSpec
from drctl.model.phase import Phase
from drctl.store.group_info import GroupInfo, StoreMode

Progress = Callable[[dict[str, Any]], None]


class FailbackReign:
    """Methods may be called from any thread."""

    def __init__(self, home: Home, deps: Deps) -> None:
        self._home = home
        self._deps = deps
        self._stores = GroupStores(home.store)
        self._handovers = HandoverFiles(home.path / "handovers")

    def plan(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """What this site would replicate back, and why it could not. Changes nothing."""
        del progress
        name = str(params.get("group"))
        info, spec, disks = self._reigning(name)
        known = self._known(name)
        reasons = self._why_not(name, info.mode, spec)
        protected = known is not None and known.generation > info.generation and known.phase is not Phase.FAILED_OVER
        with self._stores.open(name) as store:
            newest = store.newest()
        return {
            "group": name,
            "generation": max(info.generation, known.generation if known else 0),
            "protected": protected,
            "phase": known.phase.value if known and protected else None,
            "spec": msgspec.to_builtins(spec),
            "disks": [asdict(disk) for disk in disks],
            "newest": newest.number if newest else 0,
            "reasons": [] if protected else reasons,
        }

    def _reigning(self, name: str) -> tuple[GroupInfo, GroupSpec, list[GroupDisk]]:
        """The store by which the group came here, how it is protected from here, its disks as they are now."""
        with self._stores.open(name) as store:
            info, definition = store.info, store.definition()
        if definition is None:
            raise PreconditionFailed(f"the store of {name} has no machine definitions", group=name)
        known = self._known(name)
        spec = spec_back(known.spec if known else None, recoverable_from(definition).spec)
        numbers = {disk.name: disk.number for disk in info.disks}
        after = max(numbers.values(), default=-1) + 1
        disks: list[GroupDisk] = []
        for machine in spec.machines:
            with suppress(NotFound):
                for disk in self._deps.host.machine(machine).disks:
                    number = numbers.get(f"{machine}.{disk.target}")
                    if number is None:
                        number, after = after, after + 1
                    disks.append(GroupDisk(number, machine, disk.target, disk.size))
        return info, spec, disks

    def _known(self, name: str) -> GroupState | None:
        return self._deps.sources.state(name) if name in self._deps.sources.names() else None

    def _why_not(self, name: str, mode: StoreMode, spec: GroupSpec) -> list[str]:
        reasons = []
        state = self._deps.reign(name)
        if mode is not StoreMode.FAILED_OVER:
            reasons.append(f"{name} does not run at this site")
        elif state != "committed":
            reasons.append(f"its failover is {state or 'unknown'}: first drctl commit {name}")
        try:
            check_machines(self._deps.host, spec.machines)
            self._home.peer(spec.recovery)
            demand_room(self._home.run, spec.ring_size)
        except DrctlError as exc:
            reasons.append(exc.message)
        return reasons

    def protect(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, generation, definition_version} → {group, generation, phase}: replicate it back from now on.

        `generation` is what the other side takes streams of. Nothing is done when it is replicated under it already.
        Raises PreconditionFailed, Refused."""
        del progress
        name, generation = str(params.get("group")), int(params["generation"])
        info, spec, disks = self._reigning(name)
        known = self._known(name)
        if known is None or known.generation != generation:
            if reasons := self._why_not(name, info.mode, spec):
                raise PreconditionFailed(f"{name} can't be replicated back: {'; '.join(reasons)}", group=name)
            if generation <= max(info.generation, known.generation if known else 0):
                raise Refused(f"generation {generation} is not above {info.generation}, by which {name} reigns here")
            # Whoever handed it over before has it back: nothing of that may be gone on with.
            self._handovers.remove(name)
            self._begin_definition(name, int(params.get("definition_version") or 0))
            after = max((disk.number for disk in [*info.disks, *disks]), default=-1) + 1
            self._deps.sources.turn(name, lambda state: turned(state, spec, generation, disks, after))
        state = self._deps.sources.state(name)
        return {"group": name, "generation": state.generation, "phase": state.phase.value}

    def _begin_definition(self, name: str, floor: int) -> None:
        """The definitions that are sent from here are newer than all that the other side has of the group."""
        path = self._home.groups / f"{name}.definition"
        temporary = path.with_suffix(".new")
        temporary.write_text(msgspec.json.encode({"version": floor}).decode())
        temporary.replace(path)
