"""The view server: the disks of a group at one checkpoint as read-only NBD exports on a unix socket.

`python -m drctl.replication.view_server CONFIG.json` where the file holds {store, group, checkpoint, epoch, view,
socket, exports, port}: `store` is the group's store directory, `exports` names the disks (MACHINE.TARGET), all when
empty; `port` is one of the loopback address to listen on as well, 0: none.

One thread per connection answers its requests in order, several at a time in one send; reading, checking and unpacking
release the interpreter's lock. A damaged frame is an error of the requests that need it, never a wrong byte."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from drctl.errors import DrctlError, PreconditionFailed, ProtocolViolation
from drctl.model.extent import Extent, KiB, MiB
from drctl.store.group_store import GroupStore
from drctl.store.view import View
from drctl.wire import nbd
from drctl.wire.nbd_server import Buffer, NbdServer, Request

#: Data of large reads that all connections together may hold at a moment; bounds the process whatever clients ask for.
BUDGET = 64 * MiB
#: Replies are gathered up to this before they are sent: one system call for many small reads, no delay for large ones.
#: Each connection has memory for so much; a larger read gets its own, of the budget.
GATHER = 256 * KiB
#: What one block status reply describes at most, so that a client that asks for a terabyte is told in pieces.
MAX_STATUS_EXTENTS = 1024
STATUS_SPAN = 1024 * MiB
#: Looked at in steps, because a scattered first part may fill the reply already, and others wait for the view.
STATUS_WINDOW = 32 * MiB
#: struct timeval of 60 s: a client that takes nothing for so long is hung up on, it holds a share of the budget.
SEND_TIMEOUT = struct.pack("@ll", 60, 0)
#: IOV_MAX of Linux.
MAX_BUFFERS = 1024

#: malloc.h of glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8

log = logging.getLogger("drctl.view")


@dataclass(frozen=True, slots=True)
class Config:
    """What one view serves."""

    store: Path
    group: str
    checkpoint: int
    epoch: str
    view: str
    socket: Path
    exports: tuple[str, ...]
    port: int = 0

    @classmethod
    def read(cls, path: Path) -> Config:
        data: dict[str, Any] = json.loads(path.read_text())
        return cls(
            Path(data["store"]),
            str(data["group"]),
            int(data["checkpoint"]),
            str(data.get("epoch", "")),
            str(data["view"]),
            Path(data["socket"]),
            tuple(data.get("exports", ())),
            int(data.get("port") or 0),
        )


class Disk(Protocol):
    """What is served: store.view.ViewDisk, or what stands in for it."""

    size: int

    def read_into(self, buffer: memoryview, offset: int) -> None: ...

    def extents(self, offset: int, length: int) -> Iterator[tuple[Extent, bool]]: ...


class Budget:
    """Bytes in flight, shared by all connections. A request larger than all of it goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    def take(self, count: int) -> None:
        """Waits; so the caller must hold nothing, or all might wait for each other."""
        with self._changed:
            while not self._take(count):
                self._changed.wait()

    def _take(self, count: int) -> bool:
        if self._used and self._used + count > self._limit:
            return False
        self._used += count
        return True

    def give(self, count: int) -> None:
        with self._changed:
            self._used -= count
            self._changed.notify_all()


class Connection:
    """One client. Runs in a thread of its own."""

    def __init__(self, sock: socket.socket, disks: Mapping[str, Disk], budget: Budget) -> None:
        self._sock = sock
        self._disks = disks
        self._budget = budget
        self._session = NbdServer({name: _export(name, disk) for name, disk in disks.items()})
        self._pending: list[Buffer] = []
        self._memory = memoryview(bytearray(GATHER))
        self._used = 0
        self._held = 0

    def run(self) -> None:
        """Until the client leaves or breaks the protocol."""
        try:
            with self._sock:
                self._loop()
        except ProtocolViolation as exc:
            log.warning("a client was hung up on: %s", exc.message)
        except OSError as exc:
            # Those that chose no disk are the supervisor, which asks each second whether we greet.
            level = logging.INFO if self._session.export is not None else logging.DEBUG
            log.log(level, "a client left: %s", exc.strerror)
        finally:
            self._budget.give(self._held)

    def _loop(self) -> None:
        session = self._session
        self._send([session.take_output()])
        while not session.closed:
            count = self._sock.recv_into(session.get_buffer())
            if not count:
                return
            requests = session.buffer_updated(count)
            if session.has_output:
                self._pending.append(session.take_output())
            for request in requests:
                self._answer(request)
            self._flush()

    def _answer(self, request: Request) -> None:
        command, flags, cookie, offset, length, _ = request
        export = self._session.export
        assert export is not None
        disk = self._disks[export.name]
        try:
            if command == nbd.NBD_CMD_READ:
                self._read(disk, cookie, offset, length)
            elif command == nbd.NBD_CMD_BLOCK_STATUS:
                one = bool(flags & nbd.NBD_CMD_FLAG_REQ_ONE)
                self._pending.append(self._session.block_status(cookie, _status(disk, offset, length, one=one)))
            elif command == nbd.NBD_CMD_FLUSH:
                self._pending.append(self._session.done(cookie))
            else:
                self._pending.append(self._session.fail(cookie, nbd.NBD_ENOTSUP))
        except (DrctlError, OSError) as exc:
            # The edge: one damaged place is an error of the reads that need it; QEMU pauses the guest on it.
            log.error("%s: read of %d bytes at %d failed: %s", export.name, length, offset, exc)
            self._pending.append(self._session.fail(cookie, nbd.NBD_EIO, str(exc)))

    def _read(self, disk: Disk, cookie: int, offset: int, length: int) -> None:
        target = self._room(length)
        disk.read_into(target, offset)
        self._pending += self._session.data(cookie, offset, target)

    def _room(self, length: int) -> memoryview:
        """Memory for a read's data until it is sent."""
        used = self._used
        if used + length > GATHER:
            self._flush()
            used = 0
        if length <= GATHER:
            self._used = used + length
            return self._memory[used : used + length]
        self._budget.take(length)
        self._held = length
        return np.empty(length, np.uint8).data

    def _flush(self) -> None:
        if self._pending:
            self._send(self._pending)
            self._pending = []
        self._used = 0
        if self._held:
            self._budget.give(self._held)
            self._held = 0

    def _send(self, buffers: list[Buffer]) -> None:
        """All of them, in as few system calls as the socket allows."""
        while buffers:
            sent = self._sock.sendmsg(buffers[:MAX_BUFFERS])
            done = 0
            while done < len(buffers) and sent >= len(buffers[done]):
                sent -= len(buffers[done])
                done += 1
            buffers = buffers[done:]
            if sent:
                buffers[0] = memoryview(buffers[0])[sent:]


class SharedDisk:
    """A disk of a view that all connections read from; the view is used by one thread at a time."""

    def __init__(self, disk: Disk, lock: threading.Lock) -> None:
        self._disk = disk
        self._lock = lock
        self.size = disk.size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        with self._lock:
            self._disk.read_into(buffer, offset)

    def extents(self, offset: int, length: int) -> Iterator[tuple[Extent, bool]]:
        with self._lock:
            return iter(list(self._disk.extents(offset, length)))


def _export(name: str, disk: Disk) -> nbd.Export:
    return nbd.Export(name, disk.size, nbd.READ_ONLY_FLAGS)


def _status(disk: Disk, offset: int, length: int, *, one: bool) -> list[tuple[int, int]]:
    """(length, state) of what is there; neighbours of the same state as one. May end before the range does."""
    result: list[tuple[int, int]] = []
    end = offset + min(length, STATUS_SPAN)
    for window in range(offset, end, STATUS_WINDOW):
        for extent, data in disk.extents(window, min(STATUS_WINDOW, end - window)):
            state = 0 if data else nbd.NBD_STATE_HOLE | nbd.NBD_STATE_ZERO
            if result and result[-1][1] == state:
                result[-1] = (result[-1][0] + extent.length, state)
            elif result and (one or len(result) == MAX_STATUS_EXTENTS):
                return result
            else:
                result.append((extent.length, state))
    return result


class ViewServer:
    """Listens on one socket, and on a port when there is one. Invariant: the socket's path always leads to a server, if
    to any."""

    def __init__(self, path: Path, disks: Mapping[str, Disk], port: int = 0) -> None:
        self._path = path
        self._disks = disks
        self._budget = Budget(BUDGET)
        self._port = _loopback(port) if port else None
        self._listener = self._bind()
        self._inode = path.stat().st_ino

    def _bind(self) -> socket.socket:
        # Bound beside and renamed: a client that reconnects meets the old socket or the new one, never a gap.
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(beside))
        # In a setgid directory it is for the directory's group too: guests of another user reach it by that.
        beside.chmod(0o660 if self._path.parent.stat().st_mode & stat.S_ISGID else 0o600)
        listener.listen(128)
        beside.rename(self._path)
        return listener

    def serve(self) -> None:
        """Accept until `stop`."""
        if self._port is not None:
            threading.Thread(target=self._accept, args=(self._port,), name="port", daemon=True).start()
        self._accept(self._listener)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SEND_TIMEOUT)
            connection = Connection(sock, self._disks, self._budget)
            threading.Thread(target=connection.run, name="client", daemon=True).start()

    def stop(self) -> None:
        """Take the socket away unless another server has it already, and end `serve`."""
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _loopback(port: int) -> socket.socket:
    """Raises PreconditionFailed."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as exc:
        raise PreconditionFailed(f"port {port} can't be had: {exc.strerror}") from exc


def run(config: Config, disks: Mapping[str, Disk]) -> None:
    """Serve until SIGTERM or SIGINT. Raises PreconditionFailed."""
    server = ViewServer(config.socket, disks, config.port)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.signal(signal.SIGINT, lambda *_: server.stop())
    log.info("view %s of %s at checkpoint #%d: %d disks", config.view, config.group, config.checkpoint, len(disks))
    server.serve()


def _tune_memory() -> None:
    """Let all threads allocate from one heap, that keeps what is freed.

    Measured with four connections: peak memory 180 MiB without the one heap, 115 with. A heap that is given back at
    every unpacked frame is faulted in again at the next, and the kernel fills 2 MiB with zeroes for 64 KiB."""
    with suppress(AttributeError, OSError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 8 * MiB)
        mallopt(M_TRIM_THRESHOLD, 32 * MiB)


def main(arguments: list[str]) -> int:
    """The process: open the view, serve until SIGTERM."""
    _tune_memory()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = Config.read(Path(arguments[0]))
        with closing(GroupStore.open(config.store)) as store, closing(_open_view(store, config)) as view:
            lock = threading.Lock()
            names = config.exports or tuple(disk.name for disk in view.disks)
            run(config, {name: SharedDisk(view.disk(name), lock) for name in names})
    except DrctlError as exc:
        log.error("%s", exc.message)
        return exc.exit_code
    return 0


def _open_view(store: GroupStore, config: Config) -> View:
    begin = time.monotonic()
    view = store.open_view(config.checkpoint, config.epoch)
    log.info("opened in %.3f s: %d layers", time.monotonic() - begin, view.layers)
    return view


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
