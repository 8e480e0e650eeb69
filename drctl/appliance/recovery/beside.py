"""What lies beside a recovered machine's disks: where it goes here, and putting it there.

UEFI variables and media go beside the machine's overlays, under the recovery's own names; the state of an emulated TPM
goes where libvirt looks for it, under the recovered machine's UUID."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from drctl.appliance.recovery.ports import Beside, RecoverableMachine
from drctl.appliance.recovery.state import RecoveredMachine, RecoveryRecord
from drctl.appliance.source.guest_files import MachineFiles, Packed
from drctl.appliance.source.guest_reader import HostFiles
from drctl.hypervisor import firmware, guest_state
from drctl.hypervisor.recovery_firmware import Flash

#: Where an ISO image's primary descriptor has its label.
_LABEL = 16 * 2048 + 40
#: What `laid` says of a TPM's state.
TPM = "tpm"


class Putting(Protocol):
    """Files of the appliance's own (QemuImages)."""

    def exists(self, path: Path) -> bool: ...

    def put(self, path: Path, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Places:
    """Where the files of one recovered machine go."""

    directory: Path
    name: str
    suffix: str

    @property
    def nvram(self) -> Path:
        return self.directory / f"{self.name}.nvram{self.suffix}.fd"

    def medium(self, target: str) -> Path:
        return self.directory / f"{self.name}.{target}{self.suffix}.iso"


def places(recovery: RecoveryRecord, machine: RecoveredMachine) -> Places | None:
    """None for a machine without disks of its own: it has no place here."""
    if not machine.disks:
        return None
    suffix = "" if recovery.test else f"-g{recovery.generation}"
    return Places(Path(machine.disks[0].overlay).parent, machine.name, suffix)


def flash(root: ET.Element, source: RecoverableMachine, where: Places) -> Flash | None:
    """The firmware that the machine had and that this host has; None for a machine without UEFI variables."""
    facts = guest_state.variables(root)
    if facts is None:
        return None
    told, nvram = source.files.firmware, source.files.nvram
    features = frozenset(told.features) if told is not None and told.known else None
    loader = (told.loader if told is not None else "") or (root.findtext("os/loader") or "").strip()
    size = nvram.size if nvram is not None else 0
    offered = firmware.installed()
    if loader and firmware.named(offered, loader) is None and Path(loader).exists():
        offered.insert(0, _undescribed(root, loader, size, features))
    return Flash(offered, str(where.nvram), size, facts.format, loader, features)


def _undescribed(root: ET.Element, loader: str, size: int, features: frozenset[str] | None) -> firmware.Firmware:
    """A firmware that no descriptor of this host names, but that is here under the same name: it is what it was."""
    kind, found = root.find("os/type"), root.find("os/nvram")
    arch = "" if kind is None else kind.get("arch", "")
    secure = guest_state.secure(root)
    return firmware.Firmware(
        loader=loader,
        template="" if found is None else found.get("template", ""),
        template_size=size,
        features=firmware.guessed(loader, secure) if features is None else features,
        targets=((arch, ("*",)),),
    )


def beside(source: MachineFiles, where: Places, root: ET.Element, *, variables: bool) -> Beside:
    """What is to be laid. `variables`: those that travelled are of use here."""
    files: list[tuple[Path, Packed]] = [(where.medium(target), packed) for target, packed in source.media.items()]
    if variables and source.nvram is not None:
        files.append((where.nvram, source.nvram))
    facts = guest_state.tpm(root)
    if source.tpm is None or facts is None or facts.backend != "emulator":
        return Beside(tuple(files))
    return Beside(tuple(files), source.tpm, facts.version)


def without_seeds(files: MachineFiles) -> MachineFiles:
    """Without the machine's own seeds for cloud-init: of two, cloud-init takes the one that it finds first."""
    media = {target: packed for target, packed in files.media.items() if not is_seed(packed.contents())}
    return msgspec.structs.replace(files, media=media)


def is_seed(image: bytes) -> bool:
    """Whether an ISO image has the label that cloud-init looks for."""
    return image[_LABEL : _LABEL + 32].strip(b" \0").lower() == b"cidata"


def lay(images: Putting, host: HostFiles, machine: RecoveredMachine, what: Beside) -> list[str]:
    """See Definitions.lay. A file that is there was laid before, and may have been written to since."""
    laid = []
    for path, packed in what.files:
        if not images.exists(path):
            images.put(path, packed.contents())
        if str(path) not in machine.laid:
            laid.append(str(path))
    if what.tpm is not None and TPM not in machine.laid:
        states = {name: packed.contents() for name, packed in what.tpm.files.items()}
        host.put_directory(host.tpm_directory(machine.uuid, what.tpm_version), states)
        laid.append(TPM)
    return laid


def clear(host: Callable[[], HostFiles], machine: RecoveredMachine) -> None:
    """libvirt removes a TPM's state with its machine; what a crash left is removed here."""
    if TPM in machine.laid:
        for version in ("2.0", "1.2"):
            host().remove_directory(host().tpm_directory(machine.uuid, version))
        machine.laid.remove(TPM)
