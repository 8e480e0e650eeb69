"""The libvirt driver on a real libvirtd of its own: mirrors through its passthrough, its restart, recovered machines."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from drctl.errors import HostUnreachable, HypervisorRefused, IntegrityError, NotFound
from drctl.hypervisor.attestation import ask
from drctl.hypervisor.block_graph import MirrorName
from drctl.hypervisor.qmp import command
from drctl.hypervisor.reader_export import export_start, export_stop
from drctl.hypervisor.recovery_xml import Overlay, Recovery, rewrite, settle, unmet
from drctl.model.machine import MachineState
from tests.integration.libvirt_rig import Libvirtd, definition, libvirt_missing
from tests.integration.qemu_rig import have, until

pytestmark = [
    pytest.mark.skipif(bool(libvirt_missing()), reason=libvirt_missing() or "-"),
    pytest.mark.skipif(not have("qemu-nbd", "qemu-img"), reason="QEMU's tools are not installed"),
]
NAME = MirrorName.of(3, "cd" * 16, 4)
SIZE = 64 << 20


class Bed:
    """A driver on a libvirtd, and what a test starts; all of it is gone after the test."""

    def __init__(self, daemon):
        from drctl.hypervisor.libvirt import LibvirtHypervisor

        self.daemon = daemon
        self.servers = []
        self.hypervisor = LibvirtHypervisor(self.daemon.uri)
        self.events = []
        self.hypervisor.watch(lambda *event: self.events.append(event))

    def serve(self, name, image, *options):
        """An NBD server on a socket that the machines' user may open."""
        socket = self.daemon.directory / "run" / name
        socket.unlink(missing_ok=True)
        arguments = ["qemu-nbd", "-f", "raw", "-k", str(socket), "-x", "m.vda", "-t", "-e", "9", *options, str(image)]
        server = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        self.servers.append(server)
        until(socket.exists, what=name)
        os.chmod(socket, 0o777)
        return server, str(socket)

    def write(self, machine, offset, pattern):
        """A write by the device's own backend, as a guest's."""
        line = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "write -P {pattern} {offset} 4096"'
        self.hypervisor.monitor(machine, command("human-monitor-command", command_line=line))

    def close(self):
        for server in self.servers:
            server.kill()
            server.wait(10)
        for machine in self.hypervisor.machines():
            self.hypervisor.destroy(machine.name)
        for machine in self.hypervisor.machines():
            self.hypervisor.undefine(machine.name)
        self.hypervisor.close()


@pytest.fixture(scope="module")
def daemon():
    """One for all tests: it takes seconds to start, since it asks every emulator what it can do."""
    daemon = Libvirtd()
    yield daemon
    daemon.close()


@pytest.fixture
def bed(daemon):
    bed = Bed(daemon)
    yield bed
    bed.close()


@pytest.fixture
def running(bed):
    bed.hypervisor.define(definition("m", {"vda": bed.daemon.image("m.raw", SIZE)}))
    bed.hypervisor.start("m")
    return bed


def no_sink():
    raise AssertionError("a live tap needs no sink")


def read(path, offset):
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(4096)


def test_the_whole_way_of_a_mirror_through_libvirt(running):
    target = running.daemon.image("target.raw", SIZE)
    server, socket = running.serve("tap.sock", target)
    hypervisor = running.hypervisor
    mirror = hypervisor.mirror("m", "vda", NAME)

    def monitor(sent):
        return hypervisor.monitor("m", sent)

    assert mirror.attach(socket, "m.vda").healthy
    assert ask(monitor, [NAME]).attached
    running.write("m", 8192, 7)
    assert read(target, 8192) == b"\x07" * 4096
    server.kill()
    server.wait(10)
    running.write("m", 12288, 8)
    assert mirror.inspect().status == "standby"
    assert "standby" in ask(monitor, [NAME]).reason
    assert hypervisor.state("m") is MachineState.RUNNING
    running.serve("tap.sock", target)
    assert mirror.prove_order(lambda: 3) == 3
    assert read(target, 12288) == b"\x08" * 4096
    mirror.detach(no_sink)
    assert hypervisor.mirrors("m") == []
    assert "gone" in ask(monitor, [NAME]).reason
    assert hypervisor.state("m") is MachineState.RUNNING


def test_a_pass_reads_a_running_machines_disk_beside_its_mirror(running):
    _, socket = running.serve("tap.sock", running.daemon.image("target.raw", SIZE))
    running.write("m", 4096, 9)
    running.hypervisor.mirror("m", "vda", NAME).attach(socket, "m.vda")
    reader = running.daemon.directory / "run" / "reader.sock"

    def monitor(sent):
        return running.hypervisor.monitor("m", sent)

    for _ in range(2):
        export_start(monitor, str(reader), {"m.vda": running.hypervisor.source_node("m", "vda")})
        copy = running.daemon.directory / "copy.raw"
        subprocess.run(
            ["qemu-img", "convert", "-O", "raw", f"nbd+unix:///m.vda?socket={reader}", str(copy)],
            check=True,
            timeout=60,
        )
        assert read(copy, 4096) == b"\x09" * 4096
        export_stop(monitor, str(reader))
    assert running.hypervisor.state("m") is MachineState.RUNNING
    assert running.hypervisor.mirror("m", "vda", NAME).inspect().healthy


def test_libvirtds_restart_is_told_and_outlived(running):
    _, socket = running.serve("tap.sock", running.daemon.image("target.raw", SIZE))
    mirror = running.hypervisor.mirror("m", "vda", NAME)
    mirror.attach(socket, "m.vda")
    running.daemon.stop()
    until(lambda: ("", "host-lost") in running.events, what="host-lost")
    with pytest.raises(HostUnreachable, match="can't be reached"):
        running.hypervisor.machines()
    with pytest.raises(HostUnreachable):
        mirror.inspect()
    running.daemon.start()
    until(lambda: ("", "host-back") in running.events, what="host-back")
    assert mirror.inspect().healthy
    assert [found.name for found in running.hypervisor.mirrors("m")] == [NAME]
    running.events.clear()
    running.hypervisor.destroy("m")
    until(lambda: ("m", "stopped") in running.events, what="events after the restart")


def test_a_power_cycle_loses_the_mirror_and_is_told(running):
    _, socket = running.serve("tap.sock", running.daemon.image("target.raw", SIZE))
    running.hypervisor.mirror("m", "vda", NAME).attach(socket, "m.vda")
    running.hypervisor.destroy("m")
    until(lambda: ("m", "stopped") in running.events, what="stopped")
    running.events.clear()
    running.hypervisor.start("m")
    until(lambda: ("m", "started") in running.events, what="started")
    assert running.hypervisor.mirrors("m") == []
    assert running.hypervisor.mirror("m", "vda", NAME).attach(socket, "m.vda").healthy


def test_a_host_that_is_not_there_is_unreachable():
    from drctl.hypervisor.libvirt import LibvirtHypervisor

    with pytest.raises(HostUnreachable, match="No such file"):
        LibvirtHypervisor("qemu+unix:///session?socket=/nonexistent/libvirt-sock")


def test_disks_that_can_not_be_tapped_are_named(bed):
    shared = (
        "<disk type='file'><driver type='raw'/><source file='/x'/><target dev='vdb' bus='virtio'/><shareable/></disk>"
    )
    drive = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>"
    text = definition("n", {"vda": bed.daemon.image("n.raw", SIZE)}, shared + drive, attributes="iothread='1'")
    bed.hypervisor.define(text.replace("<vcpu>", "<iothreads>1</iothreads><vcpu>"))
    first, second = bed.hypervisor.machine("n").disks
    assert second.refusal.startswith("shareable")
    if "QEMU 7" in bed.hypervisor.version() or "QEMU 8" in bed.hypervisor.version():
        assert "I/O thread" in first.refusal
    else:
        assert not first.refusal


def test_a_disk_that_its_scsi_controllers_thread_serves_is_named(bed):
    """As libvirt gives the definition back, with the addresses that it has made."""
    scsi = (
        f"<disk type='file'><driver type='raw'/><source file='{bed.daemon.image('s.raw', SIZE)}'/>"
        "<target dev='sda' bus='scsi'/></disk>"
        "<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='1'/></controller>"
    )
    text = definition("s", {"vda": bed.daemon.image("s2.raw", SIZE)}, scsi)
    bed.hypervisor.define(text.replace("<vcpu>", "<iothreads>1</iothreads><vcpu>"))
    refusals = {disk.target: disk.refusal for disk in bed.hypervisor.machine("s").disks}
    assert refusals["vda"] == ""
    if "QEMU 7" in bed.hypervisor.version() or "QEMU 8" in bed.hypervisor.version():
        assert "I/O thread" in refusals["sda"]
    else:
        assert refusals["sda"] == ""


def test_a_missing_image_is_a_disk_of_unknown_size(bed):
    bed.hypervisor.define(definition("o", {"vda": bed.daemon.images / "missing.raw"}))
    (disk,) = bed.hypervisor.machine("o").disks
    assert disk.refusal.startswith("its size is unknown")


def test_a_recovered_machine_boots_from_a_view_and_is_localized_while_it_runs(running):
    hypervisor = running.hypervisor
    running.write("m", 1 << 20, 5)
    base = running.daemon.images / "m.raw"
    text = hypervisor.definition("m")
    hypervisor.destroy("m")
    _, view = running.serve("view.sock", base, "-r")
    overlay = running.daemon.images / "overlay.qcow2"
    backing = f"nbd+unix:///m.vda?socket={view}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing, str(overlay)], check=True)
    overlay.chmod(0o666)
    recovery = Recovery(
        {"vda": Overlay(str(overlay), view, "m.vda")},
        name="m-test",
        uuid="11111111-2222-3333-4444-555555555555",
        isolated=True,
    )
    done = rewrite(text, recovery)
    assert unmet(done.definition, hypervisor.capabilities()) == ()
    hypervisor.create(done.definition)
    assert hypervisor.state("m-test") is MachineState.RUNNING
    hypervisor.block_pull("m-test", "vda")
    until(lambda: hypervisor.block_progress("m-test", "vda") is None, what="pull")
    assert view not in hypervisor.live_definition("m-test")
    hypervisor.destroy("m-test")
    hypervisor.create(settle(done.definition))
    assert hypervisor.state("m-test") is MachineState.RUNNING
    hypervisor.destroy("m-test")
    with pytest.raises(NotFound):
        hypervisor.state("m-test")


def test_an_isolated_machine_starts_without_the_networks_of_its_source(bed):
    interfaces = "<interface type='network'><source network='prod'/></interface><interface type='user'/>"
    text = definition("p", {"vda": bed.daemon.image("p.raw", SIZE)}, interfaces)
    with pytest.raises(HypervisorRefused, match="prod"):
        bed.hypervisor.create(text)
    overlay = bed.daemon.images / "p.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), "1M"], check=True)
    overlay.chmod(0o666)
    bed.hypervisor.create(rewrite(text, Recovery({"vda": Overlay(str(overlay))}, isolated=True)).definition)
    time.sleep(0.2)
    info = bed.hypervisor.monitor("p", command("human-monitor-command", command_line="info network"))
    assert "user" not in info
    assert bed.hypervisor.state("p") is MachineState.RUNNING


@pytest.fixture
def files(bed):
    """Its files as an appliance has them that may not open them itself, and a directory of the daemon's own."""
    from drctl.hypervisor.libvirt_connection import Connection
    from drctl.hypervisor.libvirt_files import LibvirtFiles

    connection = Connection(bed.daemon.uri)
    directory = Path(tempfile.mkdtemp(dir=bed.daemon.images))
    owner = bed.daemon.images.stat()
    os.chown(directory, owner.st_uid, owner.st_gid)
    yield LibvirtFiles(connection, direct=False), directory
    connection.close()


def test_files_of_others_are_read_through_libvirt(bed, files):
    beside, directory = files
    assert beside.stamps(directory) == {}
    content = os.urandom(700_000)
    path = directory / "web_VARS.fd"
    path.write_bytes(content)
    os.chown(path, directory.stat().st_uid, directory.stat().st_gid)
    path.chmod(0o600)
    assert beside.read(path, 1 << 20) == content
    stamp = beside.stamp(path)
    assert (stamp.size, stamp.changed_ns) == (700_000, path.stat().st_mtime_ns)
    with path.open("r+b") as file:
        file.write(b"x")
    assert beside.stamp(path) != stamp
    assert beside.stamp(directory / "none") is None
    assert beside.costly(path)
    with pytest.raises(NotFound):
        beside.read(directory / "none", 10)
    with pytest.raises(IntegrityError):
        beside.read(path, 10)
    assert beside.stamps(directory / "nowhere") == {}


def test_a_directory_is_made_and_removed_through_libvirt(bed, files):
    beside, directory = files
    state = directory / "uuid" / "tpm2"
    beside.put_directory(state, {"old": b"1", "tpm2-00.permall": b"2"})
    content = os.urandom(300_000)
    beside.put_directory(state, {"tpm2-00.permall": content})
    assert [path.name for path in state.iterdir()] == ["tpm2-00.permall"]
    assert (state / "tpm2-00.permall").read_bytes() == content
    assert (state / "tpm2-00.permall").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    beside.remove_directory(state)
    assert list(state.iterdir()) == []
    beside.remove_directory(directory / "nowhere")
    command = ["virsh", "-q", "-c", bed.daemon.uri, "pool-list", "--all", "--name"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []
