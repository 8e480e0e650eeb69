"""What the machines of a recovery say: their agents' answers, and what their serial ports have written."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drctl.appliance.recovery.ports import Progress
from drctl.appliance.recovery.state import MachinePhase, RecoveredMachine, RecoveryFiles
from drctl.errors import HypervisorRefused, NotFound, Refused, WrongPhase
from drctl.hypervisor.domain_xml import attribute, parse
from drctl.model.ports import Hypervisor

#: What may be asked of an agent: whether it is there, and to run a plan's command.
COMMANDS = (
    "guest-ping",
    "guest-info",
    "guest-exec",
    "guest-exec-status",
    "guest-network-get-interfaces",
    "guest-get-osinfo",
)
#: Of a console so much is told, its end, bytes.
CONSOLE_LIMIT = 256 * 1024
#: An agent that does not answer within so many seconds is not up.
AGENT_SECONDS = 5
_PORTS = ("serial", "console")


class RecoveredGuests:
    """Methods may be called from any thread."""

    def __init__(self, hypervisor: Hypervisor, files: RecoveryFiles) -> None:
        self._hypervisor = hypervisor
        self._files = files

    def agent(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """One command to the agent of a recovered machine. Raises Refused, WrongPhase, HypervisorRefused."""
        del progress
        command = dict(params.get("command") or {})
        if command.get("execute") not in COMMANDS:
            raise Refused(f"{command.get('execute')!r} is not asked of an agent by drctl", hint=", ".join(COMMANDS))
        name = self._running(params).recovery_name
        return {"return": self._hypervisor.agent(name, command, timeout_seconds=AGENT_SECONDS)}

    def console(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The end of what the machine's first serial port has written since it was started.

        Raises WrongPhase, NotFound when no port of it is written to a file."""
        del progress
        machine = self._running(params)
        root = parse(self._hypervisor.live_definition(machine.recovery_name))
        for path in _files(root):
            if (told := _tail(path)) is not None:
                return told
        raise NotFound(
            "console",
            machine.name,
            message=f"no serial port of {machine.name} is written to a file here",
            hint='give it <serial type="file"> or a <log file="…"/> at the source',
        )

    def _running(self, params: dict[str, Any]) -> RecoveredMachine:
        record = self._files.load(str(params["recovery"]))
        for machine in record.machines:
            if machine.name == params.get("machine"):
                if machine.phase is not MachinePhase.RUNNING:
                    raise WrongPhase(f"{machine.name} does not run in {record.id}: {machine.phase}")
                return machine
        raise NotFound("machine", str(params.get("machine")), known=[machine.name for machine in record.machines])


def _files(root: ET.Element) -> Iterator[Path]:
    """Where serial ports go, in the order of the ports; a console that is a serial port is told again, to no harm."""
    for tag in _PORTS:
        for device in root.iterfind(f"devices/{tag}"):
            path = attribute(device, "log", "file")
            if not path and device.get("type") == "file":
                path = attribute(device, "source", "path")
            if path:
                yield Path(path)


def _tail(path: Path) -> dict[str, Any] | None:
    """What the file says at its end; None when it is not there. Raises HypervisorRefused when it can't be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - CONSOLE_LIMIT))
            return {"text": file.read(CONSOLE_LIMIT).decode(errors="replace"), "bytes": size}
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise HypervisorRefused(f"{path}: {exc.strerror}") from exc
