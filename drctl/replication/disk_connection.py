"""A disk as it can be read here: one NBD connection to QEMU's read-only export, many requests in flight."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from drctl.errors import ApplianceUnreachable, DrctlError, HypervisorRefused
from drctl.model.extent import Extent, MiB
from drctl.replication.tasks import TaskGroup
from drctl.wire.nbd_client import Failed, NbdClient, ReadDone, Ready, StatusDone

#: The shortest hole worth asking again for.
SHORT_HOLE = MiB
#: NBD_STATE_ZERO of base:allocation.
_HOLE_READS_ZERO = 2


@dataclass(frozen=True, slots=True)
class Export:
    """Where a disk can be read: a unix socket and the export's name there; and a file with what of it is to be read,
    [[offset, length], …] ("": all)."""

    socket: str
    export: str
    extents: str = ""

    def ranges(self) -> list[Extent] | None:
        """What is to be read; None: all. Raises HypervisorRefused when the file is not there or damaged."""
        if not self.extents:
            return None
        try:
            rows = msgspec.json.decode(Path(self.extents).read_bytes(), type=list[tuple[int, int]])
        except (OSError, msgspec.DecodeError) as exc:
            raise HypervisorRefused(f"{self.extents}: {exc}") from exc
        return [Extent(offset, length) for offset, length in rows if length > 0]


class _Protocol(asyncio.BufferedProtocol):
    """What the server sends goes straight to where a read wants it."""

    def __init__(self, client: NbdClient, take: Callable[[object], None]) -> None:
        self._client = client
        self._take = take
        self._transport: asyncio.Transport | None = None
        self.failure: DrctlError = ApplianceUnreachable("the NBD server closed the connection")
        self.entered = asyncio.Event()
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no common class

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._client.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        assert self._transport is not None
        try:
            events = self._client.buffer_updated(nbytes)
        except DrctlError as exc:
            self.failure = exc
            self._transport.abort()
            return
        if self._client.ready is None:
            self._transport.write(self._client.take_output())
        else:
            self.entered.set()
        for event in events:
            self._take(event)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.failure = ApplianceUnreachable(f"the NBD connection broke: {exc}")
        self.closed.set()
        self.entered.set()


class DiskConnection:
    """One NBD connection, many requests in flight."""

    def __init__(self, export: Export) -> None:
        self._client = NbdClient(export.export)
        self._protocol = _Protocol(self._client, self._dispatch)
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[ReadDone | StatusDone]] = {}
        self._cookies = itertools.count(1)

    @property
    def ready(self) -> Ready:
        """What the server said of the disk."""
        assert self._client.ready is not None
        return self._client.ready

    @classmethod
    async def open(cls, export: Export, timeout: float = 10.0) -> DiskConnection:
        """Enter the export. Raises ApplianceUnreachable, NotFound or ProtocolViolation."""
        made = cls(export)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                transport, _ = await loop.create_unix_connection(lambda: made._protocol, export.socket)
                made._transport = transport
                await made._protocol.entered.wait()
        except (OSError, TimeoutError) as exc:
            await made.close()
            raise ApplianceUnreachable(f"{export.socket}: {exc or 'no answer in time'}") from exc
        if made._client.ready is None:
            raise made._protocol.failure
        return made

    async def run(self) -> None:
        """Until the connection ends; then all that wait fail."""
        try:
            await self._protocol.closed.wait()
        finally:
            self._fail()

    def _fail(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._protocol.failure)
        self._waiting.clear()

    def _dispatch(self, event: object) -> None:
        if isinstance(event, ReadDone | StatusDone):
            future = self._waiting.pop(event.cookie, None)
            if future is not None and not future.done():
                future.set_result(event)
        elif isinstance(event, Failed):
            future = self._waiting.pop(event.cookie, None)
            if future is not None and not future.done():
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
        if self._protocol.closed.is_set() or self._transport is None:
            raise self._protocol.failure
        future: asyncio.Future[ReadDone | StatusDone] = asyncio.get_running_loop().create_future()
        self._waiting[cookie] = future
        try:
            self._transport.write(request)
        except (OSError, RuntimeError) as exc:
            raise ApplianceUnreachable(f"the NBD connection broke: {exc}") from exc
        return await future

    async def close(self) -> None:
        if self._transport is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._transport.write(self._client.disconnect())
                self._transport.close()


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
        async with TaskGroup() as tasks:
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
