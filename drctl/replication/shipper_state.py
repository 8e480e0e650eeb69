"""What the tasks of one shipper share, and the status that is told of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from drctl.errors import DrctlError, SetupFailed
from drctl.replication.clock_offset import ClockOffset
from drctl.replication.framing import Stamp
from drctl.replication.marks import Mark
from drctl.replication.overflow import Overflow
from drctl.replication.progress import AGAIN, Progress
from drctl.replication.ring_port import RingPort
from drctl.replication.shipper_config import ShipperConfig
from drctl.replication.signature_exchange import SignatureExchange
from drctl.replication.survey import Findings
from drctl.replication.throttle import Throttle
from drctl.replication.verification import Verdict, WriteWatch
from drctl.wire.link import JournalSpace

#: What a status tells of a verification in bytes, and of how many extents that are wrong.
VERDICT = ("total", "done", "read", "suspect", "undecided", "repaired")
WRONG_TOLD = 1000


class LinkState(StrEnum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    REFUSED = "refused"
    REJECTED = "rejected"
    STOPPED = "stopped"


@dataclass(slots=True)
class LinkStatus:
    state: LinkState = LinkState.CONNECTING
    #: Why there is no connection, as an error's dictionary; None while there is one.
    error: dict[str, Any] | None = None
    #: The newest refusal, until something is acknowledged: a full disk there lets us in, and refuses what we send.
    refusal: dict[str, Any] | None = None
    since_wall_ns: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    connections: int = 0

    def change(self, state: LinkState, error: DrctlError | None = None) -> None:
        if state is not self.state or self.since_wall_ns == 0:
            self.since_wall_ns = time.time_ns()
        self.state = state
        self.error = error.as_dict() if error else None
        if state is LinkState.REFUSED:
            self.refusal = self.error


@dataclass(slots=True)
class Definition:
    """The DEFINITION frame's fields as the supervisor wrote them. `version` rises with each change."""

    path: Path
    fields: dict[str, Any] = field(default_factory=dict)
    _seen: tuple[int, int] = (0, 0)

    @property
    def version(self) -> int:
        return int(self.fields.get("version", 0))

    def refresh(self) -> bool:
        """Read the file anew when it was replaced; True when its version changed. A broken one is left alone."""
        before = self.version
        try:
            if self._stamp() == self._seen:
                return False
            self.load()
        except (OSError, SetupFailed):
            return False
        return self.version != before

    def _stamp(self) -> tuple[int, int]:
        stat = self.path.stat()
        return stat.st_ino, stat.st_mtime_ns

    def load(self) -> None:
        """Read the file anew. Raises SetupFailed."""
        try:
            self._seen = self._stamp()
            self.fields = msgspec.json.decode(self.path.read_bytes(), type=dict[str, Any])
            if self.version < 1:
                raise SetupFailed(f"{self.path}: version must be 1 or more")
        except (OSError, msgspec.DecodeError, ValueError) as exc:
            raise SetupFailed(f"{self.path}: {exc}") from exc


@dataclass(slots=True)
class ShipperState:
    """Owned by the event loop: every task may read and change it between two awaits."""

    config: ShipperConfig
    ring: RingPort
    overflow: Overflow
    progress: Progress
    definition: Definition
    stamp: Stamp
    throttle: Throttle
    clock: ClockOffset = field(default_factory=ClockOffset)
    link: LinkStatus = field(default_factory=LinkStatus)
    journal: JournalSpace = field(default_factory=JournalSpace)
    exchange: SignatureExchange = field(default_factory=SignatureExchange)
    #: Set when the sender may have something to do.
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when the reader may go on: one of its reads was taken, or a sync's state changed.
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when there is something worth telling the supervisor.
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when a mark waits to be attested.
    attest: asyncio.Event = field(default_factory=asyncio.Event)
    #: Who waits for a mark to be settled, by its number.
    waiting: dict[int, asyncio.Future[Mark]] = field(default_factory=dict)
    no_mark_because: str = ""
    #: After a final mark no other is cut by the clock.
    finished: bool = False
    sync_job: str = "idle"
    sync_error: str = ""
    #: The newest survey's findings.
    survey: Findings | None = None
    #: The newest verification's; and who wants to see the records on their way.
    verdict: Verdict | None = None
    watch: WriteWatch | None = None
    shipped_records: int = 0
    shipped_bytes: int = 0

    def backlog(self) -> int:
        """Bytes in ring and spill that the receiver has not acknowledged."""
        return self.ring.used_bytes() + self.overflow.waiting

    def settle(self) -> None:
        """Tell those who wait what became of their marks."""
        settled, self.progress.marks.settled = self.progress.marks.settled, []
        for mark in settled:
            future = self.waiting.pop(mark.number, None)
            if future is not None and not future.done():
                future.set_result(mark)
        if settled:
            self.changed.set()


def status(state: ShipperState) -> dict[str, Any]:
    """What the shipper's `status` and its reports say. Times are the source's wall clock unless named otherwise."""
    ring, progress, config = state.ring, state.progress, state.config
    view = ring.look()
    progress.look(view)
    newest = progress.marks.newest
    return {
        "group": config.group,
        "host": config.host,
        "generation": ring.generation,
        "epoch": ring.epoch,
        "wall_ns": time.time_ns(),
        "link": {
            "state": state.link.state.value,
            "error": state.link.error,
            "refusal": state.link.refusal,
            "since_wall_ns": state.link.since_wall_ns,
            "peer": config.peer,
            "sent_bytes": state.link.sent_bytes,
            "received_bytes": state.link.received_bytes,
            "connections": state.link.connections,
            "offset_ms": state.clock.offset_ns / 1e6 if state.clock.known else None,
            "round_trip_ms": state.clock.round_trip_ns / 1e6 if state.clock.known else None,
            "clock_skewed": state.clock.skewed,
            "limit": state.throttle.told(),
        },
        "ring": {
            "size": ring.ring.data_capacity,
            "used": ring.used_bytes(),
            "fill": round(ring.fill(), 4),
            "published": view.published,
            "shipped": progress.cursor,
            "released": progress.released,
            "dropping": view.dropping,
            "dropped": view.dropped,
            "dirty_bytes": ring.dirty_bytes() if progress.dirty_outstanding else 0,
            "dirty_limit": sum(ring.disks.values()),
        },
        "spill": state.overflow.told(),
        "backlog_bytes": state.backlog(),
        "order": {"ordered": view.ordered, "stamp": view.order_stamp, "ordered_stamp": view.ordered_stamp},
        "needs": progress.wants.value,
        "receiver_number": progress.receiver_number,
        "no_mark_because": progress.no_mark_because(),
        "marks": {
            "newest": _mark(newest, state) if newest else None,
            "last_number": progress.marks.last_number,
            "pending": len(progress.marks.pending),
            "skipped": progress.marks.skipped,
        },
        "sync": _sync(state),
        "survey": _survey(state),
        "verification": _verification(state),
        "journal": msgspec.to_builtins(state.journal),
        "shipped_records": state.shipped_records,
        "shipped_bytes": state.shipped_bytes,
        "finished": state.finished,
    }


def _mark(mark: Mark, state: ShipperState) -> dict[str, Any]:
    return {
        "number": mark.number,
        "kind": mark.kind,
        "sequence": mark.sequence,
        "wall_ns": mark.wall_ns,
        "monotonic_ns": mark.monotonic_ns,
        "time": (mark.wall_ns + state.clock.offset_ns) / 1e9,
        "tags": list(mark.tags),
    }


def _survey(state: ShipperState) -> dict[str, Any] | None:
    if state.survey is None:
        return None
    found = asdict(state.survey)
    del found["began"]
    return {f"{name}_bytes" if name != "seconds" else name: value for name, value in found.items()}


def _verification(state: ShipperState) -> dict[str, Any] | None:
    found = state.verdict
    if found is None:
        return None
    counts = {f"{name}_bytes": getattr(found, name) for name in VERDICT}
    wrong = [{"disk": disk, "offset": offset, "length": length} for disk, offset, length in found.wrong[:WRONG_TOLD]]
    more = {"wrong": wrong, "wrong_bytes": sum(each[2] for each in found.wrong), "seconds": found.seconds}
    return {**counts, **more}


def _sync(state: ShipperState) -> dict[str, Any]:
    sync = state.progress.sync
    return {
        "job": state.sync_job,
        "error": state.sync_error,
        "mode": sync.mode if sync else None,
        "id": sync.id.removesuffix(AGAIN) if sync else None,
        "state": sync.state.value if sync else None,
        "done_bytes": sync.done_bytes if sync else 0,
        "total_bytes": sync.total if sync else 0,
        "read_bytes": sync.read_bytes if sync else 0,
        "matched_bytes": sync.matched_bytes if sync else 0,
        "sent_bytes": sync.sent_bytes if sync else 0,
    }
