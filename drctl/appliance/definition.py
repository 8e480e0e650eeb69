"""What travels besides disks: the definitions of a group's machines, as a file for the shipper."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.group_state import GroupState

#: Definitions are compared this often; an operator's `virsh edit` is in the next checkpoint but one at most.
REFRESH_SECONDS = 5.0


class Definer(Protocol):
    def definition(self, name: str) -> str: ...


class DefinitionFile:
    """`home/groups/NAME.definition`: the DEFINITION frame's fields; `version` rises whenever anything in it changes."""

    def __init__(self, home: Home, group: str, host: Definer) -> None:
        self.path: Path = home.groups / f"{group}.definition"
        self._home = home
        self._host = host
        self._checked = float("-inf")

    def refresh(self, state: GroupState, *, force: bool = False) -> bool:
        """Write the file when it is due and something has changed; True when it was written."""
        now = time.monotonic()
        if not force and now - self._checked < REFRESH_SECONDS and self.path.exists():
            return False
        self._checked = now
        fields = self._fields(state)
        old = self._load()
        version = int(old.pop("version", 0))
        if old == fields:
            return False
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps({"version": version + 1, **fields}))
        temporary.replace(self.path)
        return True

    def _load(self) -> dict[str, Any]:
        try:
            loaded = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def _fields(self, state: GroupState) -> dict[str, Any]:
        return {
            "spec": msgspec.to_builtins(state.spec),
            "machines": machines_of(self._host, state.spec.machines),
            "disks": [
                {"number": disk.number, "machine": disk.machine, "target": disk.target, "size": disk.size}
                for disk in state.disks
            ],
            "source_site": self._home.config.site,
            "source_host": self._home.config.host,
        }


def machines_of(host: Definer, names: Iterable[str]) -> list[dict[str, Any]]:
    """A DEFINITION's machines. Raises NotFound, HostUnreachable."""
    machines = []
    for name in names:
        definition = host.definition(name)
        machines.append({"name": name, "uuid": _uuid(definition), "definition": definition, "files": {}})
    return machines


def _uuid(definition: str) -> str:
    start = definition.find("<uuid>")
    return definition[start + 6 : definition.find("</uuid>", start)] if start >= 0 else ""
