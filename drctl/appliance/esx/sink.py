"""Where an ESX group's cycles go: whole disks by a pass of the shipper's reader, grains as records of the ring.

It stands in the place of a tap: nobody else writes the ring. A cycle's records are no point in time until its last, so
order counts as lost from its begin to its end, and no mark is proven in between. Nothing is ever dropped: it waits for
room, since the snapshot holds the data as long as need be."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.source.shipper_link import Export, Report, ShipperLink
from drctl.appliance.source.worker import Worker
from drctl.errors import ApplianceUnreachable, DrctlError, Interrupted, StepFailed, WrongPhase
from drctl.hypervisor.esx.cycle import DiskKey
from drctl.hypervisor.esx.frozen import FrozenDisk
from drctl.model.extent import Extent, GiB, KiB, MiB
from drctl.replication.tap_recorder import Bell
from drctl.replication.view_server import ViewServer
from drctl.store.ring import Ring
from drctl.store.ring_writer import RingWriter
from drctl.wire.ring import OrderReason, Word

#: A record is at most so long; and so many bytes are published together.
PIECE = 256 * KiB
PUBLISH = MiB
#: Zeroes have no payload: a range of them is cut only so that its length fits a record.
ZEROES = GiB
#: Between two looks at what another process does.
LOOK_SECONDS = 0.1
ROOM_SECONDS = 0.005
#: Longest that the shipper is asked to wait for a mark in one call, so that an order to stop is heard meanwhile.
MARK_SECONDS = 5.0


class Vouched(Protocol):
    """The record of a cycle: `checkpoint` is the number of one that holds all below the baseline."""

    checkpoint: int


@dataclass(frozen=True, slots=True)
class Stream:
    """One group's stream: `disks` are the numbers by machine and device, `names` the exports' by number, of all disks
    that the ring has; `exports` is the socket where they are served for a pass."""

    worker: Worker
    shipper: ShipperLink
    disks: Mapping[DiskKey, int]
    names: Mapping[int, str]
    exports: Path


class StreamSink:
    """A Sink of `hypervisor.esx.source`. One thread uses it, but `attest` may be called from any."""

    def __init__(self, stream: Stream, record: Vouched, stopped: Callable[[], str]) -> None:
        """`stopped` tells why a cycle is to be given up, else ""."""
        self._stream = stream
        self._stopped = stopped
        self._record = record
        self._ring = Ring.open(stream.worker.ring_path, writer=True)
        self._writer = RingWriter(self._ring)
        self._bell = Bell(stream.worker.bell_path, self._ring)
        self._unpublished = 0
        self._identity = ""
        self._compared = False
        self._marking = threading.Event()
        #: What the next mark carries.
        self.tags: tuple[str, ...] = ()
        #: The checkpoint that the newest commit became, as the shipper tells it.
        self.checkpoint: dict[str, Any] = {}
        #: Disks that the stream does not know, by machine and device: added since it began.
        self.unknown: set[DiskKey] = set()
        #: The recovery site has not what the record says.
        self.lost = False
        self.sent_bytes = 0
        for number in sorted(set(stream.disks.values())):
            self._writer.connected(number)

    @property
    def disks(self) -> Mapping[DiskKey, int]:
        return self._stream.disks

    def close(self) -> None:
        with suppress(BufferError):
            self._ring.close()

    def attest(self) -> str:
        """Whether what was marked just now is a point in time: "" or why not."""
        return "" if self._marking.is_set() else "a snapshot cycle is under way"

    # -- a cycle ----------------------------------------------------------------------------------------------------

    def begin(self, number: int, identity: str) -> None:
        del number
        self._marking.clear()
        self._writer.order_lost(OrderReason.CYCLE)
        self._identity = identity
        self._compared = self.lost = False
        self.sent_bytes = 0
        self.unknown = set()

    def whole(self, disks: Mapping[DiskKey, FrozenDisk]) -> None:
        """A pass over them; what is equal at the other side is not sent, where there is something to compare with."""
        numbered = {}
        for disk, frozen in disks.items():
            if (number := self._number(disk)) is not None:
                numbered[number] = frozen
        self._agree(numbered)

    def write(self, disk: DiskKey, offset: int, data: bytes | memoryview) -> None:
        if (number := self._number(disk)) is None:
            return
        self._agree({})
        whole = memoryview(data)
        for at in range(0, len(whole), PIECE):
            piece = whole[at : at + PIECE]
            self._wait_for_room(len(piece))
            self._writer.append(number, offset + at, piece)
            self._appended(len(piece))

    def zero(self, disk: DiskKey, extent: Extent) -> None:
        if (number := self._number(disk)) is None:
            return
        self._agree({})
        for at in range(extent.offset, extent.end, ZEROES):
            self._wait_for_room(0)
            self._writer.append_zeroes(number, at, min(ZEROES, extent.end - at))
            self._appended(0)

    def commit(self, number: int, taken: float) -> None:
        """Mark it, and wait until that is a checkpoint at the other side."""
        del number
        self._agree({})
        self._publish()
        words = self._ring.words
        self._stream.worker.prove(words[Word.ORDER_STAMP], words[Word.PUBLISHED], words[Word.LOSSES])
        self._marking.set()
        self.checkpoint = self._mark(int(taken * 1e9))
        self._record.checkpoint = int(self.checkpoint["number"])

    def _number(self, disk: DiskKey) -> int | None:
        number = self._stream.disks.get(disk)
        if number is None:
            self.unknown.add(disk)
        return number

    # -- records ----------------------------------------------------------------------------------------------------

    def _wait_for_room(self, length: int) -> None:
        while not self._writer.has_room(length):
            self._publish()
            self._pause(ROOM_SECONDS)

    def _appended(self, length: int) -> None:
        self.sent_bytes += length
        self._unpublished += length + 512
        if self._unpublished >= PUBLISH:
            self._publish()

    def _publish(self) -> None:
        self._writer.now = time.monotonic_ns()
        if self._writer.publish():
            self._bell.ring()
        self._unpublished = 0

    def _pause(self, seconds: float) -> None:
        """Wait, and beat as a tap does. Raises Interrupted when the cycle is to be given up."""
        self._writer.poll(time.monotonic_ns())
        if reason := self._stopped():
            raise Interrupted(reason)
        time.sleep(seconds)

    # -- passes -----------------------------------------------------------------------------------------------------

    def _agree(self, whole: Mapping[int, FrozenDisk]) -> None:
        """Once in a cycle: let both sides begin from the same. Raises StepFailed, Interrupted."""
        if self._compared:
            return
        report = self._report()
        rest = set(self._stream.names) - set(whole)
        if rest and (
            report.wants == "initial" or (report.wants == "full" and not 0 < self._record.checkpoint <= report.holds)
        ):
            if gone := sorted(self._stream.names[one] for one in rest - set(self._stream.disks.values())):
                hint = "drctl replicate start takes that up"
                raise StepFailed(f"{', '.join(gone)}: taken out of the machine, and the other site needs it", hint=hint)
            self.lost = True
            raise StepFailed("the recovery site has not what it once had: all disks are gone over")
        if report.wants == "initial":
            self._pass("initial", whole, ())
        elif whole:
            self._pass("full", whole, rest if report.wants == "full" else ())
        elif report.wants == "full":
            self._pass("clean", {}, rest)
        self._compared = True

    def _report(self) -> Report:
        """What the other side needs, once it was asked."""
        while True:
            with suppress(ApplianceUnreachable):
                self._stream.shipper.refresh()
            report = self._stream.shipper.report()
            if report is not None and report.superseded:
                raise Interrupted(f"superseded: {report.reason}")
            if report is not None and report.wants != "unknown" and not report.sync_active:
                return report
            if report is not None and report.sync_active:
                self._stream.shipper.cancel_sync()  # of a process before us: its exports are gone
            self._pause(LOOK_SECONDS)

    def _pass(self, mode: str, whole: Mapping[int, FrozenDisk], equal: Iterable[int]) -> None:
        words = f"{mode if mode == 'clean' else ''} {self._identity} {sorted(whole)}"
        identity = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
        with self._served(whole) as exports:
            self._stream.shipper.start_sync(mode, exports, identity, sorted(equal))
            try:
                self._follow(identity)
            finally:
                self._stream.shipper.cancel_sync()

    def _follow(self, identity: str) -> None:
        while True:
            with suppress(ApplianceUnreachable):
                self._stream.shipper.refresh()
            report = self._stream.shipper.report()
            if report is not None and not report.sync_active:
                if report.sync_done and report.sync_id == identity:
                    return
                error = (self._stream.shipper.status.get("sync") or {}).get("error")
                raise StepFailed(f"the pass over the disks broke off: {error or report.reason or 'the shipper ended'}")
            if report is not None and report.superseded:
                raise Interrupted(f"superseded: {report.reason}")
            self._pause(LOOK_SECONDS)

    @contextmanager
    def _served(self, whole: Mapping[int, FrozenDisk]) -> Iterator[dict[int, Export]]:
        """The disks as NBD exports, for the shipper's reader."""
        if not whole:
            yield {}
            return
        names = {number: self._stream.names[number] for number in whole}
        server = ViewServer(self._stream.exports, {names[number]: disk for number, disk in whole.items()})
        threading.Thread(target=server.serve, name="frozen-exports", daemon=True).start()
        try:
            yield {number: Export(str(self._stream.exports), name) for number, name in names.items()}
        finally:
            server.stop()

    # -- marks ------------------------------------------------------------------------------------------------------

    def _mark(self, taken_ns: int) -> dict[str, Any]:
        """The mark, once it is a checkpoint. One that was cut is waited for, however long the link is away."""
        before = self._last_number()
        while True:
            order = {"kind": "crash-consistent", "tags": list(self.tags), "timeout": MARK_SECONDS, "taken_ns": taken_ns}
            try:
                return dict(self._stream.shipper.call("mark", order, timeout_seconds=MARK_SECONDS + 2))
            except (ApplianceUnreachable, WrongPhase):
                self._pause(LOOK_SECONDS)
            if (found := self._awaited(before)) is not None:
                return found

    def _awaited(self, before: int) -> dict[str, Any] | None:
        """The checkpoint that a mark which was cut has become; None when none was cut, or it failed."""
        while True:
            status: dict[str, Any] = {}
            with suppress(DrctlError):
                self._stream.shipper.refresh()
                status = self._stream.shipper.status
            marks = status.get("marks") or {}
            newest = marks.get("newest") or {}
            if int(newest.get("number") or 0) > before:
                return dict(newest)
            if status and not marks.get("pending"):
                return None
            self._pause(LOOK_SECONDS)

    def _last_number(self) -> int:
        with suppress(DrctlError):
            self._stream.shipper.refresh()
        return int((self._stream.shipper.status.get("marks") or {}).get("last_number") or 0)
