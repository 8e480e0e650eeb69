"""What the snapshot cycle of a group has to know after a crash: `home/groups/NAME.cycle`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from drctl.errors import IntegrityError
from drctl.hypervisor.esx.cycle import CycleState, DiskKey, Mark
from drctl.store import atomic

FORMAT = 1


class _Layers(msgspec.Struct, frozen=True):
    machine: str
    device: str
    paths: tuple[str, ...]


class _Mark(msgspec.Struct, frozen=True):
    number: int
    names: dict[str, str]
    layers: tuple[_Layers, ...]
    taken: float


class _File(msgspec.Struct, frozen=True):
    """`checkpoint`: the number of one that the recovery site has, and that holds all below the baseline (0: none)."""

    format: int
    group: str
    last: int
    baseline: _Mark | None
    pending: _Mark | None
    checkpoint: int = 0


class CycleFile:
    """The record of one group. `save` returns when it is durable. One thread uses it."""

    def __init__(self, groups: Path, group: str) -> None:
        self._path = groups / f"{group}.cycle"
        self._group = group
        #: Written at the next `save`.
        self.checkpoint = 0

    def load(self) -> CycleState:
        """Raises IntegrityError: what is not known can't be guessed, and a snapshot would be left behind."""
        try:
            told = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return CycleState(self._group)
        except msgspec.DecodeError as exc:
            hint = "move it away: the disks are compared as a whole, and snapshots of the group are removed"
            raise IntegrityError(f"{self._path}: {exc}", hint=hint) from exc
        if told.format != FORMAT or told.group != self._group:
            raise IntegrityError(f"{self._path}: format {told.format} of group {told.group}")
        self.checkpoint = told.checkpoint
        return CycleState(told.group, _mark(told.baseline), _mark(told.pending), told.last)

    def save(self, state: CycleState) -> None:
        told = _File(
            FORMAT,
            state.group,
            state.last,
            _told(state.baseline),
            _told(state.pending),
            self.checkpoint if state.baseline else 0,
        )
        atomic.write_json(self._path, msgspec.to_builtins(told))

    @property
    def exists(self) -> bool:
        return self._path.exists()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _mark(told: _Mark | None) -> Mark | None:
    if told is None:
        return None
    layers: dict[DiskKey, tuple[str, ...]] = {(one.machine, one.device): one.paths for one in told.layers}
    return Mark(told.number, told.names, layers, told.taken)


def _told(mark: Mark | None) -> _Mark | None:
    if mark is None:
        return None
    layers = tuple(_Layers(*disk, tuple(paths)) for disk, paths in mark.layers.items())
    return _Mark(mark.number, dict(mark.names), layers, mark.taken)
