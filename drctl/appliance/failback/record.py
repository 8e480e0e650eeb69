"""A failback as a durable object at the site that the group comes back to. Knows neither hypervisor nor store.

home/failbacks/GROUP.json         the record
home/failbacks/GROUP/NAME.xml     the definition that a machine had here, NAME.nvram what its firmware remembered

sealing   the old disks are being put into the group's store here, as checkpoint `before-failback`
open      they are; the store takes the stream of the site that reigns, under `generation`"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from drctl.errors import IntegrityError
from drctl.model.group import GroupDisk
from drctl.store import atomic

FORMAT = 1
TAG = "before-failback"
#: The old disks stay restorable for so long.
KEEP_SECONDS = 30 * 86400.0
#: For so long whatever happens; then only as long as the journal is not fuller than this part of its limit. A journal
#: promotes for want of room above 0.9.
KEEP_AT_LEAST = 7 * 86400.0
CROWDED = 0.85


class FailbackPhase(StrEnum):
    SEALING = "sealing"
    OPEN = "open"


class OldDisk(msgspec.Struct, frozen=True):
    """A disk that lies here. `way` is how it gets into the store: `move`, `clone` or `copy` make it a base, `compare`
    writes what differs from what the store holds."""

    number: int
    name: str
    path: str
    format: str
    size: int
    used: int
    way: str


class LeftOut(msgspec.Struct, frozen=True):
    """A disk of the group that nothing here is a seed of, and why."""

    name: str
    reason: str


class Hold(msgspec.Struct, frozen=True):
    """A checkpoint that keeps its tag until then (seconds since the epoch)."""

    epoch: str
    number: int
    until: float


class Failback(msgspec.Struct):
    """One group's failback. `disks`: the group's, as the site that reigns has them; `old`: those that are sealed;
    `machines`: names of those that are defined here on the old disks. `checkpoint` is 0 while nothing is sealed.

    `given_up`: when a tag was taken before its time, because the journal needed the room; 0: never. `leftovers` are
    files of drctl's own that hold nothing any more which the store does not hold; they go when the store has a newer
    checkpoint."""

    group: str
    phase: FailbackPhase
    generation: int
    epoch: str
    number: int
    wall_ns: int
    disks: list[GroupDisk]
    old: list[OldDisk]
    left_out: list[LeftOut]
    machines: list[str]
    definition: dict[str, Any]
    checkpoint: int = 0
    differing: int = 0
    sealed: float = 0.0
    holds: list[Hold] = msgspec.field(default_factory=list)
    leftovers: list[str] = msgspec.field(default_factory=list)
    given_up: float = 0.0
    reason: str = ""
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = msgspec.to_builtins(self)
        del data["definition"]
        data["tag"] = TAG
        data["kept_until"] = next((hold.until for hold in self.holds if hold.epoch == self.epoch), None)
        return data


class FailbackFiles:
    """The records; each save is atomic and durable when it returns."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._directory.glob("[!.]*.json"))

    def load(self, group: str) -> Failback | None:
        """None when there is none. Raises IntegrityError."""
        path = self._directory / f"{group}.json"
        data = atomic.read_json(path)
        if data is None:
            return None
        try:
            return msgspec.convert(data, Failback)
        except msgspec.ValidationError as exc:
            raise IntegrityError(f"{path}: {exc}") from exc

    def save(self, record: Failback) -> None:
        atomic.make_directory(self._directory)
        atomic.write_json(self._directory / f"{record.group}.json", msgspec.to_builtins(record))

    def remove(self, group: str) -> None:
        atomic.remove(self._directory / f"{group}.json")

    def kept(self, group: str, name: str) -> Path:
        """Where something of a machine is kept aside."""
        directory = self._directory / group
        atomic.make_directory(directory)
        return directory / name
