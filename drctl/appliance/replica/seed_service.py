"""`replicate.seed`: pre-seeded copies at the recovery site, taken as the bases of a group that was not replicated yet.

After it the source's first pass compares by signatures and sends only what differs, through the journal; nothing is
restorable until that is done, for nobody knows of what time the seeds are."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drctl.appliance.control import Progress
from drctl.appliance.replica.held_store import HeldStores
from drctl.appliance.replica.seed_files import (
    SeedFile,
    Seeding,
    demand_room,
    disks_by_name,
    format_of,
    look,
    room_needed,
    same_size,
    way_of,
)
from drctl.errors import NotFound, OutOfSpace, Refused, WrongPhase
from drctl.model.extent import format_bytes
from drctl.model.group import GroupDisk
from drctl.store import atomic
from drctl.store.group_info import GroupInfo, StoreMode, change_info, read_info
from drctl.store.initial import forget_note
from drctl.store.segment import list_segments


@dataclass(frozen=True, slots=True)
class Wish:
    """A seed that somebody named, and the disk that it is to be of."""

    disk: GroupDisk
    path: Path


class SeedService:
    """Methods may be called from any thread; one call at a time takes seeds."""

    def __init__(self, stores: Path, held: HeldStores) -> None:
        self._stores = stores
        self._held = held
        self._lock = threading.Lock()

    def take(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, disks [{number, machine, target, size}], seeds [{disk, path}], give_up, dry_run} → {group, seeds
        [{disk, path, way, bytes}], unseeded [names]}. Given again, it goes on.

        Raises NotFound (group, disk, file), Refused (size; given twice), WrongPhase (it has a replica), OutOfSpace,
        PreconditionFailed; then nothing was taken."""
        group = str(params.get("group"))
        root = self._stores / group
        with self._lock:
            if not (root / "group.json").exists():
                raise NotFound("group", group, hint="apply the group at the recovery site first")
            disks = disks_by_name(params)
            wishes = wishes_of(disks, params.get("seeds") or ())
            give_up = bool(params.get("give_up"))
            info = read_info(root)
            planned = _plan(root, info, wishes, give_up=give_up)
            unseeded = sorted(set(disks) - {wish.disk.name for wish in wishes} - set(Seeding(root).notes()))
            _demand_journal(info, [disks[name] for name in unseeded])
            if not params.get("dry_run"):
                self._take(root, planned, progress, give_up=give_up)
        told = [
            {"disk": wish.disk.name, "path": str(wish.path), "way": way, "bytes": used} for wish, way, used in planned
        ]
        return {"group": group, "seeds": told, "unseeded": unseeded}

    def _take(self, root: Path, planned: Sequence[tuple[Wish, str, int]], progress: Progress, *, give_up: bool) -> None:
        with self._held.held(root.name), atomic.lock(root / "lock", wait=False, what="a receiver"):
            seeding = Seeding(root)
            for wish, _, _ in planned:

                def tell(done: int, total: int, disk: str = wish.disk.name) -> None:
                    progress({"step": "seed", "disk": disk, "done_bytes": done, "total_bytes": total})

                seeding.take(wish.disk, wish.path, give_up=give_up, tell=tell)
            based(root)


def based(root: Path) -> None:
    """The bases are what the disks were once: from now on all goes through the journal, and is compared first."""
    for path in (root / "signatures").glob("*.map"):
        atomic.remove(path)
    forget_note(root)
    change_info(
        root,
        lambda info: GroupInfo(info.group, info.generation, StoreMode.JOURNAL, info.disks, retention=info.retention),
    )


def pristine(root: Path) -> bool:
    """Nothing that could be lost is in the store: no stream has ever ended its first sync."""
    info = read_info(root)
    if info.mode is StoreMode.INITIAL:
        return True
    nothing = info.mode is StoreMode.JOURNAL and not info.base_position and not info.promoting
    return nothing and list_segments(root)[0].tail is None


def wishes_of(disks: Mapping[str, GroupDisk], seeds: Sequence[Mapping[str, Any]]) -> list[Wish]:
    """Raises NotFound for a disk that the group does not have, Refused for one that is named twice."""
    wishes: list[Wish] = []
    for seed in seeds:
        name = str(seed["disk"])
        if name not in disks:
            raise NotFound("disk", name, known=sorted(disks))
        if any(name == wish.disk.name for wish in wishes):
            raise Refused(f"two seeds for {name}")
        path = Path(str(seed["path"]))
        if not path.is_absolute():
            raise Refused(f"{path} is no absolute path at the recovery site")
        wishes.append(Wish(disks[name], path))
    return wishes


def _plan(root: Path, info: GroupInfo, wishes: Sequence[Wish], *, give_up: bool) -> list[tuple[Wish, str, int]]:
    """(wish, way, bytes) of all, each checked."""
    seeding = Seeding(root)
    planned: list[tuple[Wish, str, int]] = []
    needed = 0
    for wish in wishes:
        if seeding.taken(wish.disk.name, wish.path):
            planned.append((wish, str(seeding.notes()[wish.disk.name]["way"]), 0))
            continue
        _demand_pristine(root, info)
        seed: SeedFile = look(wish.path, format_of(wish.path))
        same_size(seed, wish.disk)
        way = way_of(seed, root, give_up=give_up)
        needed += room_needed(seed, way)
        planned.append((wish, way.value, seed.used))
    demand_room(root, needed)
    return planned


def _demand_pristine(root: Path, info: GroupInfo) -> None:
    if not pristine(root):
        raise WrongPhase(
            f"{info.group} has a replica here already: a seed would take its place",
            hint=f"what differs from it is found, and sent alone, by: drctl resync {info.group}",
            group=info.group,
        )


def _demand_journal(info: GroupInfo, unseeded: Sequence[GroupDisk]) -> None:
    """Disks without a seed go through the journal whole. Raises OutOfSpace when its limit is sure to be too low."""
    # Half: what is zeroes takes none, and the rest may be compressed; a sure failure is refused, a likely one is not.
    needed = sum(disk.size for disk in unseeded) // 2
    if needed > info.retention.journal_limit:
        names = ", ".join(disk.name for disk in unseeded)
        raise OutOfSpace(
            f"{names} without a seed may need more than {format_bytes(needed)} of journal, the limit is "
            f"{format_bytes(info.retention.journal_limit)}",
            hint="name a seed for each large disk (an empty sparse file of its size will do), or raise journal_limit",
            needed=needed,
            free=info.retention.journal_limit,
        )
