"""Reads of one NBD connection whose data the shell puts in place itself, sans-IO: for who reads as fast as it can.

Works on a connection that `NbdClient` has brought into the transmission phase, and on which nothing else is asked. The
shell writes what `ask` returns, and then, until all is done: receives `head_size` bytes for `head`, as many as that
says for `body`, and as many as the chunk says to where they belong.
"""

from __future__ import annotations

from dataclasses import dataclass

from drctl.errors import HypervisorRefused, ProtocolViolation
from drctl.wire import nbd
from drctl.wire.nbd_client import Ready
from drctl.wire.nbd_pending import Pending, check_covered

#: Longest body of a chunk that is not data: an error with its message.
_LONGEST = 8192

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` bytes of the disk from `offset` on: they follow now, or are zeroes when it is a hole. `done`: the read,
    as (offset, length), that is whole with them."""

    offset: int = 0
    length: int = 0
    hole: bool = False
    done: tuple[int, int] | None = None


class BulkReads:
    """Which reads wait for what. One thread at a time. After an error the connection is of no use any more."""

    def __init__(self, ready: Ready) -> None:
        self._structured = ready.structured
        # In one piece: QEMU then does not look for holes in each read.
        whole = ready.structured and ready.flags & nbd.NBD_FLAG_SEND_DF
        self._flags = nbd.NBD_CMD_FLAG_DF if whole else 0
        self._size = ready.size
        self._cookie = 0
        self._pending: dict[int, Pending] = {}
        self.head_size = nbd.STRUCTURED_REPLY.size if self._structured else nbd.SIMPLE_REPLY.size
        #: Of the chunk that comes: flags, type, cookie, length.
        self._coming = 0, 0, 0, 0

    @property
    def waiting(self) -> int:
        """How many reads are not done."""
        return len(self._pending)

    def ask(self, offset: int, length: int) -> bytes:
        """The bytes that ask for a read. Raises ValueError beyond the disk's end."""
        if not 0 <= offset < offset + length <= self._size:
            raise ValueError(f"{offset}+{length} is beyond the end, {self._size}")
        self._cookie += 1
        self._pending[self._cookie] = Pending(nbd.NBD_CMD_READ, offset, length)
        return nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, self._flags, nbd.NBD_CMD_READ, self._cookie, offset, length)

    def head(self, data: Buffer) -> int:
        """How many bytes are to be received for `body`. Raises ProtocolViolation, HypervisorRefused."""
        if not self._structured:
            magic, error, cookie = nbd.SIMPLE_REPLY.unpack(data)
            pending = self._of(cookie, magic == nbd.NBD_SIMPLE_REPLY_MAGIC)
            if error:
                raise _refused(error)
            kind, length = nbd.NBD_REPLY_TYPE_OFFSET_DATA, pending.length
            self._coming = nbd.NBD_REPLY_FLAG_DONE, kind, cookie, length
            return 0
        magic, flags, kind, cookie, length = nbd.STRUCTURED_REPLY.unpack(data)
        self._of(cookie, magic == nbd.NBD_STRUCTURED_REPLY_MAGIC)
        if kind == nbd.NBD_REPLY_TYPE_OFFSET_DATA:
            self._coming = flags, kind, cookie, length - 8
            return 8
        if length > _LONGEST:
            raise ProtocolViolation(f"the NBD server announced a chunk of {length} bytes")
        self._coming = flags, kind, cookie, length
        return int(length)

    def _of(self, cookie: int, proper: bool) -> Pending:
        pending = self._pending.get(cookie)
        if not proper or pending is None:
            raise ProtocolViolation("the NBD server sent what is no reply to a read in flight")
        return pending

    def body(self, data: Buffer) -> Chunk:
        """What the chunk is about. Raises ProtocolViolation, HypervisorRefused (the disk can't be read)."""
        flags, kind, cookie, length = self._coming
        pending = self._pending[cookie]
        offset = hole = 0
        if kind == nbd.NBD_REPLY_TYPE_OFFSET_DATA:
            offset = int.from_bytes(data, "big") if self._structured else pending.offset
        elif kind == nbd.NBD_REPLY_TYPE_OFFSET_HOLE and len(data) == 12:
            offset, length, hole = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big"), 1
        elif kind & nbd.NBD_REPLY_TYPE_ERROR_BIT and len(data) >= 6:
            raise _refused(int.from_bytes(data[:4], "big"), bytes(data[6 : 6 + int.from_bytes(data[4:6], "big")]))
        elif kind != nbd.NBD_REPLY_TYPE_NONE:
            raise ProtocolViolation(f"the NBD server sent a malformed chunk of type {kind}")
        else:
            length = 0
        if length or kind != nbd.NBD_REPLY_TYPE_NONE:
            self._cover(pending, offset, length)
        return Chunk(offset, length, bool(hole), self._finished(cookie) if flags & nbd.NBD_REPLY_FLAG_DONE else None)

    def _cover(self, pending: Pending, offset: int, length: int) -> None:
        if length <= 0 or offset < pending.offset or offset + length > pending.offset + pending.length:
            raise ProtocolViolation("the NBD server sent data that was not asked for")
        pending.covered.append((offset, length))

    def _finished(self, cookie: int) -> tuple[int, int]:
        pending = self._pending.pop(cookie)
        check_covered(pending)
        return pending.offset, pending.length


def _refused(error: int, message: bytes = b"") -> HypervisorRefused:
    told = message.decode("utf-8", "replace") or nbd.ERROR_NAMES.get(error, f"error {error}")
    return HypervisorRefused(f"the disk can't be read: {told}")
