"""Disks that were grown, added to a machine, or taken out, since the group's disks were noted. Pure.

A disk can't be resized while its mirror runs (QEMU refuses). One whose size has changed is taken up by itself once its
machine is off. Disks that were added or taken out change what is protected: `replicate start` takes them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.image_stamp import RUNNING
from drctl.model.extent import format_bytes
from drctl.model.machine import Machine


@dataclass(frozen=True, slots=True)
class DiskChange:
    """One disk that is not as it was noted. `old` and `new` are sizes in bytes; 0: it was, or is, not there."""

    machine: str
    target: str
    number: int | None
    old: int
    new: int
    off: bool

    @property
    def resized(self) -> bool:
        return bool(self.old and self.new)

    def words(self, group: str) -> str:
        disk = f"{self.machine}: disk {self.target}"
        if self.resized:
            verb = "grew" if self.new > self.old else "shrank"
            return f"{disk} {verb} from {format_bytes(self.old)} to {format_bytes(self.new)}"
        what = "was added and is not protected" if self.new else "was taken out of the machine"
        return f"{disk} {what}; drctl replicate start {group} takes that up"


def disk_changes(state: GroupState, machines: Iterable[Machine]) -> list[DiskChange]:
    """What differs, in the order of the machines. A size of 0 is not known, and no change."""
    found: list[DiskChange] = []
    for machine in machines:
        off = machine.state not in RUNNING
        noted = {disk.target: disk for disk in state.disks if disk.machine == machine.name}
        for disk in machine.disks:
            old = noted.pop(disk.target, None)
            if old is None:
                found.append(DiskChange(machine.name, disk.target, None, 0, disk.size, off))
            elif disk.size and disk.size != old.size:
                found.append(DiskChange(machine.name, disk.target, old.number, old.size, disk.size, off))
        found += [DiskChange(machine.name, gone.target, gone.number, gone.size, 0, off) for gone in noted.values()]
    return found


def taken_up(state: GroupState, machines: Sequence[Machine], *, every: bool) -> GroupState | None:
    """The state with changed disks as they are now, to be gone over; None when nothing is to be taken up.

    Unless it is to be `every` change, only resized disks of machines that are off are."""
    changes = disk_changes(state, machines)
    if every and changes:
        return msgspec.structs.replace(state.with_machines(machines), sync="")
    sizes = {change.number: change.new for change in changes if change.resized and change.off}
    if not sizes:
        return None
    disks = tuple(
        msgspec.structs.replace(disk.missed(), size=sizes[disk.number]) if disk.number in sizes else disk
        for disk in state.disks
    )
    return msgspec.structs.replace(state, disks=disks, sync="")
