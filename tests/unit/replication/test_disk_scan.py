"""Threads that read a disk: every piece is looked at once, errors end the reading, a server that hangs holds nobody."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from drctl.errors import ApplianceUnreachable, HypervisorRefused, NotFound
from drctl.model.extent import Extent, KiB, MiB
from drctl.replication.disk_connection import Export
from drctl.replication.disk_scan import PIECE, scanned
from drctl.wire import nbd
from drctl.wire.nbd_server import NbdServer

SIZE = 3 * MiB + 12 * KiB
CONTENT = random.Random(3).randbytes(SIZE)


class Server:
    """A read-only export on a unix socket. `bad`: an offset that can't be read; `hung`: reads get no answer."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "d.sock"
        self.bad = -1
        self.hung = False
        self.clients = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.clients += 1
                self._sockets.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        server = NbdServer({"d": nbd.Export("d", SIZE, nbd.READ_ONLY_FLAGS)})
        with suppress(OSError):
            sock.sendall(server.take_output())
            while data := sock.recv(65536):
                requests = server.receive(data)
                sock.sendall(server.take_output())
                for request in requests:
                    if not self.hung:
                        sock.sendall(self._answer(server, request))

    def _answer(self, server: NbdServer, request: object) -> bytes:
        _, _, cookie, offset, length, _ = request  # type: ignore[misc]
        if offset <= self.bad < offset + length:
            return server.fail(cookie, nbd.NBD_EIO, "a bad sector")
        return b"".join(map(bytes, server.data(cookie, offset, CONTENT[offset : offset + length])))

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def server():
    directory = Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp"))
    made = Server(directory)
    yield made
    made.close()
    shutil.rmtree(directory)


def extents(step: int) -> list[Extent]:
    return [Extent(at, min(step, SIZE - at)) for at in range(0, SIZE, step)]


def test_every_piece_is_seen_once(server):
    async def run():
        async with scanned(Export(str(server.path), "d")) as scan:
            visits = [scan.visit(each, lambda at, data: [(at, bytes(data))]) for each in extents(MiB)]
            return [found for each in await asyncio.gather(*visits) for found in each]

    found = sorted(asyncio.run(run()))
    assert b"".join(data for _, data in found) == CONTENT
    assert [at for at, _ in found] == list(range(0, SIZE, PIECE))
    assert 1 < server.clients <= 4


def test_what_can_not_be_read_is_told(server):
    server.bad = 2 * MiB + 4096

    async def run():
        async with scanned(Export(str(server.path), "d")) as scan:
            await asyncio.gather(*(scan.visit(each, lambda at, data: []) for each in extents(MiB)))

    with pytest.raises(HypervisorRefused, match="a bad sector"):
        asyncio.run(run())


def test_a_server_that_hangs_holds_nobody(server):
    server.hung = True

    async def run():
        async with scanned(Export(str(server.path), "d")) as scan:
            async with asyncio.timeout(0.2):
                await asyncio.gather(*(scan.visit(each, lambda at, data: []) for each in extents(MiB)))

    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(run(), 5))


def test_a_server_that_leaves_is_told(server):
    server.hung = True

    async def run():
        async with scanned(Export(str(server.path), "d")) as scan:
            visit = asyncio.ensure_future(scan.visit(Extent(0, MiB), lambda at, data: []))
            while not server.clients:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            for sock in server._sockets:
                sock.shutdown(socket.SHUT_RDWR)
            await visit

    with pytest.raises(ApplianceUnreachable):
        asyncio.run(run())


def test_no_server_and_no_export(server, tmp_path):
    async def run(export):
        async with scanned(export) as scan:
            await scan.visit(Extent(0, 4096), lambda at, data: [])

    with pytest.raises(ApplianceUnreachable):
        asyncio.run(run(Export(str(tmp_path / "none.sock"), "d")))
    with pytest.raises(NotFound):
        asyncio.run(run(Export(str(server.path), "x")))
