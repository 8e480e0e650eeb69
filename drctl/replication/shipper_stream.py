"""One connection of a shipper: says HELLO, sends what the progress core wants, passes acknowledgements back.

Three steps side by side, in order: the core's steps are turned into frames by worker threads (compression), written
in the order of the steps, and acknowledged by the receiver. A few MiB are between them, never more.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from drctl.errors import ApplianceUnreachable, ProtocolViolation, Refused, WrongPhase
from drctl.model.extent import FRAME_PAYLOAD
from drctl.replication import framing
from drctl.replication.framing import Stamp
from drctl.replication.link import Connection
from drctl.replication.progress import (
    Pending,
    SendDefinition,
    SendMark,
    SendProof,
    SendRecords,
    SendSyncBegin,
    SendSyncData,
    SendSyncEnd,
    SendSyncProgress,
    Step,
)
from drctl.replication.shipper_state import ShipperState
from drctl.replication.tasks import TaskGroup
from drctl.store.ring_reader import Batch
from drctl.wire import link as wire
from drctl.wire.frame import FrameKind, Parts
from drctl.wire.signature import PartMasks, Signatures

#: Steps between ring and socket, of a MiB each at most (Throttle.step_bytes): 4 MiB in flight, however large the ring.
STEP_RECORDS = 1024
STEPS = 4
PING_EVERY = 2.0
#: A receiver that says nothing for so long (it answers pings) is as good as gone.
SILENCE_LIMIT = 20.0
#: When it has nearly caught up the sender pauses this long: what a guest writes meanwhile goes out together, and the
#: processors are the guest's. Of 2 ms the bursts of 4 KiB on two full cores were a tenth slower.
GATHER = 0.01
_GATHER_BELOW = 64

_Messages = asyncio.Future[list[bytes]]


class StreamSender:
    """The source's end of one connection. `run` ends by raising what ended the connection."""

    def __init__(self, state: ShipperState, connection: Connection, workers: ThreadPoolExecutor) -> None:
        self._state = state
        self._connection = connection
        self._workers = workers
        self._steps: asyncio.Queue[_Messages] = asyncio.Queue(STEPS)
        self._pings: dict[int, tuple[int, int]] = {}
        self._heard = time.monotonic()
        self._signature_key = b""
        self._received = 0
        #: Bytes of frames that were written, and of all else that is charged to the link's limit.
        self._frames_sent = 0
        self._else_charged = 0

    async def run(self, stands: Callable[[], None]) -> None:
        """`stands` is called after WELCOME. Raises Refused, ApplianceUnreachable, ProtocolViolation, WrongPhase,
        IntegrityError or CertificateRejected."""
        await self._greet()
        self._state.link.connections += 1
        stands()
        self._state.exchange.open(self._connection, self._signature_key)
        try:
            async with TaskGroup() as tasks:
                for part in (self._produce(), self._write(), self._hear(), self._ping()):
                    tasks.create_task(part)
        except BaseExceptionGroup as failures:
            raise _first(failures) from failures
        finally:
            self._state.exchange.close()
            self._state.progress.disconnected()
            self._drop_steps()

    def _drop_steps(self) -> None:
        while not self._steps.empty():
            step = self._steps.get_nowait()
            if not step.cancel() and not step.cancelled():
                step.exception()  # of a step behind the one that ended the connection, so nobody asks for it

    async def _greet(self) -> None:
        state, config = self._state, self._state.config
        sent_wall, sent = time.time_ns(), time.monotonic_ns()
        await self._connection.send(
            wire.Hello(
                group=config.group,
                host=config.host,
                generation=state.ring.generation,
                epoch=state.ring.epoch,
                appliance=config.appliance,
                software=config.software,
                wall_ns=sent_wall,
            )
        )
        try:
            async with asyncio.timeout(SILENCE_LIMIT):
                messages = await self._connection.receive()
        except TimeoutError as exc:
            raise ApplianceUnreachable("the receiver did not answer HELLO in time") from exc
        if not messages:
            raise ApplianceUnreachable(
                "the receiver closed the connection right after the handshake, as it does with a certificate that it "
                "rejects",
                hint="drctl doctor tells whom the receiver rejected, and why",
            )
        welcome = messages[0]
        if isinstance(welcome, wire.Refused):
            raise _refusal(welcome)
        if not isinstance(welcome, wire.Welcome):
            raise ProtocolViolation(f"{type(welcome).__name__} instead of WELCOME")
        state.clock.sample(sent_wall, time.monotonic_ns() - sent, welcome.wall_ns)
        state.progress.look(state.ring.look())
        state.progress.welcomed(welcome)
        self._signature_key = bytes.fromhex(welcome.signature_key)
        self._settled()
        for message in messages[1:]:
            self._take(message)

    # sending

    async def _produce(self) -> None:
        state = self._state
        while True:
            view = state.ring.look()
            state.progress.look(view)
            pending = self._pending()
            if pending in (Pending.LIVE, Pending.SYNC) and (wait := state.throttle.ask(live=pending is Pending.LIVE)):
                await self._rest(wait)
                continue
            step = state.progress.next_step()
            if step is None:
                # Not for the cursor: while a read holds it, records beyond it are no reason to look again.
                await state.ring.wait(view.published)
                continue
            messages = self._messages_of(step)
            if state.throttle.rate:
                # Its size is known when it is packed, and the next step's turn depends on it.
                size = sum(map(len, await messages))
                state.throttle.charge(size, live=pending is not Pending.SYNC)
            await self._steps.put(messages)
            if isinstance(step, SendRecords) and state.ring.published - state.progress.cursor < _GATHER_BELOW:
                await asyncio.sleep(GATHER)

    def _pending(self) -> Pending | None:
        """What comes next where the link is limited; None where it is not, or nothing waits."""
        state = self._state
        limited = bool(state.throttle.rate)
        state.progress.records_first = limited
        if not limited:
            return None
        # Questions of a comparison don't wait, but what follows them does.
        others = self._connection.sent_bytes - self._frames_sent
        if others > self._else_charged:
            state.throttle.charge(others - self._else_charged, live=False)
            self._else_charged = others
        pending = state.progress.pending()
        if pending is None:
            state.throttle.idle()
        return pending

    async def _rest(self, seconds: float) -> None:
        """Until the link may be used again, or something came that does not wait for it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._state.wake.wait()
        self._state.wake.clear()

    def _messages_of(self, step: Step) -> _Messages:
        if isinstance(step, SendRecords):
            return self._records(step)
        if isinstance(step, SendSyncData):
            return self._blocks(step)
        return _ready(self._control(step))

    def _records(self, step: SendRecords) -> _Messages:
        state = self._state
        if (chunk := state.overflow.chunk_after(step.after)) is not None:
            last = min(chunk.last, step.upto)
            state.progress.shipped(last)
            state.shipped_records += last - step.after
            state.shipped_bytes += chunk.length
            return self._in_worker(state.overflow.frames, chunk, step.after, last)
        batch = state.ring.batch(step.after, step.upto, state.throttle.step_bytes, STEP_RECORDS)
        assert batch is not None
        state.progress.shipped(batch.last)
        if state.watch is not None:
            state.watch.note(batch.descriptors)
        state.shipped_records += len(batch)
        state.shipped_bytes += len(batch.data)
        packed = self._in_worker(_verified, state.stamp, batch)
        state.overflow.lend(batch, packed)
        return packed

    def _blocks(self, step: SendSyncData) -> _Messages:
        read, stamp = step.read, self._state.stamp
        extent = read.extent
        self._state.moved.set()
        if read.zero:
            frames = framing.frames_of_zeroes(stamp, step.position, read.disk, extent.offset, extent.length)
            return _ready(framing.messages_of(frames))
        if read.whole is not None:
            sync = self._state.progress.sync
            parts = sync.more_parts(read, FRAME_PAYLOAD) if sync is not None else [read]
            pieces = [piece for part in parts for piece in part.pieces]
            return self._in_worker(framing.frames_of_pieces, stamp, step.position, read.disk, pieces)
        assert read.data is not None
        return self._in_worker(framing.frames_of_blocks, stamp, step.position, read.disk, extent.offset, read.data)

    def _in_worker(self, work: Callable[..., list[Parts]], *args: Any) -> _Messages:
        return asyncio.get_running_loop().run_in_executor(self._workers, _packed, work, *args)

    def _control(self, step: Step) -> list[bytes]:
        state = self._state
        position = state.progress.cursor
        kind, fields = self._control_fields(step)
        return framing.messages_of([framing.control_frame(state.stamp, kind, position, fields)])

    def _control_fields(self, step: Step) -> tuple[FrameKind, dict[str, Any]]:
        match step:
            case SendMark(mark):
                return FrameKind.MARK, {
                    "number": mark.number,
                    "kind": mark.kind,
                    "sequence": mark.sequence,
                    "wall_ns": mark.wall_ns,
                    "offset_ns": self._state.clock.offset_ns,
                    "monotonic_ns": mark.monotonic_ns,
                    "order_stamp": mark.order_stamp,
                    "streams": {self._state.config.host: mark.sequence},
                    "tags": list(mark.tags),
                    "interval_ms": round(self._state.config.interval * 1000),
                }
            case SendProof(mark):
                return FrameKind.PROOF, {"number": mark.number, "wall_ns": time.time_ns()}
            case SendDefinition():
                return FrameKind.DEFINITION, self._state.definition.fields
            case SendSyncBegin(sync):
                disks = {str(number): size for number, size in sync.disks.items()}
                return FrameKind.SYNC_BEGIN, {"sync": sync.id, "mode": sync.mode, "disks": disks}
            case SendSyncProgress(place):
                return FrameKind.SYNC_PROGRESS, {"sync": place.id, "disk": place.disk, "offset": place.offset}
            case SendSyncEnd(sync):
                return FrameKind.SYNC_END, {"sync": sync.id, "mode": sync.mode}
        raise AssertionError(step)

    async def _write(self) -> None:
        while True:
            for message in await (await self._steps.get()):
                self._frames_sent += len(message)
                await self._connection.send_frames(message)
                self._state.link.sent_bytes += len(message)

    # hearing

    async def _hear(self) -> None:
        while messages := await self._connection.receive():
            self._heard = time.monotonic()
            count = self._connection.received_bytes
            self._state.link.received_bytes += count - self._received
            self._received = count
            for message in messages:
                self._take(message)
        raise ApplianceUnreachable("the receiver closed the connection")

    def _take(self, message: wire.Message) -> None:
        state = self._state
        if isinstance(message, wire.Ack):
            state.link.refusal = None
            state.progress.acknowledged(message)
            state.journal = message.journal
            self._settled()
        elif isinstance(message, wire.Pong):
            if (sent := self._pings.pop(message.id, None)) is not None:
                state.clock.sample(sent[0], time.monotonic_ns() - sent[1], message.wall_ns)
        elif isinstance(message, Signatures | PartMasks):
            state.exchange.answered(message)
        elif isinstance(message, wire.Refused):
            raise _refusal(message)

    def _settled(self) -> None:
        self._state.overflow.settle()
        self._state.settle()
        self._state.wake.set()
        self._state.moved.set()

    async def _ping(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(PING_EVERY)
            if time.monotonic() - self._heard > SILENCE_LIMIT:
                raise ApplianceUnreachable(f"the receiver was silent for {SILENCE_LIMIT:.0f} s")
            number += 1
            self._pings[number] = (time.time_ns(), time.monotonic_ns())
            self._pings.pop(number - 16, None)
            wall, monotonic = self._pings[number]
            await self._connection.send(wire.Ping(number, wall, monotonic))


def _verified(stamp: Stamp, batch: Batch) -> list[Parts]:
    batch.verify()
    return framing.frames_of_batch(stamp, batch)


def _packed(work: Callable[..., list[Parts]], *args: Any) -> list[bytes]:
    return framing.messages_of(work(*args))


def _ready(messages: list[bytes]) -> _Messages:
    future: _Messages = asyncio.get_running_loop().create_future()
    future.set_result(messages)
    return future


def _refusal(message: wire.Refused) -> Refused:
    return Refused(message.message, hint=message.hint, refusal=message.error)


def _first(group: BaseExceptionGroup) -> BaseException:
    """What a person should read of several failures: the most telling, not the consequence."""
    for kind in (Refused, ProtocolViolation, WrongPhase):
        found, _ = group.split(kind)
        if found is not None:
            return _leaf(found)
    return _leaf(group)


def _leaf(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
