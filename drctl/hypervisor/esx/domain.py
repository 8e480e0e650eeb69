"""An ESX machine as libvirt would define it, and the names that its disks have there. Pure.

What QEMU has too keeps its kind, so that the guest finds the controllers and network cards that it has drivers for.
What it lacks becomes the nearest, or is left out: `remarks` tell each such thing."""

from __future__ import annotations

import posixpath
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace

from drctl.errors import UnsupportedFormat
from drctl.hypervisor.esx.inventory import EsxMachine
from drctl.hypervisor.vmx import Vmx
from drctl.model.extent import MiB
from drctl.model.machine import Disk, Machine

#: Letters of a disk's name by its bus: scsi0:0 is sda, scsi1:0 is sdbm. SATA's come after those of four SCSI
#: controllers, NVMe's after these: libvirt calls all of them sd.
_UNITS = {"scsi": 64, "sata": 30, "nvme": 15, "ide": 2}
_FIRST = {"scsi": 0, "sata": 4 * 64, "nvme": 4 * 64 + 4 * 30, "ide": 0}
_CONTROLLERS = 4
_SERIAL_PORTS = 4
_DEVICE = re.compile(r"(scsi|sata|nvme|ide)(\d+):(\d+)")
#: VMware's SCSI controllers → libvirt's models, and what is to be said of it.
_SCSI = {
    "pvscsi": ("vmpvscsi", ""),
    "lsisas1068": ("lsisas1068", ""),
    "lsilogic": ("lsisas1068", "QEMU has no LSI 53C1030: the guest finds an LSI SAS 1068"),
    "buslogic": ("lsilogic", "QEMU has no BusLogic: the guest finds an LSI 53C895A"),
}
#: VMware's network cards → QEMU's. Of a card that is not named hostd gives a guest the oldest.
_CARDS = {"vmxnet3": "vmxnet3", "e1000": "e1000", "e1000e": "e1000e", "vlance": "pcnet", "vmxnet": "vmxnet3"}
_OLDEST_CARD = "e1000"


@dataclass(frozen=True, slots=True)
class Domain:
    """The definition, and what a person would want to know of how it came about."""

    definition: str
    remarks: tuple[str, ...]


def target(device: str) -> str:
    """libvirt's name of a disk's device: stable, whatever other disks there are. Raises UnsupportedFormat."""
    match = _DEVICE.fullmatch(device)
    if match is None or int(match[2]) >= _CONTROLLERS or int(match[3]) >= _UNITS[match[1]]:
        raise UnsupportedFormat(f"a disk at {device!r} has no place in a machine of QEMU")
    bus = match[1]
    return ("hd" if bus == "ide" else "sd") + _letters(_FIRST[bus] + int(match[2]) * _UNITS[bus] + int(match[3]))


def _letters(index: int) -> str:
    text = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        text = chr(ord("a") + digit) + text
    return text


def machine(found: EsxMachine) -> Machine:
    """The machine with its disks under libvirt's names, as groups and streams call them."""
    return replace(found.machine, disks=tuple(_renamed(disk.disk) for disk in found.disks))


def _renamed(disk: Disk) -> Disk:
    try:
        return replace(disk, target=target(disk.target))
    except UnsupportedFormat as exc:
        return replace(disk, refusal=disk.refusal or exc.message)


def define(found: EsxMachine, kind: str = "kvm") -> Domain:
    """The machine's definition for libvirt; `kind` is the domain type. Disks name what they were: they are replaced
    by overlays where it is recovered."""
    remarks: list[str] = []
    vmx, told = found.definition, found.machine
    root = ET.Element("domain", {"type": kind})
    ET.SubElement(root, "name").text = told.name
    if told.uuid:
        ET.SubElement(root, "uuid").text = told.uuid
    ET.SubElement(root, "memory", {"unit": "KiB"}).text = str(max(told.memory, 16 * MiB) // 1024)
    ET.SubElement(root, "vcpu").text = str(told.vcpus)
    _firmware(root, vmx, remarks)
    features = ET.SubElement(root, "features")
    for name in ("acpi", "apic"):
        ET.SubElement(features, name)
    if kind == "kvm":
        ET.SubElement(root, "cpu", {"mode": "host-passthrough"})
    ET.SubElement(root, "clock", {"offset": "localtime" if _is_windows(vmx) else "utc"})
    devices = ET.SubElement(root, "devices")
    _disks(devices, found.machine.disks, vmx, remarks)
    _cards(devices, vmx, remarks)
    _serial_ports(devices, found, remarks)
    _console(devices)
    return Domain(ET.tostring(root, encoding="unicode"), tuple(remarks))


def _firmware(root: ET.Element, vmx: Vmx, remarks: list[str]) -> None:
    """VMware's machines are i440BX with BIOS; one with UEFI finds its disks by the newer chipset as well."""
    efi = vmx.get("firmware", "bios").lower() == "efi"
    system = ET.SubElement(root, "os", {"firmware": "efi"} if efi else {})
    ET.SubElement(system, "type", {"arch": "x86_64", "machine": "q35" if efi else "pc"}).text = "hvm"
    if efi:
        remarks.append("its UEFI variables stay behind: it boots by \\EFI\\BOOT\\BOOTX64.EFI, or by a new entry")
        if vmx.is_on("uefi.secureBoot.enabled"):
            remarks.append("secure boot is off where it is recovered")
    ET.SubElement(system, "boot", {"dev": "hd"})


def _is_windows(vmx: Vmx) -> bool:
    return vmx.get("guestOS", "").lower().startswith("win")


def _disks(devices: ET.Element, disks: Sequence[Disk], vmx: Vmx, remarks: list[str]) -> None:
    controllers: dict[tuple[str, int], str] = {}
    for disk in disks:
        match = _DEVICE.fullmatch(disk.target)
        if disk.refusal or match is None:
            continue
        bus, number, unit = match[1], int(match[2]), int(match[3])
        element = ET.SubElement(devices, "disk", {"type": "file", "device": "disk"})
        ET.SubElement(element, "driver", {"name": "qemu", "type": "raw"})
        ET.SubElement(element, "source", {"file": disk.source})
        ours = "sata" if bus == "nvme" else bus
        ET.SubElement(element, "target", {"dev": target(disk.target), "bus": ours})
        if bus == "nvme":
            remarks.append(f"{disk.target}: the guest finds it at a SATA controller: libvirt has no NVMe for files")
        else:
            _address(element, bus, number, unit)
        controllers.setdefault((ours, number), vmx.get(f"{bus}{number}.virtualDev", "lsilogic").lower())
    for (bus, number), model in controllers.items():
        if bus == "scsi":
            _controller(devices, number, model, remarks)
        elif bus == "sata":
            ET.SubElement(devices, "controller", {"type": "sata", "index": str(number)})


def _address(element: ET.Element, bus: str, number: int, unit: int) -> None:
    # IDE counts a controller of two channels; SCSI and SATA one of many units.
    place = {"controller": "0", "bus": str(number)} if bus == "ide" else {"controller": str(number), "bus": "0"}
    ET.SubElement(element, "address", {"type": "drive", **place, "target": "0", "unit": str(unit)})


def _controller(devices: ET.Element, number: int, model: str, remarks: list[str]) -> None:
    ours, remark = _SCSI.get(model, ("vmpvscsi", f"its kind {model!r} is not known: the guest finds a PVSCSI"))
    ET.SubElement(devices, "controller", {"type": "scsi", "index": str(number), "model": ours})
    if remark:
        remarks.append(f"scsi{number}: {remark}")


def _cards(devices: ET.Element, vmx: Vmx, remarks: list[str]) -> None:
    numbers = sorted({int(m[1]) for key in vmx if (m := re.fullmatch(r"ethernet(\d+)\.present", key.lower()))})
    for number in numbers:
        card = f"ethernet{number}"
        if not vmx.is_on(f"{card}.present"):
            continue
        interface = ET.SubElement(devices, "interface", {"type": "network"})
        address = vmx.get(f"{card}.address") or vmx.get(f"{card}.generatedAddress") or ""
        if re.fullmatch(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", address):
            ET.SubElement(interface, "mac", {"address": address.lower()})
        else:
            remarks.append(f"{card}: it has no address yet, and gets a new one")
        network = vmx.get(f"{card}.networkName", "")
        if not network:
            remarks.append(f"{card}: its network is known to vCenter alone; it is called {card} here")
        ET.SubElement(interface, "source", {"network": network or card})
        wanted = vmx.get(f"{card}.virtualDev", _OLDEST_CARD).lower()
        if wanted not in _CARDS:
            remarks.append(f"{card}: QEMU has no {wanted}: the guest finds an {_OLDEST_CARD}")
        ET.SubElement(interface, "model", {"type": _CARDS.get(wanted, _OLDEST_CARD)})


def _serial_ports(devices: ET.Element, found: EsxMachine, remarks: list[str]) -> None:
    """A port that writes a file beside the machine does so where it is recovered; others lead nowhere there."""
    vmx = found.definition
    for number in range(_SERIAL_PORTS):
        if not vmx.is_on(f"serial{number}.present"):
            continue
        kind, name = vmx.get(f"serial{number}.fileType", ""), vmx.get(f"serial{number}.fileName", "")
        if kind == "file" and name:
            port = ET.SubElement(devices, "serial", {"type": "file"})
            ET.SubElement(port, "source", {"path": posixpath.join(posixpath.dirname(found.vmx), name)})
        else:
            ET.SubElement(devices, "serial", {"type": "null"})
            remarks.append(f"serial{number}: it leads to a {kind or 'device'} of this host, and nowhere in a recovery")


def _console(devices: ET.Element) -> None:
    ET.SubElement(devices, "graphics", {"type": "vnc", "autoport": "yes"})
    video = ET.SubElement(devices, "video")
    ET.SubElement(video, "model", {"type": "vga"})
