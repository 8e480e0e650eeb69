"""The tap: takes the writes of a group's disks over NBD, numbers them, puts them in the ring, replies. Nothing else.

    python -m drctl.replication.tap RING SOCKET BELL       exports from RING.json
    python -m drctl.replication.tap --sink EXPORTS SOCKET  acknowledge and discard: for detaching when the tap is dead

Every guest write waits for this process, so it stays small: one thread, one epoll loop over all connections (which is
what makes one sequence over all disks), and neither asyncio nor numpy nor logging is loaded. It does not raise its own
priority: woken before QEMU has sent the rest of its batch, it answers one by one (nice -10 on a full machine, 4 KiB at
depth 16: 14,800 writes/s instead of 24,400).
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from drctl.errors import DrctlError, IntegrityError, ProtocolViolation
from drctl.store.ring import Ring, exports_path, read_exports
from drctl.store.ring_writer import RingWriter
from drctl.wire import nbd
from drctl.wire.nbd_server import REFUSED, Buffer, NbdServer, Request
from drctl.wire.ring import OrderReason, Word

#: Half of what the contract allows between two heartbeats.
BEAT_SECONDS = 0.05
#: Far above one connection per disk; what is beyond is closed at once.
MAX_CONNECTIONS = 256
#: A READ is answered with zeroes out of this many bytes, by reference.
_ZEROES = memoryview(bytes(nbd.MiB))
#: Pieces per sendmsg; the kernel's limit is 1024.
_PIECES = 512
#: Replies are joined into one buffer up to here; answers to READs beyond it are sent in pieces, by reference.
_JOINED = 256 * 1024
_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

Exports = dict[str, tuple[int, int]]


class Recorder(Protocol):
    """Where writes go: a RingWriter, or a Sink."""

    now: int

    def append(self, disk: int, offset: int, data: memoryview | bytes) -> int: ...

    def append_zeroes(self, disk: int, offset: int, length: int) -> int: ...

    def publish(self) -> bool: ...

    def poll(self, now: int) -> bool: ...

    def order_lost(self, reason: OrderReason) -> None: ...

    def connected(self, disk: int) -> int: ...

    def disconnected(self, disk: int) -> None: ...

    def ended(self, disk: int, *, goodbye: bool) -> None: ...


class Sink:
    """Keeps nothing. It lets a mirror whose tap died end softly: QEMU never ends one with a dead target."""

    def __init__(self) -> None:
        self.now = 0
        self._connections = 0

    def append(self, disk: int, offset: int, data: memoryview | bytes) -> int:
        return 0

    def append_zeroes(self, disk: int, offset: int, length: int) -> int:
        return 0

    def publish(self) -> bool:
        return False

    def poll(self, now: int) -> bool:
        return False

    def order_lost(self, reason: OrderReason) -> None: ...
    def disconnected(self, disk: int) -> None: ...
    def ended(self, disk: int, *, goodbye: bool) -> None: ...

    def connected(self, disk: int) -> int:
        self._connections += 1
        return self._connections


class Bell:
    """The FIFO that wakes a waiting shipper. Rung after the replies, so that no guest waits for it."""

    def __init__(self, path: Path, ring: Ring) -> None:
        if not path.exists():
            os.mkfifo(path, 0o600)
        # Open for both, so that it opens without a reader and a ring is kept until one comes.
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._words = ring.words
        self._waiting = int(Word.READER_WAITING)

    def ring(self) -> None:
        if self._words[self._waiting]:
            self._words[self._waiting] = 0
            # A full FIFO is full of rings that nobody heard yet.
            with suppress(BlockingIOError):
                os.write(self._descriptor, b"\0")


class Connection:
    """One client. `disk` is -1 until it has entered an export; `queue` holds what its socket did not take yet; `lost`:
    its end has been noted in the ring."""

    __slots__ = ("disk", "lost", "name", "queue", "session", "socket")

    def __init__(self, accepted: socket.socket, session: NbdServer) -> None:
        self.socket = accepted
        self.session = session
        self.disk = -1
        self.lost = False
        self.name = ""
        self.queue: list[memoryview] = []


class Tap:
    """The loop. Invariant: when a reply leaves, its write is published or noted in a dirty map; when a connection is
    gone, that is noted before another write is taken."""

    def __init__(self, recorder: Recorder, exports: Exports, maximum_payload: int, bell: Bell | None) -> None:
        self._recorder = recorder
        self._bell = bell
        self._numbers = {name: number for name, (number, _) in exports.items()}
        self._exports = {
            name: nbd.Export(name, size, nbd.WRITABLE_FLAGS, maximum_payload=maximum_payload)
            for name, (_, size) in exports.items()
        }
        self._connections: dict[int, Connection] = {}
        self._live: dict[str, Connection] = {}
        self._epoll = select.epoll()
        self.stopping = False

    def run(self, listener: socket.socket) -> None:
        """Serve until `stopping` is set."""
        listening = listener.fileno()
        self._epoll.register(listening, select.EPOLLIN)
        poll, recorder, connections = self._epoll.poll, self._recorder, self._connections
        while not self.stopping:
            events = poll(BEAT_SECONDS)
            news = recorder.poll(time.monotonic_ns())
            for descriptor, mask in events:
                if mask & _GONE and descriptor in connections:
                    self._lose(connections[descriptor])
                    news = True
            for descriptor, mask in events:
                if descriptor == listening:
                    self._accept(listener)
                elif (connection := connections.get(descriptor)) is not None:
                    news |= self._serve(connection, mask)
            if news and self._bell is not None:
                self._bell.ring()
        self._close(listener)

    def _close(self, listener: socket.socket) -> None:
        listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection, "the tap stops")
        self._epoll.close()

    # --- connections

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, _ = listener.accept()
        except OSError:
            return  # the client has gone, or we are out of descriptors: it will ask again
        if len(self._connections) >= MAX_CONNECTIONS:
            accepted.close()
            return
        accepted.setblocking(False)
        connection = Connection(accepted, NbdServer(self._exports, structured=False, admit=self._admit))
        self._connections[accepted.fileno()] = connection
        self._epoll.register(accepted.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        self._send(connection, [connection.session.take_output()])

    def _admit(self, export: nbd.Export) -> str:
        """One writer per export: with two, neither sequence nor order would mean anything."""
        earlier = self._live.get(export.name)
        if earlier is None:
            return ""
        look = select.poll()
        look.register(earlier.socket, select.POLLRDHUP)
        if not look.poll(0):
            return f"export {export.name} has a writer already"
        self._drop(earlier, "a new connection takes its place")
        return ""

    def _lose(self, connection: Connection) -> None:
        """The client will send no more: note it at once. What it sent before is still read: a socket closed over
        unread bytes would reset a client that waits for the end of its goodbye."""
        if connection.disk >= 0 and not connection.lost:
            connection.lost = True
            self._recorder.disconnected(connection.disk)
        if connection.queue:
            self._drop(connection, "it did not wait for its replies")

    def _drop(self, connection: Connection, reason: str) -> None:
        """Forget a connection."""
        if self._connections.pop(connection.socket.fileno(), None) is None:
            return
        if connection.disk >= 0:
            if not connection.lost:
                self._recorder.disconnected(connection.disk)
            self._recorder.ended(connection.disk, goodbye=connection.session.closed and not reason)
            del self._live[connection.name]
            _say(f"{connection.name}: disconnected" + (f": {reason}" if reason else ""))
        elif reason:
            _say(f"a client was turned away: {reason}")
        self._epoll.unregister(connection.socket.fileno())
        connection.socket.close()

    def _enter(self, connection: Connection, export: nbd.Export) -> None:
        connection.name = export.name
        connection.disk = self._numbers[export.name]
        self._live[export.name] = connection
        number = self._recorder.connected(connection.disk)
        _say(f"{export.name}: connection {number}")

    # --- the way of a write

    def _serve(self, connection: Connection, mask: int) -> bool:
        """Do what the socket is ready for; True when a record was published."""
        if connection.queue:
            if mask & select.EPOLLOUT:
                self._send(connection, [])
            return False
        requests = self._receive(connection)
        if requests is None:
            return False
        session = connection.session
        replies = self._record(connection.disk, requests)
        published = self._recorder.publish()
        if session.has_output:
            replies.append(session.take_output())
        if replies:
            self._send(connection, replies)
        if session.closed:
            self._drop(connection, "")
        return published

    def _receive(self, connection: Connection) -> list[Request] | None:
        """The requests that one reception completed; None when there was nothing, or the connection is no more."""
        session = connection.session
        try:
            count = connection.socket.recv_into(session.get_buffer())
            if not count:
                self._drop(connection, "")
                return None
            requests = session.buffer_updated(count)
        except BlockingIOError:
            return None
        except OSError as exc:
            self._drop(connection, str(exc))
            return None
        except ProtocolViolation as exc:
            self._drop(connection, exc.message)
            return None
        if connection.disk < 0 and session.export is not None:
            self._enter(connection, session.export)
        return requests

    def _record(self, disk: int, requests: list[Request]) -> list[Buffer]:
        """Put the writes into the ring, in order; the replies, to be sent once they are published."""
        replies: list[Buffer] = []
        append, pack, reply = self._recorder.append, nbd.SIMPLE_REPLY.pack, replies.append
        for command, _, cookie, offset, length, payload in requests:
            if command == nbd.NBD_CMD_WRITE:
                append(disk, offset, payload)
            elif command == nbd.NBD_CMD_WRITE_ZEROES:
                self._recorder.append_zeroes(disk, offset, length)
            elif command == REFUSED:
                # QEMU goes on sending what comes after a refused write: the order is gone.
                self._recorder.order_lost(OrderReason.WRITE_REFUSED)
                continue
            reply(pack(nbd.NBD_SIMPLE_REPLY_MAGIC, 0, cookie))
            if command == nbd.NBD_CMD_READ:
                whole, rest = divmod(length, len(_ZEROES))
                replies.extend([_ZEROES] * whole)
                reply(_ZEROES[:rest])
        return replies

    def _send(self, connection: Connection, replies: list[Buffer]) -> None:
        """Send all replies of a batch at once. What the socket does not take waits, and nothing more is read from a
        client that does not take its replies."""
        waited = bool(connection.queue)
        try:
            if not waited and sum(map(len, replies)) <= _JOINED:
                pieces = [memoryview(b"".join(replies))]
            else:
                pieces = connection.queue + [memoryview(reply) for reply in replies if len(reply)]
            connection.queue = _send_pieces(connection.socket, pieces)
        except OSError as exc:
            self._drop(connection, str(exc))
            return
        if bool(connection.queue) != waited:
            ready = select.EPOLLOUT if connection.queue else select.EPOLLIN
            self._epoll.modify(connection.socket.fileno(), ready | select.EPOLLRDHUP)


def _send_pieces(target: socket.socket, pieces: list[memoryview]) -> list[memoryview]:
    """Send as much as goes; what is left."""
    while pieces:
        try:
            sent = target.send(pieces[0]) if len(pieces) == 1 else target.sendmsg(pieces[:_PIECES])
        except BlockingIOError:
            return pieces
        done = 0
        while done < len(pieces) and sent >= len(pieces[done]):
            sent -= len(pieces[done])
            done += 1
        pieces = pieces[done:]
        if sent:
            pieces[0] = pieces[0][sent:]
    return pieces


def _say(text: str) -> None:
    os.write(2, f"tap: {text}\n".encode())


def listen(path: Path) -> socket.socket:
    """Listen on a unix socket of mode 0600 (0660 in a setgid directory: it is for the directory's group too), in place
    of whatever was there. An upgrade that hands sockets over would
    make the listener from a descriptor here."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    temporary = path.with_name(path.name + "~")
    temporary.unlink(missing_ok=True)
    before = os.umask(0o117 if path.parent.stat().st_mode & stat.S_ISGID else 0o177)
    try:
        listener.bind(str(temporary))
    finally:
        os.umask(before)
    listener.listen(MAX_CONNECTIONS)
    # Only now under its name: a client that finds the socket is never refused.
    temporary.replace(path)
    return listener


def _tap_of(arguments: list[str]) -> tuple[Tap, Path]:
    """The tap and its socket's path, of `RING SOCKET BELL` or `--sink EXPORTS SOCKET`."""
    if arguments[0] == "--sink":
        return Tap(Sink(), read_exports(Path(arguments[1])), nbd.MAX_PAYLOAD, None), Path(arguments[2])
    path, path_of_socket, path_of_bell = map(Path, arguments)
    ring = Ring.open(path, writer=True)
    exports = read_exports(exports_path(path))
    if {number: size for number, size in exports.values()} != ring.disks:
        raise IntegrityError(f"{path}: its exports are not the disks that the ring was made for")
    writer = RingWriter(ring)
    # The heart beats before there is a pid that a watchdog could find hung.
    writer.poll(time.monotonic_ns())
    ring.words[Word.TAP_PID] = os.getpid()
    # A record larger than the ring could never be kept: then each such write would be a loss of order.
    maximum = max(4096, min(nbd.MAX_PAYLOAD, ring.data_capacity // 4 // 4096 * 4096))
    return Tap(writer, exports, maximum, Bell(path_of_bell, ring)), path_of_socket


def main(arguments: list[str]) -> int:
    """Run until SIGTERM; the exit code."""
    if len(arguments) != 3:
        _say("usage: RING SOCKET BELL, or --sink EXPORTS SOCKET")
        return 2
    try:
        tap, path = _tap_of(arguments)
    except DrctlError as exc:
        _say(exc.message)
        return exc.exit_code
    except OSError as exc:
        _say(str(exc))
        return 1

    def stop(number: int, frame: object) -> None:
        tap.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # Nothing here makes cycles; a collection would be a pause in every guest.
    gc.disable()
    tap.run(listen(path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
