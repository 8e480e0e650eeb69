"""What an appliance's machine on an ESX host is described by: its .vmx, its seed disk, what it tells at its console.

Pure text. The other end of the seed and of the console is in files/image/overlay/usr/local/sbin."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from drctl.errors import ConfigInvalid
from drctl.hypervisor import vmx
from drctl.hypervisor.vmx import Vmx
from drctl.model.extent import MiB
from drctl.model.site import ApplianceMachine

SYSTEM, SEED, CONSOLE = "system.vmdk", "seed.vmdk", "console.log"
#: The seed disk's size; the guest reads no more of it.
SEED_SIZE = 64 * 1024
#: 6.7's newest, the oldest host that drctl knows; newer ones run it.
_HARDWARE = 14
_WORD = "drctl-appliance"
_LINE = re.compile(rf"{_WORD} (\w+) (.+) ([0-9a-f]{{16}})\r?")
_NAME = re.compile(r"[A-Za-z0-9.:%-]+")


def machine_name(host: str) -> str:
    """What it is called on its host."""
    return f"drctl-{host}"


def definition(name: str, uuid: str, machine: ApplianceMachine) -> str:
    """The .vmx. Its serial port writes a file that whoever may enter the host can read."""
    values = {
        "config.version": "8",
        "virtualHW.version": str(_HARDWARE),
        "displayName": name,
        "annotation": "drctl's appliance of this host. Made by drctl appliance install.",
        "guestinfo.drctl.appliance": uuid,
        "guestOS": "debian10-64",
        "firmware": "bios",
        "numvcpus": str(machine.vcpus),
        "memSize": str(machine.memory // MiB),
        "floppy0.present": "FALSE",
        "pciBridge0.present": "TRUE",
        "scsi0.present": "TRUE",
        "scsi0.virtualDev": "pvscsi",
    }
    for bridge in range(4, 8):
        values |= {f"pciBridge{bridge}.present": "TRUE", f"pciBridge{bridge}.virtualDev": "pcieRootPort"}
        values[f"pciBridge{bridge}.functions"] = "8"
    for unit, file in enumerate((SYSTEM, SEED)):
        values |= {f"scsi0:{unit}.present": "TRUE", f"scsi0:{unit}.deviceType": "scsi-hardDisk"}
        values[f"scsi0:{unit}.fileName"] = file
    values |= {"ethernet0.present": "TRUE", "ethernet0.virtualDev": "vmxnet3", "ethernet0.addressType": "generated"}
    values |= {"ethernet0.networkName": machine.network, "serial0.present": "TRUE", "serial0.fileType": "file"}
    # At each start it asks what to do with what an earlier one told.
    values |= {"serial0.fileName": CONSOLE, "answer.msg.serial.file.open": "Replace"}
    return vmx.render(Vmx(values))


def descriptor(flat: str, size: int) -> str:
    """The descriptor of a flat disk of ours, `size` a multiple of 512."""
    identity = hashlib.sha256(flat.encode()).hexdigest()[:8]
    return (
        f'# Disk DescriptorFile\nversion=1\nCID={identity}\nparentCID=ffffffff\ncreateType="vmfs"\n\n'
        f'# Extent description\nRW {size // 512} VMFS "{flat}"\n\n# The Disk Data Base\n#DDB\n\n'
        f'ddb.virtualHWVersion = "{_HARDWARE}"\nddb.adapterType = "lsilogic"\nddb.geometry.cylinders = "1"\n'
        'ddb.geometry.heads = "64"\nddb.geometry.sectors = "32"\n'
    )


def seed(name: str, machine: ApplianceMachine, authorized_key: str) -> bytes:
    """The seed disk: a tar archive without a file system around it. Nothing in it is secret.

    Raises ConfigInvalid when it does not fit, or a word would be more than one."""
    files = {"authorized_keys": authorized_key.strip() + "\n", "hostname": f"{name}\n"}
    if machine.address:
        files["network"] = _network(machine)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("drctl-seed/")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for file, text in files.items():
            info = tarfile.TarInfo(f"drctl-seed/{file}")
            info.size, info.mode = len(text.encode()), 0o644
            archive.addfile(info, io.BytesIO(text.encode()))
    data = out.getvalue()
    if len(data) > SEED_SIZE:
        raise ConfigInvalid("drctl.toml", 0, "authorized_key", f"{machine.authorized_key} is too large for a seed")
    return data.ljust(SEED_SIZE, b"\0")


def _network(machine: ApplianceMachine) -> str:
    """A file for systemd-networkd. It comes before that of DHCP."""
    words = [machine.address.partition("/")[0], machine.gateway, *machine.nameservers]
    if odd := next((word for word in words if word and not _NAME.fullmatch(word)), None):
        raise ConfigInvalid("drctl.toml", 0, "machine", f"{odd!r} is no address")
    lines = ["[Match]", "Type=ether", "", "[Network]", f"Address={machine.address}"]
    lines += [f"Gateway={machine.gateway}"] if machine.gateway else []
    return "\n".join([*lines, *(f"DNS={server}" for server in machine.nameservers)]) + "\n"


@dataclass(frozen=True, slots=True)
class Told:
    """What a machine told at its console since it was started. `keys` are (kind, base64) of its SSH host keys."""

    keys: tuple[tuple[str, str], ...]
    addresses: tuple[str, ...]
    ready: bool


def told(console: str) -> Told:
    """What the console's text says; lines that others wrote into, or that are cut, are left out."""
    keys: dict[tuple[str, str], None] = {}
    addresses: dict[str, None] = {}
    ready = False
    for kind, value in _lines(console):
        name, _, key = value.partition(" ")
        if kind == "key" and key:
            keys[name, key] = None
        elif kind == "address":
            addresses[value] = None
        ready |= kind == "ready"
    return Told(tuple(keys), tuple(addresses), ready)


def _lines(console: str) -> Iterator[tuple[str, str]]:
    for line in console.split("\n"):
        match = _LINE.search(line)
        if match and hashlib.sha256(f"{match[1]} {match[2]}".encode()).hexdigest()[:16] == match[3]:
            yield match[1], match[2]
