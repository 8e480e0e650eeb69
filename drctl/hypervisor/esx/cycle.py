"""The snapshot cycle of a group on an ESX host: from what is there and what is recorded, the one next act. Pure.

One snapshot of ours is kept on each machine, the *baseline*: what was below it is at the recovery site. A cycle takes
the next, the *pending* one; the redo logs between the two are frozen then and hold what was written in between. They
are shipped, the pending snapshot becomes the baseline, and the older one is removed.

Whoever carries an act out records first, then does, then looks again. Names are recorded before their snapshots are
made; so a snapshot of the group that is in no record is one that nobody waits for: the first act is to remove it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

#: A machine, by the path of its .vmx; and its disk, by its device.
DiskKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Mark:
    """One snapshot of all machines. `names` by machine; `layers` by disk, empty until they were seen: the layer that is
    written since, and those that may lie right below it: the one that the snapshot froze, and the one that this is
    merged into when the snapshot before is removed. `taken` is a moment (wall clock) before the first of them was made:
    what guests had been told to be written by then is in it."""

    number: int
    names: Mapping[str, str]
    layers: Mapping[DiskKey, tuple[str, ...]] = field(default_factory=dict)
    taken: float = 0.0


@dataclass(frozen=True, slots=True)
class CycleState:
    """What has to outlive a crash. Invariant: all below the baseline is durable at the recovery site."""

    group: str
    baseline: Mark | None = None
    pending: Mark | None = None
    #: Of the newest mark ever begun: numbers are not used again.
    last: int = 0


@dataclass(frozen=True, slots=True)
class SeenMachine:
    """A machine as it is now: names of the group's snapshots, and of each disk the layers, newest first."""

    ours: tuple[str, ...]
    disks: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Begin:
    """Record a pending mark with new names."""

    number: int


@dataclass(frozen=True, slots=True)
class Create:
    machine: str
    name: str


@dataclass(frozen=True, slots=True)
class Note:
    """Record the pending mark's layers."""

    mark: Mark


@dataclass(frozen=True, slots=True)
class Change:
    """What a disk's redo logs hold, oldest first; `whole`: everything below the pending snapshot has to be read."""

    disk: DiskKey
    layers: tuple[str, ...]
    whole: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ship:
    """Ship the changes and make them durable; then record `done`. `below` is what lies below the baseline's layers."""

    number: int
    changes: tuple[Change, ...]
    below: Mapping[DiskKey, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Remove:
    machine: str
    name: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Record that there is no pending mark: its snapshot is gone from under it."""

    reason: str


Act = Begin | Create | Note | Ship | Remove | Abandon | None


def next_act(state: CycleState, seen: Mapping[str, SeenMachine], wanted: Sequence[str], *, begin: bool) -> Act:
    """The one act that is due; None when nothing is. `wanted` are the machines of the group, `begin` a new cycle."""
    if leftover := _leftover(state, seen):
        return leftover
    pending = state.pending
    if pending is None:
        return Begin(state.last + 1) if begin and wanted else None
    if gone := [machine for machine in pending.names if machine not in seen]:
        return Abandon(f"{gone[0]} is no longer there")
    missing = [machine for machine, name in pending.names.items() if name not in seen[machine].ours]
    if not pending.layers:
        if missing:
            return Create(missing[0], pending.names[missing[0]])
        return _note(pending, seen)
    if missing:
        return Abandon(f"the snapshot of {missing[0]} was removed by somebody else")
    return _ship(state.baseline, pending, seen)


def _leftover(state: CycleState, seen: Mapping[str, SeenMachine]) -> Remove | None:
    recorded = {
        (machine, name) for mark in (state.baseline, state.pending) if mark for machine, name in mark.names.items()
    }
    every = [(machine, name) for machine, one in seen.items() for name in one.ours]
    return next((Remove(*pair) for pair in every if pair not in recorded), None)


def _note(pending: Mark, seen: Mapping[str, SeenMachine]) -> Act:
    layers: dict[DiskKey, tuple[str, ...]] = {}
    for machine in pending.names:
        for device, chain in seen[machine].disks.items():
            if len(chain) < 2:
                return Abandon(f"{machine} {device} has no redo log though there is a snapshot")
            layers[machine, device] = (chain[0], chain[1])
    return Note(replace(pending, layers=layers)) if layers else Abandon("no disk can be replicated")


def _ship(baseline: Mark | None, pending: Mark, seen: Mapping[str, SeenMachine]) -> Act:
    changes, below = [], {}
    for disk, layers in pending.layers.items():
        machine, device = disk
        chain = seen[machine].disks.get(device, ())
        if not _is_in(chain, layers):
            return Abandon(f"the layers of {machine} {device} were changed by somebody else")
        change = _change(disk, chain[chain.index(layers[0]) + 1 :], baseline, seen[machine].ours)
        changes.append(change)
        if not change.whole:
            below[disk] = chain[chain.index(change.layers[0]) + 1]
    return Ship(pending.number, tuple(changes), below)


def _change(disk: DiskKey, frozen: tuple[str, ...], baseline: Mark | None, ours: tuple[str, ...]) -> Change:
    """The frozen layers down to the baseline's; all of them when that can't be vouched for."""
    since = baseline.layers.get(disk) if baseline else None
    if baseline is None or since is None:
        return Change(disk, tuple(reversed(frozen)), True, "first sync")
    if baseline.names[disk[0]] not in ours or not _is_in(frozen, since):
        return Change(disk, tuple(reversed(frozen)), True, "its last snapshot, or a layer above it, was changed")
    return Change(disk, tuple(reversed(frozen[: frozen.index(since[0]) + 1])), False)


def _is_in(chain: Sequence[str], layers: tuple[str, ...]) -> bool:
    """Whether the first layer is there right above one of the others: names are given anew, also by a revert."""
    return any(upper == layers[0] and lower in layers[1:] for upper, lower in pairwise(chain))


def with_snapshot(seen: Mapping[str, SeenMachine], machine: str, name: str) -> dict[str, SeenMachine]:
    """What is seen after a snapshot was made; of layers nothing is known until somebody looks."""
    return {**seen, machine: replace(seen[machine], ours=(*seen[machine].ours, name))}


def without_snapshot(seen: Mapping[str, SeenMachine], machine: str, name: str) -> dict[str, SeenMachine]:
    return {**seen, machine: replace(seen[machine], ours=tuple(one for one in seen[machine].ours if one != name))}


def begun(state: CycleState, number: int, names: Mapping[str, str], taken: float = 0.0) -> CycleState:
    return replace(state, pending=Mark(number, dict(names), taken=taken), last=number)


def noted(state: CycleState, mark: Mark) -> CycleState:
    return replace(state, pending=mark)


def done(state: CycleState, ship: Ship) -> CycleState:
    """All of the pending mark is durable at the recovery site. The baseline before it will be removed."""
    assert state.pending is not None
    old = {disk: (below,) for disk, below in ship.below.items()}
    layers = {disk: (*layers, *old.get(disk, ())) for disk, layers in state.pending.layers.items()}
    return replace(state, baseline=replace(state.pending, layers=layers), pending=None)


def abandoned(state: CycleState) -> CycleState:
    return replace(state, pending=None)


def distrusted(state: CycleState) -> CycleState:
    """The recovery site has not what it once had: nothing that it lacks can be left out. A pending mark goes on."""
    return replace(state, baseline=None)


def ended(state: CycleState) -> CycleState:
    """Replication stops: no snapshot is kept."""
    return replace(state, baseline=None, pending=None)
