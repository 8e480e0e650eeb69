"""A disk as it can be read here: one NBD connection to QEMU's read-only export, many requests in flight."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

from drctl.errors import ApplianceUnreachable, DrctlError, HypervisorRefused
from drctl.model.extent import MiB
from drctl.wire.nbd_client import Failed, NbdClient, ReadDone, Ready, StatusDone

#: The shortest hole worth asking again for.
SHORT_HOLE = MiB
#: NBD_STATE_ZERO of base:allocation.
_HOLE_READS_ZERO = 2
RECEIVE_CHUNK = 1 * MiB


@dataclass(frozen=True, slots=True)
class Export:
    """Where a disk can be read: a unix socket and the export's name there."""

    socket: str
    export: str


class DiskConnection:
    """One NBD connection, many requests in flight. `run` must be running for requests to be answered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: NbdClient) -> None:
        self._reader = reader
        self._writer = writer
        self._client = client
        self._waiting: dict[int, asyncio.Future[ReadDone | StatusDone]] = {}
        self._cookies = itertools.count(1)
        assert client.ready is not None
        self.ready: Ready = client.ready

    @classmethod
    async def open(cls, export: Export, timeout: float = 10.0) -> DiskConnection:
        """Enter the export. Raises ApplianceUnreachable, NotFound or ProtocolViolation."""
        client = NbdClient(export.export)
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(export.socket, limit=2 * RECEIVE_CHUNK)
                while client.ready is None:
                    client.receive(await _some(reader))
                    writer.write(client.take_output())
        except (OSError, EOFError, TimeoutError) as exc:
            raise ApplianceUnreachable(f"{export.socket}: {exc or 'no answer in time'}") from exc
        return cls(reader, writer, client)

    async def run(self) -> None:
        """Pass answers on until the connection ends; then all that wait fail."""
        failure: DrctlError = ApplianceUnreachable("the NBD server closed the connection")
        try:
            while data := await self._reader.read(RECEIVE_CHUNK):
                for event in self._client.receive(data):
                    self._dispatch(event)
        except OSError as exc:
            failure = ApplianceUnreachable(f"the NBD connection broke: {exc}")
        except DrctlError as exc:
            failure = exc
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(failure)
            self._waiting.clear()

    def _dispatch(self, event: object) -> None:
        if isinstance(event, ReadDone | StatusDone):
            future = self._waiting.pop(event.cookie)
            if not future.done():
                future.set_result(event)
        elif isinstance(event, Failed):
            future = self._waiting.pop(event.cookie)
            if not future.done():
                future.set_exception(HypervisorRefused(f"the disk can't be read: {event.message}"))

    async def read(self, offset: int, length: int) -> bytearray:
        """Raises HypervisorRefused when the server can't, and what ended the connection."""
        cookie = next(self._cookies)
        done = await self._ask(cookie, self._client.read(cookie, offset, length))
        assert isinstance(done, ReadDone)
        return done.data

    async def first_holes(self, offset: int, length: int) -> tuple[int, bool]:
        """How many bytes from `offset` are a hole that reads as zeroes (True), or are to be read before the next hole
        that is worth asking about (False)."""
        if not self.ready.allocation:
            return length, False
        cookie = next(self._cookies)
        done = await self._ask(cookie, self._client.block_status(cookie, offset, length))
        assert isinstance(done, StatusDone)
        return _first_run(done.extents, length)

    async def _ask(self, cookie: int, request: bytes) -> ReadDone | StatusDone:
        future: asyncio.Future[ReadDone | StatusDone] = asyncio.get_running_loop().create_future()
        self._waiting[cookie] = future
        try:
            self._writer.write(request)
        except (OSError, RuntimeError) as exc:
            raise ApplianceUnreachable(f"the NBD connection broke: {exc}") from exc
        return await future

    async def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(self._client.disconnect())
            self._writer.close()


async def _some(reader: asyncio.StreamReader) -> bytes:
    if data := await reader.read(RECEIVE_CHUNK):
        return data
    raise EOFError("the server closed the connection")


def _first_run(extents: tuple[tuple[int, int], ...], length: int) -> tuple[int, bool]:
    """(bytes, hole) of what comes first; holes shorter than SHORT_HOLE count as data once data has begun."""
    total = 0
    for size, flags in extents:
        is_hole = bool(flags & _HOLE_READS_ZERO)
        if total == 0 and is_hole:
            return min(_leading_holes(extents), length), True
        if is_hole and size >= SHORT_HOLE:
            break
        total += size
    return min(total, length), False


def _leading_holes(extents: tuple[tuple[int, int], ...]) -> int:
    return sum(size for size, _ in itertools.takewhile(lambda extent: extent[1] & _HOLE_READS_ZERO, extents))


@contextlib.asynccontextmanager
async def connected(export: Export) -> AsyncIterator[tuple[DiskConnection, asyncio.TaskGroup]]:
    """A connection to a disk, and tasks that end before it does. Raises what the first of them that failed raised."""
    connection = await DiskConnection.open(export)
    runner = asyncio.ensure_future(connection.run())
    try:
        async with asyncio.TaskGroup() as tasks:
            yield connection, tasks
    except BaseExceptionGroup as failures:
        raise _first(failures) from failures
    finally:
        await connection.close()
        runner.cancel()
        # Not awaited under a suppressed CancelledError: ours would be lost with it, and the reader go on for ever.
        await asyncio.wait((runner,))


def _first(group: BaseExceptionGroup) -> BaseException:
    """The first of our own errors in the group; else the first of all."""
    ours, _ = group.split(DrctlError)
    exc: BaseException = ours or group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
