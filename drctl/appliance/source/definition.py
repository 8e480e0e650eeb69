"""What travels besides disks: the definitions of a group's machines and their files, as a file for the shipper."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.guest_files import MachineFiles
from drctl.appliance.source.guest_reader import GuestReader

#: Definitions are compared this often; an operator's `virsh edit` is in the next checkpoint but one at most.
REFRESH_SECONDS = 5.0


class Definer(Protocol):
    def definition(self, name: str) -> str: ...


class DefinitionFile:
    """`home/groups/NAME.definition`: the DEFINITION frame's fields; `version` rises whenever anything in it changes.

    `reader` reads what machines are besides disks; without one nothing of that travels. Methods may be called from any
    thread."""

    def __init__(self, home: Home, group: str, host: Definer, reader: GuestReader | None = None) -> None:
        self.path: Path = home.groups / f"{group}.definition"
        self._home = home
        self._host = host
        self._reader = reader
        self._checked = float("-inf")
        #: What the file has, once we have read or written it, and the stamp by which that is known.
        self._written: tuple[tuple[int, int], dict[str, Any]] | None = None
        self._lock = threading.Lock()

    def refresh(self, state: GroupState, *, force: bool = False) -> bool:
        """Write the file when it is due and something has changed; True when it was written.

        Raises HostUnreachable, NotFound."""
        now = time.monotonic()
        with self._lock:
            if not force and now - self._checked < REFRESH_SECONDS and self.path.exists():
                return False
            self._checked = now
            fields = self._fields(state, force)
            old = dict(self._load())
            version = int(old.pop("version", 0))
            if old == fields:
                return False
            self._write({"version": version + 1, **fields})
            return True

    def _write(self, fields: dict[str, Any]) -> None:
        temporary = self.path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        # A TPM's state is in it: for nobody else's eyes, whatever the umask says.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(fields, file)
        temporary.replace(self.path)
        self._written = (self._stamp(), fields)

    def _stamp(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_ino, status.st_mtime_ns

    def _load(self) -> dict[str, Any]:
        try:
            stamp = self._stamp()
            if self._written is not None and self._written[0] == stamp:
                return self._written[1]
            loaded = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        if not isinstance(loaded, dict):
            return {}
        self._written = (stamp, loaded)
        return loaded

    def _fields(self, state: GroupState, force: bool) -> dict[str, Any]:
        return {
            # As the file will give it back: a tuple would never be equal to its list.
            "spec": msgspec.json.decode(msgspec.json.encode(state.spec)),
            "machines": machines_of(self._host, state.spec.machines, self._reader, force=force),
            "disks": [
                {"number": disk.number, "machine": disk.machine, "target": disk.target, "size": disk.size}
                for disk in state.disks
            ],
            "source_site": self._home.config.site,
            "source_host": self._home.config.host,
        }


def machines_of(
    host: Definer, names: Iterable[str], reader: GuestReader | None = None, *, force: bool = False
) -> list[dict[str, Any]]:
    """A DEFINITION's machines. Raises NotFound, HostUnreachable."""
    definitions = {name: host.definition(name) for name in names}
    read: Mapping[str, MachineFiles] = reader.machines(definitions, force=force) if reader is not None else {}
    files = {name: one.as_dict() for name, one in read.items()}
    return [
        {"name": name, "uuid": _uuid(definition), "definition": definition, "files": files.get(name, {})}
        for name, definition in definitions.items()
    ]


def _uuid(definition: str) -> str:
    start = definition.find("<uuid>")
    return definition[start + 6 : definition.find("</uuid>", start)] if start >= 0 else ""
