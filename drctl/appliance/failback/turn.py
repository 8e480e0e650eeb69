"""What a failback makes of a group's state at the site that reigns: it becomes the source of the stream back. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from drctl.appliance.source.group_state import Desired, DiskState, GroupState
from drctl.errors import WrongPhase
from drctl.model.group import GroupDisk, GroupSpec, turned_around
from drctl.model.phase import Event, advance


def spec_back(known: GroupSpec | None, arrived: GroupSpec) -> GroupSpec:
    """How the group is protected from here on. `arrived` came with the stream that brought it here; `known` is how it
    was protected from here before, where it was: then that holds again, but for its machines."""
    if known is None:
        return turned_around(arrived)
    return replace(known, machines=arrived.machines)


def turned(
    state: GroupState | None, spec: GroupSpec, generation: int, disks: Sequence[GroupDisk], next_number: int
) -> GroupState:
    """The group is protected from here, under `generation`: above all that either site has had. Nothing is known of
    what the other side holds, so a full pass comes first.

    `disks` are as the stream knew them that brought the group here: their numbers go on. Raises WrongPhase when an
    older state here was not superseded, or is not detached yet."""
    begun = tuple(DiskState(disk.number, disk.machine, disk.target, disk.size) for disk in disks)
    if state is not None and state.epoch:
        raise WrongPhase(f"{spec.name} is not detached here yet: {state.reason}", group=spec.name)
    if state is None:
        base, phase = GroupState(spec), advance(spec.name, GroupState(spec).phase, Event.START)
    else:
        base, phase = state, advance(spec.name, state.phase, Event.TAKEN_BACK)
    return msgspec.structs.replace(
        base,
        spec=spec,
        desired=Desired.PROTECTED,
        phase=phase,
        reason="",
        generation=generation,
        epoch="",
        next_number=max(next_number, base.next_number),
        disks=begun,
        moved=(),
        sync="",
        equal=False,
    )
