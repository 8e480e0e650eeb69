"""Rewrite a machine's definition for the site where it is recovered. Pure.

What can't travel is dropped, and every change that a person would want to know of is told as a note.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from drctl.errors import HypervisorRefused
from drctl.hypervisor.domain_xml import attribute, parse, source_text
from drctl.hypervisor.guest_state import SecretRef
from drctl.hypervisor.recovery_firmware import Flash, rewrite_firmware, rewrite_tpm
from drctl.hypervisor.recovery_fit import HostFacts, adapt, unmet
from drctl.hypervisor.recovery_sizing import renew_addresses, resize_memory, resize_processors

__all__ = ["Overlay", "Recovery", "Rewritten", "rewrite", "settle", "unmet"]

#: An interface that is cut off is a UDP socket to nobody with its link down: every QEMU has it, it needs no network and
#: no privilege. (libvirt's `null` type would say it better; libvirt 9.0.0 dies when such a machine is started.)
_NOWHERE: Final = ("127.0.0.1", "65009")

#: Host devices: what they are is at the other site.
_HOST_DEVICES: Final = {
    "hostdev": "a device of the source host",
    "redirdev": "a redirected USB device",
    "smartcard": "a smart card of the source host",
    "shmem": "memory shared with the source host",
    "lease": "a lock lease of the source host",
}
_CHARACTER_DEVICES: Final = ("serial", "parallel", "console", "channel")
#: Attributes of `<driver>` that mean the same with an overlay on any file system.
_DRIVER_KEPT: Final = ("discard", "detect_zeroes", "iothread", "queues", "queue_size", "packed", "iommu", "ats")


@dataclass(frozen=True, slots=True)
class Overlay:
    """The disk's qcow2 file here, and the view under it. `socket` empty: the file stands alone."""

    path: str
    socket: str = ""
    export: str = ""


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a machine is to appear here.

    `overlays` by disk target. An empty `name` or `uuid` is kept. `networks` maps networks and bridges (a destination
    `bridge:NAME` is a bridge of the host); one that is not in it keeps its name in a failover and is cut off when
    `isolated` (a test). `paths` maps path prefixes of the source site to those of this one; the longest that fits
    wins. `memory` (bytes), `vcpus` and `new_macs` change the machine itself; 0 and False: as it is defined.

    `flash` is its firmware's (None: kept as it is named, which is right where both hosts are alike), `tpm` whether the
    state of its TPM travelled, `media` files for its CD-ROM drives by target. `host` is what it is to run on, where
    that is known, `secrets` are those that it needs, as the source named them."""

    overlays: Mapping[str, Overlay]
    name: str = ""
    uuid: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    isolated: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)
    memory: int = 0
    vcpus: int = 0
    new_macs: bool = False
    flash: Flash | None = None
    tpm: bool = False
    media: Mapping[str, str] = field(default_factory=dict)
    host: HostFacts | None = None
    secrets: tuple[SecretRef, ...] = ()


@dataclass(frozen=True, slots=True)
class Rewritten:
    """`variables`: the UEFI variables that travelled are of use for the firmware of this host."""

    definition: str
    notes: tuple[str, ...]
    variables: bool = False


def rewrite(definition: str, recovery: Recovery) -> Rewritten:
    """The definition for this site. Raises IntegrityError (not a definition), HypervisorRefused (a disk of the
    recovery is not in it, or it can't be changed as it is wanted)."""
    root = parse(definition)
    notes: list[str] = []
    _identify(root, recovery, notes)
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    _rewrite_disks(devices, recovery, notes)
    for interface in devices.findall("interface"):
        _rewrite_interface(interface, recovery, notes)
    _resize(root, devices, recovery, notes)
    _rewrite_paths(root, recovery, notes)
    _drop_host_devices(devices, recovery, notes)
    _loosen_graphics(devices)
    if recovery.host is not None:
        adapt(root, recovery.host, recovery.secrets, notes)
    # After the machine type is settled: firmware is made for some.
    variables = rewrite_firmware(root, recovery.flash, notes) if recovery.flash is not None else False
    rewrite_tpm(root, travelled=recovery.tpm, notes=notes)
    return Rewritten(ET.tostring(root, encoding="unicode"), tuple(notes), variables)


def _resize(root: ET.Element, devices: ET.Element, recovery: Recovery, notes: list[str]) -> None:
    if recovery.memory:
        resize_memory(root, recovery.memory, notes)
    if recovery.vcpus:
        resize_processors(root, recovery.vcpus, notes)
    if recovery.new_macs:
        renew_addresses(devices, f"{root.findtext('name')}/{root.findtext('uuid')}", notes)


def settle(definition: str) -> str:
    """The same definition once its overlays stand alone: without what was under them."""
    root = parse(definition)
    for disk in root.iterfind("devices/disk"):
        for backing in disk.findall("backingStore"):
            disk.remove(backing)
    return ET.tostring(root, encoding="unicode")


# -- identity ---------------------------------------------------------------------------------------------------------


def _identify(root: ET.Element, recovery: Recovery, notes: list[str]) -> None:
    root.attrib.pop("id", None)
    if recovery.name:
        _set_text(root, "name", recovery.name)
    if recovery.uuid:
        _set_text(root, "uuid", recovery.uuid)
        _follow_uuid(root, recovery.uuid)
    generation = root.find("genid")
    if generation is not None:
        # The guest (Active Directory, for one) learns by a new one that it went back in time.
        generation.text = None
        notes.append("genid: a new VM generation id is made, so that the guest knows that it was recovered")


def _follow_uuid(root: ET.Element, uuid: str) -> None:
    """SMBIOS repeats the machine's UUID; libvirt refuses a definition in which they differ."""
    for entry in root.iterfind("sysinfo/system/entry"):
        if entry.get("name") == "uuid":
            entry.text = uuid


def _set_text(root: ET.Element, tag: str, text: str) -> None:
    found = root.find(tag)
    if found is None:
        found = ET.SubElement(root, tag)
    found.text = text


# -- disks ------------------------------------------------------------------------------------------------------------


def _rewrite_disks(devices: ET.Element, recovery: Recovery, notes: list[str]) -> None:
    seen = set()
    for disk in devices.findall("disk"):
        target, device = attribute(disk, "target", "dev"), disk.get("device", "disk")
        if device == "disk" and target in recovery.overlays:
            _overlay(disk, recovery.overlays[target])
            seen.add(target)
        elif device == "cdrom":
            _change_medium(disk, target, recovery.media.get(target, ""), notes)
        else:
            devices.remove(disk)
            notes.append(f"{device} {target}: dropped, it is not replicated{_was(disk)}")
    if missing := sorted(set(recovery.overlays) - seen):
        raise HypervisorRefused(f"the definition has no disk {', '.join(missing)}", disks=missing)


def _overlay(disk: ET.Element, overlay: Overlay) -> None:
    kept = {name: value for name in _DRIVER_KEPT if (value := attribute(disk, "driver", name))}
    for child in list(disk):
        if child.tag in (
            "driver",
            "source",
            "backingStore",
            "mirror",
            "auth",
            "readonly",
            "shareable",
            "alias",
            "encryption",
        ):
            disk.remove(child)
    disk.set("type", "file")
    disk.attrib.pop("snapshot", None)
    # Without `stop` a guest sees I/O errors when the view's server dies; with it, it waits until it is back.
    driver = {"name": "qemu", "type": "qcow2", "error_policy": "stop", "rerror_policy": "stop", **kept}
    disk.insert(0, ET.Element("driver", driver))
    disk.insert(1, ET.Element("source", {"file": overlay.path}))
    if overlay.socket:
        disk.insert(2, _backing(overlay))


def _backing(overlay: Overlay) -> ET.Element:
    backing = ET.Element("backingStore", {"type": "network"})
    ET.SubElement(backing, "format", {"type": "raw"})
    source = ET.SubElement(backing, "source", {"protocol": "nbd", "name": overlay.export})
    ET.SubElement(source, "host", {"transport": "unix", "socket": overlay.socket})
    ET.SubElement(backing, "backingStore")
    return backing


def _change_medium(disk: ET.Element, target: str, path: str, notes: list[str]) -> None:
    """A medium that travelled is at `path`; others stay at the source. The drive stays, so that the guest's devices
    keep their places."""
    medium = source_text(disk)
    for child in list(disk):
        if child.tag in ("source", "backingStore", "mirror", "auth", "alias"):
            disk.remove(child)
    if medium or path:
        disk.set("type", "file")
    if path:
        disk.append(ET.Element("source", {"file": path}))
    elif medium:
        notes.append(f"cdrom {target}: medium dropped (was {medium})")


def _was(element: ET.Element) -> str:
    source = source_text(element)
    return f" (was {source})" if source else ""


# -- networks ---------------------------------------------------------------------------------------------------------


def _rewrite_interface(interface: ET.Element, recovery: Recovery, notes: list[str]) -> None:
    kind = interface.get("type", "")
    network = attribute(interface, "source", "network") or attribute(interface, "source", "bridge")
    label = f"interface {attribute(interface, 'mac', 'address') or kind}"
    _strip(interface, ("target", "alias", "backend", "filterref", "portForward"))
    if network in recovery.networks and network:
        _connect(interface, recovery.networks[network])
        if recovery.networks[network] != network:
            notes.append(f"{label}: {network} becomes {recovery.networks[network]}")
    elif recovery.isolated:
        _cut_off(interface)
        notes.append(f"{label}: cut off (was {network or kind})")
    elif kind not in ("network", "bridge", "user"):
        _cut_off(interface)
        notes.append(f"{label}: cut off, {kind} is tied to the source host")
    elif network:
        notes.append(f"{label}: keeps {network}, for which no mapping is given")


def _connect(interface: ET.Element, destination: str) -> None:
    """Attach to a network of this site; `bridge:NAME` names a bridge of the host."""
    _strip(interface, ("source", "virtualport", "vlan"))
    kind, _, name = destination.rpartition(":") if destination.startswith("bridge:") else ("network", "", destination)
    interface.set("type", kind)
    interface.insert(0, ET.Element("source", {kind: name}))


def _cut_off(interface: ET.Element) -> None:
    _strip(interface, ("source", "virtualport", "vlan", "link", "bandwidth", "ip", "route", "script", "port"))
    interface.set("type", "udp")
    address, port = _NOWHERE
    source = ET.Element("source", {"address": address, "port": port})
    ET.SubElement(source, "local", {"address": address, "port": port})
    interface.insert(0, source)
    ET.SubElement(interface, "link", {"state": "down"})


def _strip(element: ET.Element, tags: tuple[str, ...]) -> None:
    for child in list(element):
        if child.tag in tags:
            element.remove(child)


# -- files and sockets ------------------------------------------------------------------------------------------------


def _rewrite_paths(root: ET.Element, recovery: Recovery, notes: list[str]) -> None:
    rebase = _rebaser(recovery.paths)
    _strip_all(root, "devices", "emulator")  # libvirt knows its own
    flash = () if recovery.flash is not None else ("os/nvram", "os/loader")
    for path in ("os/kernel", "os/initrd", "os/dtb", *flash):
        found = root.find(path)
        if found is not None and found.text:
            found.text = _moved(found.text.strip(), path.partition("/")[2], rebase, notes)
    for tag in _CHARACTER_DEVICES:
        for device in root.iterfind(f"devices/{tag}"):
            _rewrite_character_device(device, tag, rebase, notes)


def _rewrite_character_device(
    device: ET.Element, tag: str, rebase: Callable[[str], str | None], notes: list[str]
) -> None:
    _strip(device, ("alias",))
    label = f"{tag} {attribute(device, 'target', 'name') or attribute(device, 'target', 'port') or ''}".strip()
    for element in (*device.findall("source"), *device.findall("log")):
        key = "file" if element.tag == "log" else "path"
        path = element.get(key, "")
        if not path:
            continue
        if (moved := rebase(path)) is not None:
            element.set(key, moved)
        elif element.tag == "log" or device.get("type") == "unix":
            # libvirt chooses a socket itself for a channel without a path; a log that nobody asked for is no loss.
            device.remove(element)
            notes.append(f"{label}: {path} dropped, it is a path of the source host")
        elif device.get("type") != "pty":
            notes.append(f"{label}: keeps {path}")
    if device.get("type") == "unix" and tag != "channel" and device.find("source") is None:
        device.set("type", "pty")


def _rebaser(paths: Mapping[str, str]) -> Callable[[str], str | None]:
    """A function that moves a path to this site; None when no prefix fits."""
    ordered = sorted(paths.items(), key=lambda pair: -len(pair[0]))

    def rebase(path: str) -> str | None:
        for old, new in ordered:
            prefix = old.rstrip("/")
            if path == prefix or path.startswith(prefix + "/"):
                return new.rstrip("/") + path[len(prefix) :]
        return None

    return rebase


def _moved(path: str, label: str, rebase: Callable[[str], str | None], notes: list[str]) -> str:
    moved = rebase(path)
    if moved is None and label != "loader":
        notes.append(f"{label}: {path} must be here, too; files beside the disks are not replicated")
    return moved or path


def _strip_all(root: ET.Element, parent: str, tag: str) -> None:
    for element in root.iterfind(parent):
        _strip(element, (tag,))


# -- what stays behind ------------------------------------------------------------------------------------------------


def _drop_host_devices(devices: ET.Element, recovery: Recovery, notes: list[str]) -> None:
    rebase = _rebaser(recovery.paths)
    for device in list(devices):
        if device.tag in _HOST_DEVICES:
            devices.remove(device)
            notes.append(f"{device.tag}: dropped, it is {_HOST_DEVICES[device.tag]}")
        elif device.tag == "filesystem":
            source = device.find("source")
            moved = rebase(source.get("dir", "")) if source is not None else None
            if source is not None and moved:
                source.set("dir", moved)
            else:
                devices.remove(device)
                notes.append("filesystem: dropped, it is a directory of the source host")


def _loosen_graphics(devices: ET.Element) -> None:
    """A fixed port or socket may be taken here, and is taken in a test beside the machine itself."""
    for graphics in devices.findall("graphics"):
        if graphics.get("type") not in ("vnc", "spice"):
            devices.remove(graphics)
            continue
        for name in ("port", "tlsPort", "websocket", "socket"):
            graphics.attrib.pop(name, None)
        graphics.set("autoport", "yes")
        for listen in graphics.findall("listen"):
            if listen.get("type") in ("socket", "network"):
                graphics.remove(listen)
