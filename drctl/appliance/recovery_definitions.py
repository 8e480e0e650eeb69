"""Definitions of recovered machines on a libvirt host: what a recovery decides, said in recovery_xml's terms."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from drctl.appliance.recovery_address import seed_path
from drctl.appliance.recovery_ports import Recoverable, Rewritten, Views
from drctl.appliance.recovery_state import MachineChange, RecoveredDisk, RecoveredMachine, RecoveryRecord
from drctl.errors import NotFound
from drctl.hypervisor import domain_xml, recovery_xml
from drctl.hypervisor.seed_drive import insert_seed

_CHARACTER_DEVICES = ("serial", "parallel", "console", "channel")


class LibvirtDefinitions:
    """Rewrites definitions with overlays on a view."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def rewrite(self, recovery: RecoveryRecord, machine: RecoveredMachine, source: Recoverable) -> Rewritten:
        found = next((each for each in source.machines if each.name == machine.name), None)
        if found is None:
            raise NotFound("machine", machine.name, known=[each.name for each in source.machines])
        spec = source.spec
        change = recovery.changes.get(machine.name, MachineChange())
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
        )
        rewritten = recovery_xml.rewrite(found.definition, wanted)
        definition, notes = rewritten.definition, rewritten.notes
        if seed := seed_path(recovery, machine):
            definition, note = insert_seed(definition, seed)
            notes = (*notes, note)
        return Rewritten(definition, notes, domain_xml.cards(domain_xml.parse(definition)))

    def settled(self, definition: str) -> str:
        return recovery_xml.settle(definition)

    def unmet(self, definition: str, capabilities: str) -> tuple[str, ...]:
        return recovery_xml.unmet(definition, capabilities)

    def _overlay(self, recovery: RecoveryRecord, disk: RecoveredDisk) -> recovery_xml.Overlay:
        if disk.localized:
            return recovery_xml.Overlay(disk.overlay)
        return recovery_xml.Overlay(disk.overlay, self._views.socket(recovery), disk.export)


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
    nvram = root.findtext("os/nvram")
    if nvram and nvram.strip():
        yield nvram.strip()
    for tag in _CHARACTER_DEVICES:
        for device in root.iterfind(f"devices/{tag}"):
            # Sockets are not moved but dropped: libvirt chooses one, and its path is short enough.
            if device.get("type") == "file":
                yield from (s.get("path", "") for s in device.iterfind("source") if s.get("path"))
            yield from (log.get("file", "") for log in device.iterfind("log") if log.get("file"))
