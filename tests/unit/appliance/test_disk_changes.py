"""Disks that are not as they were noted are named, and taken up under numbers that are never reused."""

from __future__ import annotations

from drctl.appliance.source.disk_changes import disk_changes, taken_up
from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.model.group import GroupSpec
from drctl.model.machine import Disk, Machine, MachineState

MIB = 1 << 20
NOTED = GroupState(
    GroupSpec("g", "a", "b", ("web",)),
    sync="a pass",
    next_number=2,
    disks=tuple(DiskState(n, "web", f"vd{'ab'[n]}", 64 * MIB, pass_needed=False, held=9) for n in (0, 1)),
)


def web(*, state: MachineState = MachineState.SHUT_OFF, **sizes: int) -> Machine:
    disks = tuple(Disk(target, f"/images/{target}", "raw", size) for target, size in sizes.items())
    return Machine("web", "u", state, disks)


def test_nothing_changed() -> None:
    assert disk_changes(NOTED, [web(vda=64 * MIB, vdb=64 * MIB)]) == []
    assert disk_changes(NOTED, [web(vda=0, vdb=64 * MIB)]) == [], "a size that can't be told is no change"


def test_a_grown_disk_of_a_machine_that_is_off() -> None:
    (change,) = disk_changes(NOTED, [web(vda=64 * MIB, vdb=96 * MIB)])
    assert (change.resized, change.off, change.number) == (True, True, 1)
    assert change.words("g") == "web: disk vdb grew from 64.0 MiB to 96.0 MiB"
    grown = taken_up(NOTED, [web(vda=64 * MIB, vdb=96 * MIB)], every=False)
    assert grown is not None
    assert grown.disk(0) == NOTED.disk(0)
    assert (grown.disk(1).size, grown.disk(1).pass_needed, grown.disk(1).held, grown.sync) == (96 * MIB, True, 0, "")


def test_added_and_taken_out() -> None:
    machine = web(state=MachineState.RUNNING, vda=64 * MIB, vdc=8 * MIB)
    added, gone = disk_changes(NOTED, [machine])
    assert "vdc was added and is not protected; drctl replicate start g" in added.words("g")
    assert "vdb was taken out" in gone.words("g")
    assert not added.resized
    assert not gone.resized
    assert taken_up(NOTED, [machine], every=False) is None, "what is protected is the operator's to change"
    taken = taken_up(NOTED, [machine], every=True)
    assert taken is not None
    assert taken.sync == ""
    assert [(disk.number, disk.target, disk.pass_needed) for disk in taken.disks] == [
        (0, "vda", False),
        (2, "vdc", True),
    ]
    back = taken.with_machines([web(vda=64 * MIB, vdb=64 * MIB)])
    assert [(disk.number, disk.target, disk.pass_needed) for disk in back.disks] == [
        (0, "vda", False),
        (3, "vdb", True),
    ]
