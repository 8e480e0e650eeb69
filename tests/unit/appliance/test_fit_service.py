"""What would come of machines at their recovery host, and the file by which all of them travels."""

import json
from types import SimpleNamespace

import pytest

from drctl.appliance.recovery.fit import FitService
from drctl.appliance.recovery.memory import MemoryWorld
from drctl.appliance.recovery.ports import Rewritten
from drctl.appliance.source.definition import DefinitionFile
from drctl.appliance.source.description import describe
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.guest_reader import GuestReader
from drctl.errors import HypervisorRefused
from drctl.hypervisor.libvirt_files import LibvirtFiles
from drctl.model.extent import MiB
from drctl.model.group import GroupSpec
from drctl.model.machine import Disk, Machine, MachineState

SPEC = GroupSpec("erp", "alpha", "beta", ("db",))


class Host:
    def __init__(self, root):
        self.root = root
        self.extra = ""

    def machine(self, name):
        disk = Disk("vda", "/i/vda.raw", "raw", MiB, "virtio")
        return Machine(name, f"u-{name}", MachineState.RUNNING, (disk,))

    def definition(self, name):
        seed = f"<disk type='file' device='cdrom'><source file='{self.root}/seed.iso'/><target dev='sda'/></disk>"
        graphics = "<graphics type='vnc' passwd='secret'/>"
        return (
            f"<domain><name>{name}</name><uuid>u-{name}</uuid><devices>{seed}{graphics}</devices>{self.extra}</domain>"
        )

    live_definition = definition

    def files(self):
        return LibvirtFiles(SimpleNamespace(uri="qemu:///session"))

    def secrets(self):
        return {}


@pytest.fixture
def host(tmp_path):
    (tmp_path / "seed.iso").write_bytes(b"seed")
    return Host(tmp_path)


@pytest.fixture
def file(host, tmp_path):
    home = SimpleNamespace(groups=tmp_path, config=SimpleNamespace(site="alpha", host="a1"))
    return DefinitionFile(home, "erp", host, GuestReader(host))


def test_the_definition_s_version_rises_with_what_lies_beside_the_disks(file, host):
    state = GroupState(SPEC)
    assert file.refresh(state)
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert not file.refresh(state, force=True)
    (host.root / "seed.iso").write_bytes(b"another")
    assert not file.refresh(state)  # it is not due
    assert file.refresh(state, force=True)
    written = json.loads(file.path.read_text())
    assert written["version"] == 2
    assert written["machines"][0]["files"]["media"]["sda"]["size"] == 7


def test_another_supervisor_goes_on_with_the_version(file, host, tmp_path):
    file.refresh(GroupState(SPEC))
    home = SimpleNamespace(groups=tmp_path, config=SimpleNamespace(site="alpha", host="a1"))
    again = DefinitionFile(home, "erp", host, GuestReader(host))
    assert not again.refresh(GroupState(SPEC), force=True)
    host.extra = "<title/>"
    assert again.refresh(GroupState(SPEC), force=True)
    assert json.loads(again.path.read_text())["version"] == 2


def test_a_host_whose_files_can_not_be_had_sends_definitions_alone(host, tmp_path):
    home = SimpleNamespace(groups=tmp_path, config=SimpleNamespace(site="alpha", host="a1"))
    DefinitionFile(home, "erp", host).refresh(GroupState(SPEC))
    assert json.loads((tmp_path / "erp.definition").read_text())["machines"][0]["files"] == {}


def test_a_description_has_neither_contents_nor_passwords(host):
    told = describe(host, SPEC)
    machine = told["machines"][0]
    assert "secret" not in machine["definition"]
    assert machine["files"]["media"]["sda"] == {"path": f"{host.root}/seed.iso", "size": 4, "data": ""}
    assert told["disks"] == [{"number": 0, "machine": "db", "target": "vda", "size": MiB}]


class Definitions:
    """Says of each machine what it was told to say."""

    def __init__(self, notes=(), lacking=(), error=None):
        self.notes, self.lacking, self.error = notes, lacking, error

    def rewrite(self, recovery, machine, source):
        if self.error:
            raise self.error
        return Rewritten("<domain/>", self.notes)

    def unmet(self, definition, capabilities):
        return self.lacking


def service(definitions):
    world = MemoryWorld()
    world.hypervisor.capabilities = lambda: ""
    tools = world.tools()
    return FitService(
        SimpleNamespace(**{name: getattr(tools, name) for name in tools.__slots__} | {"definitions": definitions})
    )


def test_what_becomes_of_machines_is_weighed(host):
    notes = ("machine type: a becomes b", "cdrom sda: medium dropped")
    told = service(Definitions(notes, ("tpm: no swtpm",))).look(describe(host, SPEC), lambda _: None)
    assert [(one["severity"], one["message"].partition(":")[0]) for one in told["findings"]] == [
        ("warning", "machine type"),
        ("info", "cdrom sda"),
        ("error", "tpm"),
    ]


def test_what_does_not_travel_is_told(host):
    (host.root / "seed.iso").unlink()
    host.extra = "<os firmware='efi'><nvram type='network'><source/></nvram></os>"
    told = service(Definitions()).look(describe(host, SPEC), lambda _: None)
    assert "nvram does not travel: its variables are on a network device" in told["findings"][0]["message"]


def test_of_what_is_stored_the_infos_are_left_out():
    fit = service(Definitions(("machine type: a becomes b", "cdrom sda: medium dropped")))
    assert [one["subject"] for one in fit.findings()] == ["db", "web"]
    fit = service(Definitions(error=HypervisorRefused("this host has no UEFI firmware")))
    assert [one["severity"] for one in fit.findings()] == ["error", "error"]
