"""Machines that are off and of whose end nothing is known: when their disks are read, and when not yet, or not again."""

import os
from dataclasses import replace

import msgspec
import pytest

from drctl.appliance.source import attendance
from drctl.appliance.source.attendance import UNDERSTOOD_SECONDS, UNTOLD_SECONDS, Attendance
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.image_stamp import image_stamp
from drctl.model.group import GroupSpec
from drctl.model.machine import Disk, Machine, MachineState


class Group:
    """A group's state, its machines, and a clock."""

    def __init__(self, directory, names):
        self.now = 1000.0
        self.machines = []
        for number, name in enumerate(names):
            image = directory / f"{name}.img"
            image.write_bytes(b"x")
            disk = Disk("vda", str(image), "raw", 1 << 20)
            self.machines.append(Machine(name, f"uuid-{number}", MachineState.RUNNING, (disk,)))
        state = GroupState(GroupSpec("web", "alpha", "beta", tuple(names))).with_machines(self.machines)
        self.state = msgspec.structs.replace(state, disks=state.after_pass(range(len(names))))
        self.left = {}
        self.attendance = Attendance(self, self, None, self)

    def change(self, change):
        self.state = change(self.state)

    def moved_away(self, name):
        return False

    def departed(self, state, machines):
        return {n: stamp for n, stamp in self.left.items() if state.disk(n).left is None}

    def power(self, number, state):
        self.machines[number] = replace(self.machines[number], state=state)

    def look(self, seconds=0.0):
        """Numbers of the disks that have to be read, that much later."""
        self.now += seconds
        self.attendance.note_power(self.machines, reading=False)
        return [disk.number for disk in self.state.disks if disk.pass_needed]

    def passed(self, *numbers):
        """A pass over them is whole."""
        self.state = msgspec.structs.replace(self.state, disks=self.state.after_pass(numbers))

    def image(self, number):
        return self.machines[number].disks[0].source


@pytest.fixture
def group(tmp_path, monkeypatch):
    made = Group(tmp_path, ["a", "b"])
    monkeypatch.setattr(attendance.time, "monotonic", lambda: made.now)
    made.look()
    return made


def test_an_end_may_be_understood_a_look_later(group):
    group.power(0, MachineState.SHUT_OFF)
    assert group.look() == []
    group.left = {0: image_stamp(group.image(0))}
    assert group.look(1.0) == []
    assert group.look(60.0) == []


def test_one_that_is_not_understood_is_read(group):
    group.power(0, MachineState.SHUT_OFF)
    assert group.look() == []
    assert group.look(UNDERSTOOD_SECONDS) == [0]


def test_one_machine_s_end_does_not_put_off_another_s(group):
    """It did: the second was read a minute later, and until then no checkpoint was made."""
    group.power(0, MachineState.SHUT_OFF)
    group.look()
    assert group.look(UNDERSTOOD_SECONDS) == [0]
    group.power(1, MachineState.SHUT_OFF)
    group.look(1.0)
    assert group.look(UNDERSTOOD_SECONDS) == [0, 1]


def test_an_image_that_changes_all_the_while_is_read_now_and_then(group):
    group.power(0, MachineState.SHUT_OFF)
    group.look()
    group.look(UNDERSTOOD_SECONDS)
    group.passed(0)
    group.left = {0: (1, 2, 3)}  # by now it is another
    assert group.look() == []
    assert group.look(UNTOLD_SECONDS / 2) == []
    assert group.look(UNTOLD_SECONDS / 2) == [0]


def test_a_machine_that_was_back_begins_anew(group):
    for _ in range(3):
        group.power(0, MachineState.SHUT_OFF)
        assert group.look(1.0) == []
        assert group.look(UNDERSTOOD_SECONDS) == [0]
        group.passed(0)
        group.power(0, MachineState.RUNNING)
        assert group.look(1.0) == []


def test_a_machine_that_starts_is_not_read(group):
    os.utime(group.image(0))
    group.power(0, MachineState.STARTING)
    group.look()
    assert group.look(UNTOLD_SECONDS) == []
