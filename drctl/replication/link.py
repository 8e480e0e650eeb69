"""The link's connections: TLS over TCP around a wire.link Session. Who may connect is decided here, what is said
elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from drctl.errors import ApplianceUnreachable, CertificateRejected, DrctlError, ProtocolViolation, SetupFailed
from drctl.replication import identity
from drctl.replication.identity import Peer
from drctl.replication.tasks import TaskGroup
from drctl.wire.link import Message, Role, Session

HANDSHAKE_TIMEOUT = 10.0
#: What asyncio keeps for a peer that does not read; a few messages, so that the window is the ring, not memory.
WRITE_BUFFER = 2 * 1024 * 1024
WRITE_PIECE = 256 * 1024
#: Received messages that wait for their reader; beyond it the socket is not read.
RECEIVED_LIMIT = 4 * 1024 * 1024
#: Half-open connections at once. One more turns out the oldest of the address that has most of them, so that a crowd
#: that says nothing keeps nobody out; but none that is younger than PATIENCE, so that hundreds of shippers that dial
#: at once, after a restart, have their turn.
MAX_HANDSHAKES = 64
PATIENCE = 0.5

log = logging.getLogger(__name__)


class LinkProtocol(asyncio.BufferedProtocol):
    """What TLS decrypts goes straight into the messages' own memory; whole messages wait here, few MiB at most.

    Invariant: the transport is paused while more than RECEIVED_LIMIT bytes of messages wait."""

    def __init__(self, role: Role) -> None:
        self.session = Session(role)
        self.received_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._messages: deque[tuple[Message, int]] = deque()
        self._waiting_bytes = 0
        self._since_message = 0
        self._paused = False
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._failure: BaseException | None = None
        self._ended = False
        self.closed = asyncio.Event()

    # called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no common class

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.session.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self.received_bytes += nbytes
        self._since_message += nbytes
        try:
            message = self.session.buffer_updated(nbytes)
        except ProtocolViolation as exc:
            self._end(exc)
            self._pause()
            return
        if message is None:
            return
        self._messages.append((message, self._since_message))
        self._waiting_bytes += self._since_message
        self._since_message = 0
        self._news.set()
        if self._waiting_bytes > RECEIVED_LIMIT:
            self._pause()

    def eof_received(self) -> bool:
        self._end(None)
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        self._end(exc)
        self.closed.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _end(self, exc: BaseException | None) -> None:
        self._failure = self._failure or exc
        self._ended = True
        self._news.set()

    def _pause(self) -> None:
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    # called by the connection

    async def next_messages(self) -> list[Message]:
        """All that wait, at least one; none at the end. Raises what ended the connection."""
        await self._news.wait()
        messages = [message for message, _ in self._messages]
        self._messages.clear()
        self._waiting_bytes = 0
        if not messages:
            if self._failure is not None:
                raise self._failure
            return []
        if not self._ended:
            self._news.clear()
            if self._paused and self._transport is not None and not self._transport.is_closing():
                self._paused = False
                self._transport.resume_reading()
        return messages

    async def drained(self) -> None:
        """Until the transport takes more. Raises what ended the connection."""
        await self._writable.wait()
        if self.closed.is_set():
            raise self._failure or ConnectionResetError("the connection is closed")


class Connection:
    """One established connection to an authorised peer. `receive` and `send` may run in two tasks."""

    def __init__(self, protocol: LinkProtocol, transport: asyncio.Transport, appliance: str, peer: Peer) -> None:
        self._protocol = protocol
        self._transport = transport
        self.appliance = appliance
        self.peer = peer
        self.sent_bytes = 0

    @property
    def received_bytes(self) -> int:
        return self._protocol.received_bytes

    async def receive(self) -> list[Message]:
        """The next messages; empty at the end of the connection. Raises ProtocolViolation, CertificateRejected or
        ApplianceUnreachable; the connection is of no use then."""
        try:
            return await self._protocol.next_messages()
        except (OSError, EOFError) as exc:
            raise identity.rejection(exc) or ApplianceUnreachable(f"the link broke: {exc}") from exc

    async def send(self, message: Message) -> None:
        await self._write(self._protocol.session.send(message))

    async def send_frames(self, message: bytes) -> None:
        """Send a FRAMES message that is packed already."""
        self._protocol.session.sends_frames()
        await self._write(message)

    async def _write(self, data: bytes) -> None:
        whole = memoryview(data)
        try:
            # In pieces that stay in the processor's cache while they are encrypted, copied and sent.
            for at in range(0, len(whole), WRITE_PIECE):
                self._transport.write(whole[at : at + WRITE_PIECE])
            self.sent_bytes += len(whole)
            await self._protocol.drained()
        except (OSError, RuntimeError) as exc:
            raise identity.rejection(exc) or ApplianceUnreachable(f"the link broke: {exc}") from exc

    async def close(self) -> None:
        """Say goodbye for at most a second, then cut."""
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            self._transport.close()
            async with asyncio.timeout(1):
                await self._protocol.closed.wait()
        self.abort()

    def abort(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._transport.abort()


def split_address(address: str) -> tuple[str, int]:
    """`HOST:PORT` or `[V6]:PORT`. Raises SetupFailed."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise SetupFailed(f"{address!r} is no address; write HOST:PORT")
    return host.strip("[]"), int(port)


async def dial(address: str, tls_dir: Path, expected: str = "") -> Connection:
    """Connect to a receiver as the source. `expected`: the UUID that it must have; empty: any on our list.

    Raises ApplianceUnreachable, CertificateRejected or SetupFailed (our own certificate)."""
    host, port = split_address(address)
    context = identity.client_context(tls_dir)
    loop = asyncio.get_running_loop()
    protocol = LinkProtocol(Role.SOURCE)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT):
            transport, _ = await loop.create_connection(lambda: protocol, host, port, ssl=context)
    except (OSError, TimeoutError, EOFError) as exc:
        raise identity.rejection(exc) or _unreachable(address, exc) from exc
    return _connection(protocol, transport, tls_dir, expected)


def _unreachable(address: str, exc: BaseException) -> ApplianceUnreachable:
    if isinstance(exc, TimeoutError) and not str(exc):
        why = f"no answer within {HANDSHAKE_TIMEOUT:.0f} s"
    elif isinstance(exc, OSError) and exc.strerror:
        why = exc.strerror.lower()
    else:
        # Errors of the event loop may come without a word.
        why = str(exc) or "the connection was closed"
    return ApplianceUnreachable(f"no link to {address}: {why}", hint="is the other site's appliance running?")


def _connection(protocol: LinkProtocol, transport: asyncio.Transport, tls_dir: Path, expected: str = "") -> Connection:
    transport.set_write_buffer_limits(high=WRITE_BUFFER)
    _tune(transport.get_extra_info("socket"))
    try:
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        appliance, peer = identity.authorise(tls.getpeercert(binary_form=True), identity.load_peers(tls_dir))
        if expected and appliance != expected:
            raise CertificateRejected(
                f"appliance {appliance} answers where {expected} was expected",
                hint="check the link address of the host",
                reason="another appliance",
            )
    except DrctlError:
        transport.abort()
        raise
    return Connection(protocol, transport, appliance, peer)


def _tune(sock: socket.socket) -> None:
    """No delay for acknowledgements; a dead path is noticed within half a minute even when nothing is sent."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)


Serve = Callable[[Connection], Awaitable[None]]
Rejected = Callable[[str, DrctlError], None]


class Listener:
    """The link's listening port. Each connection that is let in runs `serve` in a task of its own."""

    def __init__(self, address: str, tls_dir: Path, serve: Serve, rejected: Rejected) -> None:
        self._address = address
        self._tls_dir = tls_dir
        self._serve = serve
        self._rejected = rejected
        self._sock: socket.socket | None = None
        #: Tasks that shake hands, oldest first, whom with, and since when.
        self._half_open: dict[asyncio.Task[None], tuple[str, float]] = {}
        self._room = asyncio.Event()
        self.port = 0

    def bind(self) -> None:
        """Raises SetupFailed when the address can't be listened on, or our certificate is of no use."""
        host, port = split_address(self._address)
        identity.server_context(self._tls_dir)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        try:
            sock.bind((host, port))
            sock.listen(128)
        except OSError as exc:
            sock.close()
            raise SetupFailed(f"can't listen on {self._address}: {exc}") from exc
        self._sock = sock
        self.port = sock.getsockname()[1]

    async def run(self) -> None:
        """Accept until cancelled; the connections end with it."""
        assert self._sock is not None
        loop = asyncio.get_running_loop()
        with self._sock as sock:
            async with TaskGroup() as tasks:
                while True:
                    await self._make_room()
                    try:
                        accepted, address = await loop.sock_accept(sock)
                    except OSError as exc:  # e.g. out of descriptors: others' connections must go on
                        log.warning("accept: %s", exc)
                        await asyncio.sleep(0.5)
                        continue
                    task = tasks.create_task(self._one(accepted, f"{address[0]}:{address[1]}"))
                    self._half_open[task] = address[0], loop.time()

    async def _make_room(self) -> None:
        """Until one more may shake hands; who comes meanwhile waits in the kernel's queue."""
        while len(self._half_open) >= MAX_HANDSHAKES and not self._turn_out(asyncio.get_running_loop().time()):
            self._room.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE / 10):
                    await self._room.wait()

    def _turn_out(self, now: float) -> bool:
        """Make room for one more: the oldest of the address that holds most of the places, unless it is young."""
        [(crowd, _)] = Counter(address for address, _ in self._half_open.values()).most_common(1)
        oldest, since = next((task, since) for task, (address, since) in self._half_open.items() if address == crowd)
        if now - since < PATIENCE:
            return False
        del self._half_open[oldest]
        oldest.cancel()
        return True

    async def _one(self, sock: socket.socket, address: str) -> None:
        try:
            await self._meet(sock, address)
        except DrctlError as exc:
            self._rejected(address, exc)
        except Exception:  # the edge: one connection must not end the others
            log.exception("connection from %s", address)

    async def _meet(self, sock: socket.socket, address: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            connection = await self._shake_hands(sock, address)
        except asyncio.CancelledError:
            sock.close()
            if task in self._half_open:
                raise  # it is the listener that ends
            raise ProtocolViolation(f"no TLS handshake from {address}: others waited for its place") from None
        finally:
            self._half_open.pop(task, None)
            self._room.set()
        try:
            await self._serve(connection)
        finally:
            await connection.close()

    async def _shake_hands(self, sock: socket.socket, address: str) -> Connection:
        loop = asyncio.get_running_loop()
        protocol = LinkProtocol(Role.RECEIVER)
        try:
            context = identity.server_context(self._tls_dir)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=context)
        except (OSError, TimeoutError, EOFError) as exc:
            sock.close()
            raise identity.rejection(exc) or ProtocolViolation(
                f"no TLS handshake from {address}: {exc or type(exc).__name__}"
            ) from exc
        return _connection(protocol, transport, self._tls_dir)
