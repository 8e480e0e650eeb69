"""One pass of the reader as the stream sees it: what is being read, what waits to be sent, how far it is durable.

Pure: knows no I/O and no clock. Race rule: the PUBLISHED before a read (`floor`) holds the shipping cursor until the
data is in the stream, so what the guest wrote since comes after it and wins.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from drctl.model.extent import Extent
from drctl.wire.link import SyncPlace

NOWHERE = SyncPlace("")
#: The reader's place is put into the stream after so many bytes, so a broken link costs at most that much again.
PROGRESS_EVERY = 16 * 1024 * 1024


class SyncState(StrEnum):
    BEGINNING = "beginning"
    READING = "reading"
    ENDING = "ending"
    SENT = "sent"
    DONE = "done"


@dataclass(slots=True)
class Read:
    """One range that the reader fetches. `data` is None until it is there; empty data with `zero` reads as zeroes."""

    attempt: int
    disk: int
    extent: Extent
    floor: int
    data: bytes | memoryview | None = None
    zero: bool = False


@dataclass(slots=True)
class Sync:
    """A pass over some disks. Invariant: `reads` are in the order of issue, and sent in it; only the front is sent.

    `attempt` rises whenever the reader must start over at `resume`; reads of an older attempt are worth nothing."""

    id: str
    mode: str
    disks: dict[int, int]
    total: int = 0
    state: SyncState = SyncState.BEGINNING
    attempt: int = 1
    resume: SyncPlace = NOWHERE
    reads: deque[Read] = field(default_factory=deque)
    #: Bytes sent in this attempt since the last SYNC_PROGRESS, and the place that the next one tells.
    since_progress: int = 0
    reached: SyncPlace = NOWHERE
    progress_due: bool = False
    no_more_reads: bool = False
    #: Bytes of the pass that are in the stream, and bytes read by this process, repeated ones too.
    done_bytes: int = 0
    read_bytes: int = 0

    @property
    def active(self) -> bool:
        return self.state is not SyncState.DONE

    @property
    def hold(self) -> int | None:
        """The cursor may not pass this sequence: the smallest PUBLISHED before a read that is not in the stream yet."""
        return min((read.floor for read in self.reads), default=None)

    def issue(self, disk: int, extent: Extent, published: int) -> Read:
        """Note a read that is about to start. `published` was read from the ring *before* it."""
        read = Read(self.attempt, disk, extent, published)
        self.reads.append(read)
        return read

    @property
    def outstanding(self) -> int:
        """Bytes that are being read or wait to be sent."""
        return sum(0 if read.zero else read.extent.length for read in self.reads)

    def arrived(self, read: Read, data: bytes | memoryview, *, zero: bool) -> None:
        read.data, read.zero = data, zero

    def abandon(self) -> None:
        """The reader failed: it starts over at what is durable."""
        self.attempt += 1
        self.reads.clear()
        self.no_more_reads = False
        self.progress_due = False
        self.since_progress = 0
        self.reached = self.resume
        self.done_bytes = self._bytes_before(self.resume)

    def _bytes_before(self, place: SyncPlace) -> int:
        """Of a pass over whole disks; a pass over ranges counts from its last start."""
        if self.mode == "dirty":
            return 0
        return sum(size for disk, size in self.disks.items() if disk < place.disk) + place.offset

    def resume_at(self, place: SyncPlace) -> None:
        """Go on with a pass that the receiver has begun to make durable: SYNC_BEGIN is there already."""
        self.id, self.resume = place.id, place
        self.state = SyncState.READING
        self.abandon()

    def next_read(self) -> Read | None:
        """The front read, taken out, when its data is there."""
        if self.state is not SyncState.READING or not self.reads or self.reads[0].data is None:
            return None
        read = self.reads.popleft()
        self.since_progress += read.extent.length
        self.done_bytes += read.extent.length
        self.read_bytes += 0 if read.zero else read.extent.length
        self.reached = SyncPlace(self.id, read.disk, read.extent.end)
        if self.since_progress >= PROGRESS_EVERY:
            self.progress_due = True
        return read

    def finished_reading(self) -> None:
        """The reader has issued its last read of this attempt."""
        self.no_more_reads = True

    def at_end(self) -> bool:
        return self.state is SyncState.READING and self.no_more_reads and not self.reads

    def took_progress(self) -> SyncPlace:
        self.progress_due = False
        self.since_progress = 0
        return self.reached

    def rewind(self, known: SyncPlace | None) -> None:
        """A new connection; `known` is the newest sync there. Frames that are not durable are lost."""
        if self.state is SyncState.DONE:
            return
        begun = known is not None and known.id == self.id
        self.state = SyncState.READING if begun else SyncState.BEGINNING
        if not begun:
            self.resume = SyncPlace(self.id)
        self.durable(known)
        self.abandon()

    def durable(self, place: SyncPlace | None) -> None:
        """The receiver tells how far this sync is durable."""
        if place is None or place.id != self.id:
            return
        self.resume = place
        if place.done:
            self.state = SyncState.DONE
