"""group.json: what a store knows of its group besides the journal. Changed under a short lock, by any process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from drctl.errors import IntegrityError, NotFound, UnsupportedFormat
from drctl.model.group import GroupDisk, Retention, Rung
from drctl.store import atomic

FORMAT = 1


class StoreMode(StrEnum):
    """initial: the first sync fills the bases. journal: frames go to the journal. failed-over: nothing is accepted,
    the group reigns here."""

    INITIAL = "initial"
    JOURNAL = "journal"
    FAILED_OVER = "failed-over"


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """Invariant: base_position <= promoting. The bases hold all of the journal up to the end of log `base_position`,
    and parts of what follows up to the end of log `promoting`: no checkpoint in between can be restored."""

    group: str
    generation: int
    mode: StoreMode
    disks: tuple[GroupDisk, ...] = ()
    base_position: int = 0
    promoting: int = 0
    retention: Retention = field(default_factory=Retention)

    def disk(self, name: str) -> GroupDisk:
        for disk in self.disks:
            if disk.name == name:
                return disk
        raise NotFound("disk", name, known=[disk.name for disk in self.disks])


def read_info(root: Path) -> GroupInfo:
    """Raises NotFound, IntegrityError or UnsupportedFormat."""
    path = root / "group.json"
    fields = atomic.read_json(path)
    if fields is None:
        raise NotFound("store", str(root))
    try:
        if fields["format"] != FORMAT:
            raise UnsupportedFormat(f"{path}: format {fields['format']}, known: {FORMAT}")
        return GroupInfo(
            fields["group"],
            int(fields["generation"]),
            StoreMode(fields["mode"]),
            tuple(GroupDisk(**disk) for disk in fields["disks"]),
            int(fields["base_position"]),
            int(fields["promoting"]),
            retention_from(fields["retention"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise IntegrityError(f"{path}: {exc!r}", path=path) from exc


def write_info(root: Path, info: GroupInfo) -> None:
    """Replace group.json. Call it through `change_info` once the store exists."""
    atomic.write_json(root / "group.json", {"format": FORMAT, **asdict(info)})


def change_info(root: Path, change: Callable[[GroupInfo], GroupInfo]) -> GroupInfo:
    """Apply `change` to the newest group.json, alone."""
    with commit_lock(root):
        info = read_info(root)
        changed = change(info)
        if changed != info:
            write_info(root, changed)
        return changed


def commit_lock(root: Path) -> Any:
    """The short lock under which group.json, tags and pins change, and a merge or promotion becomes true."""
    return atomic.lock(root / "commit.lock")


def retention_from(fields: dict[str, Any]) -> Retention:
    """A Retention from its JSON object; absent fields have their defaults."""
    rungs = [Rung(float(rung["within"]), float(rung["every"])) for rung in fields.get("ladder", ())]
    default = Retention()
    return Retention(
        float(fields.get("history", default.history)),
        tuple(rungs) or default.ladder,
        int(fields.get("journal_limit", default.journal_limit)),
        float(fields.get("lock", default.lock)),
    )


def with_disks(info: GroupInfo, disks: Sequence[GroupDisk]) -> GroupInfo:
    """`info` with new disks added and grown ones grown; a base never shrinks and is never dropped by a definition."""
    known = {disk.number: disk for disk in info.disks}
    for disk in disks:
        old = known.get(disk.number)
        known[disk.number] = replace(disk, size=max(disk.size, old.size)) if old else disk
    return replace(info, disks=tuple(known[number] for number in sorted(known)))
