"""Libvirt's autostart of protected guests: noted in the group's state, taken away, given back. Pure but for the port.

A flag is written down before it is switched off, so a crash between the two only makes it happen again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import msgspec

from drctl.appliance.source.group_state import GroupState, GuestNote
from drctl.errors import NotFound
from drctl.model.machine import Machine


class AutostartHost(Protocol):
    def set_autostart(self, name: str, on: bool) -> None: ...


def noted(state: GroupState, machines: Sequence[Machine]) -> GroupState:
    """The state with a note of every machine. A flag that is on is a wish; one that is off may be off by us."""
    before = {note.name: note for note in state.guests}
    notes = tuple(
        GuestNote(
            machine.name,
            machine.uuid,
            autostart=machine.autostart or (machine.name in before and before[machine.name].autostart),
        )
        for machine in machines
    )
    return msgspec.structs.replace(state, guests=notes) if notes != state.guests else state


def take(host: AutostartHost, machines: Iterable[Machine]) -> list[Machine]:
    """Switch off what is on, and tell the machines as they are then; `noted` must have been saved before.

    Raises HypervisorRefused, HostUnreachable."""
    after = []
    for machine in machines:
        if machine.autostart:
            host.set_autostart(machine.name, on=False)
        after.append(replace(machine, autostart=False))
    return after


def give_back(host: AutostartHost, state: GroupState) -> GroupState:
    """Switch on what was on, and forget that; a guest that is gone has no flag. Raises as `take`."""
    for name in wanted(state):
        with suppress(NotFound):
            host.set_autostart(name, on=True)
    notes = tuple(msgspec.structs.replace(note, autostart=False) for note in state.guests)
    return msgspec.structs.replace(state, guests=notes)


def wanted(state: GroupState) -> list[str]:
    """The guests that libvirt would start at the host's boot if we had not taken it over."""
    return [note.name for note in state.guests if note.autostart]
