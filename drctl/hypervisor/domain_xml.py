"""libvirt's machine definitions: what they say of the machine's disks. Pure; `recovery_xml` rewrites them.

A definition that comes from another site is foreign text: one with a document type (the only door for entities) is
refused before it is parsed.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from xml.parsers import expat

from drctl.errors import IntegrityError

#: Largest definition taken, characters. One with 90 disks and comments is below 200 KiB.
DEFINITION_LIMIT = 4 * 1024 * 1024
#: Deepest nesting taken: far above libvirt's 10 or a backing chain of 100, far below what ends a recursive writer.
DEPTH_LIMIT = 250

#: Elements of libvirt's own QEMU extension keep their usual prefix.
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", QEMU_NAMESPACE)


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """A `<disk device='disk'>` (or `lun`) of a definition. `alias` and `index` are of a running machine only.

    `refusal` is empty when it can be tapped, as far as the definition tells."""

    target: str
    bus: str
    kind: str
    format: str
    source: str
    alias: str
    iothread: bool
    refusal: str


def parse(definition: str) -> ET.Element:
    """The definition's root. Raises IntegrityError when it isn't one, or has a document type."""
    if len(definition) > DEFINITION_LIMIT:
        raise IntegrityError(f"a definition of {len(definition)} characters is too large to be one")
    try:
        _scout(definition)
        root = ET.fromstring(definition)
    except (expat.ExpatError, ET.ParseError, ValueError) as exc:
        raise IntegrityError(f"not a machine definition: {exc}") from exc
    if root.tag != "domain" or not root.findtext("name"):
        raise IntegrityError("not a machine definition: no <domain> with a <name>")
    return root


def _scout(definition: str) -> None:
    """Raise ValueError for what libvirt never writes: a document type, or elements nested beyond all reason."""
    depth = 0

    def refuse(*_: object) -> None:
        raise ValueError("it has a document type")

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"it is nested deeper than {DEPTH_LIMIT}")

    def leave(_: object) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = enter
    parser.EndElementHandler = leave
    parser.Parse(definition, True)


def disks(root: ET.Element) -> list[DiskFacts]:
    """The machine's virtual disks, in the definition's order. CD-ROM and floppy drives are no disks."""
    threaded = _threaded_controllers(root)
    found = [disk for disk in root.iterfind("devices/disk") if disk.get("device", "disk") in ("disk", "lun")]
    return [_facts(disk, threaded) for disk in found]


def _threaded_controllers(root: ET.Element) -> set[str]:
    """The SCSI controllers that are served by an I/O thread, by their index: so are all their disks."""
    return {
        controller.get("index", "0")
        for controller in root.iterfind("devices/controller")
        if controller.get("type") == "scsi" and attribute(controller, "driver", "iothread")
    }


def _has_thread(disk: ET.Element, threaded: set[str]) -> bool:
    """Whether an I/O thread serves it: its own, or its SCSI controller's. One without an address may be at any."""
    if attribute(disk, "driver", "iothread") or disk.find("driver/iothreads") is not None:
        return True
    if attribute(disk, "target", "bus") != "scsi":
        return False
    return attribute(disk, "address", "controller") in threaded if disk.find("address") is not None else bool(threaded)


def cards(root: ET.Element) -> tuple[tuple[str, str], ...]:
    """(MAC address, libvirt's network or "") of each network card, in order."""
    found = root.iterfind("devices/interface")
    return tuple((attribute(one, "mac", "address").lower(), attribute(one, "source", "network")) for one in found)


def without_passwords(definition: str) -> str:
    """The definition without what libvirt calls secure information: passwords of displays."""
    root = parse(definition)
    for graphics in root.iterfind("devices/graphics"):
        graphics.attrib.pop("passwd", None)
    return ET.tostring(root, encoding="unicode")


def memory_bytes(root: ET.Element) -> int:
    """The machine's memory."""
    memory = root.find("memory")
    if memory is None or not (memory.text or "").strip().isdigit():
        return 0
    units = {"b": 1, "bytes": 1, "KB": 1000, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {name: 1 << shift for names, shift in _BINARY for name in names}
    return int(memory.text or 0) * units.get(memory.get("unit", "KiB"), 1024)


_BINARY = ((("k", "KiB"), 10), (("M", "MiB"), 20), (("G", "GiB"), 30), (("T", "TiB"), 40))


def vcpus(root: ET.Element) -> int:
    text = (root.findtext("vcpu") or "1").strip()
    return int(text) if text.isdigit() else 1


def attribute(element: ET.Element, path: str, name: str) -> str:
    """An attribute of a descendant, empty when either is missing."""
    found = element.find(path)
    return "" if found is None else found.get(name, "")


def source_text(disk: ET.Element) -> str:
    """Where a disk's bytes are, as a person would say it."""
    source = disk.find("source")
    if source is None:
        return ""
    for name in ("file", "dev", "dir", "path"):
        if source.get(name):
            return str(source.get(name))
    if source.get("pool"):
        return f"{source.get('pool')}/{source.get('volume')}"
    if source.get("protocol"):
        return f"{source.get('protocol')}:{source.get('name', '')}"
    return ""


def _facts(disk: ET.Element, threaded: set[str]) -> DiskFacts:
    return DiskFacts(
        target=attribute(disk, "target", "dev"),
        bus=attribute(disk, "target", "bus"),
        kind=disk.get("type", ""),
        format=attribute(disk, "driver", "type") or "raw",
        source=source_text(disk),
        alias=attribute(disk, "alias", "name"),
        iothread=_has_thread(disk, threaded),
        refusal=next(iter(_refusals(disk)), ""),
    )


def _refusals(disk: ET.Element) -> Iterable[str]:
    """Why a disk can't be tapped, most telling reason first."""
    if disk.get("device") == "lun":
        yield "a LUN passed through: the guest's SCSI commands go past QEMU's block layer"
    if disk.get("type") in ("vhostuser", "vhostvdpa"):
        yield f"{disk.get('type')}: the guest's writes go past QEMU's block layer"
    if disk.get("type") == "dir":
        yield "a directory shown as a disk"
    if disk.find("shareable") is not None:
        yield "shareable: other machines may write to it, past the tap"
    if disk.find("readonly") is not None:
        yield "read-only: nothing is written to it"
    if disk.find("transient") is not None:
        yield "transient: its writes are thrown away at power-off"
    if disk.find("encryption") is not None or disk.find("source/encryption") is not None:
        yield "encrypted by QEMU: the replica would hold the clear text"
    if not source_text(disk):
        yield "no source"
