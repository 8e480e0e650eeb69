"""What a handover makes of a group's state at its source. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from drctl.appliance.source.group_state import Desired, GroupState
from drctl.appliance.source.image_stamp import Stamp
from drctl.model.phase import Event, advance


def handed_over(state: GroupState, reason: str) -> GroupState:
    """The other site is going to reign: this one neither runs nor replicates the group from here on."""
    phase = advance(state.spec.name, state.phase, Event.SUPERSEDED)
    return msgspec.structs.replace(state, phase=phase, reason=reason, desired=Desired.STOPPED)


def taken_back(state: GroupState, generation: int, clean: Mapping[str, Stamp]) -> GroupState:
    """The other site has given the reign back: the group is protected again, under a generation above both.

    `clean`: images that are known to be what the other site holds, by disk. When all are, no pass is needed; else what
    is known of each disk since it was let go decides.
    Raises WrongPhase when the group was not away."""
    equal = bool(state.disks) and all(disk.name in clean for disk in state.disks)
    return msgspec.structs.replace(
        state,
        phase=advance(state.spec.name, state.phase, Event.TAKEN_BACK),
        reason="",
        desired=Desired.PROTECTED,
        generation=generation,
        epoch="",
        equal=equal,
        disks=tuple(
            msgspec.structs.replace(disk, pass_needed=False, left=clean[disk.name]) if equal else disk
            for disk in state.disks
        ),
    )
