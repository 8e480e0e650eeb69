"""One pass of the reader as the stream sees it: what is being read, what waits to be sent, how far it is durable.

Pure: knows no I/O and no clock. Race rule: the PUBLISHED before a read (`floor`) holds the shipping cursor until the
data is in the stream, so what the guest wrote since comes after it and wins. And what the ring held when the pass began
(`after`) comes before all that it reads: a write that passed the ring by, since it was dropped or missed, may be newer
than a record of its block that is still to be sent.

A range that is *compared* holds nothing: what is equal at the other side needs no place in the stream (the proof is in
docs/design.md). What differs becomes a *part* of it, a read like any other.
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


@dataclass(slots=True, eq=False)
class Read:
    """One range that the reader fetches. `data` is None until it is there; empty data with `zero` reads as zeroes.

    `floor` is None for a range that is only compared. A part has `pieces` of its range in the place of data."""

    attempt: int
    disk: int
    extent: Extent
    floor: int | None
    data: bytes | memoryview | None = None
    zero: bool = False
    pieces: list[tuple[int, memoryview]] = field(default_factory=list)
    whole: Read | None = None
    #: Itself and its parts, as far as they are not in the stream and not known to be equal.
    open: int = 1

    @property
    def size(self) -> int:
        """Bytes of a part."""
        return sum(len(data) for _, data in self.pieces)


@dataclass(slots=True)
class Sync:
    """A pass over some disks. Invariant: `reads` are in the order of issue; the place that is told ends before the
    first of them that is still open. `held` are reads and parts that are not in the stream yet, `ready` those of them
    whose data is there.

    `attempt` rises whenever the reader must start over at `resume`; reads of an older attempt are worth nothing."""

    id: str
    mode: str
    disks: dict[int, int]
    total: int = 0
    state: SyncState = SyncState.BEGINNING
    attempt: int = 1
    resume: SyncPlace = NOWHERE
    #: PUBLISHED when the pass began: its SYNC_BEGIN, and so all that it reads, stands behind that record.
    after: int = 0
    reads: deque[Read] = field(default_factory=deque)
    held: list[Read] = field(default_factory=list)
    ready: deque[Read] = field(default_factory=deque)
    #: Bytes sent in this attempt since the last SYNC_PROGRESS, and the place that the next one tells.
    since_progress: int = 0
    reached: SyncPlace = NOWHERE
    progress_due: bool = False
    no_more_reads: bool = False
    #: The receiver has SYNC_BEGIN durable: from now on it may be asked how its blocks are.
    begun: bool = False
    #: Bytes of the pass that are in the stream or equal, and bytes read by this process, repeated ones too. Of those
    #: `matched_bytes` were equal at the other side, and `sent_bytes` went into the stream.
    done_bytes: int = 0
    read_bytes: int = 0
    matched_bytes: int = 0
    sent_bytes: int = 0

    @property
    def active(self) -> bool:
        return self.state is not SyncState.DONE

    @property
    def hold(self) -> int | None:
        """The cursor may not pass this sequence: the smallest PUBLISHED before a read that is not in the stream yet."""
        return min((read.floor for read in self.held if read.floor is not None), default=None)

    def issue(self, disk: int, extent: Extent, published: int) -> Read:
        """Note a read that is about to start. `published` was read from the ring *before* it."""
        read = Read(self.attempt, disk, extent, published)
        self.reads.append(read)
        self.held.append(read)
        return read

    def withdraw(self, read: Read) -> None:
        """The newest read is not wanted any more."""
        self.reads.remove(read)
        self.held.remove(read)

    def compare(self, disk: int, extent: Extent) -> Read:
        """Note a range that is about to be read and compared; tell by `part` what differs, and then `compared`."""
        whole = Read(self.attempt, disk, extent, None)
        self.reads.append(whole)
        return whole

    def part(self, whole: Read, floor: int) -> Read:
        """Something of a compared range differs. Its data was, or will be, read after PUBLISHED was `floor`, and the
        cursor is not beyond that."""
        part = Read(whole.attempt, whole.disk, whole.extent, floor, whole=whole)
        whole.open += 1
        self.held.append(part)
        return part

    def compared(self, whole: Read) -> None:
        """All parts of the range that differ are noted."""
        self.read_bytes += whole.extent.length
        self.matched_bytes += whole.extent.length
        self._close(whole)

    def _close(self, read: Read) -> None:
        read.open -= 1
        if read.whole is not None:
            self._close(read.whole)
        while self.reads and self.reads[0].open == 0:
            self._pass(self.reads.popleft())

    def _pass(self, read: Read) -> None:
        self.since_progress += read.extent.length
        self.done_bytes += read.extent.length
        self.reached = SyncPlace(self.id, read.disk, read.extent.end)
        if self.since_progress >= PROGRESS_EVERY:
            self.progress_due = True

    @property
    def outstanding(self) -> int:
        """Bytes that are being read or compared, or wait to be sent."""
        return sum(0 if read.zero or not read.open else read.extent.length for read in self.reads)

    def arrived(self, read: Read, data: bytes | memoryview, *, zero: bool) -> None:
        read.data, read.zero = data, zero
        self.ready.append(read)

    def part_arrived(self, part: Read, pieces: list[tuple[int, memoryview]]) -> None:
        """What differs: offsets on the disk, and the data there."""
        part.pieces = pieces
        self.ready.append(part)

    def abandon(self) -> None:
        """The reader failed: it starts over at what is durable."""
        self.attempt += 1
        self.reads.clear()
        self.held.clear()
        self.ready.clear()
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
        self.begun = True
        self.abandon()

    def next_read(self) -> Read | None:
        """A read whose data is there, taken out."""
        if self.state is not SyncState.READING or not self.ready:
            return None
        read = self.ready.popleft()
        self.held.remove(read)
        if read.whole is not None:
            size = read.size
            self.matched_bytes -= size
        else:
            size = 0 if read.zero else read.extent.length
            self.read_bytes += size
        self.sent_bytes += size
        self._close(read)
        return read

    def more_parts(self, first: Read, limit: int) -> list[Read]:
        """Parts whose data is there, to be sent along with `first`: up to `limit` bytes in all, of the same disk."""
        parts, size = [first], first.size
        while self.ready:
            after = self.ready[0]
            size += after.size
            if after.whole is None or after.disk != first.disk or size > limit:
                break
            if (read := self.next_read()) is None:
                break
            parts.append(read)
        return parts

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
        self.begun = known is not None and known.id == self.id
        self.state = SyncState.READING if self.begun else SyncState.BEGINNING
        if not self.begun:
            self.resume = SyncPlace(self.id)
        self.durable(known)
        self.abandon()

    def durable(self, place: SyncPlace | None) -> None:
        """The receiver tells how far this sync is durable."""
        if place is None or place.id != self.id:
            return
        self.resume = place
        self.begun = True
        if place.done:
            self.state = SyncState.DONE
