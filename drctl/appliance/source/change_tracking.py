"""What the guests of a group write while its replication is paused: recorded by QEMU, so that resume reads no more.

Bitmaps begin first, then a checkpoint is made: it holds all that was written before the bitmaps. So a disk whose bitmap
still records, of a receiver that still has that checkpoint, differs there only where the bitmap says. The bitmap goes
on until its disk has a mirror again and a pass begins; what it has then is what that pass reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.appliance.source.image_stamp import REACHABLE
from drctl.errors import DrctlError
from drctl.hypervisor import change_bitmap
from drctl.hypervisor.qmp import Monitor
from drctl.model.extent import Extent
from drctl.model.machine import Machine
from drctl.model.phase import Phase

log = logging.getLogger(__name__)


class Host(Protocol):
    def monitor(self, name: str, sent: dict[str, Any]) -> Any: ...

    def source_node(self, name: str, target: str) -> str: ...


class Protected(Protocol):
    """A group's protection, as far as its state is concerned."""

    @property
    def state(self) -> GroupState: ...

    @property
    def machines(self) -> Sequence[Machine]: ...

    def change(self, change: Callable[[GroupState], GroupState]) -> None: ...


class ChangeTracking:
    """The bitmaps of groups. Keeps nothing: QEMU knows them, and a group's state which of them are to be trusted."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def pause(self, protected: Protected, mark: Callable[[], int]) -> None:
        """Let QEMU note what is written from now on: the group is about to be paused. Where that can't be had, all is
        compared at its resume."""
        state = protected.state
        if state.phase is not Phase.LIVE:
            return
        try:
            tracked = self.begin(state, protected.machines, mark)
        except DrctlError as exc:
            log.warning("%s: its resume will compare all: %s", state.spec.name, exc.message)
            return
        protected.change(lambda now: with_tracked(now, tracked))

    def give_up(self, protected: Protected) -> None:
        """What is written while it is paused does not matter any more."""
        if tracked := [disk.number for disk in protected.state.disks if disk.tracked]:
            self.forget(protected.state, protected.machines)
            protected.change(lambda now: now.with_missed(tracked))

    def begin(
        self, state: GroupState, machines: Iterable[Machine], mark: Callable[[], int]
    ) -> dict[int, tuple[str, int]]:
        """Start bitmaps for the running machines, then cut a checkpoint by `mark`; {disk: (bitmap, its number)}.

        Raises DrctlError, and then nothing is recorded."""
        running = [machine for machine in machines if machine.state in REACHABLE]
        names: dict[int, str] = {}
        try:
            for machine in running:
                disks = _disks_of(state, machine.name)
                ours = {self._node(disk): f"{change_bitmap.PREFIX}{state.epoch[:12]}-{disk.number}" for disk in disks}
                change_bitmap.start(self._monitor(machine.name), ours)
                names |= {disk.number: name for disk, name in zip(disks, ours.values(), strict=True)}
            number = mark() if names else 0
        except DrctlError:
            for machine in running:
                self._forget(machine.name, _disks_of(state, machine.name))
            raise
        return {disk: (name, number) for disk, name in names.items()}

    def recording(self, state: GroupState, machines: Iterable[Machine]) -> set[int]:
        """The disks whose bitmaps record, and so have missed nothing."""
        return {number for number, records in self._found(state, machines).items() if records}

    def _found(self, state: GroupState, machines: Iterable[Machine]) -> dict[int, bool]:
        """{disk: whether its bitmap records}; of those whose bitmap is gone nothing."""
        known: dict[int, bool] = {}
        for machine in machines:
            tracked = [disk for disk in _disks_of(state, machine.name) if disk.tracked]
            if not tracked or machine.state not in REACHABLE:
                continue
            try:
                there = change_bitmap.found(self._monitor(machine.name))
                for disk in tracked:
                    if (records := there.get((self._node(disk), disk.tracked))) is not None:
                        known[disk.number] = records
            except DrctlError as exc:
                log.info("%s: what it wrote while paused is not known: %s", machine.name, exc.message)
        return known

    def stop(self, state: GroupState, machines: Sequence[Machine], numbers: Collection[int]) -> dict[int, str]:
        """Stop these bitmaps, whose disks have mirrors again; {disk: bitmap} of those that are there. One that was
        stopped before is as good: a write that was missed since would have made the state forget it."""
        bitmaps: dict[int, str] = {}
        for number, records in self._found(state, machines).items():
            disk = state.disk(number)
            if number not in numbers:
                continue
            try:
                if records:
                    change_bitmap.stop(self._monitor(disk.machine), self._node(disk), disk.tracked)
                bitmaps[number] = disk.tracked
            except DrctlError as exc:
                log.info("%s: its bitmap can't be used: %s", disk.name, exc.message)
        return bitmaps

    def forget(self, state: GroupState, machines: Iterable[Machine]) -> None:
        """Remove the bitmaps; what can't be removed goes with its QEMU."""
        for machine in machines:
            if tracked := [disk for disk in _disks_of(state, machine.name) if disk.tracked]:
                self._forget(machine.name, tracked)

    def _forget(self, machine: str, disks: Iterable[DiskState]) -> None:
        try:
            change_bitmap.forget(self._monitor(machine), [self._node(disk) for disk in disks])
        except DrctlError as exc:
            log.info("%s: its bitmaps are left: %s", machine, exc.message)

    def _node(self, disk: DiskState) -> str:
        return self._host.source_node(disk.machine, disk.target)

    def _monitor(self, machine: str) -> Monitor:
        return partial(self._host.monitor, machine)


def write_extents(path: Path, extents: Iterable[Extent]) -> None:
    """For the reader: [[offset, length], …]."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps([[extent.offset, extent.length] for extent in extents]))
    temporary.replace(path)


def with_tracked(state: GroupState, tracked: Mapping[int, tuple[str, int]]) -> GroupState:
    """These disks have bitmaps, and a checkpoint that holds what was written before."""
    for number, (name, checkpoint) in tracked.items():
        state = state.with_disk(number, tracked=name, tracked_since=checkpoint)
    return state


def _disks_of(state: GroupState, machine: str) -> list[DiskState]:
    return [disk for disk in state.disks if disk.machine == machine]
