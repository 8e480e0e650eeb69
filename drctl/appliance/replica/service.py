"""Control methods of the recovery role that concern stores: groups kept here, their checkpoints, their status."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drctl.appliance.control import Handler, Progress
from drctl.appliance.recovery.store import GroupStores
from drctl.appliance.replica.expiry import KEEP_SECONDS, StoreExpiry
from drctl.errors import IntegrityError, Refused, WrongPhase
from drctl.model.checkpoint import Checkpoint
from drctl.model.extent import MiB
from drctl.model.group import GroupSpec
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore
from drctl.store.retention import Forecast
from drctl.store.retention_lock import locked, locked_until
from drctl.store.signatures import verify_signatures

#: Bytes of a disk verified between two reports of progress.
_STEP = 4 * MiB
#: A new group's generation; the source's is the same (appliance/source/group_state.py).
FIRST_GENERATION = 1


class StoreService:
    """The stores under one directory. Opens one anew for each question, so any thread may ask."""

    def __init__(self, directory: Path, expiry: StoreExpiry, recoveries: Callable[[str], list[dict[str, Any]]]) -> None:
        self._directory = directory
        self._stores = GroupStores(directory)
        self._expiry = expiry
        self._recoveries = recoveries
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """The methods of checkpoints, for an appliance's control socket."""
        return {
            "checkpoint.list": self.checkpoint_list,
            "checkpoint.choose": self.checkpoint_choose,
            "checkpoint.tag": self.checkpoint_tag,
            "checkpoint.verify": self.checkpoint_verify,
        }

    def names(self) -> list[str]:
        return self._stores.groups()

    def put(self, spec: GroupSpec) -> bool:
        """Make the group's store, or take a changed retention; True when that changed anything."""
        with self._lock:
            root = self._directory / spec.name
            if not (root / "group.json").exists():
                GroupStore.create(root, spec.name, FIRST_GENERATION, (), spec.retention).close()
                return True
            self._expiry.forget(spec.name)
            with self._stores.open(spec.name) as store:
                if store.info.retention == spec.retention:
                    return False
                store.set_retention(spec.retention)
                return True

    def generation(self, name: str) -> int:
        return self._stores.generation(name)

    def summary(self, name: str) -> dict[str, Any]:
        with self._stores.open(name) as store:
            info = store.info
            spec = (store.definition() or {}).get("spec")
        return {"mode": info.mode.value, "generation": info.generation, "spec": spec}

    def status(self, name: str) -> dict[str, Any]:
        with self._stores.open(name) as store:
            info = store.info
            count, oldest, newest = store.count(), store.oldest(), store.newest()
            ahead = store.forecast(time.time())
            definition, until = store.definition() or {}, store.locked_until()
        spec = definition.get("spec") or {}
        history = newest.time - oldest.time if newest and oldest else None
        return {
            "group": name,
            "role": "recovery",
            "mode": info.mode.value,
            "generation": info.generation,
            "source": {"site": definition.get("source_site"), "host": definition.get("source_host")},
            "interval": spec.get("checkpoint_interval"),
            "wall_ns": time.time_ns(),
            "checkpoints": {
                "count": count,
                "oldest": {"number": oldest.number, "time": oldest.time} if oldest else None,
                "newest": {"number": newest.number, "time": newest.time} if newest else None,
            },
            "journal": {"bytes": ahead.used, "limit": info.retention.journal_limit},
            "history": {"seconds": history, "target": info.retention.history, "forecast": _forecast(ahead)},
            "kept_until": self._expiry.until(name),
            "lock": {"seconds": info.retention.lock, "until": until} if info.retention.lock else None,
            "recoveries": self._recoveries(name),
        }

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint_list(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        del progress
        with self._stores.open(str(params.get("group"))) as store:
            return [asdict(checkpoint) for checkpoint in store.checkpoints(int(params.get("last") or -1))]

    def checkpoint_choose(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The one checkpoint that a selector names: a list of half a million would cost seconds in a disaster."""
        del progress
        with self._stores.open(str(params.get("group"))) as store:
            return asdict(_resolve(store, params))

    def checkpoint_tag(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        with self._stores.open(str(params.get("group"))) as store:
            chosen = _resolve(store, params)
            if params.get("remove"):
                _demand_unlocked(store, chosen)
            for tag in params.get("tags") or ():
                store.tag(chosen.number, str(tag))
            for tag in params.get("remove") or ():
                store.untag(str(tag))
            return asdict(store.checkpoint(chosen.number))

    def checkpoint_verify(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Read all of a checkpoint, and what is signed of the newest content; what is damaged is named."""
        with self._stores.open(str(params.get("group"))) as store:
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
            for count, problems in verify_signatures(store.root):
                done += count
                damaged += problems
                progress({"done_bytes": done, "total_bytes": max(total, done)})
        return {"number": chosen.number, "time": chosen.time, "bytes": done, "damaged": damaged}

    def replicate_stop(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The source replicates no more; keep what is here for a while."""
        del progress
        name = str(params.get("group"))
        with self._stores.open(name):
            asked = params.get("keep_replica_seconds")
            seconds = KEEP_SECONDS if asked is None else float(asked)
            return {"group": name, "kept_until": self._expiry.keep(name, seconds, "replication was stopped")}

    def remove(self, name: str) -> float:
        """Delete the group's history, after a week. Raises WrongPhase while the group reigns or is tested here."""
        with self._stores.open(name) as store:
            if store.info.mode is StoreMode.FAILED_OVER or store.pins():
                raise WrongPhase(f"{name} is in use at this site", hint=f"see: drctl status {name}", group=name)
        return self._expiry.keep(name, KEEP_SECONDS, "the group was deleted")

    def mode(self, name: str) -> StoreMode:
        with self._stores.open(name) as store:
            return store.info.mode


def _demand_unlocked(store: GroupStore, checkpoint: Checkpoint) -> None:
    """Raises RetentionLocked for one that is younger than the lock: without its tag the ladder might drop it."""
    until = locked_until(store.info.retention, checkpoint.time)
    if until > time.time():
        raise locked(f"checkpoint #{checkpoint.number} keeps its tags", store.info.group, until)


def _forecast(ahead: Forecast) -> dict[str, Any] | None:
    """What the limit will make of the history; null while too little is known."""
    if ahead.at_limit is None:
        return None
    return {
        "seconds": min(ahead.at_limit, ahead.target),
        "falls_short": ahead.falls_short,
        "hours_until_short": ahead.hours_until_short,
        "held_back": ahead.held_back,
        "hours_until_full": ahead.full_in / 3600 if ahead.full_in is not None else None,
    }


def _resolve(store: GroupStore, params: dict[str, Any]) -> Checkpoint:
    try:
        return store.choose(str(params.get("checkpoint") or "latest"), time.time())
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
