"""The client's half of one NBD connection, sans-IO: reads and block status of one export, many in flight.

The shell writes `take_output()`, passes what it received to `receive()`, and after Ready asks with `read` and
`block_status`, whose bytes it writes. Or it receives into `get_buffer()` and tells by `buffer_updated()` how much: then
a read's data goes from the socket to its place without a copy. Cookies are the caller's own, unique among requests in
flight; replies come in any order. Used by the reader against QEMU's own export.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from drctl.errors import NotFound, ProtocolViolation
from drctl.wire import nbd
from drctl.wire.nbd_pending import Pending, check_covered


@dataclass(frozen=True, slots=True)
class Ready:
    """The export was entered. `allocation`: block_status may be asked. Sizes in bytes."""

    size: int
    flags: int
    minimum_block: int
    preferred_block: int
    maximum_payload: int
    structured: bool
    allocation: bool


@dataclass(frozen=True, slots=True)
class ReadDone:
    """All bytes of a read. Invariant: every byte was covered exactly once by the server's chunks."""

    cookie: int
    offset: int
    data: bytearray


@dataclass(frozen=True, slots=True)
class StatusDone:
    """(length, NBD_STATE_* flags) of extents from `offset` on; may cover less, or with the last more, than asked."""

    cookie: int
    offset: int
    extents: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Done:
    """A flush succeeded."""

    cookie: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The server refused one request; the connection goes on."""

    cookie: int
    error: int
    message: str


Event = Ready | ReadDone | StatusDone | Done | Failed


#: Received at once where no data is due: replies' heads, block status, and what of a payload comes along with them.
_HEADS = 16384


class NbdClient:
    """One connection to `export`. Errors that end it: ProtocolViolation, NotFound (no such export, or not for us).

    Invariant: at most one event per cookie. Not thread-safe."""

    def __init__(self, export: str) -> None:
        self._export = export
        self._buffer = bytearray()
        self._position = 0
        self._heads = memoryview(bytearray(_HEADS))
        #: The last `get_buffer` was the target's own memory.
        self._direct = False
        self._output: list[bytes] = []
        self._stage: Callable[[], bool] = self._hello
        self._events: list[Event] = []
        self._pending: dict[int, Pending] = {}
        # The read whose data is arriving: where it goes, and how many bytes are to come.
        self._target: memoryview | None = None
        self._filled = 0
        self._then: Callable[[], None] = _nothing
        self._structured = False
        self._allocation_id: int | None = None
        self._size = 0
        self._flags = 0
        self._blocks = (1, 4096, nbd.MAX_PAYLOAD)
        self.ready: Ready | None = None

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    def take_output(self) -> bytes:
        """What the handshake has to say next."""
        output = b"".join(self._output)
        self._output.clear()
        return output

    # --- requests

    def read(self, cookie: int, offset: int, length: int) -> bytes:
        """The bytes that ask for `length` bytes at `offset`; length at most Ready.maximum_payload."""
        request = self._request(nbd.NBD_CMD_READ, cookie, offset, length)
        self._pending[cookie].data = bytearray(length)
        return request

    def block_status(self, cookie: int, offset: int, length: int) -> bytes:
        """The bytes that ask which parts of the range hold data. Only with Ready.allocation."""
        if self._allocation_id is None:
            raise ValueError("the server does not tell block status")
        return self._request(nbd.NBD_CMD_BLOCK_STATUS, cookie, offset, length)

    def flush(self, cookie: int) -> bytes:
        """The bytes that ask to flush."""
        return self._request(nbd.NBD_CMD_FLUSH, cookie, 0, 0)

    def disconnect(self) -> bytes:
        """The goodbye; no reply comes."""
        return nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, 0, nbd.NBD_CMD_DISC, 0, 0, 0)

    def _request(self, command: int, cookie: int, offset: int, length: int) -> bytes:
        if self.ready is None or cookie in self._pending:
            raise ValueError("a request before Ready, or a cookie that is in flight")
        if offset + length > self._size:
            raise ValueError(f"{offset}+{length} is beyond the end, {self._size}")
        self._pending[cookie] = Pending(command, offset, length)
        return nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, 0, command, cookie, offset, length)

    # --- reception

    def get_buffer(self) -> memoryview:
        """Where the next bytes are to be received; of use until `buffer_updated`."""
        self._direct = self._target is not None and self._position >= len(self._buffer)
        if self._target is not None and self._direct:
            return self._target[self._filled :]
        return self._heads

    def buffer_updated(self, count: int) -> list[Event]:
        """What `count` bytes in the buffer complete. Raises as `receive`."""
        if not self._direct:
            return self.receive(self._heads[:count])
        assert self._target is not None
        self._filled += count
        if self._filled == len(self._target):
            self._target = None
            self._then()
        events, self._events = self._events, []
        return events

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """What the bytes complete. Raises ProtocolViolation or NotFound: then the connection must end."""
        view = memoryview(data)
        while len(view) or self._position < len(self._buffer):
            if self._target is not None:
                view = self._fill(view)
                if self._target is not None:
                    break
            self._buffer += view
            view = memoryview(b"")
            if not self._stage():
                break
        if self._position:
            del self._buffer[: self._position]
            self._position = 0
        events, self._events = self._events, []
        return events

    def _fill(self, view: memoryview) -> memoryview:
        """Payload goes straight to where it belongs: first what is in the buffer, then what just came."""
        assert self._target is not None
        held = memoryview(self._buffer)[self._position :]
        for source in (held, view):
            count = min(len(source), len(self._target) - self._filled)
            self._target[self._filled : self._filled + count] = source[:count]
            self._filled += count
            if source is held:
                self._position += count
            else:
                view = view[count:]
        held.release()
        if self._filled == len(self._target):
            self._target = None
            self._then()
        return view

    def _have(self, count: int) -> bool:
        return len(self._buffer) - self._position >= count

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[self._position : self._position + count])
        self._position += count
        return data

    # --- handshake: each stage returns whether it got on

    def _hello(self) -> bool:
        if not self._have(nbd.SERVER_HELLO.size):
            return False
        magic, option_magic, flags = nbd.SERVER_HELLO.unpack(self._take(nbd.SERVER_HELLO.size))
        if magic != nbd.NBDMAGIC or option_magic != nbd.IHAVEOPT or not flags & nbd.NBD_FLAG_FIXED_NEWSTYLE:
            raise ProtocolViolation("the peer is no fixed-newstyle NBD server")
        agreed = nbd.NBD_FLAG_C_FIXED_NEWSTYLE | (flags & nbd.NBD_FLAG_NO_ZEROES)
        self._output.append(nbd.CLIENT_FLAGS.pack(agreed) + nbd.pack_option(nbd.NBD_OPT_STRUCTURED_REPLY))
        self._stage = self._option_reply
        return True

    def _option_reply(self) -> bool:
        if not self._have(nbd.OPTION_REPLY.size):
            return False
        magic, option, kind, length = nbd.OPTION_REPLY.unpack_from(self._buffer, self._position)
        if magic != nbd.NBD_REP_MAGIC or length > nbd.MAX_OPTION:
            raise ProtocolViolation("the NBD server's answer to an option is malformed")
        if not self._have(nbd.OPTION_REPLY.size + length):
            return False
        self._position += nbd.OPTION_REPLY.size
        self._answered(option, kind, self._take(length))
        return True

    def _answered(self, option: int, kind: int, data: bytes) -> None:
        match option:
            case nbd.NBD_OPT_STRUCTURED_REPLY:
                self._structured = kind == nbd.NBD_REP_ACK
                self._ask_context() if self._structured else self._ask_go()
            case nbd.NBD_OPT_SET_META_CONTEXT:
                self._context(kind, data)
            case nbd.NBD_OPT_GO:
                self._entered(kind, data)
            case _:
                raise ProtocolViolation(f"the NBD server answered option {option}, which was not asked")

    def _ask_context(self) -> None:
        query = nbd.pack_string(self._export) + (1).to_bytes(4, "big") + nbd.pack_string(nbd.BASE_ALLOCATION)
        self._output.append(nbd.pack_option(nbd.NBD_OPT_SET_META_CONTEXT, query))

    def _ask_go(self) -> None:
        wanted = (1).to_bytes(2, "big") + nbd.NBD_INFO_BLOCK_SIZE.to_bytes(2, "big")
        self._output.append(nbd.pack_option(nbd.NBD_OPT_GO, nbd.pack_string(self._export) + wanted))

    def _context(self, kind: int, data: bytes) -> None:
        if kind == nbd.NBD_REP_META_CONTEXT and data[4:] == nbd.BASE_ALLOCATION.encode():
            self._allocation_id = int.from_bytes(data[:4], "big")
            return
        if kind != nbd.NBD_REP_ACK and not kind & nbd.NBD_REP_FLAG_ERROR:
            raise ProtocolViolation("the NBD server offered a context that was not asked")
        self._ask_go()

    def _entered(self, kind: int, data: bytes) -> None:
        if kind & nbd.NBD_REP_FLAG_ERROR:
            reason = data.decode("utf-8", "replace") or f"error {kind & ~nbd.NBD_REP_FLAG_ERROR}"
            raise NotFound("NBD export", self._export, hint=f"the server said: {reason}")
        if kind == nbd.NBD_REP_INFO:
            self._info(data)
        elif kind == nbd.NBD_REP_ACK:
            self._begin()
        else:
            raise ProtocolViolation(f"the NBD server answered GO with {kind}")

    def _info(self, data: bytes) -> None:
        kind = int.from_bytes(data[:2], "big")
        if kind == nbd.NBD_INFO_EXPORT and len(data) == nbd.INFO_EXPORT.size:
            _, self._size, self._flags = nbd.INFO_EXPORT.unpack(data)
        elif kind == nbd.NBD_INFO_BLOCK_SIZE and len(data) == nbd.INFO_BLOCK_SIZE.size:
            _, minimum, preferred, maximum = nbd.INFO_BLOCK_SIZE.unpack(data)
            self._blocks = (minimum, preferred, min(maximum, nbd.MAX_PAYLOAD))

    def _begin(self) -> None:
        if not self._flags & nbd.NBD_FLAG_HAS_FLAGS:
            raise ProtocolViolation("the NBD server opened the export without telling its size")
        allocation = self._allocation_id is not None
        self.ready = Ready(self._size, self._flags, *self._blocks, self._structured, allocation)
        self._events.append(self.ready)
        self._stage = self._reply

    # --- replies

    def _reply(self) -> bool:
        if not self._have(4):
            return False
        magic = int.from_bytes(self._buffer[self._position : self._position + 4], "big")
        if magic == nbd.NBD_SIMPLE_REPLY_MAGIC:
            return self._simple_reply()
        if magic == nbd.NBD_STRUCTURED_REPLY_MAGIC and self._structured:
            return self._structured_reply()
        raise ProtocolViolation("the NBD server sent no reply where one was due")

    def _of(self, cookie: int) -> Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise ProtocolViolation(f"the NBD server replied to cookie {cookie}, which is not in flight")
        return pending

    def _simple_reply(self) -> bool:
        if not self._have(nbd.SIMPLE_REPLY.size):
            return False
        _, error, cookie = nbd.SIMPLE_REPLY.unpack(self._take(nbd.SIMPLE_REPLY.size))
        pending = self._of(cookie)
        pending.error = error
        if error or pending.command == nbd.NBD_CMD_FLUSH:
            self._finish(cookie)
        elif pending.command == nbd.NBD_CMD_READ and not self._structured:
            pending.covered.append((pending.offset, pending.length))
            self._expect(memoryview(pending.data), lambda: self._finish(cookie))
        else:
            raise ProtocolViolation("the NBD server sent a simple reply to a request for data")
        return True

    def _expect(self, target: memoryview, then: Callable[[], None]) -> None:
        self._target, self._filled, self._then = target, 0, then

    def _structured_reply(self) -> bool:
        if not self._have(nbd.STRUCTURED_REPLY.size):
            return False
        _, flags, kind, cookie, length = nbd.STRUCTURED_REPLY.unpack_from(self._buffer, self._position)
        pending = self._of(cookie)
        last = bool(flags & nbd.NBD_REPLY_FLAG_DONE)
        if kind == nbd.NBD_REPLY_TYPE_OFFSET_DATA:
            return self._offset_data(cookie, pending, length, last)
        if length > nbd.MAX_OPTION + 8 * 65536:
            raise ProtocolViolation(f"the NBD server announced a chunk of {length} bytes")
        if not self._have(nbd.STRUCTURED_REPLY.size + length):
            return False
        self._position += nbd.STRUCTURED_REPLY.size
        self._chunk(kind, pending, self._take(length))
        if last:
            self._finish(cookie)
        return True

    def _offset_data(self, cookie: int, pending: Pending, length: int, last: bool) -> bool:
        if length <= 8:
            raise ProtocolViolation(f"the NBD server announced a chunk of data of {length} bytes")
        if not self._have(nbd.STRUCTURED_REPLY.size + 8):
            return False
        self._position += nbd.STRUCTURED_REPLY.size
        offset = int.from_bytes(self._take(8), "big")
        self._cover(pending, offset, length - 8)
        begin = offset - pending.offset
        target = memoryview(pending.data)[begin : begin + length - 8]
        self._expect(target, (lambda: self._finish(cookie)) if last else _nothing)
        return True

    def _cover(self, pending: Pending, offset: int, length: int) -> None:
        inside = pending.offset <= offset and offset + length <= pending.offset + pending.length
        if pending.command != nbd.NBD_CMD_READ or length <= 0 or not inside:
            raise ProtocolViolation("the NBD server sent data that was not asked for")
        pending.covered.append((offset, length))

    def _chunk(self, kind: int, pending: Pending, body: bytes) -> None:
        if kind & nbd.NBD_REPLY_TYPE_ERROR_BIT:
            if len(body) < 6:
                raise ProtocolViolation("the NBD server's error chunk is malformed")
            pending.error = int.from_bytes(body[:4], "big") or nbd.NBD_EIO
            pending.message = body[6 : 6 + int.from_bytes(body[4:6], "big")].decode("utf-8", "replace")
        elif kind == nbd.NBD_REPLY_TYPE_OFFSET_HOLE and len(body) == 12:
            self._cover(pending, int.from_bytes(body[:8], "big"), int.from_bytes(body[8:], "big"))
        elif kind == nbd.NBD_REPLY_TYPE_BLOCK_STATUS and len(body) >= 12 and len(body) % 8 == 4:
            self._status(pending, body)
        elif kind != nbd.NBD_REPLY_TYPE_NONE:
            raise ProtocolViolation(f"the NBD server sent a malformed chunk of type {kind}")

    def _status(self, pending: Pending, body: bytes) -> None:
        if pending.command != nbd.NBD_CMD_BLOCK_STATUS or int.from_bytes(body[:4], "big") != self._allocation_id:
            raise ProtocolViolation("the NBD server sent block status that was not asked for")
        pending.extents.extend(nbd.BLOCK_DESCRIPTOR.iter_unpack(body[4:]))

    def _finish(self, cookie: int) -> None:
        pending = self._pending.pop(cookie)
        if pending.error:
            message = pending.message or nbd.ERROR_NAMES.get(pending.error, f"error {pending.error}")
            self._events.append(Failed(cookie, pending.error, message))
        elif pending.command == nbd.NBD_CMD_READ:
            check_covered(pending)
            self._events.append(ReadDone(cookie, pending.offset, pending.data))
        elif pending.command == nbd.NBD_CMD_BLOCK_STATUS:
            if not pending.extents or any(length == 0 for length, _ in pending.extents):
                raise ProtocolViolation("the NBD server answered block status with nothing")
            self._events.append(StatusDone(cookie, pending.offset, tuple(pending.extents)))
        else:
            self._events.append(Done(cookie))


def _nothing() -> None:
    """What follows a chunk that is not the last."""
