"""What has to be so before a group is created, changed or protected, on a host of whatever kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from drctl.appliance.source.group_state import Desired, GroupState
from drctl.errors import AlreadyExists, OutOfSpace, WrongPhase
from drctl.model.extent import format_bytes
from drctl.model.group import GroupSpec


def demand_unprotected(state: GroupState, what: str) -> None:
    """Raises WrongPhase while anything of the group is under protection; `what` can't be done then."""
    if state.desired is not Desired.STOPPED or state.epoch:
        raise WrongPhase(
            f"{state.spec.name} is {state.phase}; {what}",
            hint=f"drctl replicate stop {state.spec.name}",
            group=state.spec.name,
        )


def demand_free(spec: GroupSpec, groups: Iterable[GroupState]) -> None:
    """Raises AlreadyExists when a machine is in another of the groups: its disks would be read twice."""
    for other in groups:
        taken = sorted(set(spec.machines) & set(other.spec.machines)) if other.spec.name != spec.name else []
        if taken:
            raise AlreadyExists(
                f"{', '.join(taken)} of {spec.name} is in group {other.spec.name} already",
                hint=f"a machine belongs to one group: drctl group show {other.spec.name}",
                group=spec.name,
            )


def demand_room(run: Path, ring_size: int) -> None:
    """Raises OutOfSpace when the ring can't be had: better now than as a group that never attaches."""
    free = shutil.disk_usage(run).free
    if ring_size > free:
        raise OutOfSpace(
            f"a ring of {format_bytes(ring_size)} does not fit: {run} has {format_bytes(free)} free",
            hint="lower ring_size in the group's file and apply, or give the file system more memory",
            needed=ring_size,
            free=free,
        )
