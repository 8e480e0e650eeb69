"""Mirrors of a group whose tap ends under them, on the hypervisor in memory."""

import time

import pytest

from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.tapping import Place, Tapping
from drctl.errors import StepFailed
from drctl.hypervisor.memory import MemoryHypervisor
from drctl.hypervisor.memory_qemu import MemoryTap
from drctl.model.group import GroupSpec

SOCKET = "/run/tap.sock"
DOMAIN = """<domain type='kvm'><name>web-1</name><uuid>7f3c0e52-8a0e-4b7e-9a30-2f4f1b6f0001</uuid>
<memory unit='MiB'>128</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/images/a.img'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""


class RingWords:
    """The words of a ring. A tap that was killed leaves them as they were; its process is gone at once."""

    def __init__(self):
        self.runs = True
        self.proven = None
        self.connected = 1

    def tap_runs(self):
        return self.runs

    def beating(self):
        return True

    def order_stamp(self):
        return 5

    def published(self):
        return 40

    def connection(self, number):
        return self.connected

    def losses(self):
        return 0

    def prove(self, stamp, sequence, losses):
        self.proven = (stamp, sequence, losses)


@pytest.fixture
def ring():
    return RingWords()


@pytest.fixture
def tap():
    return MemoryTap()


@pytest.fixture
def protected(ring, tap):
    """(mirrors, state, machines) of a running machine with one disk."""
    host = MemoryHypervisor()
    host.taps[SOCKET] = tap
    host.define(DOMAIN)
    host.start("web-1")
    machines = [host.machine("web-1")]
    spec = GroupSpec("web", "alpha", "beta", ("web-1",))
    state = GroupState(spec, epoch="ab" * 16).with_machines(machines)
    tapping = Tapping(host, ring)
    tapping.attach(state, machines[0], [disk.number for disk in state.disks], Place(SOCKET, lambda: None))
    return tapping, state, machines


def test_the_order_of_an_attached_group_is_proven(protected, ring):
    tapping, state, machines = protected
    assert tapping.prove(state, machines) == ""
    assert ring.proven == (5, 40, 0)


def test_a_tap_that_ends_during_the_proof_is_not_waited_for(protected, ring, tap):
    tapping, state, machines = protected
    tap.die()
    ring.runs, ring.connected = False, 0
    begun = time.monotonic()
    with pytest.raises(StepFailed, match="the tap ended"):
        tapping.prove(state, machines)
    assert time.monotonic() - begun < 1
    assert ring.proven is None
