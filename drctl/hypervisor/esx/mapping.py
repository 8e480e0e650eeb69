"""A machine as libvirt defines it, made one of VMware: its .vmx, and what of it becomes something else. Pure.

The other way round is domain.py; what came from there goes back as it was. What a guest surely has drivers for is
taken where VMware has no such device: AHCI for virtio disks, an Intel card for virtio's."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from drctl.errors import HypervisorRefused
from drctl.hypervisor.domain_xml import attribute, memory_bytes, parse, source_text, vcpus
from drctl.hypervisor.recovery_sizing import renew_addresses
from drctl.hypervisor.vmx import Vmx
from drctl.model.extent import MiB

#: libvirt's SCSI controllers that VMware has, too, and what is to be said of it.
_SCSI = {
    "vmpvscsi": ("pvscsi", ""),
    "lsisas1068": ("lsisas1068", ""),
    "lsisas1078": ("lsisas1068", "VMware has no LSI SAS 1078: the guest finds an LSI SAS 1068"),
    "lsilogic": ("lsilogic", "VMware has no LSI 53C895A: the guest finds an LSI 53C1030"),
    "buslogic": ("buslogic", ""),
}
_SCSI_CONTROLLERS, _SCSI_UNITS, _SCSI_SELF = 4, 16, 7
_SATA_CONTROLLERS, _SATA_UNITS = 4, 30
_IDE_CHANNELS, _IDE_UNITS = 2, 2
_CARDS = {"vmxnet3": "vmxnet3", "e1000": "e1000", "e1000e": "e1000e", "pcnet": "vlance"}
#: Every guest has a driver for it.
_COMMON_CARD = "e1000e"
_MOST_CARDS = 10
_SERIAL_PORTS = 4
#: ESXi's versions → the newest hardware that all of their updates know (KB 1003746). A newer ESXi knows older ones.
_HARDWARE = {(6, 5): 13, (6, 7): 14, (7, 0): 17, (8, 0): 20}
_OLDEST_HARDWARE = 13
#: Devices of a definition that have nothing to do here.
_LEFT = {
    "hostdev": "it is a device of the source host",
    "redirdev": "it is a redirected USB device",
    "smartcard": "it is a smart card of the source host",
    "shmem": "it is memory shared with the source host",
    "filesystem": "it is a directory of the source host",
    "lease": "it is a lock lease of the source host",
    "watchdog": "VMware has none",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a machine is to appear on an ESX host. `disks` are files beside the .vmx by libvirt's targets, `media` and
    `seed` likewise.

    `networks` maps names of networks and bridges to port groups; one that is not in it keeps its name, and is cut off
    where `isolated`. 0 and False: as it is defined."""

    name: str
    uuid: str
    disks: Mapping[str, str]
    version: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    isolated: bool = False
    memory: int = 0
    vcpus: int = 0
    new_macs: bool = False
    media: Mapping[str, str] = field(default_factory=dict)
    seed: str = ""
    nvram: str = ""


@dataclass(frozen=True, slots=True)
class Mapped:
    """`cards`: (MAC address, port group or "") of each network card, in order."""

    vmx: Vmx
    notes: tuple[str, ...]
    cards: tuple[tuple[str, str], ...]


class _Making:
    """One .vmx while it is made."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.notes: list[str] = []
        self._taken: set[str] = set()

    def place(self, device: str) -> bool:
        """Whether the device's place was free; it is taken now."""
        free = device not in self._taken
        self._taken.add(device)
        return free

    def next_sata(self) -> str:
        every = (f"sata{n}:{unit}" for n in range(_SATA_CONTROLLERS) for unit in range(_SATA_UNITS))
        found = next((device for device in every if device not in self._taken), None)
        if found is None:
            raise HypervisorRefused("it has more disks than four SATA controllers take")
        self._taken.add(found)
        return found

    def device(self, device: str, file: str, **more: str) -> None:
        self.values |= {f"{device}.present": "TRUE", f"{device}.fileName": file}
        self.values |= {f"{device}.{key}": value for key, value in more.items()}
        self.values[f"{device.partition(':')[0]}.present"] = "TRUE"


def hardware(version: str) -> int:
    """The virtual hardware for a host of this version (`8.0.3`)."""
    match = re.match(r"(\d+)\.(\d+)", version)
    told = (int(match[1]), int(match[2])) if match else (0, 0)
    return max((number for known, number in _HARDWARE.items() if known <= told), default=_OLDEST_HARDWARE)


def map_machine(definition: str, wanted: Wanted) -> Mapped:
    """The machine for an ESX host. Raises IntegrityError (no definition), HypervisorRefused (it can't run there)."""
    root = parse(definition)
    _demand_processor(root)
    making = _Making()
    _identify(making, root, wanted)
    _firmware(making, root, wanted)
    if wanted.new_macs and (devices := root.find("devices")) is not None:
        renew_addresses(devices, f"{wanted.name}/{wanted.uuid}", making.notes)
    boot = _disks(making, root, wanted)
    _media(making, root, wanted)
    if boot and making.values["firmware"] == "bios":
        making.values |= {"bios.bootOrder": "hdd", "bios.hddOrder": boot}
    cards = _cards(making, root, wanted)
    _serial_ports(making, root)
    making.notes += _left(root)
    return Mapped(Vmx(making.values), tuple(making.notes), cards)


def is_windows(root: ET.Element) -> bool:
    """By libosinfo's name of the system, or as libvirt's tools define Windows: with Hyper-V's features or its clock."""
    for found in root.iter():
        if found.tag.endswith("}os") and "microsoft.com" in found.get("id", ""):
            return True
    return root.find("features/hyperv") is not None or attribute(root, "clock", "offset") == "localtime"


# -- the machine -------------------------------------------------------------------------------------------------------


def _demand_processor(root: ET.Element) -> None:
    arch = attribute(root, "os/type", "arch") or "x86_64"
    if arch not in ("x86_64", "i686"):
        raise HypervisorRefused(f"its processor is {arch}: ESX hosts run x86 alone")


def _identify(making: _Making, root: ET.Element, wanted: Wanted) -> None:
    number = hardware(wanted.version)
    megabytes = -(-(wanted.memory or memory_bytes(root) or 1024 * MiB) // (4 * MiB)) * 4
    making.values |= {
        "config.version": "8",
        "virtualHW.version": str(number),
        "displayName": wanted.name,
        "guestOS": _system(root),
        "memSize": str(megabytes),
        "numvcpus": str(wanted.vcpus or vcpus(root)),
        "uuid.bios": vmx_uuid(wanted.uuid),
        # It is the machine itself, with its addresses: without this the host asks whether it was moved or copied.
        "uuid.action": "keep",
        "floppy0.present": "FALSE",
        "tools.syncTime": "FALSE",
        "pciBridge0.present": "TRUE",
    }
    # Without PCIe root ports vmxnet3, pvscsi and e1000e find no slot.
    for index in range(4, 8):
        making.values |= {
            f"pciBridge{index}.present": "TRUE",
            f"pciBridge{index}.virtualDev": "pcieRootPort",
            f"pciBridge{index}.functions": "8",
        }


def vmx_uuid(uuid: str) -> str:
    """As a .vmx writes it: `56 4d 00 … -00 … c1`. Raises HypervisorRefused."""
    digits = re.sub(r"[^0-9a-f]", "", uuid.lower())
    if len(digits) != 32:
        raise HypervisorRefused(f"{uuid!r} is no UUID")
    pairs = [digits[at : at + 2] for at in range(0, 32, 2)]
    return f"{' '.join(pairs[:8])}-{' '.join(pairs[8:])}"


def _system(root: ET.Element) -> str:
    wide = (attribute(root, "os/type", "arch") or "x86_64") == "x86_64"
    if is_windows(root):
        return "windows9-64" if wide else "windows9"
    return "other3xlinux-64" if wide else "other3xlinux"


def _firmware(making: _Making, root: ET.Element, wanted: Wanted) -> None:
    system, loader = root.find("os"), root.find("os/loader")
    told = "" if system is None else system.get("firmware", "")
    efi = told == "efi" or (loader is not None and loader.get("type") == "pflash")
    making.values["firmware"] = "efi" if efi else "bios"
    if wanted.nvram:
        making.values["nvram"] = wanted.nvram
    if efi:
        making.values["uefi.secureBoot.enabled"] = "FALSE"
        making.notes.append("nvram: its UEFI variables stay behind: it boots by \\EFI\\BOOT\\BOOTX64.EFI")
    if loader is not None and loader.get("secure") == "yes":
        making.notes.append("firmware: secure boot is off there")
    if root.find("devices/tpm") is not None:
        making.notes.append("tpm: it has none there: what is sealed by it (BitLocker, LUKS) asks for its recovery key")


# -- disks -------------------------------------------------------------------------------------------------------------


def _disks(making: _Making, root: ET.Element, wanted: Wanted) -> str:
    """The place of the disk that it boots from."""
    models = _models(root)
    every = [one for one in root.iterfind("devices/disk") if one.get("device", "disk") in ("disk", "lun")]
    ours = [one for one in every if attribute(one, "target", "dev") in wanted.disks]
    making.notes += [
        f"disk {attribute(one, 'target', 'dev')}: dropped, it is not replicated" for one in every if one not in ours
    ]
    known = {attribute(one, "target", "dev") for one in ours}
    if missing := sorted(set(wanted.disks) - known):
        raise HypervisorRefused(f"the definition has no disk {', '.join(missing)}", disks=missing)
    # Those that keep their places first, so that the others find what is left.
    places: dict[str, str] = {}
    kept = {attribute(one, "target", "dev"): _own_place(one, models) for one in ours}
    for name, (device, model, _) in kept.items():
        if device and making.place(device):
            places[name] = device
            if model:
                making.values[f"{device.partition(':')[0]}.virtualDev"] = model
    first = _boot_disk(ours)
    for disk in ours:
        name = attribute(disk, "target", "dev")
        place = places.get(name) or making.next_sata()
        if name not in places:
            _demand_driver(root, name, attribute(disk, "target", "bus"), first=name == first)
            making.notes.append(f"{name}: the guest finds it at a SATA controller (it was {_bus(disk)})")
        elif note := kept[name][2]:
            making.notes.append(f"{name}: {note}")
        making.device(place, wanted.disks[name], deviceType="disk") if place.startswith("ide") else making.device(
            place, wanted.disks[name]
        )
        places[name] = place
    return places.get(first, "")


def _bus(disk: ET.Element) -> str:
    return attribute(disk, "target", "bus") or "no bus that is told"


def _demand_driver(root: ET.Element, name: str, bus: str, *, first: bool) -> None:
    """Windows starts only drivers of controllers that it has booted from before."""
    if first and is_windows(root):
        raise HypervisorRefused(
            f"it is Windows and boots from {name} at {bus or 'a controller of QEMU'}: it would not find its disk at a "
            "controller of VMware",
            hint="give it a disk at a SATA or LSI SAS controller at the source once, boot it, and move the boot disk "
            "there; virt-v2v-in-place knows the way from VMware alone",
        )


def _models(root: ET.Element) -> dict[str, str]:
    """Kinds of SCSI controllers by their index."""
    return {
        one.get("index", "0"): one.get("model", "")
        for one in root.iterfind("devices/controller")
        if one.get("type") == "scsi"
    }


def _own_place(disk: ET.Element, models: Mapping[str, str]) -> tuple[str, str, str]:
    """(device, controller's kind or "", note) where VMware has such a place; ("", "", "") else."""
    bus, address = attribute(disk, "target", "bus"), disk.find("address")
    if address is None or address.get("type", "drive") != "drive":
        return "", "", ""
    number, channel, unit = (_number(address.get(key, "0")) for key in ("controller", "bus", "unit"))
    if bus == "scsi" and (known := _SCSI.get(models.get(str(number), ""))):
        fits = number < _SCSI_CONTROLLERS and unit < _SCSI_UNITS and unit != _SCSI_SELF and not channel
        return (f"scsi{number}:{unit}", *known) if fits else ("", "", "")
    if bus == "sata" and number < _SATA_CONTROLLERS and unit < _SATA_UNITS and not channel:
        return f"sata{number}:{unit}", "", ""
    if bus == "ide" and not number and channel < _IDE_CHANNELS and unit < _IDE_UNITS:
        return f"ide{channel}:{unit}", "", ""
    return "", "", ""


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 1 << 20


def _boot_disk(disks: Sequence[ET.Element]) -> str:
    """By its boot order, else the first."""
    ordered = [(_number(attribute(one, "boot", "order")), at) for at, one in enumerate(disks)]
    return attribute(disks[min(ordered)[1]], "target", "dev") if disks else ""


def _media(making: _Making, root: ET.Element, wanted: Wanted) -> None:
    """Drives with a medium that travelled; empty ones are of no use, others' media stay at the source."""
    for drive in root.iterfind("devices/disk"):
        target, medium = attribute(drive, "target", "dev"), source_text(drive)
        if drive.get("device") == "cdrom" and target in wanted.media:
            making.device(making.next_sata(), wanted.media[target], deviceType="cdrom-image")
        elif drive.get("device") == "cdrom" and medium:
            making.notes.append(f"cdrom {target}: medium dropped (was {medium})")
    if wanted.seed:
        making.device(making.next_sata(), wanted.seed, deviceType="cdrom-image")
        making.notes.append("cdrom: a seed for cloud-init with its addresses")


# -- cards and ports ---------------------------------------------------------------------------------------------------


def _cards(making: _Making, root: ET.Element, wanted: Wanted) -> tuple[tuple[str, str], ...]:
    found = root.findall("devices/interface")
    if len(found) > _MOST_CARDS:
        raise HypervisorRefused(f"it has {len(found)} network cards: VMware's machines have {_MOST_CARDS} at most")
    return tuple(_card(making, number, interface, wanted) for number, interface in enumerate(found))


def _card(making: _Making, number: int, interface: ET.Element, wanted: Wanted) -> tuple[str, str]:
    card, mac = f"ethernet{number}", attribute(interface, "mac", "address").lower()
    network = attribute(interface, "source", "network") or attribute(interface, "source", "bridge")
    kind = attribute(interface, "model", "type")
    ours = _CARDS.get(kind, _COMMON_CARD)
    label = f"interface {mac or number}"
    if ours != kind:
        making.notes.append(f"{label}: the guest finds an {ours} (it was {kind or 'of no kind that is told'})")
    making.values |= {f"{card}.present": "TRUE", f"{card}.virtualDev": ours}
    if re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", mac):
        # Beyond VMware's own range an address is taken only where it is not checked.
        static = {"addressType": "static", "address": mac, "checkMACAddress": "FALSE"}
        making.values |= {f"{card}.{key}": value for key, value in static.items()}
    else:
        making.values[f"{card}.addressType"] = "generated"
        making.notes.append(f"{label}: it gets a new address")
    group = _port_group(making, label, network, wanted)
    making.values[f"{card}.startConnected"] = "TRUE" if group else "FALSE"
    if group:
        making.values[f"{card}.networkName"] = group
    return mac, group


def _port_group(making: _Making, label: str, network: str, wanted: Wanted) -> str:
    """Where the card is connected; "" for nowhere."""
    if network and network in wanted.networks:
        group = wanted.networks[network]
        if group != network:
            making.notes.append(f"{label}: {network} becomes {group}")
        return group
    if wanted.isolated or not network:
        making.notes.append(f"{label}: cut off (was {network or 'tied to the source host'})")
        return ""
    making.notes.append(f"{label}: keeps {network}, for which no mapping is given")
    return network


def _serial_ports(making: _Making, root: ET.Element) -> None:
    """A port that writes a file does so beside the machine; others lead nowhere there."""
    for number, port in enumerate(root.findall("devices/serial")[:_SERIAL_PORTS]):
        serial = f"serial{number}"
        if port.get("type") == "file" or attribute(port, "log", "file"):
            making.values |= {
                f"{serial}.present": "TRUE",
                f"{serial}.fileType": "file",
                f"{serial}.fileName": f"serial{number}.log",
                f"{serial}.yieldOnMsrRead": "TRUE",
            }
        else:
            making.notes.append(f"serial {number}: dropped, it leads to the source host")


def _left(root: ET.Element) -> Iterator[str]:
    for tag, why in _LEFT.items():
        if root.find(f"devices/{tag}") is not None:
            yield f"{tag}: dropped, {why}"
    if any(attribute(one, "target", "name") for one in root.iterfind("devices/channel")):
        yield "channel: dropped: VMware has no virtio channels, so no QEMU guest agent answers"
