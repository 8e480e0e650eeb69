"""Reads what a machine is besides its disks at its own host, to travel with the group's definitions.

A file is read again when its size or time has changed. One that is being written keeps what was read of it before: the
next look is some seconds away."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from drctl.appliance.source.guest_files import (
    FORMAT,
    MEDIA_LIMIT,
    NVRAM_LIMIT,
    TPM_LIMIT,
    Firmware,
    LeftOut,
    MachineFiles,
    Packed,
    Secret,
    Tpm,
    fit_budget,
    pack,
)
from drctl.errors import DrctlError, HostUnreachable, IntegrityError, NotFound
from drctl.hypervisor import domain_xml, firmware, guest_state
from drctl.model.extent import format_bytes

#: Files that are read through libvirt are looked at this often; each look is a storage pool made and unmade.
COSTLY_SECONDS = 60.0


class Stamp(Protocol):
    @property
    def size(self) -> int: ...

    @property
    def changed_ns(self) -> int: ...


class HostFiles(Protocol):
    """Small files of a hypervisor host (LibvirtFiles)."""

    def costly(self, path: Path) -> bool: ...

    def stamp(self, path: Path) -> Stamp | None: ...

    def stamps(self, directory: Path) -> Mapping[str, Stamp]: ...

    def read(self, path: Path, limit: int) -> bytes: ...

    def tpm_directory(self, uuid: str, version: str) -> Path: ...

    def nvram_path(self, name: str) -> Path: ...

    def put_directory(self, directory: Path, files: Mapping[str, bytes]) -> None: ...

    def remove_directory(self, directory: Path) -> None: ...


class GuestHost(Protocol):
    """The hypervisor, as far as a machine's state beside its disks is concerned."""

    def definition(self, name: str) -> str: ...

    def live_definition(self, name: str) -> str: ...

    def files(self) -> HostFiles: ...

    def secrets(self) -> Mapping[str, tuple[str, str]]:
        """Type and usage of the host's secrets by UUID."""
        ...


@dataclass(slots=True)
class _Looking:
    """One look at one machine: what was found so far."""

    left_out: list[LeftOut] = field(default_factory=list)
    costly: bool = False


class GuestReader:
    """What travels of machines. One thread at a time."""

    def __init__(self, host: GuestHost) -> None:
        self._host = host
        self._files = host.files()
        self._read: dict[Path, tuple[Stamp, Packed]] = {}
        #: Of machines whose files are costly: when they were looked at, by which definition, and what they are.
        self._looked: dict[str, tuple[float, str, MachineFiles]] = {}
        #: Where libvirt put the variables of a machine that ran, and the firmware that it chose.
        self._ran: dict[str, tuple[Path, Firmware]] = {}
        #: This host's firmware, read once for all machines.
        self._offered: list[firmware.Firmware] | None = None

    def machines(self, definitions: Mapping[str, str], *, force: bool = False) -> dict[str, MachineFiles]:
        """Files of the machines of one group. Raises HostUnreachable."""
        self._offered = None
        return fit_budget({name: self._of(name, text, force) for name, text in definitions.items()})

    def _of(self, name: str, definition: str, force: bool) -> MachineFiles:
        now = time.monotonic()
        then, text, known = self._looked.get(name, (float("-inf"), "", MachineFiles()))
        if not force and text == definition and now - then < COSTLY_SECONDS:
            return known
        looking = _Looking()
        files = self._look(name, domain_xml.parse(definition), looking)
        if looking.costly:
            self._looked[name] = (now, definition, files)
        return files

    def _look(self, name: str, root: ET.Element, looking: _Looking) -> MachineFiles:
        nvram, described = self._firmware(name, root, looking)
        tpm = self._tpm(root, looking)
        media = {}
        for medium in guest_state.media(root):
            what = f"medium {medium.target}"
            if medium.refusal:
                looking.left_out.append(LeftOut(what, f"{medium.path}: {medium.refusal}"))
            elif packed := self._take(what, Path(medium.path), MEDIA_LIMIT, looking):
                media[medium.target] = packed
        secrets = tuple(self._secrets(guest_state.secrets(root)))
        return MachineFiles(nvram, described, tpm, media, secrets, tuple(looking.left_out), FORMAT)

    def _firmware(self, name: str, root: ET.Element, looking: _Looking) -> tuple[Packed | None, Firmware | None]:
        if (facts := guest_state.variables(root)) is None:
            return None, None
        if not facts.path and not facts.refusal:
            # libvirt 9.0 writes the firmware that it chose, and the place of its variables, into what runs alone.
            root = domain_xml.parse(self._host.live_definition(name))
            facts = guest_state.variables(root) or facts
        if not facts.path and not facts.refusal:
            return self._firmware_of_one_that_is_off(name, facts, looking)
        loader = (root.findtext("os/loader") or "").strip()
        if self._offered is None:
            self._offered = firmware.installed()
        known = firmware.named(self._offered, loader) if loader else None
        features = tuple(sorted(known.features)) if known else ()
        template = known.template if known else ""
        described = Firmware(loader, facts.format, template, features, known is not None)
        if facts.refusal:
            looking.left_out.append(LeftOut("nvram", facts.refusal))
        if not facts.path:
            return None, described
        self._ran[name] = (Path(facts.path), described)
        return self._take("nvram", Path(facts.path), NVRAM_LIMIT, looking), described

    def _firmware_of_one_that_is_off(
        self, name: str, facts: guest_state.Variables, looking: _Looking
    ) -> tuple[Packed | None, Firmware]:
        """As it was when it ran; else what lies where libvirt puts variables, whatever firmware they are of."""
        path, described = self._ran.get(name, (self._files.nvram_path(name), Firmware(format=facts.format)))
        return self._take("nvram", path, NVRAM_LIMIT, looking), described

    def _tpm(self, root: ET.Element, looking: _Looking) -> Tpm | None:
        if (facts := guest_state.tpm(root)) is None:
            return None
        if facts.refusal:
            looking.left_out.append(LeftOut("tpm", facts.refusal))
            return None
        uuid = (root.findtext("uuid") or "").strip()
        directory = Path(facts.directory) if facts.directory else self._files.tpm_directory(uuid, facts.version)
        looking.costly |= self._files.costly(directory)
        try:
            names = sorted(self._files.stamps(directory))
        except HostUnreachable:
            raise
        except DrctlError as exc:
            looking.left_out.append(LeftOut("tpm", f"{directory}: {exc.message}"))
            return None
        before = len(looking.left_out)
        taken = {name: self._take("tpm", directory / name, TPM_LIMIT, looking) for name in names}
        if len(looking.left_out) > before:
            return None  # half a state is none
        files = {name: packed for name, packed in taken.items() if packed is not None}
        return Tpm(files) if files else None

    def _take(self, what: str, path: Path, limit: int, looking: _Looking) -> Packed | None:
        """The file, packed; None when it is not there, or stays behind for a reason that is noted."""
        looking.costly |= self._files.costly(path)
        try:
            stamp = self._files.stamp(path)
            if stamp is None:
                return None
            if stamp.size > limit:
                reason = f"{path}: {format_bytes(stamp.size)} are too much, {format_bytes(limit)} are taken along"
                looking.left_out.append(LeftOut(what, reason))
                return None
            return self._packed(path, stamp, limit)
        except (HostUnreachable, NotFound) as exc:
            if isinstance(exc, NotFound):
                return None
            raise
        except DrctlError as exc:
            looking.left_out.append(LeftOut(what, f"{path}: {exc.message}"))
            return None

    def _packed(self, path: Path, stamp: Stamp, limit: int) -> Packed:
        known = self._read.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            packed = pack(str(path), self._files.read(path, limit))
        except IntegrityError:
            if known is None:
                raise
            return known[1]
        self._read[path] = (stamp, packed)
        return packed

    def _secrets(self, named: Iterable[guest_state.SecretRef]) -> Iterator[Secret]:
        wanted: Sequence[guest_state.SecretRef] = list(named)
        known = self._host.secrets() if wanted else {}
        for one in wanted:
            kind, usage = known.get(one.uuid, (one.kind, one.usage))
            yield Secret(one.needed_by, one.uuid, kind, usage)
