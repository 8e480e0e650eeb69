"""The snapshot cycle carried out: acts of `cycle`, one at a time, each recorded first and looked at afterwards.

Any call may end with HostUnreachable, or the process may die: the next cycle goes on from what was recorded and what is
there. Of all machines of a host the snapshots are taken one after the other: a checkpoint is consistent for each
machine, not over them."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from drctl.errors import DrctlError, HypervisorRefused, NotFound
from drctl.hypervisor import redo_log
from drctl.hypervisor.esx import cycle
from drctl.hypervisor.esx.cycle import Change, CycleState, DiskKey, SeenMachine
from drctl.hypervisor.esx.disks import Disks
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.inventory import EsxMachine, Layer
from drctl.hypervisor.esx.snapshots import Snapshots, new_name
from drctl.model.extent import Extent, MiB

#: A whole disk is read in pieces of this size.
PIECE = 4 * MiB
#: More acts than any cycle has; a host that undoes each of them must not keep us forever.
ACTS = 10_000


class Record(Protocol):
    """Where the state outlives a crash; `save` returns when it is durable."""

    def load(self) -> CycleState: ...

    def save(self, state: CycleState) -> None: ...


class Sink(Protocol):
    """Where changes go. All between `begin` and `commit` is one checkpoint, and may come again after a crash."""

    def begin(self, number: int) -> None: ...

    def whole(self, disk: DiskKey, size: int) -> None:
        """All of the disk follows; what is not told reads as zeroes. Comes again when the reading starts over."""

    def write(self, disk: DiskKey, offset: int, data: bytes | memoryview) -> None: ...

    def zero(self, disk: DiskKey, extent: Extent) -> None: ...

    def commit(self, number: int) -> None:
        """Returns when everything is durable."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a source works with."""

    host: EsxHost
    snapshots: Snapshots
    disks: Disks


class Source:
    """One group's machines on one ESX host."""

    def __init__(self, parts: Parts, record: Record, sink: Sink) -> None:
        self._parts = parts
        self._record = record
        self._sink = sink
        #: What the last cycles met: disks that were read whole, cycles that were given up.
        self.remarks: list[str] = []

    def run(self, wanted: Sequence[str], *, name: Callable[[str, int], str] = new_name) -> int:
        """One cycle over these machines (paths of .vmx), finishing what an earlier one left. The mark's number.

        Raises HypervisorRefused when a snapshot can't be taken: then none of this cycle is left."""
        state = self._record.load()
        begin, stale = True, False
        machines, seen = self._look(state.group, wanted)
        for _ in range(ACTS):
            act = cycle.next_act(state, seen, wanted, begin=begin)
            if stale and not isinstance(act, cycle.Create):
                machines, seen = self._look(state.group, wanted)
                stale = False
                continue
            match act:
                case None:
                    return state.baseline.number if state.baseline else 0
                case cycle.Create(machine=machine, name=label):
                    self._create(state, machines[machine], label)
                    seen = cycle.with_snapshot(seen, machine, label)
                    stale = True
                case cycle.Remove(machine=machine, name=label):
                    self._parts.snapshots.remove(machines[machine], label)
                    seen = cycle.without_snapshot(seen, machine, label)
                case cycle.Ship():
                    self._ship(act, machines)
                    state, begin = self._save(cycle.done(state, act)), False
                case _:
                    state, begin = self._note(state, act, wanted, name), begin and not isinstance(act, cycle.Begin)
        raise HypervisorRefused(f"{self._parts.host.name}: the snapshot cycle of {state.group} comes to no end")

    def _note(
        self, state: CycleState, act: cycle.Act, wanted: Sequence[str], name: Callable[[str, int], str]
    ) -> CycleState:
        """Acts that change the record alone."""
        match act:
            case cycle.Begin(number=number):
                return self._save(cycle.begun(state, number, {one: name(state.group, number) for one in wanted}))
            case cycle.Note(mark=mark):
                return self._save(cycle.noted(state, mark))
            case cycle.Abandon(reason=reason):
                self.remarks.append(reason)
                return self._save(cycle.abandoned(state))
        raise AssertionError(act)

    def stop(self) -> None:
        """End the replication: every snapshot of the group's is removed, none is kept."""
        self._save(cycle.ended(self._record.load()))
        self._sweep()

    def _sweep(self) -> None:
        """Remove the snapshots that are in no record."""
        state = self._record.load()
        machines, seen = self._look(state.group, ())
        while isinstance(act := cycle.next_act(state, seen, (), begin=False), cycle.Remove):
            self._parts.snapshots.remove(machines[act.machine], act.name)
            seen = cycle.without_snapshot(seen, act.machine, act.name)

    def _save(self, state: CycleState) -> CycleState:
        self._record.save(state)
        return state

    def _look(self, group: str, wanted: Sequence[str]) -> tuple[dict[str, EsxMachine], dict[str, SeenMachine]]:
        """The host's machines; of those without redo logs, which can't have snapshots of ours, nothing is asked."""
        machines = {one.vmx: one for one in self._parts.host.inventory().machines}
        if missing := next((one for one in wanted if one not in machines), None):
            raise NotFound("machine", missing, known=sorted(machines))
        some = [machine for machine in machines.values() if machine.has_snapshots]
        trees = zip(some, self._parts.snapshots.ours_of_all(some, group), strict=True)
        names = {machine.vmx: tuple(one.name for one in ours) for machine, ours in trees}
        return machines, {path: _seen(machine, names.get(path, ())) for path, machine in machines.items()}

    def _create(self, state: CycleState, machine: EsxMachine, name: str) -> None:
        """A refusal ends the cycle: what it made is in no record any more, and is removed before the error is told."""
        try:
            self._parts.snapshots.create(machine, name)
        except HypervisorRefused:
            self._save(cycle.abandoned(state))
            with suppress(DrctlError):
                self._sweep()
            raise

    # -- data -------------------------------------------------------------------------------------------------------

    def _ship(self, act: cycle.Ship, machines: dict[str, EsxMachine]) -> None:
        self._sink.begin(act.number)
        for change in act.changes:
            layers = {layer.path: layer for disk in machines[change.disk[0]].disks for layer in disk.layers}
            chosen = [layers[path] for path in change.layers]
            if change.reason:
                self.remarks.append(
                    f"{change.disk[1]} of {machines[change.disk[0]].name} is read whole: {change.reason}"
                )
            try:
                self._read(change, chosen)
            except HypervisorRefused as exc:
                self.remarks.append(exc.message)
                self._clone(change, chosen[-1])
        self._sink.commit(act.number)

    def _read(self, change: Change, layers: Sequence[Layer]) -> None:
        """The layers as they lie there, oldest first: later ones win."""
        for layer in layers:
            if layer.descriptor.is_redo_log:
                self._read_redo_log(change.disk, layer)
            else:
                self._read_flat(change.disk, extent_path(layer), layer.descriptor.size)

    def _read_redo_log(self, disk: DiskKey, layer: Layer) -> None:
        path = extent_path(layer)
        read = partial(self._parts.host.session.fetch, path)
        log = redo_log.parse(read, self._parts.host.session.size(path))
        for extent, is_data in log.extents():
            if not is_data:
                self._sink.zero(disk, extent)
        for offset, data in redo_log.grains(log, read):
            self._sink.write(disk, offset, data)

    def _read_flat(self, disk: DiskKey, path: str, size: int) -> None:
        self._sink.whole(disk, size)
        for offset in range(0, size, PIECE):
            (data,) = self._parts.host.session.fetch(path, [Extent(offset, min(PIECE, size - offset))])
            if data.count(0) != len(data):
                self._sink.write(disk, offset, data)

    def _clone(self, change: Change, newest: Layer) -> None:
        """Where the host does not let frozen layers be read: a flat copy is made of them, read, and deleted."""
        place = posixpath.dirname(newest.path)
        target = f"{place}/drctl-{posixpath.basename(newest.path)}"
        self._parts.disks.clone(newest.path, target)
        try:
            self._read_flat(change.disk, target.removesuffix(".vmdk") + "-flat.vmdk", newest.descriptor.size)
        finally:
            self._parts.disks.delete(target)


def _seen(machine: EsxMachine, ours: tuple[str, ...]) -> SeenMachine:
    disks = {
        one.disk.target: tuple(layer.path for layer in one.layers) for one in machine.disks if not one.disk.refusal
    }
    return SeenMachine(ours, disks)


def extent_path(layer: Layer) -> str:
    """The file with a layer's data. Raises HypervisorRefused for a disk of several."""
    if len(layer.descriptor.pieces) != 1:
        raise HypervisorRefused(f"{layer.path} has {len(layer.descriptor.pieces)} extents: such a disk is not read")
    return posixpath.join(posixpath.dirname(layer.path), layer.descriptor.pieces[0].file)
