"""The server's half of one NBD connection, sans-IO: bytes in, requests out; answers in, bytes out.

The shell receives into `get_buffer()`, tells `buffer_updated()` how much came, sends `take_output()`, and answers each
request, in any order, with the bytes of `done`, `fail`, `data`, `read_reply` or `block_status`.

Errors are of two kinds. A peer that breaks the protocol ends the connection: ProtocolViolation. A request that can't be
done is answered by the session itself with an error number, and the connection goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from drctl.errors import ProtocolViolation
from drctl.wire import nbd
from drctl.wire.nbd import NBD_CMD_WRITE, NBD_REQUEST_MAGIC, REQUEST, Export
from drctl.wire.nbd_negotiation import ALLOCATION_ID, Admit, Exports, Negotiation, admit_all

Buffer = bytes | bytearray | memoryview
#: (command, command flags, cookie, offset, length, payload). A plain tuple, for there are 100,000 a second of them.
#: The payload is a view of the session's buffer: it lives until the next get_buffer() or receive().
Request = tuple[int, int, int, int, int, memoryview]

#: In place of a command: a request to change data was refused by the session, and answered; `length` is the error.
REFUSED = -1

_NOTHING = memoryview(b"")
_HEADER = REQUEST.size
_INITIAL_BUFFER = 256 * 1024
#: With less room than this behind what is left over, the rest is moved to the front rather than received in morsels.
_LEAST_ROOM = 64 * 1024
#: A request from this length on is received alone.
_LARGE = 128 * 1024
#: After so many small receptions in a row a buffer that had grown for large writes is given back.
_SMALL_BEFORE_SHRINKING = 512

_CHANGES_DATA = frozenset({nbd.NBD_CMD_WRITE, nbd.NBD_CMD_TRIM, nbd.NBD_CMD_WRITE_ZEROES})
_KNOWN_FLAGS = {
    nbd.NBD_CMD_READ: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_DF,
    nbd.NBD_CMD_WRITE: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_FLUSH: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_TRIM: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_WRITE_ZEROES: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_NO_HOLE | nbd.NBD_CMD_FLAG_FAST_ZERO,
    nbd.NBD_CMD_BLOCK_STATUS: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_REQ_ONE,
}
#: Transmission flag without which a command or command flag may not be sent.
_NEEDS = {nbd.NBD_CMD_TRIM: nbd.NBD_FLAG_SEND_TRIM, nbd.NBD_CMD_WRITE_ZEROES: nbd.NBD_FLAG_SEND_WRITE_ZEROES}

_HELLO = nbd.SERVER_HELLO.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, nbd.NBD_FLAG_FIXED_NEWSTYLE | nbd.NBD_FLAG_NO_ZEROES)


class NbdServer:
    """One connection. Invariant: a request is returned once, whole, and within its export.

    `export` is None until the client has entered one; `closed` is True once it said goodbye (then nothing more is
    read). With `structured` False, structured replies and block status are refused to the client. Not thread-safe."""

    def __init__(self, exports: Exports, *, structured: bool = True, admit: Admit = admit_all) -> None:
        self._agreed = Negotiation(exports, structured=structured, admit=admit)
        self._stage = self._client_flags
        self._need = nbd.CLIENT_FLAGS.size
        self._view = memoryview(bytearray(_INITIAL_BUFFER))
        self._start = 0
        self._end = 0
        self._small = 0
        self._output: list[bytes] = [_HELLO]
        self._size = 0
        self._alignment_mask = 0
        self._maximum = 0
        self._writable = False
        self.export: Export | None = None
        self.structured = False
        self.closed = False

    @classmethod
    def resumed(cls, export: Export, unread: bytes) -> NbdServer:
        """A session that goes on in transmission where another one stood, whose `unread` that was. It was entered
        without structured replies."""
        session = cls({}, structured=False)
        session._output.clear()
        session._enter(export)
        session._make_room(len(unread) + _LEAST_ROOM)
        session._view[: len(unread)] = unread
        session._end = len(unread)
        return session

    def unread(self) -> bytes:
        """What was received and makes no whole request yet."""
        return bytes(self._view[self._start : self._end])

    def get_buffer(self) -> memoryview:
        """Where the next bytes belong; never empty. Payloads returned before are gone after this call."""
        start, end, view = self._start, self._end, self._view
        if start == end:
            self._start = self._end = 0
            if len(view) > _INITIAL_BUFFER and self._small > _SMALL_BEFORE_SHRINKING:
                self._view = view = memoryview(bytearray(_INITIAL_BUFFER))
            end = 0
        need = self._need
        if need > len(view) - self._start or len(view) - end < _LEAST_ROOM:
            self._make_room(need + _LEAST_ROOM)
        if need > _LARGE:
            # Up to the end of this request and no further: what came behind it would have to be moved to the front.
            return self._view[self._end : self._start + need]
        return self._view[self._end :]

    def _make_room(self, capacity: int) -> None:
        left = self._end - self._start
        view = self._view
        if capacity > len(view):
            self._view = memoryview(bytearray(max(capacity, min(2 * capacity, 2 * nbd.MiB))))
        self._view[:left] = view[self._start : self._end]
        self._start, self._end = 0, left

    def buffer_updated(self, count: int) -> list[Request]:
        """The requests that are whole after `count` more bytes in the buffer. Raises ProtocolViolation."""
        self._end += count
        self._small = self._small + 1 if count < _INITIAL_BUFFER // 2 else 0
        if self.export is None:
            self._handshake()
            if self.export is None:
                return []
        return self._requests()

    def receive(self, data: Buffer) -> list[Request]:
        """As get_buffer and buffer_updated, for a shell that has the bytes already."""
        if len(self.get_buffer()) < len(data):
            self._make_room(self._end - self._start + len(data))
        self._view[self._end : self._end + len(data)] = data
        return self.buffer_updated(len(data))

    def take_output(self) -> bytes:
        """What the session itself has to say: the handshake, and errors of refused requests."""
        output = b"".join(self._output)
        self._output.clear()
        return output

    @property
    def has_output(self) -> bool:
        return bool(self._output)

    # --- handshake

    def _handshake(self) -> None:
        while self.export is None and not self.closed and self._end - self._start >= self._need:
            self._stage()

    def _take(self, count: int) -> bytes:
        data = bytes(self._view[self._start : self._start + count])
        self._start += count
        return data

    def _client_flags(self) -> None:
        self._agreed.flags(nbd.CLIENT_FLAGS.unpack(self._take(nbd.CLIENT_FLAGS.size))[0])
        self._next_stage_is_an_option()

    def _next_stage_is_an_option(self) -> None:
        self._stage, self._need = self._option, nbd.OPTION.size

    def _option(self) -> None:
        magic, option, length = nbd.OPTION.unpack_from(self._view, self._start)
        if magic != nbd.IHAVEOPT:
            raise ProtocolViolation("NBD client sent no option where one was due")
        if length > nbd.MAX_OPTION:
            raise ProtocolViolation(f"NBD option {option} with {length} bytes of data")
        if self._end - self._start < nbd.OPTION.size + length:
            self._need = nbd.OPTION.size + length
            return
        self._start += nbd.OPTION.size
        self._output.append(self._agreed.option(option, self._take(length)))
        self._next_stage_is_an_option()
        self.closed = self._agreed.aborted
        if self._agreed.export is not None:
            self._enter(self._agreed.export)

    def _enter(self, export: Export) -> None:
        self._need = _HEADER
        self._size = export.size
        self._alignment_mask = export.minimum_block - 1
        self._maximum = export.maximum_payload
        self._writable = not export.read_only
        self.structured = self._agreed.structured
        self.export = export

    # --- transmission

    def _requests(self) -> list[Request]:
        view, position, end = self._view, self._start, self._end
        size, mask, maximum = self._size, self._alignment_mask, self._maximum
        requests: list[Request] = []
        need = _HEADER
        while end - position >= _HEADER and not self.closed:
            magic, flags, command, cookie, offset, length = REQUEST.unpack_from(view, position)
            if magic != NBD_REQUEST_MAGIC:
                raise ProtocolViolation("NBD client sent no request where one was due")
            begin = position + _HEADER
            if command != NBD_CMD_WRITE:
                position = begin
                request = self._without_payload((command, flags, cookie, offset, length, _NOTHING))
                if request is not None:
                    requests.append(request)
                continue
            if length > maximum:
                raise ProtocolViolation(f"NBD write of {length} bytes; at most {maximum} were offered")
            stop = begin + length
            if stop > end:
                need = stop - position
                break
            position = stop
            if flags <= 1 and length and offset + length <= size and not (offset | length) & mask and self._writable:
                requests.append((command, flags, cookie, offset, length, view[begin:stop]))
            else:
                self._refuse((command, flags, cookie, offset, length, _NOTHING), requests)
        self._start = position
        self._need = need
        return requests

    def _without_payload(self, request: Request) -> Request | None:
        """The request if it may be done, a REFUSED one if the shell must know, None when all is answered."""
        command, _, cookie, _, _, _ = request
        if command == nbd.NBD_CMD_DISC:
            self.closed = True
            return None
        error = self._error_of(request)
        if not error:
            return request
        self._output.append(self.fail(cookie, error))
        if self._writable and command in _CHANGES_DATA:
            return (REFUSED, 0, cookie, 0, error, _NOTHING)
        return None

    def _refuse(self, request: Request, requests: list[Request]) -> None:
        error = self._error_of(request) or nbd.NBD_EINVAL
        self._output.append(self.fail(request[2], error))
        if self._writable:
            requests.append((REFUSED, 0, request[2], 0, error, _NOTHING))

    def _error_of(self, request: Request) -> int:
        """The error number that the request deserves, 0 if none."""
        command, flags, _, offset, length, _ = request
        known = _KNOWN_FLAGS.get(command)
        if known is None or flags & ~known:
            return nbd.NBD_EINVAL
        if command in _CHANGES_DATA and not self._writable:
            return nbd.NBD_EPERM
        if not self._offered(command, flags):
            return nbd.NBD_EINVAL
        if command == nbd.NBD_CMD_FLUSH:
            return nbd.NBD_EINVAL if offset or length else 0
        if not length or (offset | length) & self._alignment_mask:
            return nbd.NBD_EINVAL
        if offset + length > self._size:
            return nbd.NBD_ENOSPC if command in _CHANGES_DATA else nbd.NBD_EINVAL
        return nbd.NBD_EOVERFLOW if command == nbd.NBD_CMD_READ and length > self._maximum else 0

    def _offered(self, command: int, flags: int) -> bool:
        """Whether the export's flags and what was agreed allow the command and its flags."""
        assert self.export is not None
        offered = self.export.flags
        if command == nbd.NBD_CMD_BLOCK_STATUS:
            return self._agreed.allocation
        if flags & nbd.NBD_CMD_FLAG_DF and not (offered & nbd.NBD_FLAG_SEND_DF and self.structured):
            return False
        if flags & nbd.NBD_CMD_FLAG_FAST_ZERO and not offered & nbd.NBD_FLAG_SEND_FAST_ZERO:
            return False
        return not (_NEEDS.get(command, 0) & ~offered)

    # --- answers

    def done(self, cookie: int) -> bytes:
        """The request succeeded; it asked for no data."""
        return nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def fail(self, cookie: int, error: int, message: str = "") -> bytes:
        """The request failed. `error` is one of the protocol's own numbers (NBD_EIO…)."""
        if not self.structured:
            return nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, error, cookie)
        text = (message or nbd.ERROR_NAMES.get(error, "")).encode()[: nbd.MAX_STRING]
        body = error.to_bytes(4, "big") + len(text).to_bytes(2, "big") + text
        return self._chunk(cookie, nbd.NBD_REPLY_TYPE_ERROR, len(body), last=True) + body

    def data(self, cookie: int, offset: int, data: Buffer) -> list[Buffer]:
        """All that a READ asked for, in one piece; to be written in order."""
        return self.read_reply(cookie, offset, [data])

    def read_reply(self, cookie: int, offset: int, pieces: Sequence[Buffer | int]) -> list[Buffer]:
        """What a READ at `offset` asked for, in pieces that follow each other: data, or a number of zero bytes.

        Zeroes cost no bytes on the wire where the client agreed to structured replies."""
        if not self.structured:
            head = nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
            return [head, *(bytes(piece) if isinstance(piece, int) else piece for piece in pieces)]
        reply: list[Buffer] = []
        last = len(pieces) - 1
        for index, piece in enumerate(pieces):
            where = offset.to_bytes(8, "big")
            if isinstance(piece, int):
                length = piece
                head = self._chunk(cookie, nbd.NBD_REPLY_TYPE_OFFSET_HOLE, 12, last=index == last)
                reply.append(head + where + piece.to_bytes(4, "big"))
            else:
                length = len(piece)
                head = self._chunk(cookie, nbd.NBD_REPLY_TYPE_OFFSET_DATA, 8 + length, last=index == last)
                reply += (head + where, piece)
            offset += length
        return reply

    def block_status(self, cookie: int, extents: Sequence[tuple[int, int]]) -> bytes:
        """What a BLOCK_STATUS asked for: (length, NBD_STATE_* flags) of extents from its offset on, at least one.

        With NBD_CMD_FLAG_REQ_ONE the caller passes exactly one; only the last may reach beyond what was asked."""
        body = ALLOCATION_ID.to_bytes(4, "big") + b"".join(nbd.BLOCK_DESCRIPTOR.pack(*extent) for extent in extents)
        return self._chunk(cookie, nbd.NBD_REPLY_TYPE_BLOCK_STATUS, len(body), last=True) + body

    def _chunk(self, cookie: int, kind: int, length: int, *, last: bool) -> bytes:
        flags = nbd.NBD_REPLY_FLAG_DONE if last else 0
        return nbd.STRUCTURED_REPLY.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)
