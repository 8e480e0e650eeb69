"""The tap: takes the writes of a group's disks over NBD, numbers them, puts them in the ring, replies. Nothing else.

    python -m drctl.replication.tap RING SOCKET BELL       exports from RING.json
    python -m drctl.replication.tap --sink EXPORTS SOCKET  acknowledge and discard: for detaching when the tap is dead
    python -m drctl.replication.tap --heir RING SOCKET BELL  take over from the tap that runs (tap_handover.py)

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
import sys
import time
from pathlib import Path

from drctl.errors import DrctlError, IntegrityError, ProtocolViolation
from drctl.replication import tap_handover
from drctl.replication.tap_connection import MAX_CONNECTIONS, Connection, listen, send_pieces
from drctl.replication.tap_handover import Estate, Live, Offer, Succession
from drctl.replication.tap_recorder import Bell, Recorder, Sink, say
from drctl.store.ring import Ring, exports_path, read_exports
from drctl.store.ring_writer import RingWriter
from drctl.wire import nbd
from drctl.wire.nbd_server import REFUSED, Buffer, NbdServer, Request
from drctl.wire.ring import OrderReason, Word

#: Half of what the contract allows between two heartbeats.
BEAT_SECONDS = 0.05
#: A READ is answered with zeroes out of this many bytes, by reference.
_ZEROES = memoryview(bytes(nbd.MiB))
#: Replies are joined into one buffer up to here; answers to READs beyond it are sent in pieces, by reference.
_JOINED = 256 * 1024
#: A handover waits for a moment in which this much is to be carried at most, and nobody negotiates; but not for long.
_LITTLE = 4 * nbd.MiB
_CALM_SECONDS = 0.5
_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

Exports = dict[str, tuple[int, int]]


class Tap:
    """The loop. Invariant: when a reply leaves, its write is published or noted in a dirty map; when a connection is
    gone, that is noted before another write is taken."""

    def __init__(
        self, recorder: Recorder, exports: Exports, maximum_payload: int, bell: Bell | None, lock: int = -1
    ) -> None:
        self._recorder = recorder
        #: The descriptor that holds the ring's lock, for a successor.
        self._lock = lock
        self._bell = bell
        self._numbers = {name: number for name, (number, _) in exports.items()}
        self._exports = {
            name: nbd.Export(name, size, nbd.WRITABLE_FLAGS, maximum_payload=maximum_payload)
            for name, (_, size) in exports.items()
        }
        self._connections: dict[int, Connection] = {}
        self._live: dict[str, Connection] = {}
        self._epoll = select.epoll()
        self._offer: Offer | None = None
        self._heir: socket.socket | None = None
        self._heir_since = 0.0
        self.stopping = False

    def offer(self, offer: Offer) -> None:
        """Hand everything over to whoever asks there."""
        self._offer = offer
        self._epoll.register(offer.fileno(), select.EPOLLIN)

    def adopt(self, estate: Estate) -> None:
        """Go on with the connections of the tap before us. Nothing is sent, noted or read yet.

        Raises IntegrityError for one whose client agreed to something that is not offered here."""
        for live in estate.live:
            export = tap_handover.matching(live, self._exports)
            connection = Connection(live.socket, NbdServer.resumed(export, live.unread))
            connection.socket.setblocking(False)
            connection.name, connection.disk, connection.lost = export.name, self._numbers[export.name], live.lost
            connection.queue = [memoryview(live.unsent)] if live.unsent else []
            self._live[export.name] = self._connections[live.socket.fileno()] = connection
            self._epoll.register(live.socket.fileno(), connection.wanted())

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
                elif self._offer is not None and descriptor == self._offer.fileno():
                    self._asked(self._offer)
                elif (connection := connections.get(descriptor)) is not None:
                    news |= self._serve(connection, mask)
            if news and self._bell is not None:
                self._bell.ring()
            if self._heir is not None and self._hand_over(listener, self._heir):
                return
        self._close(listener)

    def _asked(self, offer: Offer) -> None:
        if (asking := offer.accept()) is not None:
            if self._heir is not None:
                self._heir.close()
            self._heir, self._heir_since = asking, time.monotonic()

    def _hand_over(self, listener: socket.socket, heir: socket.socket) -> bool:
        """Give everything to the successor that asked, between two rounds. True: all is its own now, and this process
        must not even touch the ring. Whatever goes wrong before that, this one goes on as if nothing had been."""
        live = [
            Live(self._exports[one.name], one.socket, one.lost, one.session.unread(), b"".join(one.queue))
            for one in self._live.values()
        ]
        calm = len(live) == len(self._connections) and sum(len(one.unread) + len(one.unsent) for one in live) <= _LITTLE
        if not calm and time.monotonic() - self._heir_since < _CALM_SECONDS:
            return False
        self._heir = None
        with heir:
            return tap_handover.give(heir, Estate(listener, self._lock, live))

    def _close(self, listener: socket.socket) -> None:
        listener.close()
        if self._offer is not None:
            self._offer.close()
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
            say(f"{connection.name}: disconnected" + (f": {reason}" if reason else ""))
        elif reason:
            say(f"a client was turned away: {reason}")
        self._epoll.unregister(connection.socket.fileno())
        connection.socket.close()

    def _enter(self, connection: Connection, export: nbd.Export) -> None:
        connection.name = export.name
        connection.disk = self._numbers[export.name]
        self._live[export.name] = connection
        number = self._recorder.connected(connection.disk)
        say(f"{export.name}: connection {number}")

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
            connection.queue = send_pieces(connection.socket, pieces)
        except OSError as exc:
            self._drop(connection, str(exc))
            return
        if bool(connection.queue) != waited:
            self._epoll.modify(connection.socket.fileno(), connection.wanted())


def _tap_of(arguments: list[str]) -> tuple[Tap, socket.socket]:
    """The tap and its listener, of `RING SOCKET BELL`, `--sink EXPORTS SOCKET` or `--heir RING SOCKET BELL`."""
    if arguments[0] == "--sink":
        exports = read_exports(Path(arguments[1]))
        return Tap(Sink(), exports, nbd.MAX_PAYLOAD, None), listen(Path(arguments[2]))
    if arguments[0] == "--heir":
        return _heir_of(*map(Path, arguments[1:]))
    path, path_of_socket, path_of_bell = map(Path, arguments)
    ring = Ring.open(path, writer=True)
    writer = RingWriter(ring)
    tap = _tap_on(ring, writer, path_of_bell)
    # The heart beats before there is a pid that a watchdog could find hung.
    writer.poll(time.monotonic_ns())
    ring.words[Word.TAP_PID] = os.getpid()
    tap.offer(Offer(tap_handover.handover_path(path)))
    return tap, listen(path_of_socket)


def _tap_on(ring: Ring, writer: RingWriter, path_of_bell: Path) -> Tap:
    exports = read_exports(exports_path(ring.path))
    if {number: size for number, size in exports.values()} != ring.disks:
        raise IntegrityError(f"{ring.path}: its exports are not the disks that the ring was made for")
    # A record larger than the ring could never be kept: then each such write would be a loss of order.
    maximum = max(4096, min(nbd.MAX_PAYLOAD, ring.data_capacity // 4 // 4096 * 4096))
    return Tap(writer, exports, maximum, Bell(path_of_bell, ring), ring.descriptor)


def _heir_of(path: Path, path_of_socket: Path, path_of_bell: Path) -> tuple[Tap, socket.socket]:
    """A tap in place of the one that runs, with its connections: nothing is lost, nothing is noted.

    All that takes time is done before guests have to wait. Raises DrctlError: then the other one goes on."""
    del path_of_socket  # the listener comes with the rest
    place = tap_handover.handover_path(path)
    ring = Ring.open(path, writer=True, locked=False)
    writer = RingWriter(ring, continued=True)
    tap = _tap_on(ring, writer, path_of_bell)
    succession = Succession(place)
    estate = succession.receive()
    try:
        ring.take_lock(estate.ring)
        writer.catch_up()
        tap.adopt(estate)
    except DrctlError as exc:
        succession.refuse(exc.message)
        raise
    seconds = succession.accede()
    writer.poll(time.monotonic_ns())
    ring.words[Word.TAP_PID] = os.getpid()
    say(f"took over {len(estate.live)} connections in {seconds * 1000:.1f} ms")
    try:
        tap.offer(Offer(place))
    except OSError as exc:
        say(f"can't be handed over itself: {exc}")
    estate.listener.setblocking(False)
    return tap, estate.listener


def main(arguments: list[str]) -> int:
    """Run until SIGTERM; the exit code."""
    if len(arguments) != (4 if arguments[:1] == ["--heir"] else 3):
        say("usage: [--heir] RING SOCKET BELL, or --sink EXPORTS SOCKET")
        return 2
    # Nothing here makes cycles; a collection would be a pause in every guest.
    gc.disable()
    try:
        tap, listener = _tap_of(arguments)
    except DrctlError as exc:
        say(exc.message)
        return exc.exit_code
    except OSError as exc:
        say(str(exc))
        return 1

    def stop(number: int, frame: object) -> None:
        tap.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    tap.run(listener)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
