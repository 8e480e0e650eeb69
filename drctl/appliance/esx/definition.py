"""The definitions of an ESX group's machines, as libvirt would have them, in a file for the shipper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.esx.guests import EsxGuests
from drctl.appliance.source.group_state import GroupState
from drctl.errors import IntegrityError
from drctl.store import atomic


class EsxDefinition:
    """`home/groups/NAME.definition`: a DEFINITION frame's fields; `version` rises whenever anything in it changes."""

    def __init__(self, home: Home, group: str, guests: EsxGuests) -> None:
        self._path: Path = home.groups / f"{group}.definition"
        self._home = home
        self._guests = guests

    def refresh(self, state: GroupState) -> bool:
        """Write the file when something has changed; True when it was written. Raises NotFound, HostUnreachable."""
        fields = described(self._guests, state)
        fields |= {"source_site": self._home.config.site, "source_host": self._home.config.host}
        old = self._load()
        version = int(old.pop("version", 0))
        if old == fields:
            return False
        atomic.write_json(self._path, {"version": version + 1, **fields})
        return True

    def _load(self) -> dict[str, Any]:
        try:
            return dict(atomic.read_json(self._path) or {})
        except IntegrityError:
            return {}


def described(guests: EsxGuests, state: GroupState) -> dict[str, Any]:
    """The group, its machines as libvirt would define them, and its disks, as a DEFINITION frame has them.

    Raises NotFound, HostUnreachable."""
    machines = [
        {"name": name, "uuid": guests.machine(name).uuid, "definition": guests.definition(name), "files": {}}
        for name in state.spec.machines
    ]
    disks = [
        {"number": disk.number, "machine": disk.machine, "target": disk.target, "size": disk.size}
        for disk in state.disks
    ]
    return {"spec": msgspec.to_builtins(state.spec), "machines": machines, "disks": disks}
