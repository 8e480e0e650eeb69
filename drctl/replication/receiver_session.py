"""One source's connection at the receiver: HELLO, then frames in, durable, acknowledged.

While one batch is made durable the next gathers: a slow fsync makes batches larger, not acknowledgements wrong.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time

from drctl.errors import DrctlError, NotFound, OutOfSpace, ProtocolViolation, Refused, UnsupportedFormat
from drctl.model.extent import MiB
from drctl.replication.group_writer import SHARED_FSYNC, GroupWriter, StreamToken
from drctl.replication.link import Connection
from drctl.replication.tasks import TaskGroup
from drctl.wire import link as wire
from drctl.wire.signature import Compare, Digests

HELLO_TIMEOUT = 10.0
#: What a group and a host may be called: they become parts of file names here.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: Far above the number of failovers that a group sees, and it fits every format.
MAX_GENERATION = 2**32
#: Frames that wait for the store; beyond it the socket is not read, and TCP slows the source down.
WAITING_LIMIT = 16 * MiB
#: Questions of a comparison that wait for their answer; beyond it the socket is not read.
MAX_QUESTIONS = 256

log = logging.getLogger(__name__)


class ReceiverSession:
    """The receiver's end of one connection."""

    def __init__(self, connection: Connection, hello: wire.Hello, writer: GroupWriter) -> None:
        self._connection = connection
        self._writer = writer
        self.hello = hello
        self.token = StreamToken(hello.host, hello.generation, hello.epoch)
        self._waiting: list[bytes | memoryview] = []
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._questions: asyncio.Queue[Compare | Digests | None] = asyncio.Queue(MAX_QUESTIONS)
        self._ended = False
        self.since_wall_ns = time.time_ns()
        #: When the source last said anything, pings among it.
        self.heard_wall_ns = self.since_wall_ns
        self.sequence = 0
        self.mark = 0
        self.sync: wire.SyncPlace | None = None
        self.received_bytes = 0
        self.acknowledgements = 0

    async def run(self) -> None:
        """Serve until the source leaves or something must end it. Raises DrctlError after having told the source."""
        try:
            welcome = await self._writer.begin(self.token)
            self.sequence, self.mark, self.sync = welcome.position.sequence, welcome.proven_mark, welcome.sync
            await self._connection.send(welcome)
            await self._both()
        except DrctlError as exc:
            await refuse(self._connection, exc)
            raise

    async def _both(self) -> None:
        try:
            async with TaskGroup() as tasks:
                tasks.create_task(self._hear())
                tasks.create_task(self._store())
                tasks.create_task(self._compare())
        except BaseExceptionGroup as failures:
            ours, others = failures.split(DrctlError)
            if ours is not None:
                raise ours.exceptions[0] from failures
            if others is not None:
                raise

    async def _hear(self) -> None:
        while messages := await self._connection.receive():
            self.heard_wall_ns = time.time_ns()
            for message in messages:
                await self._take(message)
        self._ended = True
        self._arrived.set()
        await self._questions.put(None)

    async def _take(self, message: wire.Message) -> None:
        if isinstance(message, wire.Frames):
            self._waiting.append(message.data)
            self._waiting_bytes += len(message.data)
            self.received_bytes += len(message.data)
            self._arrived.set()
            while self._waiting_bytes > WAITING_LIMIT:
                self._taken.clear()
                await self._taken.wait()
        elif isinstance(message, wire.Ping):
            await self._connection.send(wire.Pong(message.id, time.time_ns(), time.monotonic_ns()))
        elif isinstance(message, Compare | Digests):
            await self._questions.put(message)

    async def _compare(self) -> None:
        """Answer questions in their order, beside what the store does."""
        while (asked := await self._questions.get()) is not None:
            await self._connection.send(await self._writer.compared(self.token, asked))

    async def _store(self) -> None:
        owed = False
        while True:
            if not await self._more(SHARED_FSYNC if owed else None):
                owed = await self._make_durable([])
            while self._waiting:
                batch, self._waiting = self._waiting, []
                self._waiting_bytes = 0
                self._taken.set()
                owed = await self._make_durable(batch)
            if self._ended:
                return

    async def _more(self, timeout: float | None) -> bool:
        """Wait until something arrived; False when nothing did in time."""
        try:
            async with asyncio.timeout(timeout):
                await self._arrived.wait()
        except TimeoutError:
            return False
        self._arrived.clear()
        return True

    async def _make_durable(self, batch: list[bytes | memoryview]) -> bool:
        """True when the store owes the acknowledgement still."""
        ack = await self._writer.write(self.token, batch)
        if ack is None:
            return True
        self.sequence, self.mark, self.sync = ack.sequence, ack.mark, ack.sync
        self.acknowledgements += 1
        await self._connection.send(ack)
        return False


async def hear_hello(connection: Connection) -> wire.Hello:
    """The first message. Raises ProtocolViolation, UnsupportedFormat."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT):
            messages = await connection.receive()
    except TimeoutError as exc:
        raise ProtocolViolation(f"no HELLO within {HELLO_TIMEOUT:.0f} s") from exc
    if not messages:
        raise ProtocolViolation("the peer left without HELLO")
    hello = messages[0]
    if not isinstance(hello, wire.Hello) or len(messages) > 1:
        raise ProtocolViolation("something else than one HELLO")
    if hello.version != wire.VERSION:
        raise UnsupportedFormat(f"link version {hello.version}, known: {wire.VERSION}", hint="upgrade the older side")
    if len(hello.epoch) != 32 or not set(hello.epoch) <= set("0123456789abcdef"):
        raise ProtocolViolation("the epoch in HELLO is none")
    if not NAME.fullmatch(hello.host) or not 0 <= hello.generation < MAX_GENERATION:
        raise ProtocolViolation("the host's name or the generation in HELLO is none")
    if not NAME.fullmatch(hello.group):
        raise NotFound("group", hello.group[:64], hint="no group is called like that")
    if hello.appliance != connection.appliance:
        raise Refused(f"HELLO of {hello.appliance} with the certificate of {connection.appliance}")
    if not connection.peer.may(hello.group):
        raise Refused(
            f"appliance {connection.appliance} may not replicate group {hello.group} to here",
            hint="see groups in peers.json",
        )
    return hello


async def refuse(connection: Connection, exc: DrctlError) -> None:
    """Tell the source why the connection ends, as far as it still listens."""
    reason = str(exc.fields.get("refusal") or exc.slug)
    if isinstance(exc, OutOfSpace):
        log.warning("out of space: %s", exc)
    try:
        async with asyncio.timeout(2):
            await connection.send(wire.Refused(reason, exc.message, exc.hint))
    except (DrctlError, TimeoutError):
        pass
