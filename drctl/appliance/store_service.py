"""Control methods of the recovery role that concern stores: groups kept here, their checkpoints, their status."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drctl.appliance.control import Progress
from drctl.errors import IntegrityError, NotFound, Refused, WrongPhase
from drctl.model.checkpoint import Checkpoint, resolve
from drctl.model.extent import MiB
from drctl.model.group import GroupSpec
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore

#: Bytes of a disk verified between two reports of progress.
_STEP = 4 * MiB
#: A new group's generation; the source's is the same (appliance/group_state.py).
FIRST_GENERATION = 1


class StoreService:
    """The stores under one directory. Opens one anew for each question, so any thread may ask."""

    def __init__(self, directory: Path, recoveries: Callable[[str], list[dict[str, Any]]]) -> None:
        self._directory = directory
        self._recoveries = recoveries
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self._directory.glob("*/group.json"))

    def put(self, spec: GroupSpec) -> bool:
        """Make the group's store, or take a changed retention; True when that changed anything."""
        with self._lock:
            root = self._directory / spec.name
            if not (root / "group.json").exists():
                GroupStore.create(root, spec.name, FIRST_GENERATION, (), spec.retention).close()
                return True
            with self._open(spec.name) as store:
                if store.info.retention == spec.retention:
                    return False
                store.set_retention(spec.retention)
                return True

    def summary(self, name: str) -> dict[str, Any]:
        with self._open(name) as store:
            info = store.info
            spec = (store.definition() or {}).get("spec")
        return {"mode": info.mode.value, "generation": info.generation, "spec": spec}

    def status(self, name: str) -> dict[str, Any]:
        with self._open(name) as store:
            info = store.info
            checkpoints = store.checkpoints()
        ends = [{"number": c.number, "time": c.time} for c in (*checkpoints[:1], *checkpoints[-1:])]
        journal = sum(path.stat().st_size for path in (self._directory / name).glob("streams/*/*/*"))
        history = checkpoints[-1].time - checkpoints[0].time if checkpoints else None
        return {
            "group": name,
            "role": "recovery",
            "mode": info.mode.value,
            "generation": info.generation,
            "wall_ns": time.time_ns(),
            "checkpoints": {
                "count": len(checkpoints),
                "oldest": ends[0] if ends else None,
                "newest": ends[-1] if ends else None,
            },
            "journal": {"bytes": journal, "limit": info.retention.journal_limit},
            "history": {"seconds": history, "target": info.retention.history, "forecast": None},
            "recoveries": self._recoveries(name),
        }

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint_list(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        del progress
        with self._open(str(params.get("group"))) as store:
            return [asdict(checkpoint) for checkpoint in store.checkpoints()]

    def checkpoint_tag(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        with self._open(str(params.get("group"))) as store:
            chosen = _resolve(store, params)
            for tag in params.get("tags") or ():
                store.tag(chosen.number, str(tag))
            for tag in params.get("remove") or ():
                store.untag(str(tag))
            return asdict(store.checkpoint(chosen.number))

    def checkpoint_verify(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Read all of a checkpoint; what is damaged is named, with file and offset."""
        with self._open(str(params.get("group"))) as store:
            chosen = _resolve(store, params)
            damaged: list[str] = []
            done = 0
            with closing(store.open_view(chosen.number)) as view:
                total = sum(disk.size for disk in view.disks)
                for disk in view.disks:
                    for count, problem in _read_all(view.disk(disk.name)):
                        done += count
                        if problem:
                            damaged.append(f"{disk.name}: {problem}")
                        progress({"done_bytes": done, "total_bytes": total})
        return {"number": chosen.number, "time": chosen.time, "bytes": done, "damaged": damaged}

    def remove(self, name: str) -> None:
        raise WrongPhase(
            f"the history of {name} is kept at this site",
            hint=f"remove {self._directory / name} by hand once it is of no use",
        )

    def mode(self, name: str) -> StoreMode:
        with self._open(name) as store:
            return store.info.mode

    @contextmanager
    def _open(self, group: str) -> Iterator[GroupStore]:
        root = self._directory / group
        if not group or "/" in group or not (root / "group.json").exists():
            raise NotFound("group", group, known=self.names())
        with closing(GroupStore.open(root)) as store:
            yield store


def _resolve(store: GroupStore, params: dict[str, Any]) -> Checkpoint:
    try:
        return resolve(str(params.get("checkpoint") or "latest"), store.checkpoints(), time.time())
    except ValueError as exc:
        raise Refused(str(exc)) from exc


def _read_all(disk: Any) -> Iterator[tuple[int, str]]:
    """(bytes read, what is wrong or "") for each piece of a disk."""
    for offset in range(0, disk.size, _STEP):
        length = min(_STEP, disk.size - offset)
        try:
            for extent, data in disk.extents(offset, length):
                if data:
                    disk.read(extent.offset, extent.length)
            yield length, ""
        except IntegrityError as exc:
            yield length, exc.message
