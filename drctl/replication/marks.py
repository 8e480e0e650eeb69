"""Marks on their way to become checkpoints: planned, sent, attested, proven. Pure: knows no I/O and no clock.

A mark is *planned* at a moment T with the PUBLISHED read then: all that was acknowledged before T is at or below it.
Its MARK frame is placed in the stream exactly there, however late the link is, so a backlog costs no checkpoints.
It is *attested* when the supervisor says that every disk is attached and the ring's order stamp and connections are
what they were before the mark; one such answer proves all earlier marks under the same stamp and connections too.
Its PROOF follows the MARK; the mark is *settled* when the receiver has both durable, or when it can never be proven.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

#: At 5 s this is a link outage of almost 3 hours whose points in time are kept; later ones are skipped.
MAX_PENDING = 2048


@dataclass(frozen=True, slots=True)
class RingView:
    """One look at the ring's header.

    Read in the order of the fields, PUBLISHED last: a stamp that is unchanged *after* means that all records up to
    `published` were accepted in order."""

    order_stamp: int
    ordered_stamp: int
    ordered_sequence: int
    connections: tuple[int, ...]
    dropping: bool
    dropped: int
    drain_request: int
    drain_done: int
    published: int

    @property
    def ordered(self) -> bool:
        return self.ordered_stamp == self.order_stamp and self.published >= self.ordered_sequence


@dataclass(slots=True)
class Mark:
    """One mark. Invariant: a proof is sent only when `sent` and `attested`."""

    number: int
    kind: str
    sequence: int
    wall_ns: int
    monotonic_ns: int
    order_stamp: int
    connections: tuple[int, ...]
    tags: tuple[str, ...] = ()
    sent: bool = False
    attested: bool = False
    proof_sent: bool = False
    #: Empty until it is known why this mark can't become a checkpoint.
    failure: str = ""


@dataclass(slots=True)
class Marks:
    """The marks that are neither settled nor failed, oldest first. Invariant: numbers and sequences never fall."""

    pending: deque[Mark] = field(default_factory=deque)
    last_number: int = 0
    skipped: int = 0
    #: The newest mark that became a checkpoint, as far as this process knows.
    newest: Mark | None = None
    #: Marks settled or failed since the shell last took them.
    settled: list[Mark] = field(default_factory=list)

    def plan(self, view: RingView, kind: str, wall_ns: int, monotonic_ns: int, tags: tuple[str, ...]) -> Mark | None:
        """Plan a mark at what the view shows; None when too many wait already. The caller has checked the order."""
        if len(self.pending) >= MAX_PENDING:
            self.skipped += 1
            return None
        self.last_number += 1
        mark = Mark(
            self.last_number, kind, view.published, wall_ns, monotonic_ns, view.order_stamp, view.connections, tags
        )
        self.pending.append(mark)
        return mark

    def oldest_age(self, now: float) -> float:
        """Seconds since the oldest pending mark was planned, `now` on its monotonic clock; 0 when there is none."""
        return max(0.0, now - self.pending[0].monotonic_ns / 1e9) if self.pending else 0.0

    def next_to_send(self) -> Mark | None:
        """The oldest mark whose MARK frame is not in the stream yet."""
        return next((mark for mark in self.pending if not mark.sent), None)

    def next_to_prove(self) -> Mark | None:
        """The oldest mark whose PROOF may be sent now. Proofs go in the order of numbers."""
        return next((mark for mark in self.pending if mark.sent and mark.attested and not mark.proof_sent), None)

    def to_attest(self) -> Mark | None:
        """The mark to ask the supervisor about: the newest unattested, since a yes covers the older ones."""
        return next((mark for mark in reversed(self.pending) if not mark.attested), None)

    def attested(self, number: int, reason: str, view: RingView) -> None:
        """The supervisor's answer about mark `number` (`reason` empty: yes), and a look at the ring taken after it.

        Marks under another stamp or other connections than now can't be proven any more and fail, with all older
        unattested ones."""
        for mark in self._unattested(number):
            if reason:
                mark.failure = reason
            elif mark.order_stamp != view.order_stamp:
                mark.failure = "order was lost after the mark"
            elif mark.connections != view.connections:
                mark.failure = "a disk was connected anew after the mark"
            else:
                mark.attested = True
        self._drop_failed()

    def _unattested(self, number: int) -> Iterator[Mark]:
        return (mark for mark in self.pending if mark.number <= number and not mark.attested)

    def durable(self, proven: int) -> None:
        """The receiver has all proofs up to mark `proven` durable."""
        while self.pending and self.pending[0].proof_sent and self.pending[0].number <= proven:
            self.newest = self.pending.popleft()
            self.settled.append(self.newest)

    def rewind(self, position: int, last_mark: int, proven: int) -> None:
        """A new connection: what was sent and is not durable there must be sent again.

        `position` is the durable sequence, `last_mark` the newest durable MARK. A mark that is not durable had
        nothing behind it that is, so its place is still ahead."""
        self.durable(proven)
        self.last_number = max(self.last_number, last_mark)
        for mark in self.pending:
            mark.sent = mark.sent and mark.number <= last_mark
            mark.proof_sent = False
            if not mark.sent and mark.sequence < position:
                mark.failure = "the receiver is past the mark's place without it"
        self._drop_failed()

    def fail_all(self, reason: str) -> None:
        for mark in self.pending:
            mark.failure = reason
        self._drop_failed()

    def _drop_failed(self) -> None:
        failed = [mark for mark in self.pending if mark.failure]
        if failed:
            self.settled += failed
            self.pending = deque(mark for mark in self.pending if not mark.failure)
