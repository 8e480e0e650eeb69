"""The tap's side of a ring: numbers writes, publishes them, keeps dirty maps while the ring is full.

One writer per ring. Imported by the tap, so it must not import numpy. The order of stores below is the format's law:
x86 keeps stores in order; a machine that does not would need a barrier before PUBLISHED.
"""

from __future__ import annotations

import struct
from zlib import crc32

from drctl.errors import IntegrityError
from drctl.model.extent import BLOCK
from drctl.store.ring import Ring
from drctl.wire.ring import (
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    HEADER_SIZE,
    RECORD_WRITE,
    RECORD_ZERO,
    DiskWord,
    OrderReason,
    Word,
    data_checksum,
)

#: What append returns in place of a sequence when the payload was dropped and its blocks were noted.
DROPPED = 0

_CHECKED = struct.Struct("<QQQIHBBQI")
_CHECKED_SIZE = _CHECKED.size
_BLOCK_SHIFT = BLOCK.bit_length() - 1
# Bound once: each is used for every record.
_PUBLISHED, _DATA_HEAD, _RELEASED = int(Word.PUBLISHED), int(Word.DATA_HEAD), int(Word.RELEASED)


class RingWriter:
    """Invariant: a record is whole before it is published; what was acknowledged is published or noted in a map.

    append() writes a record, publish() makes all appended ones visible: call it before acknowledging any of them."""

    def __init__(self, ring: Ring, *, continued: bool = False) -> None:
        """Adopt the ring: recover its head, declare all connections gone and order lost (TAP_RESTARTED).

        `continued`: another writer is at work on it, whose connections live on: nothing is looked at or written until
        it has stopped, and catch_up() is called."""
        self._ring = ring
        self._words = ring.words
        self._memory = ring.memory
        self._capacity = ring.data_capacity
        self._data_at = ring.data_at
        self._slots = ring.slots
        self._published = self._sequence = self._head = 0
        self._dropping = False
        self._maps = {disk: (ring.open_dirty_map(disk, 0), ring.open_dirty_map(disk, 1)) for disk in ring.tables}
        #: disk number → [writes, bytes] since the last publication.
        self._counts = {disk: [0, 0] for disk in ring.tables}
        self._last_slot = 0
        self._data_limit = 0
        #: CLOCK_MONOTONIC nanoseconds of the batch at hand; set by the caller.
        self.now = 0
        if continued:
            return
        self.catch_up()
        for disk in ring.tables:
            self._set(disk, DiskWord.CONNECTION, 0)
        self.order_lost(OrderReason.TAP_RESTARTED)

    def catch_up(self) -> None:
        """Go on where the writer before us stopped. Raises IntegrityError."""
        words = self._words
        self._published = self._sequence = words[_PUBLISHED]
        self._head = self._recover_head()
        self._dropping = bool(words[Word.DROPPING])
        self._refresh()

    def _recover_head(self) -> int:
        """PUBLISHED is the authority: a killed tap may have left DATA_HEAD, or a half-written record, beyond it."""
        sequence = self._published
        released = self._words[_RELEASED]
        if released > sequence or sequence - released > self._slots - 1:
            raise IntegrityError(f"{self._ring.path}: released {released}, published {sequence}: no ring does that")
        if sequence == 0:
            return 0
        raw = bytes(self._memory[self._slot(sequence) :][:DESCRIPTOR_SIZE])
        found, position, _, sectors, _, kind, _, _, _, checksum = DESCRIPTOR.unpack(raw)
        if found != sequence or crc32(raw[:_CHECKED_SIZE]) != checksum:
            raise IntegrityError(f"{self._ring.path}: descriptor of published record {sequence} is damaged")
        return int(position + (sectors * 512 if kind == RECORD_WRITE else 0))

    def _slot(self, sequence: int) -> int:
        return HEADER_SIZE + sequence % self._slots * DESCRIPTOR_SIZE

    def _set(self, disk: int, word: DiskWord, value: int) -> None:
        self._words[self._ring.tables[disk] + word] = value

    # --- records

    def append(self, disk: int, offset: int, data: memoryview | bytes) -> int:
        """Write a record; its sequence, or DROPPED when it did not fit (then its blocks are noted)."""
        length = len(data)
        if self._dropping and not self._may_stop_dropping():
            return self._drop(disk, offset, length)
        head = self._head
        place = head % self._capacity
        if place + length > self._capacity:
            # Never wrapped inside a record, so that a reader gets it in one piece.
            head += self._capacity - place
            place = 0
        sequence = self._sequence + 1
        if (sequence > self._last_slot or head + length > self._data_limit) and not self._fits(sequence, head + length):
            self._begin_dropping()
            return self._drop(disk, offset, length)
        at = self._data_at + place
        self._memory[at : at + length] = data
        checksum = data_checksum(data)
        self._place(
            sequence,
            _CHECKED.pack(sequence, head, offset >> 9, length >> 9, disk, RECORD_WRITE, 0, self.now, checksum),
        )
        counts = self._counts[disk]
        counts[0] += 1
        counts[1] += length
        self._head = head + length
        return sequence

    def append_zeroes(self, disk: int, offset: int, length: int) -> int:
        """Write a record of a range that now reads as zeroes; its sequence, or DROPPED."""
        if self._dropping and not self._may_stop_dropping():
            return self._drop(disk, offset, length)
        sequence = self._sequence + 1
        if sequence > self._last_slot and not self._fits(sequence, self._head):
            self._begin_dropping()
            return self._drop(disk, offset, length)
        self._place(
            sequence,
            _CHECKED.pack(sequence, self._head, offset >> 9, length >> 9, disk, RECORD_ZERO, 0, self.now, 0),
        )
        counts = self._counts[disk]
        counts[0] += 1
        counts[1] += length
        return sequence

    def _place(self, sequence: int, body: bytes) -> None:
        """Put a descriptor (without its checksum) into its slot."""
        at = HEADER_SIZE + sequence % self._slots * DESCRIPTOR_SIZE
        self._memory[at : at + DESCRIPTOR_SIZE] = body + crc32(body).to_bytes(4, "little")
        self._sequence = sequence

    def publish(self) -> bool:
        """Make what was appended visible. False when there was nothing to publish."""
        if self._sequence == self._published:
            return False
        words = self._words
        words[_DATA_HEAD] = self._head
        words[_PUBLISHED] = self._published = self._sequence
        for disk, counts in self._counts.items():
            if counts[0]:
                start = self._ring.tables[disk]
                words[start + DiskWord.WRITES] += counts[0]
                words[start + DiskWord.BYTES] += counts[1]
                words[start + DiskWord.WRITTEN] = self.now
                counts[0] = counts[1] = 0
        return True

    # --- room

    def has_room(self, length: int) -> bool:
        """Whether a record of so many bytes fits now: who can wait asks before, and nothing is ever dropped."""
        head = self._head
        place = head % self._capacity
        if place + length > self._capacity:
            head += self._capacity - place
        return not self._dropping and self._fits(self._sequence + 1, head + length)

    def _refresh(self) -> None:
        """Learn what the shipper has released."""
        released = self._words[_RELEASED]
        self._last_slot = released + self._slots - 1
        if released >= self._sequence:
            tail = self._head
        else:
            at = self._slot(released + 1) + 8
            tail = int.from_bytes(self._memory[at : at + 8], "little")
        self._data_limit = tail + self._capacity

    def _fits(self, sequence: int, end: int) -> bool:
        self._refresh()
        return sequence <= self._last_slot and end <= self._data_limit

    def _half_free(self) -> bool:
        self._refresh()
        free_slots = self._last_slot - self._sequence
        free_bytes = self._data_limit - self._head
        return free_slots >= self._slots // 2 and free_bytes >= self._capacity // 2

    # --- dropping

    def _begin_dropping(self) -> None:
        self.order_lost(OrderReason.RING_FULL)
        self._words[Word.DROPPING] = 1
        self._dropping = True

    def _may_stop_dropping(self) -> bool:
        if not self._half_free():
            return False
        self._words[Word.DROPPING] = 0
        self._dropping = False
        return True

    def _drop(self, disk: int, offset: int, length: int) -> int:
        bits = self._maps[disk][self._words[Word.ACTIVE_MAP]]
        first, last = offset >> _BLOCK_SHIFT, (offset + length - 1) >> _BLOCK_SHIFT
        _set_bits(bits, first, last)
        self._words[Word.DROPPED] += 1
        return DROPPED

    # --- what is not a record

    def poll(self, now: int) -> bool:
        """Beat the heart, answer a drain request, stop dropping when half is free. True when the shipper should look.

        To be called at least each 100 ms, also while busy."""
        words = self._words
        words[Word.HEARTBEAT] = self.now = now
        news = False
        request = words[Word.DRAIN_REQUEST]
        if request != words[Word.DRAIN_DONE]:
            # Each request is one more than the last: its parity says which map. A tap killed between the two words must
            # not be followed by one that swaps back, and hands the shipper the map without the drops.
            words[Word.ACTIVE_MAP] = request & 1
            words[Word.DRAIN_DONE] = request
            news = True
        if self._dropping:
            news |= self._may_stop_dropping()
        return news

    def order_lost(self, reason: OrderReason) -> None:
        """Note it, before another write is accepted. Whether that of a connection is one for good, `ended` tells."""
        if reason is not OrderReason.CONNECTION_LOST:
            self._words[Word.LOSSES] += 1
        self._words[Word.LAST_REASON] = reason
        self._words[Word.ORDER_STAMP] += 1

    def connected(self, disk: int) -> int:
        """A client has entered the disk's export; the connection's number."""
        self._words[Word.CONNECTIONS] += 1
        number = self._words[Word.CONNECTIONS]
        self._set(disk, DiskWord.ENDED, 0)
        self._set(disk, DiskWord.CONNECTION, number)
        return number

    def disconnected(self, disk: int) -> None:
        """The disk's connection ended, however it did: from now on writes may pass us by."""
        self._set(disk, DiskWord.CONNECTION, 0)
        self.order_lost(OrderReason.CONNECTION_LOST)

    def ended(self, disk: int, *, goodbye: bool) -> None:
        """All that the client sent before its end is published. Without a goodbye more may have been on its way: QEMU
        says goodbye when it closes the mirror's target, after every write has ended."""
        if goodbye:
            self._set(disk, DiskWord.ENDED, max(self.now, 1))
        else:
            self._words[Word.LOSSES] += 1


def _set_bits(bits: memoryview, first: int, last: int) -> None:
    """Set bits first..last; lowest bit of a byte first."""
    low, high = first >> 3, last >> 3
    head = 0xFF << (first & 7) & 0xFF
    tail = 0xFF >> (7 - (last & 7))
    if low == high:
        bits[low] |= head & tail
        return
    bits[low] |= head
    if high - low > 1:
        bits[low + 1 : high] = b"\xff" * (high - low - 1)
    bits[high] |= tail
