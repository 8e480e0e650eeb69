"""What a look sees of a group's machines."""

from dataclasses import replace

from drctl.appliance.source.seen import Seen
from drctl.model.machine import Disk, Machine, MachineState

OFF = Machine("a", "uuid", MachineState.SHUT_OFF, (Disk("vda", "/a.img", "raw", 1 << 20),))


class Host:
    def __init__(self):
        self.now = OFF
        self.asked = 0

    def machine(self, name):
        self.asked += 1
        return self.now

    def state(self, name):
        return self.now.state


def test_a_machine_that_was_asked_while_it_powered_off_is_asked_again_at_once():
    """Its disks' sizes stayed unknown for two seconds, its end was not understood, and a pass went over all of them."""
    host, seen = Host(), Seen()
    host.now = replace(OFF, disks=(replace(OFF.disks[0], size=0, refusal="its size is unknown"),))
    seen.look(host, ["a"], anew=False)
    host.now = OFF
    assert seen.look(host, ["a"], anew=False) == [OFF]
    seen.look(host, ["a"], anew=False)
    assert host.asked == 2


def test_a_machine_that_starts_has_the_disks_that_it_had():
    host, seen = Host(), Seen()
    seen.look(host, ["a"], anew=False)
    host.now = replace(OFF, state=MachineState.STARTING, disks=())
    assert seen.look(host, ["a"], anew=True) == [replace(OFF, state=MachineState.STARTING)]
    assert host.asked == 1
