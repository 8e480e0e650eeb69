"""The hypervisor as the protection of a group sees it."""

from __future__ import annotations

from typing import Any, Protocol

from drctl.appliance.source.guest_reader import GuestHost
from drctl.model.machine import Machine, MachineState


class SourceHost(GuestHost, Protocol):
    """What protection needs of a hypervisor (LibvirtHypervisor has it)."""

    def machine(self, name: str) -> Machine: ...

    def state(self, name: str) -> MachineState: ...

    def moved_away(self, name: str) -> bool: ...

    def ended_in_order(self, name: str) -> bool: ...

    def monitor(self, name: str, sent: dict[str, Any]) -> Any: ...

    def source_node(self, name: str, target: str) -> str: ...

    def set_autostart(self, name: str, on: bool) -> None: ...

    def destroy(self, name: str) -> None: ...
