"""Replicas that are kept for a while after their replication was stopped, and deleted then. Knows no hypervisor."""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import closing, suppress
from pathlib import Path

from drctl.appliance.client import Client
from drctl.errors import DrctlError
from drctl.model.duration import format_duration
from drctl.store.group_store import GroupStore
from drctl.store.retention_lock import locked

log = logging.getLogger(__name__)

#: What is kept when nobody said otherwise, and after `group delete`: long enough to notice a mistake.
KEEP_SECONDS = 7 * 86400.0
#: Between two looks for what has expired.
SWEEP_SECONDS = 60.0
_FILE = "expiry.json"


class StoreExpiry:
    """`store/GROUP/expiry.json` says until when a store is kept. Without it a store is kept for ever."""

    def __init__(self, stores: Path, receiver: Path) -> None:
        """`receiver`: the receiver's control socket; it has to let go of a store before it is deleted."""
        self._stores = stores
        self._receiver = receiver
        self._swept = 0.0

    def keep(self, group: str, seconds: float, why: str) -> float:
        """Keep the store that long from now; returns the moment (seconds since the epoch).

        Raises RetentionLocked when its lock lasts longer than that."""
        until = time.time() + seconds
        if (end := self.locked_until(group)) > until:
            raise locked(f"{group} can't be deleted {_when(seconds)}", group, end)
        temporary = self._stores / group / f".{_FILE}.new"
        temporary.write_text(json.dumps({"until": until, "why": why}))
        temporary.replace(self._stores / group / _FILE)
        return until

    def forget(self, group: str) -> None:
        """The group is wanted again: keep its store."""
        (self._stores / group / _FILE).unlink(missing_ok=True)

    def locked_until(self, group: str) -> float:
        """The end of the group's retention lock, seconds since the epoch; 0.0: it has none."""
        with closing(GroupStore.open(self._stores / group)) as store:
            return store.locked_until()

    def until(self, group: str) -> float | None:
        try:
            return float(json.loads((self._stores / group / _FILE).read_text())["until"])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def sweep(self) -> list[str]:
        """Delete what has expired, at most each minute; a store with a pin (a view, a failover) or a lock waits."""
        if time.monotonic() - self._swept < SWEEP_SECONDS:
            return []
        self._swept = time.monotonic()
        now = time.time()
        expired = [path.parent.name for path in self._stores.glob(f"*/{_FILE}")]
        return [group for group in expired if (self.until(group) or now) < now and self._delete(group)]

    def _delete(self, group: str) -> bool:
        root = self._stores / group
        try:
            store = GroupStore.open(root)
            held = bool(store.pins()) or store.locked_until() > time.time()
            store.close()
            if held:
                return False
            with suppress(DrctlError):
                Client(f"unix:{self._receiver}").call("group.release", {"group": group})
        except DrctlError as exc:
            log.warning("%s: not deleted: %s", root, exc.message)
            return False
        # Renamed first: a half-deleted store must not be taken for a damaged one.
        doomed = root.with_name(f".{group}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        root.rename(doomed)
        shutil.rmtree(doomed)
        log.info("%s: replica and checkpoints deleted, their time was over", group)
        return True


def _when(seconds: float) -> str:
    return f"in {format_duration(seconds)}" if seconds > 0 else "now"
