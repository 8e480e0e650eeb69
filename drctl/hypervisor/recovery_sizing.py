"""Memory, processors and MAC addresses of a machine as somebody wants them at the recovery site. Pure.

What can't be changed without changing the guest's world as well (NUMA cells) is refused rather than guessed."""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET

from drctl.errors import HypervisorRefused
from drctl.model.extent import format_bytes

#: QEMU's own prefix: addresses that no maker of hardware has.
PREFIX = "52:54:00"
_KIB = 1024


def resize_memory(root: ET.Element, memory: int, notes: list[str]) -> None:
    """Give it so many bytes. Raises HypervisorRefused when its memory is divided into NUMA cells."""
    if root.find("cpu/numa") is not None or root.find("maxMemory") is not None:
        raise HypervisorRefused("its memory can't be changed: it is divided into NUMA cells, or can be plugged")
    for tag in ("memory", "currentMemory"):
        found = root.find(tag)
        if found is None and tag == "memory":
            found = ET.SubElement(root, tag)
        if found is not None:
            found.set("unit", "KiB")
            found.text = str(memory // _KIB)
    notes.append(f"memory: {format_bytes(memory)}, as the plan says")


def resize_processors(root: ET.Element, count: int, notes: list[str]) -> None:
    """Give it so many virtual processors, all on; what named single ones that are gone goes, too.

    Raises HypervisorRefused when its processors are divided into NUMA cells."""
    if root.find("cpu/numa") is not None:
        raise HypervisorRefused("its processors can't be changed: they are divided into NUMA cells")
    found = root.find("vcpu")
    if found is None:
        found = ET.SubElement(root, "vcpu")
    found.text = str(count)
    for name in ("current", "cpuset"):
        found.attrib.pop(name, None)
    for single in root.findall("vcpus"):
        root.remove(single)
    notes.append(f"vcpus: {count}, as the plan says")
    _unpin(root, count)
    _fit_topology(root, count, notes)


def _unpin(root: ET.Element, count: int) -> None:
    tune = root.find("cputune")
    if tune is None:
        return
    for pin in tune.findall("vcpupin"):
        number = pin.get("vcpu", "")
        if not number.isdigit() or int(number) >= count:
            tune.remove(pin)


def _fit_topology(root: ET.Element, count: int, notes: list[str]) -> None:
    processor = root.find("cpu")
    topology = processor.find("topology") if processor is not None else None
    if processor is None or topology is None:
        return
    product = 1
    for name in ("sockets", "dies", "clusters", "cores", "threads"):
        text = topology.get(name, "1")
        product *= int(text) if text.isdigit() else 0
    if product != count:
        processor.remove(topology)
        notes.append("cpu topology: dropped, it does not fit the number of processors")


def renew_addresses(devices: ET.Element, seed: str, notes: list[str]) -> None:
    """New MAC addresses, made of `seed`: the same each time that the same recovery is defined."""
    for number, interface in enumerate(devices.findall("interface")):
        mac = interface.find("mac")
        if mac is None:
            mac = ET.SubElement(interface, "mac")
        was = mac.get("address", "none")
        digest = hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()
        mac.set("address", f"{PREFIX}:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}")
        notes.append(f"interface {was}: its address becomes {mac.get('address')}, as the plan says")
