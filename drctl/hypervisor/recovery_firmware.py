"""Firmware and TPM of a machine's definition, made fit for the site where it is recovered. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from drctl.errors import HypervisorRefused
from drctl.hypervisor import firmware as firmwares
from drctl.hypervisor.firmware import Firmware, Wanted
from drctl.hypervisor.guest_state import is_uefi, secure, tpm


@dataclass(frozen=True, slots=True)
class Flash:
    """A machine's firmware at its source, and what this host has.

    `path`: where its variables are to be here, `size` their bytes (0: they did not travel, new ones are
    made); `features` None: no descriptor told them."""

    offered: Sequence[Firmware]
    path: str
    size: int = 0
    format: str = "raw"
    loader: str = ""
    features: frozenset[str] | None = None


def rewrite_firmware(root: ET.Element, flash: Flash, notes: list[str]) -> bool:
    """Name this host's firmware and the place of the variables; whether the variables that travelled are of use.

    Raises HypervisorRefused where no UEFI of this host can run the machine."""
    system = root.find("os")
    if system is None or not is_uefi(root):
        return False
    wanted = _wanted(root, system, flash)
    chosen = firmwares.choose(flash.offered, wanted)
    kept = chosen is not None and flash.size > 0
    if chosen is None:
        chosen = firmwares.choose(flash.offered, _any_variables(wanted))
        if chosen is None:
            raise HypervisorRefused(_none_fits(wanted), hint="install UEFI firmware here, as at the source (ovmf)")
        notes.append(
            f"firmware: nothing here reads variables of {flash.size // 1024} KiB ({flash.format}), as the machine has "
            f"them; it begins with new ones of {chosen.loader}: boot entries and enrolled keys are lost"
        )
    elif not flash.size:
        notes.append("nvram: its variables did not travel; it begins with new ones, without its own boot entries")
    if wanted.loader and chosen.loader != wanted.loader:
        notes.append(f"firmware: {wanted.loader} becomes {chosen.loader}")
    _set(root, system, chosen, flash.path)
    return kept


def _wanted(root: ET.Element, system: ET.Element, flash: Flash) -> Wanted:
    loader = flash.loader or (system.findtext("loader") or "").strip()
    features = flash.features
    if features is None:
        features = firmwares.guessed(loader, secure(root))
    kind = system.find("type")
    arch, machine = ("", "") if kind is None else (kind.get("arch", ""), kind.get("machine", ""))
    return Wanted(arch, machine, flash.size, flash.format, features, loader)


def _any_variables(wanted: Wanted) -> Wanted:
    return Wanted(wanted.arch, wanted.machine, 0, "raw", wanted.features, wanted.loader)


def _none_fits(wanted: Wanted) -> str:
    kind = " with secure boot" if firmwares.SECURE_BOOT in wanted.features else ""
    return f"this host has no UEFI firmware{kind} for {wanted.machine or wanted.arch}"


def _set(root: ET.Element, system: ET.Element, chosen: Firmware, path: str) -> None:
    """By name, not by libvirt's choice: that could be one of other variables."""
    system.attrib.pop("firmware", None)
    for child in list(system):
        if child.tag in ("loader", "nvram", "firmware"):
            system.remove(child)
    # libvirt's `secure` asks QEMU for protected flash, which is what firmware with this feature insists on.
    smm = firmwares.REQUIRES_SMM in chosen.features
    attributes = {"readonly": "yes", "type": "pflash"} | ({"secure": "yes"} if smm else {})
    loader = ET.Element("loader", attributes)
    loader.text = chosen.loader
    variables = ET.Element("nvram", {"template": chosen.template})
    variables.text = path
    if chosen.format != "raw" or chosen.template_format != "raw":
        loader.set("format", chosen.format)
        variables.set("format", chosen.template_format)
    place = next((number for number, child in enumerate(system) if child.tag == "type"), -1) + 1
    system.insert(place, loader)
    system.insert(place + 1, variables)
    if smm:
        _set_smm(root)


def _set_smm(root: ET.Element) -> None:
    features = root.find("features")
    if features is None:
        features = ET.SubElement(root, "features")
    found = features.find("smm")
    if found is None:
        found = ET.SubElement(features, "smm")
    found.set("state", "on")


def rewrite_tpm(root: ET.Element, *, travelled: bool, notes: list[str]) -> None:
    """A chip of the source host goes; an emulated one is libvirt's, at its own place."""
    devices, facts = root.find("devices"), tpm(root)
    if devices is None or facts is None:
        return
    if facts.backend != "emulator":
        for device in devices.findall("tpm"):
            devices.remove(device)
        notes.append(f"tpm: dropped, {facts.refusal}")
        return
    for backend in devices.iterfind("tpm/backend"):
        for source in backend.findall("source"):
            backend.remove(source)
    if not travelled:
        notes.append("tpm: its state did not travel, the guest finds an empty one: what it sealed is lost to it")
