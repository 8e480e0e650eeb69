"""Whether machines can be protected at all: asked before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from drctl.errors import PreconditionFailed
from drctl.model.machine import Machine


class MachineHost(Protocol):
    def machine(self, name: str) -> Machine: ...


def check_machines(host: MachineHost, names: Iterable[str]) -> None:
    """Every machine exists on the host and every disk of it can be tapped. Raises PreconditionFailed or NotFound."""
    for name in names:
        machine = host.machine(name)
        for disk in machine.disks:
            if disk.refusal:
                raise PreconditionFailed(
                    f"{name}: disk {disk.target} can't be tapped: {disk.refusal}",
                    hint="take the machine out of the group, or change the disk",
                    machine=name,
                    disk=disk.target,
                )
        if not machine.disks:
            raise PreconditionFailed(f"{name} has no disk to protect", machine=name)
