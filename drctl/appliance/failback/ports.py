"""What a failback acts through, as interfaces; tests bring their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from drctl.appliance.failback.exports import OldExports
from drctl.appliance.failback.seal import OldHost
from drctl.appliance.replica.expiry import StoreExpiry
from drctl.appliance.replica.held_store import HeldStores
from drctl.appliance.source.group_state import GroupState
from drctl.model.machine import MachineState


class FailbackHost(OldHost, Protocol):
    def state(self, name: str) -> MachineState: ...


class Sources(Protocol):
    """The groups that this host protects, or did (SourceService)."""

    def names(self) -> list[str]: ...

    def state(self, name: str) -> GroupState: ...

    def turn(self, name: str, change: Callable[[GroupState | None], GroupState]) -> None: ...


@dataclass(frozen=True, slots=True)
class Deps:
    """What a failback acts through. `reign` tells the state of the recovery by which a group reigns here, or ""."""

    host: FailbackHost
    sources: Sources
    held: HeldStores
    exports: OldExports
    expiry: StoreExpiry
    reign: Callable[[str], str]
