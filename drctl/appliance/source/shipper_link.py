"""The supervisor's side of a shipper: its configuration, its start, its reports, and the passes it is told to run."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drctl import __version__
from drctl.appliance.client import Client
from drctl.appliance.config import Home
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.worker import Worker
from drctl.errors import ApplianceUnreachable, DrctlError
from drctl.store import link_limits

#: A report that is older says nothing about now (the shipper reports each second and on every change).
REPORT_SECONDS = 5.0
#: Longest that a checkpoint is waited for when a group is paused.
MARK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """The parts of a shipper's status that the protection decides by. `wants` is a pass: `unknown`, `initial`,
    `full`, `dirty` or `nothing`; `holds` the largest number of a checkpoint that the other side is known to have."""

    wants: str
    holds: int
    reason: str
    sync_active: bool
    sync_done: bool
    sync_id: str
    superseded: bool


@dataclass(frozen=True, slots=True)
class Export:
    """Where the reader finds a disk: an NBD unix socket and the export's name there; and a file that says which
    extents of it alone are to be read ("": all)."""

    socket: str
    export: str
    extents: str = ""


class ShipperLink:
    """One group's shipper as the supervisor knows it. `take` is called from the control socket's threads."""

    def __init__(self, home: Home, state: GroupState, worker: Worker, *, clock: bool = True) -> None:
        """`clock`: the shipper cuts marks each interval; else only when it is told to."""
        self._home = home
        self._clock = clock
        self._worker = worker
        self.config_path: Path = home.run / "shippers" / f"{state.spec.name}.json"
        self._taken: tuple[float, dict[str, Any]] = (0.0, {})
        #: The newest checkpoint that any shipper of this group told of: a new one knows of none at first.
        self.newest: dict[str, Any] | None = None
        #: The pass that is running: its id, when it was first seen, how far it was then.
        self._sync_seen: tuple[str | None, float, int] = (None, 0.0, 0)

    def configure(self, state: GroupState) -> None:
        """Write the shipper's configuration; a running one is ended so that it starts anew with it."""
        config = self._home.config
        peer = self._home.peer(state.spec.recovery)
        text = json.dumps(
            {
                "group": state.spec.name,
                "host": config.host,
                "appliance": config.uuid,
                "ring": str(self._worker.ring_path),
                "bell": str(self._worker.bell_path),
                "control": str(self._worker.shipper_socket),
                "supervisor": str(self._home.control),
                "peer": peer.link,
                "peer_appliance": peer.uuid,
                "tls": str(self._home.tls),
                "definition": str(self._home.groups / f"{state.spec.name}.definition"),
                "interval": state.spec.checkpoint_interval,
                "software": __version__,
                "limits": [asdict(limit) for limit in state.spec.limits],
                "priority": state.spec.priority,
                "links": str(self._home.path / link_limits.FILE),
                "share": str(self._home.run / "links" / f"{state.spec.recovery}.share"),
                "site": state.spec.recovery,
                "spill": str(self._worker.spill_path),
                "spill_key": str(self._worker.spill_key_path),
                "spill_size": state.spec.spill_size,
                **({} if self._clock else {"clock": False, "spill_size": 0}),
            },
            indent=1,
        )
        if self.config_path.exists() and self.config_path.read_text() == text:
            return
        self.config_path.write_text(text)
        self._worker.end_shipper()

    def ensure(self, state: GroupState) -> None:
        self.configure(state)
        if self._worker.ensure_shipper(self.config_path):
            self._taken = (0.0, {})

    def take(self, status: dict[str, Any]) -> None:
        """A report has come in."""
        now = time.monotonic()
        self._taken = (now, status)
        self.newest = (status.get("marks") or {}).get("newest") or self.newest
        sync = status.get("sync") or {}
        if sync.get("id") != self._sync_seen[0]:
            self._sync_seen = (sync.get("id"), now, int(sync.get("done_bytes") or 0))

    def newest_of(self, epoch: str) -> dict[str, Any] | None:
        """The newest checkpoint of an epoch that is durable at the other side, as far as this shipper knows."""
        status = self.status
        return (status.get("marks") or {}).get("newest") if status.get("epoch") == epoch else None

    def sync_eta(self) -> float | None:
        """Seconds until the running pass ends at the pace that it had so far; None while that is not known."""
        sync = self.status.get("sync") or {}
        identity, since, begun = self._sync_seen
        done, total = int(sync.get("done_bytes") or 0), int(sync.get("total_bytes") or 0)
        elapsed = time.monotonic() - since
        if identity is None or done <= begun or elapsed < 1.0:
            return None
        return max(0, total - done) / ((done - begun) / elapsed)

    @property
    def status(self) -> dict[str, Any]:
        """The newest status; empty when there is none that is fresh."""
        taken, status = self._taken
        return status if time.monotonic() - taken < REPORT_SECONDS else {}

    def report(self) -> Report | None:
        status = self.status
        if not status or status.get("epoch") != self._worker.ring.epoch:
            return None
        sync = status.get("sync") or {}
        link = status.get("link") or {}
        error = link.get("error") or {}
        connected = link.get("state") == "connected"
        reason = "" if connected else str(error.get("message") or "the other site is not reached")
        refusal = str((link.get("refusal") or {}).get("message") or "")
        return Report(
            wants=str(status.get("needs", "unknown")) if connected else "unknown",
            holds=int(status.get("receiver_number") or 0),
            reason=reason or refusal,
            sync_active=sync.get("job") == "running",
            sync_done=sync.get("job") == "done",
            sync_id=str(sync.get("id") or ""),
            superseded=error.get("refusal") == "superseded",
        )

    def call(self, method: str, params: dict[str, Any] | None = None, timeout_seconds: float = 10.0) -> Any:
        """Raises ApplianceUnreachable when the shipper does not answer."""
        try:
            return Client(f"unix:{self._worker.shipper_socket}").call(method, params, timeout=timeout_seconds)
        except ApplianceUnreachable as exc:
            if "address" not in exc.fields:
                raise  # the shipper's own: the other site was not reached in time
            name = self._worker.shipper_name
            raise ApplianceUnreachable(
                f"the shipper does not answer; if it keeps ending, see {self._home.logs}/{name}.log", shipper=name
            ) from exc

    def refresh(self) -> None:
        """Ask for the status now, without waiting for the next report."""
        self.take(self.call("status"))

    def start_sync(
        self, mode: str, exports: dict[int, Export], identity: str = "", equal: Collection[int] = (), **more: Any
    ) -> None:
        disks = {str(number): asdict(export) for number, export in exports.items()}
        self.call("sync.start", {"mode": mode, "disks": disks, "id": identity, "equal": sorted(equal), **more})
        self.refresh()

    def new_definition(self) -> None:
        """The definition file was written anew; a shipper that is not there reads it when it starts."""
        with suppress(DrctlError):
            self.call("definition")

    def mark(self) -> int:
        """Cut a checkpoint now; its number, once it is proven and durable. Raises DrctlError."""
        order = {"kind": "crash-consistent", "tags": [], "timeout": MARK_SECONDS}
        return int(self.call("mark", order, timeout_seconds=MARK_SECONDS + 2)["number"])

    def end_strange_sync(self, *, ours: bool) -> None:
        """A pass runs. Not `ours`: a supervisor that has ended since has ordered it, and its disks are open for nobody
        any more. It is ended; ordered again by its id, it goes on where it is durable."""
        if not ours:
            self.cancel_sync()

    def cancel_sync(self) -> None:
        with suppress(DrctlError):
            self.call("sync.cancel")
