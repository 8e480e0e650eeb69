"""Images of machines that are off: what is known of them, and of which of them nothing is known."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.model.extent import SECTOR
from drctl.model.machine import Machine, MachineState

#: States in which a machine's disks are open and may be written.
RUNNING = (MachineState.RUNNING, MachineState.PAUSED, MachineState.STARTING)
#: States in which a machine's QEMU can be asked.
REACHABLE = (MachineState.RUNNING, MachineState.PAUSED)

#: (size, mtime in ns, inode) of an image file; of a block device (size, - device number, sectors written so far).
Stamp = tuple[int, int, int]
#: Fields of /sys/dev/block/M:N/stat (Documentation/block/stat.rst): sectors written, sectors discarded.
_SECTORS_WRITTEN, _SECTORS_DISCARDED = 6, 13


def image_stamp(path: str) -> Stamp | None:
    """What an image is like now, so that a change shows; None when it can't be told.

    A block device has no time of modification, but counts what is written to it; from 0 again after a reboot, so then
    it has changed."""
    try:
        found = Path(path).stat()
        if stat.S_ISBLK(found.st_mode):
            return _device_stamp(found.st_rdev)
    except (OSError, ValueError, IndexError):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _device_stamp(device: int) -> Stamp | None:
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve(strict=True)
    queue = place / "queue" if (place / "queue").exists() else place.parent / "queue"  # a partition has its disk's
    if int((queue / "iostats").read_text()) == 0:
        return None
    fields = (place / "stat").read_text().split()
    written = int(fields[_SECTORS_WRITTEN]) + int(fields[_SECTORS_DISCARDED])
    return int((place / "size").read_text()) * SECTOR, -device, written


def why_not_in_order(machine: Machine, disks: Sequence[DiskState]) -> str:
    """A machine that is off is attested when it left in order and nobody has touched its images since."""
    sources = {disk.target: disk.source for disk in machine.disks}
    for disk in disks:
        if disk.left is None:
            return f"{disk.target}: the machine is {machine.state} and did not leave in order"
        if image_stamp(sources.get(disk.target, "")) != disk.left:
            return f"{disk.target}: its image changed while the machine was off"
    return ""


def stamps_of_images(state: GroupState, machines: Sequence[Machine]) -> dict[int, Stamp | None]:
    """The images of machines that are off, as they are now, by disk number."""
    off = {(m.name, disk.target): disk.source for m in machines if m.state not in RUNNING for disk in m.disks}
    return {
        disk.number: image_stamp(off[disk.machine, disk.target])
        for disk in state.disks
        if (disk.machine, disk.target) in off
    }


def untold(state: GroupState, machines: Sequence[Machine]) -> list[int]:
    """Numbers of disks of machines that are off and may have been written unseen: nobody saw how the machine ended, or
    the image has changed since. Those of a machine that was moved away are not here to be read."""
    now = stamps_of_images(state, machines)
    return [
        disk.number
        for disk in state.disks
        if disk.number in now
        and disk.machine not in state.moved
        and not disk.pass_needed
        and (disk.left is None or disk.left != now[disk.number])
    ]
