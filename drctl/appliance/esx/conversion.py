"""Definitions of machines that are recovered on an ESX host: what a recovery decides, said in mapping's terms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from drctl.appliance.esx.datastore import EsxImages, safe
from drctl.appliance.esx.guests import TOLD_SECONDS, EsxGuests
from drctl.appliance.esx.recovered import packed, unpacked
from drctl.appliance.recovery import beside as recovery_beside
from drctl.appliance.recovery.address import seed_path
from drctl.appliance.recovery.ports import Beside, Recoverable, Rewritten
from drctl.appliance.recovery.state import MachineChange, RecoveredMachine, RecoveryRecord
from drctl.errors import HypervisorRefused, NotFound
from drctl.hypervisor import vmx
from drctl.hypervisor.esx.mapping import Wanted, map_machine


class EsxDefinitions:
    """Makes a .vmx of what travelled, which is libvirt's whatever the source was."""

    def __init__(self, guests: EsxGuests, images: EsxImages, networks: Callable[[], frozenset[str]]) -> None:
        self._guests = guests
        self._images = images
        self._networks = networks

    def rewrite(self, recovery: RecoveryRecord, machine: RecoveredMachine, source: Recoverable) -> Rewritten:
        found = next((each for each in source.machines if each.name == machine.name), None)
        if found is None:
            raise NotFound("machine", machine.name, known=[each.name for each in source.machines])
        where = recovery_beside.places(recovery, machine)
        if where is None:
            raise HypervisorRefused(f"{machine.name} has no disk that is replicated: there is nothing to boot from")
        change = recovery.changes.get(machine.name, MachineChange())
        files, seed = found.files, seed_path(recovery, machine)
        if seed:
            files = recovery_beside.without_seeds(files)
        media = {target: where.medium(target) for target in files.media}
        spec = source.spec
        wanted = Wanted(
            name=machine.recovery_name,
            uuid=machine.uuid,
            disks={disk.target: Path(disk.overlay).name for disk in machine.disks},
            version=self._guests.inventory(TOLD_SECONDS).version.get("Version", ""),
            networks={**dict(spec.test_networks if recovery.test else spec.networks), **change.networks},
            isolated=recovery.test,
            memory=change.memory,
            vcpus=change.vcpus,
            new_macs=change.new_macs,
            media={target: path.name for target, path in media.items()},
            seed=Path(seed).name if seed else "",
            nvram=f"{safe(machine.name)}.nvram",
        )
        mapped = map_machine(found.definition, wanted)
        beside = Beside(tuple((media[target], content) for target, content in files.media.items()))
        path = where.directory / f"{safe(machine.name)}.vmx"
        return Rewritten(packed(str(path), mapped.vmx), mapped.notes, mapped.cards, beside)

    def lay(self, machine: RecoveredMachine, beside: Beside) -> list[str]:
        """See Definitions.lay."""
        for path, content in beside.files:
            if not self._images.exists(path):
                self._images.put(path, content.contents())
        return [str(path) for path, _ in beside.files if str(path) not in machine.laid]

    def clear(self, machine: RecoveredMachine) -> None:
        """All lies in the machine's directory, and goes with it."""

    def settled(self, definition: str) -> str:
        return definition

    def unmet(self, definition: str, capabilities: str) -> tuple[str, ...]:
        """Port groups that the host lacks; and whether it may start machines at all."""
        del capabilities
        machine = vmx.parse(unpacked(definition)[1])
        wanted = {machine[key] for key in machine if key.lower().endswith(".networkname")}
        lacking = [f"the host has no port group {name!r}: map it by networks" for name in wanted - self._networks()]
        if self._guests.inventory(TOLD_SECONDS).maintenance:
            lacking.append("the host is in maintenance mode: it starts no machine")
        return tuple(sorted(lacking))
