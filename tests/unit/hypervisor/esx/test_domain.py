"""ESX machines as libvirt's domains: what is kept, what becomes something else, and that each such thing is told."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drctl.errors import UnsupportedFormat
from drctl.hypervisor import vmdk, vmx
from drctl.hypervisor.esx import domain
from drctl.hypervisor.esx.inventory import EsxDisk, EsxMachine, Layer
from drctl.hypervisor.recovery_xml import Overlay, Recovery, rewrite
from drctl.model.extent import MiB
from drctl.model.machine import Disk, Machine, MachineState

BASE = {"displayName": "web", "memSize": "2048", "numvcpus": "2", "guestOS": "centos8-64"}
CARD = {
    "present": "TRUE",
    "virtualDev": "vmxnet3",
    "networkName": "VM Network",
    "generatedAddress": "00:0C:29:AA:BB:CC",
}


def machine(*devices: str, refusal: str = "", **config: str) -> EsxMachine:
    disks = []
    for number, device in enumerate(devices):
        layer = Layer(f"/vmfs/volumes/u/web/web_{number}.vmdk", vmdk.flat(f"web_{number}-flat.vmdk", MiB))
        disks.append(EsxDisk(Disk(device, layer.path, "vmdk", MiB, refusal=refusal), (layer,)))
    uuid = "564d0000-0000-0000-0000-0000000000c1"
    told = Machine("web", uuid, MachineState.RUNNING, tuple(one.disk for one in disks), 2048 * MiB, 2)
    keys = {key.replace("__", "."): value for key, value in config.items()}
    return EsxMachine("7", told, "/vmfs/volumes/u/web/web.vmx", vmx.Vmx(BASE | keys), tuple(disks))


def card(number: int, **changes: str) -> dict[str, str]:
    return {f"ethernet{number}__{key}": value for key, value in (CARD | changes).items()}


def define(found: EsxMachine) -> tuple[ET.Element, tuple[str, ...]]:
    made = domain.define(found)
    return ET.fromstring(made.definition), made.remarks


def test_a_machine_with_what_qemu_has_too_says_nothing() -> None:
    root, remarks = define(
        machine("scsi0:0", "scsi1:2", scsi0__virtualDev="pvscsi", scsi1__virtualDev="lsisas1068", **card(0))
    )
    assert remarks == ()
    assert root.findtext("name") == "web"
    assert root.findtext("memory") == "2097152"
    assert root.findtext("vcpu") == "2"
    assert [one.get("machine") for one in root.iterfind("os/type")] == ["pc"]
    models = {one.get("index"): one.get("model") for one in root.iterfind("devices/controller")}
    assert models == {"0": "vmpvscsi", "1": "lsisas1068"}
    places = [(one.get("controller"), one.get("unit")) for one in root.iterfind("devices/disk/address")]
    assert places == [("0", "0"), ("1", "2")]
    (interface,) = root.iterfind("devices/interface")
    assert interface.find("mac").get("address") == "00:0c:29:aa:bb:cc"  # type: ignore[union-attr]
    assert interface.find("source").get("network") == "VM Network"  # type: ignore[union-attr]
    assert interface.find("model").get("type") == "vmxnet3"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"scsi0__virtualDev": "lsilogic"}, "scsi0: QEMU has no LSI 53C1030"),
        ({"scsi0__virtualDev": "buslogic"}, "scsi0: QEMU has no BusLogic"),
        ({"scsi0__virtualDev": "quantum"}, "its kind 'quantum' is not known"),
        ({"scsi0__virtualDev": "pvscsi", "firmware": "efi"}, "its UEFI variables stay behind"),
        ({"scsi0__virtualDev": "pvscsi", "firmware": "efi", "uefi__secureBoot__enabled": "TRUE"}, "secure boot is off"),
        ({"scsi0__virtualDev": "pvscsi", **card(0, virtualDev="sriov")}, "ethernet0: QEMU has no sriov"),
        (
            {"scsi0__virtualDev": "pvscsi", **card(1, networkName="")},
            "ethernet1: its network is known to vCenter alone",
        ),
        ({"scsi0__virtualDev": "pvscsi", **card(0, generatedAddress="")}, "ethernet0: it has no address yet"),
    ],
)
def test_what_becomes_something_else_is_told(config: dict[str, str], words: str) -> None:
    _, remarks = define(machine("scsi0:0", **config))
    assert words in " ".join(remarks)


def test_uefi_machines_have_the_newer_chipset() -> None:
    root, _ = define(machine("sata0:1", firmware="efi"))
    system = root.find("os")
    assert system is not None
    assert system.get("firmware") == "efi"
    assert [one.get("machine") for one in system.iterfind("type")] == ["q35"]
    assert [one.get("bus") for one in root.iterfind("devices/disk/target")] == ["sata"]


def test_nvme_becomes_sata_and_a_refused_disk_is_left_out() -> None:
    root, remarks = define(machine("nvme0:0"))
    assert [one.get("bus") for one in root.iterfind("devices/disk/target")] == ["sata"]
    assert "no NVMe" in remarks[0]
    root, _ = define(machine("scsi0:0", refusal="shared"))
    assert root.findall("devices/disk") == []


def test_serial_ports() -> None:
    ports = {
        "serial0__present": "TRUE",
        "serial0__fileType": "file",
        "serial0__fileName": "log",
        "serial1__present": "TRUE",
    }
    root, remarks = define(machine("ide0:0", **ports))
    assert [one.get("type") for one in root.iterfind("devices/serial")] == ["file", "null"]
    assert root.find("devices/serial/source").get("path") == "/vmfs/volumes/u/web/log"  # type: ignore[union-attr]
    assert remarks == ("serial1: it leads to a device of this host, and nowhere in a recovery",)


def test_windows_keeps_local_time() -> None:
    root, _ = define(machine("ide0:0", guestOS="windows2019srv-64"))
    assert root.find("clock").get("offset") == "localtime"  # type: ignore[union-attr]


@given(st.sets(st.tuples(st.sampled_from(["scsi", "sata", "nvme"]), st.integers(0, 3), st.integers(0, 14)), min_size=2))
def test_no_two_disks_have_one_name(devices: set[tuple[str, int, int]]) -> None:
    names = {domain.target(f"{bus}{number}:{unit}") for bus, number, unit in devices}
    assert len(names) == len(devices)


@pytest.mark.parametrize(
    ("device", "name"), [("scsi0:0", "sda"), ("scsi0:15", "sdp"), ("scsi1:0", "sdbm"), ("ide1:0", "hdc")]
)
def test_names_are_those_of_old_checkpoints(device: str, name: str) -> None:
    assert domain.target(device) == name


@pytest.mark.parametrize("device", ["scsi4:0", "scsi0:64", "ide0:2", "floppy0", "scsi0"])
def test_what_has_no_place(device: str) -> None:
    with pytest.raises(UnsupportedFormat):
        domain.target(device)


def test_a_recovery_finds_the_disks() -> None:
    made = domain.define(machine("scsi0:0", "scsi0:1", scsi0__virtualDev="pvscsi", **card(0)))
    overlays = {"sda": Overlay("/o/a", "/s", "web.sda"), "sdb": Overlay("/o/b", "/s", "web.sdb")}
    rewritten = rewrite(made.definition, Recovery(overlays, networks={"VM Network": "lan"}))
    root = ET.fromstring(rewritten.definition)
    assert [one.get("file") for one in root.iterfind("devices/disk/source")] == ["/o/a", "/o/b"]
    assert root.find("devices/interface/source").get("network") == "lan"  # type: ignore[union-attr]
