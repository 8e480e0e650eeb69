"""libvirt's machines as VMware's: what keeps its place, what becomes something else, and that each such thing is told."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import HypervisorRefused
from drctl.hypervisor import vmx
from drctl.hypervisor.esx import domain
from drctl.hypervisor.esx.mapping import Mapped, Wanted, hardware, map_machine, vmx_uuid
from tests.unit.hypervisor.esx.test_domain import card, machine

UUID = "564d0000-0000-0000-0000-0000000000c1"
LINUX = """<domain type='kvm'><name>web</name><memory unit='MiB'>1022</memory><vcpu>2</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
<disk type='file' device='disk'><source file='/a'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='/b'/><target dev='vdb' bus='virtio'/><boot order='1'/></disk>
<disk type='file' device='cdrom'><source file='/c.iso'/><target dev='sda' bus='sata'/></disk>
<interface type='network'><mac address='52:54:00:AA:00:01'/><source network='lan'/><model type='virtio'/></interface>
<serial type='file'><source path='/x'/></serial><serial type='pty'/>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
</devices></domain>"""
WINDOWS = "<features><hyperv/></features><os>"


def mapped(definition: str = LINUX, **changes: object) -> Mapped:
    given_ = {"name": "web", "uuid": UUID, "disks": {"vda": "a.vmdk", "vdb": "b.vmdk"}, "version": "8.0.3"}
    return map_machine(definition, Wanted(**(given_ | changes)))  # type: ignore[arg-type]


def test_a_machine_of_qemu_finds_what_it_has_drivers_for() -> None:
    made = mapped()
    assert made.vmx["sata0:0.fileName"] == "a.vmdk"
    assert made.vmx["sata0:1.fileName"] == "b.vmdk"
    assert made.vmx["bios.hddOrder"] == "sata0:1"
    assert made.vmx["ethernet0.virtualDev"] == "e1000e"
    assert made.vmx["memSize"] == "1024"
    assert made.vmx["virtualHW.version"] == "20"
    assert made.vmx["uuid.bios"] == "56 4d 00 00 00 00 00 00-00 00 00 00 00 00 00 c1"
    assert made.cards == (("52:54:00:aa:00:01", "lan"),)
    told = "\n".join(made.notes)
    for word in ("vda: the guest finds it at a SATA", "an e1000e (it was virtio)", "keeps lan", "channel", "/c.iso"):
        assert word in told
    assert "serial1.present" not in made.vmx
    assert made.vmx["serial0.fileType"] == "file"


def test_a_test_is_cut_off_unless_its_network_is_mapped() -> None:
    alone = mapped(isolated=True)
    assert alone.vmx["ethernet0.startConnected"] == "FALSE"
    assert "ethernet0.networkName" not in alone.vmx
    lab = mapped(isolated=True, networks={"lan": "Lab"})
    assert lab.vmx["ethernet0.networkName"] == "Lab"
    assert lab.vmx["ethernet0.startConnected"] == "TRUE"


def test_uefi_and_what_is_lost_with_it_is_told() -> None:
    made = mapped(
        LINUX.replace("<os>", "<os firmware='efi'><loader secure='yes'/>").replace(
            "<serial type='pty'/>", "<tpm model='tpm-crb'/>"
        )
    )
    assert made.vmx["firmware"] == "efi"
    assert "bios.hddOrder" not in made.vmx
    assert [note.partition(":")[0] for note in made.notes if note.startswith(("nvram", "firmware", "tpm"))] == [
        "nvram",
        "firmware",
        "tpm",
    ]


def test_windows_on_virtio_is_refused_and_on_sata_taken() -> None:
    windows = LINUX.replace("<os>", WINDOWS)
    with pytest.raises(HypervisorRefused, match="Windows and boots from vdb at virtio"):
        mapped(windows)
    sata = windows.replace(
        "<target dev='vdb' bus='virtio'/>", "<target dev='vdb' bus='sata'/><address controller='0' unit='3'/>"
    )
    made = mapped(sata)
    assert made.vmx["sata0:3.fileName"] == "b.vmdk"
    assert made.vmx["sata0:0.fileName"] == "a.vmdk"
    assert made.vmx["guestOS"] == "windows9-64"


def test_another_processor_is_refused() -> None:
    with pytest.raises(HypervisorRefused, match="aarch64"):
        mapped(LINUX.replace("x86_64", "aarch64"))


def test_a_disk_that_is_not_defined_is_refused() -> None:
    with pytest.raises(HypervisorRefused, match="no disk vdc"):
        mapped(disks={"vdc": "c.vmdk"})


def test_many_disks_and_two_at_one_place() -> None:
    disk = "<disk device='disk'><target dev='sd{0}' bus='sata'/><address controller='0' unit='0'/></disk>"
    body = "".join(disk.format(number) for number in range(40))
    text = f"<domain><name>web</name><devices>{body}</devices></domain>"
    made = mapped(text, disks={f"sd{n}": f"{n}.vmdk" for n in range(40)})
    places = {key: made.vmx[key] for key in made.vmx if key.endswith(".fileName")}
    assert len(set(places.values())) == 40
    assert places["sata0:0.fileName"] == "0.vmdk"


@pytest.mark.parametrize(
    ("version", "number"), [("6.7.0", 14), ("7.0.3", 17), ("8.0.3", 20), ("9.1.0", 20), ("", 13), ("5.5", 13)]
)
def test_hardware_is_what_the_host_knows(version: str, number: int) -> None:
    assert hardware(version) == number


@pytest.mark.parametrize("text", ["", "564d", "zz" * 16, UUID + "00"])
def test_no_uuid_is_refused(text: str) -> None:
    with pytest.raises(HypervisorRefused):
        vmx_uuid(text)


@pytest.mark.parametrize("device", ["scsi0:0", "scsi3:15", "sata1:29", "ide0:0", "ide1:1"])
@pytest.mark.parametrize("kind", ["pvscsi", "lsisas1068"])
def test_a_machine_of_vmware_comes_back_as_it_was(device: str, kind: str) -> None:
    found = machine(device, scsi0__virtualDev=kind, scsi3__virtualDev=kind, firmware="efi", **card(0))
    made = mapped(domain.define(found).definition, disks={domain.target(device): "x.vmdk"})
    assert made.vmx[f"{device}.fileName"] == "x.vmdk"
    if device.startswith("scsi"):
        assert made.vmx[f"{device.partition(':')[0]}.virtualDev"] == kind
    assert made.vmx["ethernet0.virtualDev"] == "vmxnet3"
    assert made.vmx["ethernet0.address"] == "00:0c:29:aa:bb:cc"
    assert made.vmx["ethernet0.networkName"] == "VM Network"
    assert made.vmx["firmware"] == "efi"
    assert not [note for note in made.notes if "SATA" in note]


names = st.text(st.characters(min_codepoint=32, blacklist_categories=["Cs"]), min_size=1, max_size=40)


@given(names, names, names)
@settings(max_examples=60)
def test_hostile_names_stay_what_they_are(name: str, network: str, group: str) -> None:
    """Nothing that a network or a machine is called becomes a key of its own, or a line."""
    root = ET.fromstring(LINUX)
    source = root.find("devices/interface/source")
    assert source is not None
    source.set("network", network)
    made = mapped(ET.tostring(root, encoding="unicode"), name=name, networks={network.strip(): group, network: group})
    again = vmx.parse(vmx.render(made.vmx))
    assert dict(again) == {".encoding": "UTF-8", **dict(made.vmx)}
    assert again["displayName"] == name
