"""Definitions of recovered machines on a libvirt host: what a recovery decides, said in recovery_xml's terms."""

from __future__ import annotations

import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from drctl.appliance.recovery import beside as recovery_beside
from drctl.appliance.recovery.address import seed_path
from drctl.appliance.recovery.beside import Putting
from drctl.appliance.recovery.ports import Beside, Recoverable, Rewritten, Views
from drctl.appliance.recovery.state import MachineChange, RecoveredDisk, RecoveredMachine, RecoveryRecord
from drctl.appliance.source.guest_files import MachineFiles, Secret
from drctl.appliance.source.guest_reader import GuestHost
from drctl.errors import NotFound
from drctl.hypervisor import domain_xml, recovery_fit, recovery_xml
from drctl.hypervisor.guest_state import SecretRef
from drctl.hypervisor.seed_drive import insert_seed

_FRESH_SECONDS = 5.0
_INTERFACES = Path("/sys/class/net")
_CHARACTER_DEVICES = ("serial", "parallel", "console", "channel")


class FittingHost(GuestHost, Protocol):
    """A hypervisor that says what can run on it."""

    def capabilities(self) -> str: ...

    def networks(self) -> frozenset[str] | None:
        """Names of its networks; None where libvirt has no say in that."""
        ...

    def processor_fits(self, arch: str, machine: str, kind: str, processor: str) -> bool | None:
        """Whether the host can give a guest this `<cpu>`; None where it can't tell."""
        ...


class LibvirtDefinitions:
    """Rewrites definitions with overlays on a view."""

    def __init__(self, views: Views, host: FittingHost, images: Putting) -> None:
        self._views = views
        self._host = host
        self._images = images
        self._known: tuple[float, recovery_fit.HostFacts | None] = (0.0, None)

    def rewrite(self, recovery: RecoveryRecord, machine: RecoveredMachine, source: Recoverable) -> Rewritten:
        found = next((each for each in source.machines if each.name == machine.name), None)
        if found is None:
            raise NotFound("machine", machine.name, known=[each.name for each in source.machines])
        spec = source.spec
        change = recovery.changes.get(machine.name, MachineChange())
        root, files = domain_xml.parse(found.definition), found.files
        if seed_path(recovery, machine):
            files = recovery_beside.without_seeds(files)
        where = recovery_beside.places(recovery, machine)
        wanted = recovery_xml.Recovery(
            overlays={disk.target: self._overlay(recovery, disk) for disk in machine.disks},
            name=machine.recovery_name,
            uuid=machine.uuid,
            networks={**dict(spec.test_networks if recovery.test else spec.networks), **change.networks},
            isolated=recovery.test,
            paths=_paths(recovery, machine, found.definition),
            memory=change.memory,
            vcpus=change.vcpus,
            new_macs=change.new_macs,
            flash=recovery_beside.flash(root, found, where) if where is not None else None,
            tpm=files.tpm is not None,
            media={target: str(where.medium(target)) for target in files.media} if where is not None else {},
            host=self._facts(),
            secrets=_named(files.secrets),
        )
        rewritten = recovery_xml.rewrite(found.definition, wanted)
        beside = Beside()
        if where is not None:
            beside = recovery_beside.beside(files, where, root, variables=rewritten.variables)
        definition, notes = rewritten.definition, (*rewritten.notes, *_left_out(files))
        if seed := seed_path(recovery, machine):
            definition, note = insert_seed(definition, seed)
            notes = (*notes, note)
        return Rewritten(definition, notes, domain_xml.cards(domain_xml.parse(definition)), beside)

    def settled(self, definition: str) -> str:
        return recovery_xml.settle(definition)

    def unmet(self, definition: str, capabilities: str) -> tuple[str, ...]:
        return recovery_fit.unmet_here(definition, replace(self._facts(), capabilities=capabilities))

    def lay(self, machine: RecoveredMachine, beside: Beside) -> list[str]:
        return recovery_beside.lay(self._images, self._host.files(), machine, beside)

    def clear(self, machine: RecoveredMachine) -> None:
        recovery_beside.clear(self._host.files, machine)

    def _facts(self) -> recovery_fit.HostFacts:
        """What the host is, asked once for all machines of a recovery."""
        then, facts = self._known
        if facts is None or time.monotonic() - then > _FRESH_SECONDS:
            facts = self._ask()
            self._known = (time.monotonic(), facts)
        return facts

    def _ask(self) -> recovery_fit.HostFacts:
        emulator = shutil.which("swtpm") is not None
        return recovery_fit.HostFacts(
            self._host.capabilities(),
            self._host.secrets(),
            self._host.processor_fits,
            emulator,
            self._host.networks(),
            lambda name: (_INTERFACES / name).exists(),
        )

    def _overlay(self, recovery: RecoveryRecord, disk: RecoveredDisk) -> recovery_xml.Overlay:
        if disk.localized:
            return recovery_xml.Overlay(disk.overlay)
        return recovery_xml.Overlay(disk.overlay, self._views.socket(recovery), disk.export)


def _named(secrets: Iterable[Secret]) -> tuple[SecretRef, ...]:
    return tuple(SecretRef(one.needed_by, one.uuid, one.kind, one.usage) for one in secrets)


def _left_out(files: MachineFiles) -> Iterator[str]:
    """Media are told where their drives are emptied."""
    return (f"{one.what}: did not travel: {one.reason}" for one in files.left_out if one.what in ("tpm", "nvram"))


def _paths(recovery: RecoveryRecord, machine: RecoveredMachine, definition: str) -> dict[str, str]:
    """Where files that QEMU writes go here: beside the machine's overlays, each under its own name.

    A failover keeps a file whose directory is here, too; a test never writes where the machine itself does."""
    if not machine.disks:
        return {}
    here = Path(machine.disks[0].overlay).parent
    moved = {}
    for path in _written_files(domain_xml.parse(definition)):
        if recovery.test or not Path(path).parent.is_dir():
            moved[path] = str(here / f"{machine.name}.{Path(path).name}")
    return moved


def _written_files(root: ET.Element) -> Iterator[str]:
    for tag in _CHARACTER_DEVICES:
        for device in root.iterfind(f"devices/{tag}"):
            # Sockets are not moved but dropped: libvirt chooses one, and its path is short enough.
            if device.get("type") == "file":
                yield from (s.get("path", "") for s in device.iterfind("source") if s.get("path"))
            yield from (log.get("file", "") for log in device.iterfind("log") if log.get("file"))
