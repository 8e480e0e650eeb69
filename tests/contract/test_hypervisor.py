"""What every hypervisor driver promises, asked of each: memory, libvirt's test driver, and libvirt with QEMU."""

import re
import time

import pytest

from drctl.errors import HypervisorRefused, NotFound
from drctl.hypervisor.memory import MemoryHypervisor
from drctl.model.machine import MachineState
from tests.integration.libvirt_rig import Libvirtd, definition, libvirt_missing

IMAGE = 16 << 20


class Host:
    """A driver, and how to make an image for it."""

    def __init__(self, hypervisor, kind, image):
        self.hypervisor = hypervisor
        self.image = image
        self.real = kind == "qemu"
        self.domain_type = "test" if kind == "test" else "qemu"
        self.events = []
        hypervisor.watch(lambda *event: self.events.append(event))

    def definition(self, name, targets=("vda",)):
        text = definition(name, {target: self.image(f"{name}.{target}", IMAGE) for target in targets})
        text = text.replace("type='qemu'", f"type='{self.domain_type}'", 1)
        return re.sub("<emulator>.*</emulator>", "", text) if self.domain_type == "test" else text

    def seen(self, event):
        deadline = time.monotonic() + 5
        while event not in self.events:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


@pytest.fixture(scope="module")
def libvirtd():
    if libvirt_missing():
        pytest.skip(libvirt_missing())
    daemon = Libvirtd()
    yield daemon
    daemon.close()


@pytest.fixture(params=["memory", "test", "qemu"])
def host(request, tmp_path):
    if request.param == "memory":
        hypervisor = MemoryHypervisor()
        yield Host(hypervisor, "memory", lambda name, size: hypervisor.sizes.update({f"/{name}": size}) or f"/{name}")
        return
    libvirt_driver = pytest.importorskip("drctl.hypervisor.libvirt")
    if request.param == "test":
        hypervisor = libvirt_driver.LibvirtHypervisor("test:///default")
        image = lambda name, size: tmp_path / name  # noqa: E731  # this driver opens no image
    else:
        daemon = request.getfixturevalue("libvirtd")
        hypervisor, image = libvirt_driver.LibvirtHypervisor(daemon.uri), daemon.image
    yield Host(hypervisor, request.param, image)
    for machine in hypervisor.machines():
        hypervisor.destroy(machine.name)
    for machine in hypervisor.machines():
        hypervisor.undefine(machine.name)
    hypervisor.close()


def test_a_machine_is_defined_started_and_stopped(host):
    hypervisor = host.hypervisor
    hypervisor.define(host.definition("a"))
    assert hypervisor.state("a") is MachineState.SHUT_OFF
    hypervisor.start("a")
    assert hypervisor.state("a") is MachineState.RUNNING
    hypervisor.destroy("a")
    assert hypervisor.state("a") is MachineState.SHUT_OFF
    hypervisor.undefine("a")
    assert "a" not in [machine.name for machine in hypervisor.machines()]


def test_what_is_not_there_is_not_found(host):
    hypervisor = host.hypervisor
    for ask in (hypervisor.machine, hypervisor.state, hypervisor.definition, hypervisor.start, hypervisor.undefine):
        with pytest.raises(NotFound):
            ask("nobody")


def test_the_same_twice_does_nothing_the_second_time(host):
    hypervisor = host.hypervisor
    hypervisor.define(host.definition("b"))
    hypervisor.start("b")
    hypervisor.start("b")
    hypervisor.suspend("b")
    hypervisor.suspend("b")
    assert hypervisor.state("b") is MachineState.PAUSED
    hypervisor.resume("b")
    hypervisor.resume("b")
    assert hypervisor.state("b") is MachineState.RUNNING
    hypervisor.destroy("b")
    hypervisor.destroy("b")
    hypervisor.shutdown("b")
    hypervisor.destroy("nobody")


def test_a_transient_machine_is_gone_when_it_stops(host):
    hypervisor = host.hypervisor
    hypervisor.create(host.definition("c"))
    assert not hypervisor.machine("c").persistent
    hypervisor.destroy("c")
    with pytest.raises(NotFound):
        hypervisor.machine("c")


def test_a_machine_can_be_created_with_its_processors_stopped(host):
    if host.domain_type == "test":
        pytest.skip("libvirt's test driver can't")
    host.hypervisor.create(host.definition("d"), paused=True)
    assert host.hypervisor.state("d") is MachineState.PAUSED
    host.hypervisor.resume("d")
    assert host.hypervisor.state("d") is MachineState.RUNNING


def test_a_running_machine_is_not_created_again(host):
    host.hypervisor.create(host.definition("e"))
    with pytest.raises(HypervisorRefused):
        host.hypervisor.create(host.definition("e"))


def test_a_machine_tells_its_disks(host):
    host.hypervisor.define(host.definition("f", ("vda", "vdb")))
    machine = host.hypervisor.machine("f")
    assert [disk.target for disk in machine.disks] == ["vda", "vdb"]
    assert all(
        disk.format == "raw" and disk.bus == "virtio" and not disk.refusal for disk in machine.disks[:1] if host.real
    )
    assert machine.memory == 64 << 20
    assert len(machine.uuid) in (0, 36)
    if host.real:
        assert machine.disks[0].size == IMAGE


def test_autostart_is_remembered(host):
    if host.domain_type == "test":
        pytest.skip("libvirt's test driver loses it")
    host.hypervisor.define(host.definition("g"))
    assert not host.hypervisor.machine("g").autostart
    host.hypervisor.set_autostart("g", True)
    assert host.hypervisor.machine("g").autostart
    host.hypervisor.set_autostart("g", False)
    assert not host.hypervisor.machine("g").autostart


def test_life_is_told(host):
    host.hypervisor.define(host.definition("h"))
    host.hypervisor.start("h")
    host.hypervisor.suspend("h")
    host.hypervisor.resume("h")
    host.hypervisor.destroy("h")
    host.hypervisor.undefine("h")
    for event in ("defined", "started", "suspended", "resumed", "stopped", "undefined"):
        assert host.seen(("h", event)), event


def test_a_definition_comes_back_and_can_be_given_again(host):
    host.hypervisor.define(host.definition("i"))
    text = host.hypervisor.definition("i")
    host.hypervisor.undefine("i")
    host.hypervisor.define(text)
    assert host.hypervisor.machine("i").disks[0].target == "vda"


def test_a_machine_that_does_not_run_has_no_monitor(host):
    host.hypervisor.define(host.definition("j"))
    with pytest.raises(HypervisorRefused):
        host.hypervisor.monitor("j", {"execute": "query-status"})
    with pytest.raises(HypervisorRefused):
        host.hypervisor.agent("j", {"execute": "guest-ping"})


def test_the_host_tells_what_can_run(host):
    assert "<guest>" in host.hypervisor.capabilities()
    assert host.hypervisor.version()


def test_the_monitor_answers_for_a_running_machine(host):
    if host.domain_type == "test":
        pytest.skip("libvirt's test driver has no QEMU")
    host.hypervisor.create(host.definition("k"))
    assert host.hypervisor.monitor("k", {"execute": "query-status"})["status"] == "running"
    with pytest.raises(HypervisorRefused, match="QEMU refused no-such") as refusal:
        host.hypervisor.monitor("k", {"execute": "no-such"})
    assert refusal.value.fields["qmp_class"] == "CommandNotFound"
    assert host.hypervisor.source_node("k", "vda")
    with pytest.raises(NotFound):
        host.hypervisor.source_node("k", "vdz")
