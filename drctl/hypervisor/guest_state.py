"""What a definition says of a machine's state beside its disks: UEFI variables, TPM, media, secrets. Pure."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass

from drctl.hypervisor.domain_xml import attribute, source_text

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Variables:
    """The UEFI variable store. `path` is empty before the first start with a firmware that libvirt chooses; `refusal`
    says why it is no file that can be taken along."""

    path: str
    format: str
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class TpmFacts:
    """`backend`: `emulator`, `passthrough`, `external`. `directory` is empty where libvirt chooses."""

    backend: str
    version: str
    directory: str = ""
    secret: str = ""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Medium:
    target: str
    path: str
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class SecretRef:
    """A secret that the definition names, by UUID or by type and usage."""

    needed_by: str
    uuid: str = ""
    kind: str = ""
    usage: str = ""


def is_uefi(root: ET.Element) -> bool:
    """Whether it boots by UEFI with variables of its own."""
    system = root.find("os")
    if system is None:
        return False
    return system.get("firmware") == "efi" or system.find("nvram") is not None or _loader(root).get("type") == "pflash"


def secure(root: ET.Element) -> bool:
    """Whether the definition asks for secure boot."""
    asked = {each.get("name") for each in root.iterfind("os/firmware/feature") if each.get("enabled") == "yes"}
    return _loader(root).get("secure") == "yes" or "secure-boot" in asked


def _loader(root: ET.Element) -> ET.Element:
    found = root.find("os/loader")
    return found if found is not None else ET.Element("loader")


def variables(root: ET.Element) -> Variables | None:
    """None for a machine without UEFI, or whose firmware keeps no variables."""
    if not is_uefi(root) or _loader(root).get("stateless") == "yes":
        return None
    found = root.find("os/nvram")
    if found is None:
        return Variables("", "raw")
    kind, form = found.get("type", "file"), found.get("format", "raw")
    path = attribute(found, "source", "file") or (found.text or "").strip()
    if kind != "file" or (found.find("source") is not None and not path):
        return Variables("", form, f"its variables are on a {kind} device, not in a file")
    return Variables(path, form)


def tpm(root: ET.Element) -> TpmFacts | None:
    """Of the machine's TPM; None when it has none."""
    backend = root.find("devices/tpm/backend")
    if backend is None:
        return None
    kind, version = backend.get("type", ""), backend.get("version", "2.0")
    if kind != "emulator":
        return TpmFacts(kind, version, refusal=f"the TPM is {_BACKENDS.get(kind, kind)}: its state can't be had")
    secret = attribute(backend, "encryption", "secret")
    source = backend.find("source")
    if source is None:
        return TpmFacts(kind, version, secret=secret)
    if source.get("type") == "dir":
        return TpmFacts(kind, version, source.get("path", ""), secret)
    return TpmFacts(kind, version, secret=secret, refusal="the TPM's state is a file or device of its own format")


_BACKENDS = {"passthrough": "a chip of the source host", "external": "run by somebody else than libvirt"}


def media(root: ET.Element) -> Iterator[Medium]:
    """What lies in the CD-ROM drives."""
    for disk in root.iterfind("devices/disk"):
        if disk.get("device") != "cdrom" or disk.find("source") is None:
            continue
        target, path = attribute(disk, "target", "dev"), attribute(disk, "source", "file")
        if disk.get("type", "file") == "file" and path:
            yield Medium(target, path)
        elif where := source_text(disk):
            yield Medium(target, where, "it is no file")


def secrets(root: ET.Element) -> Iterator[SecretRef]:
    """The secrets that the machine needs where it is recovered: those of its disks' storage stay with that storage."""
    facts = tpm(root)
    if facts is not None and facts.secret:
        yield SecretRef("tpm", uuid=facts.secret)
    for medium in root.iterfind("devices/*"):
        if medium.tag in ("disk", "tpm"):
            continue
        for element in medium.iter():
            if element.tag == "secret":
                yield SecretRef(medium.tag, element.get("uuid", ""), element.get("type", ""), element.get("usage", ""))
            elif element.tag == "encryption" and _UUID.fullmatch(element.get("secret", "")):
                yield SecretRef(medium.tag, uuid=element.get("secret", ""))
