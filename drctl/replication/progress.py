"""The pure core of the source's end of a stream: events in, what to send and release next out.

Knows no sockets, no clock, no ring: the shell (shipper.py) looks at those, tells this machine, and does what it says.
The law of the stream:

1. Records are sent in the order of their sequences, each once per connection; the cursor is the last one sent.
2. A MARK stands exactly where the records up to its PUBLISHED end. While one waits, no SYNC frame is placed before it:
   what the reader fetched is newer than the mark.
3. SYNC frames stand at a cursor that is at or below the PUBLISHED before their read, and not below the PUBLISHED when
   their pass began: what was written past the ring before is newer than any record of its block in it.
4. No mark is planned while a sync runs, dropped blocks are outstanding, or the order is not proven.
5. `released` is what the receiver acknowledged as durable: released <= cursor <= published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from drctl.errors import WrongPhase
from drctl.replication.marks import Mark, Marks, RingView
from drctl.replication.sync_progress import Read, Sync, SyncState
from drctl.wire.link import Ack, SyncPlace, Welcome

#: Added to the name of a pass that has to begin anew.
AGAIN = ".again"


class Needs(StrEnum):
    """What the receiver lacks before marks make sense. UNKNOWN: it was not asked yet."""

    UNKNOWN = "unknown"
    INITIAL = "initial"
    FULL = "full"
    DIRTY = "dirty"
    NOTHING = "nothing"


class Pending(StrEnum):
    """What the next step is about. A link's limit holds up LIVE and SYNC; what is URGENT is small, and goes at once."""

    URGENT = "urgent"
    LIVE = "live"
    SYNC = "sync"


@dataclass(frozen=True, slots=True)
class SendDefinition:
    version: int


@dataclass(frozen=True, slots=True)
class SendRecords:
    """Ship records with `after` < sequence <= `upto`, as many as fit; tell how far by `shipped`."""

    after: int
    upto: int


@dataclass(frozen=True, slots=True)
class SendMark:
    mark: Mark
    position: int


@dataclass(frozen=True, slots=True)
class SendProof:
    mark: Mark
    position: int


@dataclass(frozen=True, slots=True)
class SendSyncBegin:
    sync: Sync
    position: int


@dataclass(frozen=True, slots=True)
class SendSyncData:
    read: Read
    position: int


@dataclass(frozen=True, slots=True)
class SendSyncProgress:
    place: SyncPlace
    position: int


@dataclass(frozen=True, slots=True)
class SendSyncEnd:
    sync: Sync
    position: int


Step = (
    SendDefinition | SendRecords | SendMark | SendProof | SendSyncBegin | SendSyncData | SendSyncProgress | SendSyncEnd
)


class Progress:
    """A source-side stream. One task owns it.

    Invariant: 0 <= released <= cursor <= published, but for a moment after a receiver came back with less than it
    acknowledged once: then `needs` is FULL and nothing that was released is asked for."""

    def __init__(self, epoch: str, released: int, definition_version: int) -> None:
        self.epoch = epoch
        self.released = released
        self.cursor = released
        self.connected = False
        self.needs = Needs.UNKNOWN
        self.marks = Marks()
        self.sync: Sync | None = None
        self.remote_sync: SyncPlace | None = None
        self.definition_version = definition_version
        self._definition_sent = 0
        self._published = released
        self._dropping = False
        self._dropped = 0
        #: DROPPED up to which dropped blocks were read again. 0 at first: an earlier process may not have finished.
        self._drained = 0
        self._sync_was_last = False
        self._first_mark_kind = ""
        self._told_sync = ""
        #: A pass that the receiver knows of, and that must not be gone on with.
        self._void_sync = ""
        self._ordered = False
        self.lost_at_receiver = False
        #: Records that it had acknowledged are lost at the receiver: nothing but a pass over all disks heals that.
        self._must_pass = False
        #: Largest number of a mark that the receiver had when the connection was made.
        self.receiver_number = 0
        #: The link is limited: records do not take turns with reads but go first, as far as the reads let them.
        self.records_first = False

    # events

    def restored(self, marks: Sequence[Mark], last_number: int) -> None:
        """Before the first connection: an earlier process has seen that all was whole at the other side, and planned
        these marks since."""
        self.needs = Needs.NOTHING
        self.marks.pending.extend(marks)
        self.marks.last_number = last_number

    def lose(self, upto: int) -> None:
        """Records up to `upto` can't be sent any more. Not while connected: what the receiver lacks of them the next
        connection tells."""
        self.released = max(self.released, upto)

    def look(self, view: RingView) -> None:
        """What the ring shows now."""
        self._published = view.published
        self._dropping = view.dropping
        self._dropped = view.dropped
        self._ordered = view.ordered

    def welcomed(self, welcome: Welcome) -> None:
        """A connection stands; all that is not durable at the other side will be sent again.

        Raises WrongPhase when the receiver has more than was ever written: another ring uses our epoch."""
        position = welcome.position.sequence if welcome.position.epoch == self.epoch else 0
        if position > self._published:
            raise WrongPhase(f"the receiver has {position} of this epoch, the ring only {self._published}")
        self.connected = True
        self.lost_at_receiver = position < self.released
        self._must_pass |= self.lost_at_receiver
        self.receiver_number = welcome.last_number
        if self.lost_at_receiver:
            self._forget_receiver(welcome.sync)
            welcome = Welcome(
                position=welcome.position,
                last_number=welcome.last_number,
                definition_version=welcome.definition_version,
                needs="initial" if welcome.needs == "initial" else "full",
            )
        self.cursor = max(position, self.released)
        self.released = self.cursor
        self.marks.rewind(self.cursor, welcome.last_mark, welcome.proven_mark)
        self.marks.last_number = max(self.marks.last_number, welcome.last_number)
        self.needs = self._needs_after(welcome)
        self.remote_sync = welcome.sync
        self._definition_sent = welcome.definition_version
        self._sync_was_last = False
        if self.needs is Needs.INITIAL and self.sync is not None and self.sync.state is SyncState.DONE:
            self.sync = None  # a store that is empty again: the pass that it once had whole is gone with it
        if self.sync is not None:
            self.sync.rewind(welcome.sync)
            self._sync_ended_remotely()

    def _needs_after(self, welcome: Welcome) -> Needs:
        """The receiver can't tell a whole epoch without a mark, or a sync of dropped blocks, from a broken off pass:
        it says `full`. When this process has seen the pass end, or runs the one for dropped blocks, it knows better.

        And an epoch with a durable MARK was whole there: no mark is planned before. What was written unseen since is
        known to the supervisor, which has it on disk and orders a pass; what was dropped is in the ring's maps."""
        needs = Needs(welcome.needs)
        if self._must_pass:
            return Needs.INITIAL if needs is Needs.INITIAL else Needs.FULL
        if needs is Needs.FULL and welcome.last_mark:
            return Needs.NOTHING
        if needs is not Needs.FULL or self.needs is not Needs.NOTHING:
            return needs
        if welcome.sync is None or welcome.sync.done:
            return Needs.NOTHING
        ours = self.sync is not None and self.sync.mode == Needs.DIRTY and self.sync.id == welcome.sync.id
        return Needs.NOTHING if ours else needs

    def _forget_receiver(self, place: SyncPlace | None) -> None:
        """It has less than it acknowledged once (another disk, a restored backup), or than we can still send: nothing
        of before counts, no pass that it has begun or ended either."""
        self.marks.fail_all("records are lost that the receiver lacks")
        self._void_sync = place.id if place is not None else ""
        if self.sync is not None and (self.sync.mode == Needs.DIRTY or not self.sync.active):
            self.sync = None
        elif self.sync is not None:
            self.sync.id += AGAIN

    def disconnected(self) -> None:
        self.connected = False

    def shipped(self, upto: int) -> None:
        """Records up to `upto` are handed to the connection."""
        if not self.cursor <= upto <= self._published:
            raise ValueError(f"shipped {upto}, but the cursor is {self.cursor} of {self._published}")
        self.cursor = upto

    def acknowledged(self, ack: Ack) -> None:
        """The receiver made more durable. Raises WrongPhase when it acknowledges what was not sent."""
        if ack.epoch != self.epoch:
            return
        if ack.sequence > self.cursor:
            raise WrongPhase(f"the receiver acknowledged {ack.sequence}, sent is {self.cursor}")
        self.released = max(self.released, ack.sequence)
        self.marks.durable(ack.mark)
        if self.sync is not None and ack.sync is not None:
            self.remote_sync = ack.sync
            self.sync.durable(ack.sync)
            self._sync_ended_remotely()

    def attested(self, number: int, reason: str, view: RingView) -> None:
        """The supervisor's answer (see Marks.attested)."""
        self.look(view)
        self.marks.attested(number, reason, view)

    # syncs

    def start_sync(self, sync: Sync) -> Sync:
        """Begin a pass, or go on with the one of that id that the receiver has begun; one that it has whole is done at
        once. Whoever names a pass may use its id again only while its disks stay the same and miss no write. To be
        called after a `look` that is newer than the writes that it is about. Raises WrongPhase while one runs."""
        if self.sync is not None and self.sync.active:
            raise WrongPhase(f"a {self.sync.mode} sync is running already")
        place = self.remote_sync
        self.sync, sync.after = sync, self._published
        if sync.id == self._void_sync:
            sync.id += AGAIN
        if place is not None and place.id == sync.id:
            sync.resume_at(place)
            sync.durable(place)
            self._sync_ended_remotely()
        return sync

    def cancel_sync(self) -> None:
        """Give the pass up; what it was for is still needed."""
        self.sync = None

    def _sync_ended_remotely(self) -> None:
        sync = self.sync
        if sync is not None and sync.state is SyncState.DONE and self.needs is not Needs.UNKNOWN:
            if sync.mode != Needs.DIRTY:
                self.needs = Needs.NOTHING
                self._must_pass = False
            if self.marks.last_number and sync.mode != Needs.INITIAL and sync.total and sync.id != self._told_sync:
                # Each acknowledgement tells of the ended sync again; only the first mark after it is its own.
                self._told_sync = sync.id
                self._first_mark_kind = "resync"

    def drained(self, dropped: int) -> None:
        """All blocks that were dropped while DROPPED was at most `dropped` are durable at the other side."""
        self._drained = dropped

    @property
    def dirty_outstanding(self) -> bool:
        return self._dropping or self._dropped != self._drained

    @property
    def wants(self) -> Needs:
        """The pass that is to be run next, by whoever knows how to read the disks."""
        if self.needs is Needs.NOTHING and self.dirty_outstanding:
            return Needs.DIRTY
        return self.needs

    # marks

    def no_mark_because(self) -> str:
        """Why a mark can't be planned now; empty when it can."""
        if self.needs is Needs.UNKNOWN:
            return "the receiver was not reached yet"
        if self.needs is not Needs.NOTHING:
            return f"{'an' if self.needs is Needs.INITIAL else 'a'} {self.needs} sync is needed first"
        if self.sync is not None and self.sync.active:
            return "a sync is running"
        if self.dirty_outstanding:
            return "dropped blocks must be read again first"
        if not self._ordered:
            return "the order of writes is not proven"
        return ""

    @property
    def order_wanted(self) -> bool:
        """The order is the only thing that is missing: ask the supervisor to prove it."""
        return not self._ordered and not self.dirty_outstanding

    def plan_mark(
        self, view: RingView, wall_ns: int, monotonic_ns: int, kind: str = "crash-consistent", tags: Sequence[str] = ()
    ) -> Mark | None:
        """A mark at this look at the ring; None when too many wait. Raises WrongPhase with the reason why not."""
        self.look(view)
        if reason := self.no_mark_because():
            raise WrongPhase(f"no checkpoint can be made now: {reason}")
        if kind == "crash-consistent" and self._first_mark_kind:
            kind = self._first_mark_kind
        mark = self.marks.plan(view, kind, wall_ns, monotonic_ns, tuple(tags))
        if mark is not None:
            self._first_mark_kind = ""
        return mark

    # what to send

    def pending(self) -> Pending | None:
        """What the next step is about; None: there is none now. Nothing counts as sent by it."""
        if not self.connected:
            return None
        waiting = self.marks.next_to_send()
        due = waiting is not None and waiting.sequence == self.cursor
        if self._definition_sent < self.definition_version or due or self.marks.next_to_prove() is not None:
            return Pending.URGENT
        records, sync = self._records(waiting), self.sync
        if sync is None or waiting is not None or (records is not None and self._turn_of_records):
            return Pending.LIVE if records else None
        if self._may_begin(sync) or sync.progress_due or sync.at_end():
            return Pending.URGENT
        if sync.state is SyncState.READING and sync.ready:
            return Pending.SYNC
        return Pending.LIVE if records else None

    @property
    def _turn_of_records(self) -> bool:
        return self._sync_was_last or self.records_first

    def next_step(self) -> Step | None:
        """What goes into the connection next; None: nothing now. The step counts as sent when this returns, but for
        records, whose end is told by `shipped`."""
        if not self.connected:
            return None
        if self._definition_sent < self.definition_version:
            self._definition_sent = self.definition_version
            return SendDefinition(self.definition_version)
        waiting = self.marks.next_to_send()
        if waiting is not None and waiting.sequence == self.cursor:
            waiting.sent = True
            return SendMark(waiting, self.cursor)
        if (proof := self.marks.next_to_prove()) is not None:
            proof.proof_sent = True
            return SendProof(proof, self.cursor)
        return self._next_data(waiting)

    def _next_data(self, waiting: Mark | None) -> Step | None:
        """Records and reads take turns, so that neither starves the other."""
        records, sync = self._records(waiting), self.sync
        if sync is None or waiting is not None or (records is not None and self._turn_of_records):
            self._sync_was_last = False
            return records
        step = self._next_sync(sync)
        self._sync_was_last = isinstance(step, SendSyncData)
        return step or records

    def _records(self, waiting: Mark | None) -> SendRecords | None:
        upto = self._published if waiting is None else min(self._published, waiting.sequence)
        if self.sync is not None and (hold := self.sync.hold) is not None:
            upto = min(upto, hold)
        return SendRecords(self.cursor, upto) if upto > self.cursor else None

    def _may_begin(self, sync: Sync) -> bool:
        return sync.state is SyncState.BEGINNING and self.cursor >= sync.after

    def _next_sync(self, sync: Sync) -> Step | None:
        if self._may_begin(sync):
            sync.state = SyncState.READING
            return SendSyncBegin(sync, self.cursor)
        if sync.progress_due:
            return SendSyncProgress(sync.took_progress(), self.cursor)
        if (read := sync.next_read()) is not None:
            return SendSyncData(read, self.cursor)
        if sync.at_end():
            sync.state = SyncState.SENT
            return SendSyncEnd(sync, self.cursor)
        return None
