"""A CD-ROM drive with a seed in a machine's definition. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from drctl.hypervisor.domain_xml import attribute, parse, source_text

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def insert_seed(definition: str, path: str) -> tuple[str, str]:
    """The definition with the image in its first empty CD-ROM drive, or in a new one; and a note about it."""
    root = parse(definition)
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    drive = next(_empty_drives(devices), None)
    if drive is None:
        drive = _add_drive(root, devices)
    drive.set("type", "file")
    for child in [one for one in drive if one.tag in ("source", "driver")]:
        drive.remove(child)
    drive.insert(0, ET.Element("driver", {"name": "qemu", "type": "raw"}))
    drive.insert(1, ET.Element("source", {"file": path}))
    if drive.find("readonly") is None:
        ET.SubElement(drive, "readonly")
    target = attribute(drive, "target", "dev")
    return ET.tostring(root, encoding="unicode"), f"cdrom {target}: a seed for cloud-init with its addresses, {path}"


def _empty_drives(devices: ET.Element) -> Iterator[ET.Element]:
    return (one for one in devices.iterfind("disk") if one.get("device") == "cdrom" and not source_text(one))


def _add_drive(root: ET.Element, devices: ET.Element) -> ET.Element:
    """On a bus that the guest can be expected to know: libvirt makes a controller where one is missing."""
    bus, prefix = _bus(root, devices)
    if bus == "scsi" and devices.find("controller[@type='scsi']") is None:
        ET.SubElement(devices, "controller", {"type": "scsi", "index": "0", "model": "virtio-scsi"})
    taken = {attribute(one, "target", "dev") for one in devices.iterfind("disk")}
    # The last letters first: earlier ones are where a guest's own disks are added.
    name = next(f"{prefix}{letter}" for letter in reversed(_LETTERS[:4]) if f"{prefix}{letter}" not in taken)
    drive = ET.SubElement(devices, "disk", {"type": "file", "device": "cdrom"})
    ET.SubElement(drive, "target", {"dev": name, "bus": bus})
    return drive


def _bus(root: ET.Element, devices: ET.Element) -> tuple[str, str]:
    """The bus and how names of its disks begin. IDE where the machine type has it, also for guests with virtio disks.

    Else virtio-scsi for guests that have disks of virtio's: Debian's kernel for clouds knows no AHCI."""
    machine = root.find("os/type")
    kind = "" if machine is None else machine.get("machine", "")
    if machine is None or machine.get("arch", "x86_64") not in ("x86_64", "i686"):
        return "scsi", "sd"
    if kind == "pc" or kind.startswith(("pc-i440fx", "isapc")):
        return "ide", "hd"
    return ("scsi", "sd") if _knows_virtio(devices) else ("sata", "sd")


def _knows_virtio(devices: ET.Element) -> bool:
    """Whether its first SCSI controller is virtio's, or, without any, a disk is."""
    controllers = devices.findall("controller[@type='scsi']")
    if controllers:
        first = next((one for one in controllers if one.get("index", "0") == "0"), controllers[0])
        return first.get("index", "0") == "0" and first.get("model", "").startswith("virtio")
    return any(attribute(one, "target", "bus") == "virtio" for one in devices.iterfind("disk"))
