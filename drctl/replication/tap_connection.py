"""A tap's sockets: where it listens, one client's connection, and sending what a socket takes."""

from __future__ import annotations

import os
import select
import socket
import stat
from pathlib import Path

from drctl.wire.nbd_server import NbdServer

#: Far above one connection per disk; what is beyond is closed at once.
MAX_CONNECTIONS = 256
#: Pieces per sendmsg; the kernel's limit is 1024.
_PIECES = 512


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

    def wanted(self) -> int:
        """What its socket is waited for: nothing more is read from a client that does not take its replies."""
        return (select.EPOLLOUT if self.queue else select.EPOLLIN) | select.EPOLLRDHUP


def send_pieces(target: socket.socket, pieces: list[memoryview]) -> list[memoryview]:
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


def listen(path: Path, *, private: bool = False) -> socket.socket:
    """Listen on a unix socket of mode 0600, in place of whatever was there. In a setgid directory it is of mode 0660:
    for the directory's group too, unless it is `private`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    temporary = path.with_name(path.name + "~")
    temporary.unlink(missing_ok=True)
    shared = path.parent.stat().st_mode & stat.S_ISGID and not private
    before = os.umask(0o117 if shared else 0o177)
    try:
        listener.bind(str(temporary))
    finally:
        os.umask(before)
    listener.listen(MAX_CONNECTIONS)
    # Only now under its name: a client that finds the socket is never refused.
    temporary.replace(path)
    return listener
