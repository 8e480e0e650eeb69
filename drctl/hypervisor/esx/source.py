"""The snapshot cycle carried out: acts of `cycle`, one at a time, each recorded first and looked at afterwards.

Any call may end with HostUnreachable, or the process may die: the next cycle goes on from what was recorded and what is
there. Of all machines of a host the snapshots are taken one after the other: a checkpoint is consistent for each
machine, not over them."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from drctl.errors import DrctlError, HypervisorRefused, IntegrityError, NotFound, UnsupportedFormat
from drctl.hypervisor import redo_log, vmdk
from drctl.hypervisor.esx import cycle
from drctl.hypervisor.esx.batch import Command
from drctl.hypervisor.esx.cycle import Change, CycleState, DiskKey, Mark, SeenMachine
from drctl.hypervisor.esx.disks import Disks
from drctl.hypervisor.esx.frozen import FrozenDisk
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.inventory import EsxMachine, Inventory, Layer
from drctl.hypervisor.esx.snapshots import Snapshots, new_name
from drctl.hypervisor.redo_log import RedoLog
from drctl.model.extent import Extent

#: More acts than any cycle has; a host that undoes each of them must not keep us forever.
ACTS = 10_000


class Record(Protocol):
    """Where the state outlives a crash; `save` returns when it is durable."""

    def load(self) -> CycleState: ...

    def save(self, state: CycleState) -> None: ...


class Sink(Protocol):
    """Where changes go. All between `begin` and `commit` is one checkpoint, and may come again after a crash."""

    def begin(self, number: int, identity: str) -> None:
        """`identity` is that of the snapshots: under the same one comes the same data."""

    def whole(self, disks: Mapping[DiskKey, FrozenDisk]) -> None:
        """All of these disks, to be read or compared; called before any write, when there are such. Returns when they
        are at the recovery site, however long that takes."""

    def write(self, disk: DiskKey, offset: int, data: bytes | memoryview) -> None: ...

    def zero(self, disk: DiskKey, extent: Extent) -> None: ...

    def commit(self, number: int, taken: float) -> None:
        """Returns when everything is durable, as it was at `taken` (wall clock)."""


#: What looks at the host before anything is changed there; raises when no cycle should begin.
Check = Callable[[Inventory, Sequence[str]], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a source works with."""

    host: EsxHost
    snapshots: Snapshots
    disks: Disks
    check: Check = lambda inventory, wanted: None
    clock: Callable[[], float] = time.time


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a disk's change is read: its redo logs, or all of it."""

    disk: DiskKey
    logs: tuple[tuple[str, RedoLog], ...] = ()
    whole: FrozenDisk | None = None


class Source:
    """One group's machines on one ESX host."""

    def __init__(self, parts: Parts, record: Record, sink: Sink) -> None:
        self._parts = parts
        self._record = record
        self._sink = sink
        #: What the last cycles met: disks that were read whole, cycles that were given up.
        self.remarks: list[str] = []
        #: The host as it was last looked at.
        self.inventory: Inventory | None = None
        self._swept = False

    def run(self, wanted: Sequence[str], *, name: Callable[[str, int], str] = new_name) -> int:
        """One cycle over these machines (paths of .vmx), finishing what an earlier one left. The mark's number.

        Raises HypervisorRefused when a snapshot can't be taken: then none of this cycle is left."""
        state = self._record.load()
        begin, stale = True, False
        machines, seen = self._look(state.group, wanted)
        if not self._swept:
            self._sweep_clones(state, [machines[path] for path in wanted])
        for _ in range(ACTS):
            act = cycle.next_act(state, seen, wanted, begin=begin)
            if stale and not isinstance(act, cycle.Create):
                machines, seen = self._look(state.group, wanted)
                stale = False
                continue
            match act:
                case None:
                    return state.baseline.number if state.baseline else 0
                case cycle.Begin():
                    assert self.inventory is not None
                    self._parts.check(self.inventory, wanted)
                    state, begin = self._note(state, act, wanted, name), False
                case cycle.Create(machine=machine, name=label):
                    self._create(state, machines[machine], label)
                    seen = cycle.with_snapshot(seen, machine, label)
                    stale = True
                case cycle.Remove(machine=machine, name=label):
                    self._parts.snapshots.remove(machines[machine], label)
                    seen = cycle.without_snapshot(seen, machine, label)
                case cycle.Ship():
                    assert state.pending is not None
                    self._ship(act, state.pending, machines, state.group)
                    state, begin = self._save(cycle.done(state, act)), False
                case _:
                    state = self._note(state, act, wanted, name)
        raise HypervisorRefused(f"{self._parts.host.name}: the snapshot cycle of {state.group} comes to no end")

    def _note(
        self, state: CycleState, act: cycle.Act, wanted: Sequence[str], name: Callable[[str, int], str]
    ) -> CycleState:
        """Acts that change the record alone."""
        match act:
            case cycle.Begin(number=number):
                names = {one: name(state.group, number) for one in wanted}
                return self._save(cycle.begun(state, number, names, self._parts.clock()))
            case cycle.Note(mark=mark):
                return self._save(cycle.noted(state, mark))
            case cycle.Abandon(reason=reason):
                self.remarks.append(reason)
                return self._save(cycle.abandoned(state))
        raise AssertionError(act)

    def stop(self) -> None:
        """End the replication: every snapshot of the group's is removed, none is kept, nor a clone."""
        state = self._save(cycle.ended(self._record.load()))
        machines = self._sweep()
        self._sweep_clones(state, list(machines.values()))

    def abandon(self) -> None:
        """Give up a mark that is not at the recovery site: its snapshots are removed, the newest that is stays."""
        self._save(cycle.abandoned(self._record.load()))
        self._sweep()

    def _sweep(self) -> dict[str, EsxMachine]:
        """Remove the snapshots that are in no record. The host's machines."""
        state = self._record.load()
        machines, seen = self._look(state.group, ())
        while isinstance(act := cycle.next_act(state, seen, (), begin=False), cycle.Remove):
            self._parts.snapshots.remove(machines[act.machine], act.name)
            seen = cycle.without_snapshot(seen, act.machine, act.name)
        return machines

    def _sweep_clones(self, state: CycleState, machines: Sequence[EsxMachine]) -> None:
        """Delete clones of ours that no pending mark waits for: what a crash left."""
        places = sorted({posixpath.dirname(layer.path) for one in machines for d in one.disks for layer in d.layers})
        kept = state.pending.number if state.pending else -1
        for place, answer in zip(
            places, self._parts.host.session.run(*(["ls", place] for place in places)), strict=True
        ):
            for line in answer.out.splitlines():
                match = _CLONE.fullmatch(line)
                if match and match[1] == state.group and int(match[2]) != kept:
                    self._parts.disks.delete(f"{place}/{line}")
        self._swept = True

    def _save(self, state: CycleState) -> CycleState:
        self._record.save(state)
        return state

    def _look(self, group: str, wanted: Sequence[str]) -> tuple[dict[str, EsxMachine], dict[str, SeenMachine]]:
        """The host's machines; of those without redo logs, which can't have snapshots of ours, nothing is asked."""
        self.inventory = self._parts.host.inventory()
        machines = {one.vmx: one for one in self.inventory.machines}
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

    def _ship(self, act: cycle.Ship, mark: Mark, machines: dict[str, EsxMachine], group: str) -> None:
        clones: list[str] = []
        readings: list[_Reading] = []
        try:
            prefix = f"drctl.{group}.{act.number}"
            readings.extend(self._reading(one, machines[one.disk[0]], prefix, clones) for one in act.changes)
            self._sink.begin(act.number, " ".join(sorted(mark.names.values())))
            if whole := {one.disk: one.whole for one in readings if one.whole is not None}:
                self._sink.whole(whole)
            for one in readings:
                for path, log in one.logs:
                    self._send(one.disk, path, log)
            self._sink.commit(act.number, mark.taken)
        finally:
            for one in readings:
                if one.whole is not None:
                    one.whole.close()
        # Not after a failure: the next attempt at this mark goes on with them, another sweeps them.
        for target in clones:
            self._parts.disks.delete(target)

    def _reading(self, change: Change, machine: EsxMachine, prefix: str, clones: list[str]) -> _Reading:
        """How to read a change: its redo logs as they lie there, oldest first, later ones win; or all of the disk."""
        layers = [layer for disk in machine.disks for layer in disk.layers]
        known = {layer.path: layer for layer in layers}
        chosen = [known[path] for path in change.layers]
        if change.reason:
            self.remarks.append(f"{change.disk[1]} of {machine.name} is read whole: {change.reason}")
        try:
            logs, base = self._opened(chosen)
            if not change.whole:
                return _Reading(change.disk, logs)
            frozen = FrozenDisk(self._parts.host.session.fetch, base, chosen[-1].descriptor.size, logs)
        except (HypervisorRefused, IntegrityError, UnsupportedFormat) as exc:
            self.remarks.append(f"{change.disk[1]} of {machine.name}: a clone is read: {exc.message}")
            frozen = self._clone(chosen[-1], prefix, clones)
        return _Reading(change.disk, whole=frozen)

    def _opened(self, layers: Sequence[Layer]) -> tuple[tuple[tuple[str, RedoLog], ...], str]:
        """The redo logs among the layers, parsed, and the file of the base, if it is among them.

        Raises HypervisorRefused where the host does not let one be read; IntegrityError, UnsupportedFormat."""
        session, base = self._parts.host.session, ""
        paths = [extent_path(layer) for layer in layers]
        told = session.run(*(command for path in paths for command in _looks(path)))
        logs = []
        for layer, path, probe, size in zip(layers, paths, told[0::2], told[1::2], strict=True):
            if probe.code:
                raise HypervisorRefused(f"{path} can't be read there: {probe.told}")
            if layer.descriptor.is_redo_log:
                logs.append((path, redo_log.parse(partial(session.fetch, path), int(session.checked(size).out))))
            elif layer.descriptor.kind == vmdk.VIRTUAL_RDM:
                raise HypervisorRefused(f"{path} is a raw device mapping: its data lies elsewhere")
            else:
                base = path
        return tuple(logs), base

    def _send(self, disk: DiskKey, path: str, log: RedoLog) -> None:
        for extent, is_data in log.extents():
            if not is_data:
                self._sink.zero(disk, extent)
        for offset, data in redo_log.grains(log, partial(self._parts.host.session.fetch, path)):
            self._sink.write(disk, offset, data)

    def _clone(self, newest: Layer, prefix: str, clones: list[str]) -> FrozenDisk:
        """Where the host does not let frozen layers be read: a flat copy of them beside, to be deleted afterwards.

        Its name has the mark's number, which is never used again: no other mark takes it for its own."""
        target = f"{posixpath.dirname(newest.path)}/{prefix}.{posixpath.basename(newest.path)}"
        self._parts.disks.clone(newest.path, target)
        clones.append(target)
        flat = target.removesuffix(".vmdk") + "-flat.vmdk"
        return FrozenDisk(self._parts.host.session.fetch, flat, newest.descriptor.size)


#: A clone of ours: group, number, and the layer that it was made of.
_CLONE = re.compile(r"drctl\.([A-Za-z0-9][A-Za-z0-9_-]*)\.(\d+)\.(?!.*-flat\.vmdk).*\.vmdk")


def _looks(path: str) -> tuple[Command, Command]:
    """Whether a file's bytes can be had, and how many there are."""
    return ["dd", f"if={path}", "of=/dev/null", "bs=1M", "count=1"], ["stat", "-c", "%s", path]


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
