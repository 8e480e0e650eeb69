"""UEFI firmware as QEMU's descriptors tell of it, and the one that fits a machine of another host.

Pure but for `installed`.

Descriptors (docs/interop/firmware.json of QEMU) lie in three directories; a file of a later one hides one of the same
name in an earlier one, and an empty file hides it altogether. Their names give the order of preference."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = Path("/usr/share/qemu/firmware")
ADMIN = Path("/etc/qemu/firmware")

SECURE_BOOT = "secure-boot"
ENROLLED_KEYS = "enrolled-keys"
REQUIRES_SMM = "requires-smm"


@dataclass(frozen=True, slots=True)
class Firmware:
    """One flash firmware: code at `loader`, variables that begin as a copy of `template`, of `template_size` bytes (0
    when it is not there). `targets`: (architecture, patterns of machine types)."""

    loader: str
    template: str
    template_size: int
    features: frozenset[str]
    targets: tuple[tuple[str, tuple[str, ...]], ...]
    format: str = "raw"
    template_format: str = "raw"

    def runs(self, arch: str, machine: str) -> bool:
        return any(
            arch == name and any(fnmatch.fnmatchcase(machine, pattern) for pattern in patterns)
            for name, patterns in self.targets
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a machine's firmware has to be: `size` of its variables in bytes (0: there are none, any will do)."""

    arch: str
    machine: str
    size: int
    format: str
    features: frozenset[str]
    loader: str = ""


def choose(offered: Sequence[Firmware], wanted: Wanted) -> Firmware | None:
    """The best firmware whose variables are of the same kind; None when there is none.

    Secure boot is a must when it was wanted: without it the guest's own checks of it would fail. Beyond that: the same
    file, then no secure boot where there was none, then the same keys, then the host's order."""
    fitting = [one for one in offered if one.runs(wanted.arch, wanted.machine) and _reads(one, wanted)]
    if SECURE_BOOT in wanted.features:
        fitting = [one for one in fitting if SECURE_BOOT in one.features]

    def unlike(one: Firmware) -> tuple[bool, bool, bool]:
        secure = (SECURE_BOOT in one.features) != (SECURE_BOOT in wanted.features)
        keys = (ENROLLED_KEYS in one.features) != (ENROLLED_KEYS in wanted.features)
        return one.loader != wanted.loader, secure, keys

    return min(fitting, key=unlike, default=None)


def _reads(one: Firmware, wanted: Wanted) -> bool:
    if not wanted.size:
        return True
    if one.template_format != wanted.format:
        return False
    # A qcow2 file's size says nothing of what is in it.
    return wanted.format != "raw" or one.template_size == wanted.size


def named(offered: Iterable[Firmware], loader: str) -> Firmware | None:
    """The firmware whose code is this file."""
    return next((one for one in offered if one.loader == loader), None)


def guessed(loader: str, secure: bool) -> frozenset[str]:
    """Features of a firmware that no descriptor names, by the way in which distributions name their files."""
    name = Path(loader).name.lower()
    features = {SECURE_BOOT, REQUIRES_SMM} if secure or "secboot" in name or ".ms." in name else set()
    return frozenset(features | ({ENROLLED_KEYS} if ".ms." in name or "secboot" in name else set()))


def installed(directories: Sequence[Path] | None = None) -> list[Firmware]:
    """This host's firmware, in its order of preference."""
    if directories is None:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        directories = (SYSTEM, ADMIN, base / "qemu" / "firmware")
    chosen: dict[str, Path] = {}
    for directory in directories:
        for path in sorted(directory.glob("*.json")):
            chosen[path.name] = path
    read = (_read(chosen[name]) for name in sorted(chosen))
    return [one for one in read if one is not None]


def _read(path: Path) -> Firmware | None:
    try:
        return described(json.loads(path.read_text()), _size_of)
    except (OSError, ValueError):
        return None


def _size_of(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def described(descriptor: Any, size_of: Any) -> Firmware | None:
    """A descriptor's firmware; None when it is none of UEFI in flash with variables, or no descriptor."""
    try:
        mapping = descriptor["mapping"]
        if "uefi" not in descriptor["interface-types"] or mapping["device"] != "flash":
            return None
        template = mapping.get("nvram-template")
        if template is None or mapping.get("mode", "split") != "split":
            return None
        return Firmware(
            loader=str(mapping["executable"]["filename"]),
            template=str(template["filename"]),
            template_size=size_of(str(template["filename"])),
            features=frozenset(map(str, descriptor.get("features", ()))),
            targets=tuple(_target(each) for each in descriptor["targets"]),
            format=str(mapping["executable"].get("format", "raw")),
            template_format=str(template.get("format", "raw")),
        )
    except (KeyError, TypeError, AttributeError):
        return None


def _target(fields: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return str(fields["architecture"]), tuple(map(str, fields["machines"]))
