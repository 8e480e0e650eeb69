"""Guests that run where their group no longer reigns: found, told loudly, and stopped where that is wished.

Libvirt's hook refuses their start (libvirt_hook.py); this is for hosts without it, and for guests that ran on while the
sites were cut apart."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Protocol

from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.image_stamp import RUNNING
from drctl.errors import DrctlError, NotFound
from drctl.model.group import StrayPolicy
from drctl.model.machine import MachineState
from drctl.model.phase import Phase
from drctl.store.group_info import StoreMode, read_info

#: A guest that may not run is noticed within this.
LOOK_SECONDS = 1.0

log = logging.getLogger(__name__)


class StrayHost(Protocol):
    def state(self, name: str) -> MachineState: ...

    def destroy(self, name: str) -> None: ...


def superseded_here(state: GroupState, store: Path) -> bool:
    """Whether the group may not run at this host. `store` is the directory of all groups' stores here.

    A group that left and was failed over *to* this host again reigns here, under a higher generation. A store that
    can't be read says nothing, and nothing is stopped or refused by it."""
    if state.phase is not Phase.FAILED_OVER:
        return False
    root = store / state.spec.name
    if not (root / "group.json").exists():
        return True
    try:
        info = read_info(root)
    except DrctlError:
        return False
    return not (info.mode is StoreMode.FAILED_OVER and info.generation > state.generation)


class Strays:
    """The running guests of one superseded group. One thread calls `look`."""

    def __init__(self, host: StrayHost, store: Path) -> None:
        self._host = host
        self._store = store
        self._due = 0.0
        self.names: tuple[str, ...] = ()

    def look(self, state: GroupState) -> None:
        """Find them, each second at most. Raises HostUnreachable, HypervisorRefused."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + LOOK_SECONDS
        found = self._running(state) if superseded_here(state, self._store) else ()
        if found and found != self.names:
            log.error(
                "%s runs here, but %s reigns at %s (superseded_guest = %s)",
                ", ".join(found),
                state.spec.name,
                state.spec.recovery,
                state.spec.superseded_guest,
            )
        self.names = found
        if state.spec.superseded_guest == StrayPolicy.STOP:
            for name in found:
                self._host.destroy(name)

    def _running(self, state: GroupState) -> tuple[str, ...]:
        found = []
        for name in state.spec.machines:
            try:
                if self._host.state(name) in RUNNING:
                    found.append(name)
            except NotFound:
                continue  # removed by the operator: it can't run
        return tuple(found)
