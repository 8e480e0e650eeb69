"""What is known of a machine's end, from one look to the next."""

import time

import pytest

from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.image_stamp import image_stamp
from drctl.appliance.source.returning import Returning
from drctl.model.group import GroupSpec
from drctl.model.machine import Disk, Machine, MachineState


class Ends:
    """A ring whose disks' connections said goodbye once it was heard; nothing was written to them in this epoch."""

    goodbye = 0

    def lossless(self):
        return True

    def connection(self, number):
        return 0

    def ended(self, number):
        return self.goodbye

    def written(self, number):
        return 0


class Host:
    def ended_in_order(self, name):
        return True


@pytest.fixture
def known(tmp_path):
    """(returning, ring, state, machine) of a machine that was seen with its mirrors and is off now."""
    image = tmp_path / "a.img"
    image.write_bytes(b"x")
    machine = Machine("a", "uuid", MachineState.SHUT_OFF, (Disk("vda", str(image), "raw", 1 << 20),))
    state = GroupState(GroupSpec("web", "alpha", "beta", ("a",))).with_machines([machine])
    state = GroupState(state.spec, disks=state.after_pass([0]))
    ring = Ends()
    returning = Returning(Host(), ring)
    returning.attached({"a"}, ())
    time.sleep(0.05)
    return returning, ring, state, machine


def test_an_end_that_is_heard_of_late_is_in_order_all_the_same(known):
    """A disk that was not written to is believed by its mirror alone; the look at which its machine was off already
    had forgotten that it was there, and a pass went over it for nothing."""
    returning, ring, state, machine = known
    assert returning.departed(state, [machine]) == {}
    returning.attached((), {"a"})
    ring.goodbye = time.monotonic_ns()
    assert returning.departed(state, [machine]) == {0: image_stamp(machine.disks[0].source)}


def test_without_a_mirror_it_is_not(known):
    returning, ring, state, machine = known
    returning.attached((), ())
    ring.goodbye = time.monotonic_ns()
    assert returning.departed(state, [machine]) == {}
