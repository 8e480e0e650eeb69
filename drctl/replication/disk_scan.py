"""Threads that read a disk as fast as it can be read, and look at what they have read before it leaves their cache.

Each has an NBD connection of its own and memory that is used again and again: nothing of what is read passes the event
loop, or is copied, but for what a look keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from drctl.errors import ApplianceUnreachable
from drctl.model.extent import Extent, KiB
from drctl.replication.disk_connection import Export
from drctl.wire.nbd_bulk import BulkReads
from drctl.wire.nbd_client import NbdClient, Ready

#: Connections, and threads: while one looks at what it has, the server is busy with another's.
CONNECTIONS = 4
#: One request of a connection: QEMU's own memory for it stays in the processor's cache.
PIECE = 256 * KiB
#: Longest that it may take to connect (seconds).
CONNECT = 10.0

T = TypeVar("T")
#: Called with an offset on the disk and what is there; the memory is only lent.
Look = Callable[[int, memoryview], list[T]]


class _Connection:
    """One connection, used by one thread at a time. After an error it is of no use any more."""

    def __init__(self, export: Export) -> None:
        """Raises ApplianceUnreachable, NotFound or ProtocolViolation."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._memory = memoryview(bytearray())
        self._head = memoryview(bytearray(8192))
        try:
            self._socket.settimeout(CONNECT)
            self._socket.connect(export.socket)
            self.ready = _shake_hands(self._socket, NbdClient(export.export))
            self._socket.settimeout(None)
        except OSError as exc:
            self._socket.close()
            raise ApplianceUnreachable(f"{export.socket}: {exc}") from exc
        except BaseException:
            self._socket.close()
            raise
        self._reads = BulkReads(self.ready)

    def visit(self, extent: Extent, look: Look[T]) -> list[T]:
        """Read the extent in pieces, and look at each. Raises HypervisorRefused, ApplianceUnreachable,
        ProtocolViolation."""
        if len(self._memory) < extent.length:
            self._memory = memoryview(bytearray(extent.length))
        found: list[T] = []
        try:
            self._socket.sendall(b"".join(self._reads.ask(at, length) for at, length in _pieces(extent)))
            while self._reads.waiting:
                done = self._receive(extent)
                if done is not None:
                    offset, length = done
                    begin = offset - extent.offset
                    found += look(offset, self._memory[begin : begin + length])
        except OSError as exc:
            raise ApplianceUnreachable(f"the NBD connection broke: {exc}") from exc
        return found

    def _receive(self, extent: Extent) -> tuple[int, int] | None:
        """One chunk; the read that is whole with it."""
        reads = self._reads
        count = reads.head(self._fill(self._head[: reads.head_size]))
        chunk = reads.body(self._fill(self._head[:count]))
        begin = chunk.offset - extent.offset
        if chunk.hole:
            self._memory[begin : begin + chunk.length] = bytes(chunk.length)
        elif chunk.length:
            self._fill(self._memory[begin : begin + chunk.length])
        return chunk.done

    def _fill(self, target: memoryview) -> memoryview:
        done = 0
        while done < len(target):
            count = self._socket.recv_into(target[done:], 0, socket.MSG_WAITALL)
            if not count:
                raise ApplianceUnreachable("the NBD server closed the connection")
            done += count
        return target

    def hang_up(self) -> None:
        """Let whoever waits for the server fail."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _pieces(extent: Extent) -> Iterator[tuple[int, int]]:
    return ((at, min(PIECE, extent.end - at)) for at in range(extent.offset, extent.end, PIECE))


def _shake_hands(sock: socket.socket, client: NbdClient) -> Ready:
    while client.ready is None:
        data = sock.recv(4096)
        if not data:
            raise ApplianceUnreachable("the NBD server closed the connection")
        client.receive(data)
        sock.sendall(client.take_output())
    return client.ready


class DiskScan:
    """Owned by the event loop. Ends by `close`, whatever its threads wait for."""

    def __init__(self, export: Export, connections: int = CONNECTIONS) -> None:
        self._export = export
        self._workers = ThreadPoolExecutor(connections, "scan")
        self._all: list[_Connection] = []
        self._free: queue.SimpleQueue[_Connection] = queue.SimpleQueue()
        self._closed = False

    async def visit(self, extent: Extent, look: Look[T]) -> list[T]:
        """What the looks at the pieces of the extent returned, in no order. The pieces are of PIECE bytes, the last may
        be shorter. Raises HypervisorRefused, ApplianceUnreachable, NotFound, ProtocolViolation."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, self._visit, extent, look)

    def _visit(self, extent: Extent, look: Look[T]) -> list[T]:
        try:
            connection = self._free.get_nowait()
        except queue.Empty:
            connection = _Connection(self._export)
            self._all.append(connection)
        if self._closed:
            connection.hang_up()
        found = connection.visit(extent, look)
        self._free.put(connection)
        return found

    async def close(self) -> None:
        """Hang up, and wait for the threads; they are done in a moment."""
        self._closed = True
        for connection in list(self._all):
            connection.hang_up()
        await asyncio.get_running_loop().run_in_executor(None, self._workers.shutdown)
        for connection in self._all:
            connection.close()


@contextlib.asynccontextmanager
async def scanned(export: Export) -> AsyncIterator[DiskScan]:
    """Threads that read the disk, ended with the block."""
    scan = DiskScan(export)
    try:
        yield scan
    finally:
        await scan.close()
