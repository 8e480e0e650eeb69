"""Mirrors of a group whose tap ends under them, on the hypervisor in memory."""

import time
from dataclasses import replace

import msgspec
import pytest

from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.tapping import Place, Tapping
from drctl.errors import HypervisorRefused, StepFailed
from drctl.hypervisor.memory import MemoryHypervisor
from drctl.hypervisor.memory_qemu import MemoryTap
from drctl.model.group import GroupSpec
from drctl.model.machine import MachineState

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
        self.goodbye = 0
        self.stamp = 5
        self.position = 40
        self.lost = 0
        self.once = False

    def tap_runs(self):
        return self.runs

    def beating(self):
        return True

    def order_stamp(self):
        return self.stamp

    def published(self):
        return self.position

    def connection(self, number):
        return self.connected

    def losses(self):
        return self.lost

    def lossless(self):
        return self.lost == 0

    def ended(self, number):
        return self.goodbye

    def proven_once(self):
        return self.once

    def prove(self, stamp, sequence, losses):
        self.proven = (stamp, sequence, losses)
        self.once = True


class Host(MemoryHypervisor):
    silent = False

    def monitor(self, name, sent):
        if self.silent:
            raise HypervisorRefused(f"{name} does not answer")
        return super().monitor(name, sent)


@pytest.fixture
def ring():
    return RingWords()


@pytest.fixture
def tap():
    return MemoryTap()


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def protected(ring, tap, host):
    """(mirrors, state, machines) of a running machine with one disk."""
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


def test_after_goodbyes_alone_no_qemu_is_asked(protected, ring, host):
    """Another machine's connection ended in order: what was proven of this one holds, so that twenty machines that
    power off one after the other cost no proof each."""
    tapping, state, machines = protected
    assert tapping.prove(state, machines) == ""
    ring.stamp, ring.position = 6, 55
    host.silent = True
    assert tapping.prove(state, machines) == ""
    assert ring.proven == (6, 55, 0)


@pytest.mark.parametrize(
    "trouble",
    [
        {"lost": 1},  # something was lost: refused, dropped, a tap that died
        {"connected": 0, "goodbye": 0},  # ended, and it is not known yet how
        {"once": False},  # never proven in this epoch
    ],
    ids=str,
)
def test_any_other_end_is_proven_at_length(protected, ring, host, trouble):
    tapping, state, machines = protected
    assert tapping.prove(state, machines) == ""
    ring.stamp, ring.position, ring.proven = 6, 55, None
    for name, value in trouble.items():
        setattr(ring, name, value)
    host.silent = True
    with pytest.raises(HypervisorRefused, match="does not answer"):
        tapping.prove(state, machines)
    assert ring.proven is None


def test_a_connection_that_said_goodbye_is_no_loss(protected, ring, host):
    tapping, state, machines = protected
    assert tapping.prove(state, machines) == ""
    ring.stamp, ring.connected, ring.goodbye = 6, 0, 777
    host.silent = True
    assert tapping.prove(state, machines) == ""
    assert ring.proven == (6, 40, 0)


class Starting(MemoryHypervisor):
    """Machines that are being started: whoever asks their QEMUs waits as long as that takes."""

    def monitor(self, name, sent):
        assert self.state(name) is not MachineState.STARTING, "it would wait for the start's end"
        return super().monitor(name, sent)


def test_a_machine_that_starts_is_not_asked(ring, tap):
    host = Starting()
    host.taps[SOCKET] = tap
    host.define(DOMAIN)
    machine = replace(host.machine("web-1"), state=MachineState.STARTING)
    host._guests["web-1"].state = MachineState.STARTING
    state = GroupState(GroupSpec("web", "alpha", "beta", ("web-1",)), epoch="ab" * 16).with_machines([machine])
    tapping = Tapping(host, ring)
    assert tapping.missing(state, [machine]) == []
    assert tapping.attach_all(state, [machine], [0], Place(SOCKET, lambda: None)) == {}
    assert tapping.prove(state, [machine]) == ""
    state = msgspec.structs.replace(state, disks=state.after_pass([0]))
    assert "did not leave in order" in tapping.attest(state, [machine])
    assert tapping.detach(state, [machine], Place(SOCKET, lambda: None)) == []


def test_one_machine_that_can_t_be_attached_does_not_keep_others_waiting(ring, tap):
    host = MemoryHypervisor()
    host.taps[SOCKET] = tap
    for number in (1, 2, 3):
        host.define(DOMAIN.replace("web-1", f"web-{number}").replace("0001</uuid>", f"000{number}</uuid>"))
        host.start(f"web-{number}")
    machines = [host.machine(f"web-{number}") for number in (1, 2, 3)]
    state = GroupState(GroupSpec("web", "alpha", "beta", ("web-1", "web-2", "web-3")), epoch="ab" * 16)
    state = state.with_machines(machines)
    host.destroy("web-2")  # while it is being attached
    tapping = Tapping(host, ring)
    failed = tapping.attach_all(state, machines, [0, 1, 2], Place(SOCKET, lambda: None))
    assert list(failed) == ["web-2"]
    assert tapping.missing(state, [machines[0], machines[2]]) == []
