"""What the ring can't hold goes on to the spill, and into the stream from there: every record once, in order, whatever is
killed, cut or full meanwhile; and no point in time is lost by it."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import IntegrityError, OutOfSpace, WrongPhase
from drctl.model.extent import BLOCK
from drctl.model.identity import StreamIdentity
from drctl.replication import framing, overflow
from drctl.replication.framing import Stamp
from drctl.replication.marks import RingView
from drctl.replication.overflow import Overflow
from drctl.replication.progress import Needs, Progress, SendDefinition, SendMark, SendProof, SendRecords
from drctl.replication.ring_port import RingPort
from drctl.replication.shipper_config import ShipperConfig
from drctl.replication.sync_progress import Sync
from drctl.store import spill as spill_module
from drctl.store.ring import Ring
from drctl.store.ring_writer import RingWriter
from drctl.wire import frame
from drctl.wire.frame import EXTENT_ZERO, FrameKind
from drctl.wire.link import Ack, Position, SyncPlace, Welcome
from drctl.wire.ring import Word

EPOCH = "0123456789abcdef" * 2
BLOCKS = 16
RING = 32 * BLOCK
SPILL = 96 * BLOCK


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """A spill of small pieces, so that a few writes fill several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overflow, "CHUNK", 6 * BLOCK)
        patch.setattr(overflow, "OVERHEAD", BLOCK)
        patch.setattr(overflow, "AGAIN", 0.0)
        patch.setattr(spill_module, "SMALLEST_SEGMENT", 6 * BLOCK)
        patch.setattr(spill_module, "CHUNK", 4 * BLOCK)
        yield


@dataclass
class Receiver:
    """The other side: what it was sent, of which the first `durable` entries survive."""

    log: list[tuple[str, int, object]] = field(default_factory=list)
    durable: int = 0

    def take(self, frames: bytes) -> None:
        for header, whole in frame.split(memoryview(frames), "sent"):
            assert header.kind is FrameKind.DATA
            assert header.first_sequence == self.position + 1, "a record is missing, or comes again"
            self.log.append(("data", header.last_sequence - header.partial, bytes(whole)))

    @property
    def position(self) -> int:
        return next((at for kind, at, _ in reversed(self.log) if kind == "data"), 0)

    def numbers(self, kind: str) -> list[int]:
        return [int(what) for found, _, what in self.log[: self.durable] if found == kind]  # type: ignore[call-overload]

    def fsync(self) -> Ack:
        self.durable = len(self.log)
        return Ack(EPOCH, self.position, max(self.numbers("proof"), default=0), None)

    def welcome(self) -> Welcome:
        del self.log[self.durable :]
        marks, proofs = self.numbers("mark"), self.numbers("proof")
        return Welcome(
            position=Position(EPOCH, self.position),
            last_mark=max(marks, default=0),
            proven_mark=max(proofs, default=0),
            last_number=max(marks, default=0),
            needs="nothing",
        )

    def checkpoints(self) -> dict[int, bytes]:
        disk, marks, found = bytearray(BLOCKS * BLOCK), {}, {}
        for kind, _, what in self.log[: self.durable]:
            if kind == "data":
                _apply(disk, what)
            elif kind == "mark":
                assert what not in marks, f"mark {what} stands there twice"
                marks[what] = bytes(disk)
            elif what in marks:
                found[what] = marks[what]
        return found


def _apply(disk: bytearray, whole: object) -> None:
    [(header, data)] = frame.split(memoryview(whole), "log")  # type: ignore[arg-type]
    body = data[frame.HEADER_SIZE :]
    payload = frame.payload_of(header, body, "log")
    for extent in frame.extents_of(header, body):
        offset, length, at = (int(extent[name]) for name in ("offset", "length", "payload_offset"))
        zero = extent["kind"] == EXTENT_ZERO
        disk[offset * 512 : (offset + length) * 512] = bytes(length * 512) if zero else payload[at : at + length * 512]


class Rig:
    """Guest, ring, spill, core and receiver; all calls within one event loop."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "web.ring"
        self.ring = Ring.create(path, StreamIdentity("web", "host-a", 1, EPOCH), {1: BLOCKS * BLOCK}, RING, 256)
        self.writer = RingWriter(self.ring)
        self.writer.connected(1)
        self.ring.words[Word.ORDERED_STAMP] = self.ring.words[Word.ORDER_STAMP]
        self.disk = bytearray(BLOCKS * BLOCK)
        self.history = {0: bytes(self.disk)}
        self.receiver = Receiver()
        self.clock = 0
        self.full = False
        #: Packed later, as worker threads do, while the tap goes on.
        self.packing: list[tuple[object, asyncio.Future[None]]] = []
        #: Marks that became attested, in any life of the shipper.
        self.attested: set[int] = set()
        self.start()

    # the shipper

    def start(self) -> None:
        self.port = RingPort(self.directory / "web.ring", self.directory / "web.bell")
        config = ShipperConfig(
            *("web", "host-a", "", "", "", "", "", "", ""),
            spill=str(self.directory / "spill"),
            spill_key=str(self.directory / "key"),
            spill_size=SPILL,
        )
        self.overflow = Overflow(config, self.port)
        self.core = Progress(EPOCH, self.overflow.start, 1)
        self.overflow.attach(self.core)
        self.core.look(self.port.look())

    async def kill(self) -> None:
        self.cut()
        self.overflow._thread.shutdown()
        if self.overflow._spill is not None:
            self.overflow._spill.close()
        os.close(self.port._bell)
        self.start()

    def cut(self) -> None:
        self.core.disconnected()
        for _, taken in self.packing:
            taken.cancel()
        self.packing.clear()

    async def connect(self) -> None:
        self.cut()
        self.core.look(self.port.look())
        self.core.welcomed(self.receiver.welcome())
        self.overflow.settle()

    async def send(self) -> bool:
        self.core.look(self.port.look())
        step = self.core.next_step()
        match step:
            case None:
                return False
            case SendRecords(after, upto):
                await self._records(after, upto)
            case SendMark(mark, position):
                await self.pack()
                assert position == mark.sequence == self.receiver.position
                self.receiver.log.append(("mark", position, mark.number))
            case SendProof(mark, position):
                await self.pack()
                self.receiver.log.append(("proof", position, mark.number))
            case _:
                assert isinstance(step, SendDefinition)
        return True

    async def _records(self, after: int, upto: int) -> None:
        if (chunk := self.overflow.chunk_after(after)) is not None:
            last = min(chunk.last, upto)
            self.core.shipped(last)
            self.packing.append(((chunk, after, last), asyncio.get_running_loop().create_future()))
            return
        batch = self.port.batch(after, upto, 4 * BLOCK, 3)
        assert batch is not None
        self.core.shipped(batch.last)
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.overflow.lend(batch, taken)
        self.packing.append((batch, taken))

    async def pack(self) -> None:
        """What was sent reaches the other side's memory."""
        for what, taken in self.packing:
            if isinstance(what, tuple):
                frames = self.overflow.frames(*what)
            else:
                what.verify()
                frames = framing.frames_of_batch(Stamp(1, EPOCH), what)
            self.receiver.take(b"".join(part for parts in frames for part in parts))
            taken.set_result(None)
        self.packing.clear()
        await asyncio.sleep(0)

    async def ack(self) -> None:
        await self.pack()
        if self.core.connected:
            self.core.acknowledged(self.receiver.fsync())
            self.overflow.settle()

    async def spill(self) -> None:
        """The overflow's task looks once."""
        spill = self.overflow._spill
        assert spill is not None
        self.overflow.settle()
        try:
            await self.overflow._note(spill)
            while self.overflow._wanted(spill):
                await self.overflow._move(spill)
        except (OSError, OutOfSpace) as exc:
            assert self.full
            self.overflow._refused(exc)

    # the guest

    async def write(self, block: int, blocks: int, value: int) -> None:
        blocks = min(blocks, BLOCKS - block)
        if self.port.fill() > 0.7 or len(self.history) > 200:
            return  # what is dropped is another test's
        data = bytes([value]) * (blocks * BLOCK)
        place = slice(block * BLOCK, (block + blocks) * BLOCK)
        self.disk[place] = data
        sequence = (
            self.writer.append(1, block * BLOCK, data)
            if value
            else self.writer.append_zeroes(1, block * BLOCK, blocks * BLOCK)
        )
        self.writer.publish()
        self.history[sequence] = bytes(self.disk)

    async def burst(self, count: int, value: int) -> None:
        """Small writes, one record each."""
        for at in range(count):
            await self.write((value + at) % BLOCKS, 1, (value + at) % 256)

    async def mark(self) -> None:
        self.clock += 1
        with suppress(WrongPhase):
            self.core.plan_mark(self.port.look(), self.clock, self.clock)

    async def attest(self) -> None:
        mark = self.core.marks.to_attest()
        if mark is not None:
            self.core.attested(mark.number, "", self.port.look())
            self.attested |= {each.number for each in self.core.marks.pending if each.attested}

    async def fill_disk(self) -> None:
        self.full = not self.full

    # the oracle

    def check(self) -> dict[int, bytes]:
        words = self.ring.words
        assert words[Word.RELEASED] <= max(self.receiver.position, self.overflow._spill.upto)  # type: ignore[union-attr]
        found = self.receiver.checkpoints()
        places = {what: at for kind, at, what in self.receiver.log[: self.receiver.durable] if kind == "mark"}
        for number, disk in found.items():
            assert disk == self.history[places[number]], f"checkpoint {number} is none"
        return found

    async def settle(self) -> None:
        await self.connect()
        for _ in range(400):
            await self.spill()
            await self.attest()
            if not await self.send():
                await self.ack()
                if not await self.send():
                    return
        raise AssertionError("it does not come to rest")


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, BLOCKS - 1), st.integers(1, 5), st.integers(0, 255)),
        st.tuples(st.just("write"), st.integers(0, BLOCKS - 1), st.integers(1, 5), st.integers(0, 255)),
        st.tuples(st.just("burst"), st.integers(2, 14), st.integers(0, 255)),
        st.tuples(st.just("burst"), st.integers(2, 14), st.integers(0, 255)),
        st.tuples(
            st.sampled_from(
                ["connect", "cut", "kill", "send", "send", "pack", "ack", "spill", "spill", "spill", "mark", "attest"]
            )
        ),
        st.tuples(st.just("fill_disk")),
    ),
    min_size=30,
    max_size=120,
)


async def play(directory: Path, actions: list[tuple[object, ...]], *, eager: bool) -> None:
    """`eager`: notes are made at once, so a kill may not cost a single mark."""
    rig = Rig(directory)
    with pytest.MonkeyPatch.context() as patch:
        real = spill_module.write_at

        def write_at(file: int, buffers: list[bytes], offset: int) -> int:
            if rig.full:
                real(file, [buffers[0][:7]], offset)
                raise OSError(errno.ENOSPC, "no room")
            return real(file, buffers, offset)

        patch.setattr(spill_module, "write_at", write_at)
        await rig.connect()
        for name, *arguments in actions:
            done = getattr(rig, str(name))(*arguments)
            if done is not None:
                await done
            if eager and name != "fill_disk" and not rig.full:
                await rig.overflow._note(rig.overflow._spill)  # type: ignore[arg-type]
            rig.check()
        failed_to_note = rig.full
        rig.full = False
        await rig.settle()
        await rig.mark()
        await rig.settle()
        found = rig.check()
        assert found[max(found)] == bytes(rig.disk)
        assert rig.receiver.position == rig.port.published == rig.port.released
        assert not list((directory / "spill").glob("*")), "what is at the other side is removed"
        if eager and not failed_to_note and ("fill_disk",) not in actions:
            assert rig.attested <= set(found), "a mark was lost"
    rig.overflow._thread.shutdown()
    os.close(rig.port._bell)


@settings(max_examples=60, deadline=None)
@given(ACTIONS, st.booleans())
def test_every_record_comes_over_once_and_every_checkpoint_is_true(actions, eager):
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(play(Path(directory), actions, eager=eager))


def test_a_mark_is_noted_and_restored_with_what_was_said_of_it(tmp_path):
    async def lives() -> None:
        rig = Rig(tmp_path)
        await rig.connect()
        for value in range(1, 4):
            await rig.write(value, 1, value)
            await rig.mark()
        await rig.attest()
        rig.cut()
        await rig.spill()
        await rig.kill()
        assert [(mark.number, mark.attested) for mark in rig.core.marks.pending] == [(1, True), (2, True), (3, True)]
        assert rig.core.needs is Needs.NOTHING
        await rig.write(5, 1, 5)
        await rig.mark()
        assert rig.core.marks.last_number == 4, "marks go on though nobody was reached yet"
        await rig.settle()
        assert set(rig.check()) == {1, 2, 3, 4}

    asyncio.run(lives())


def test_marks_that_became_void_are_not_restored(tmp_path):
    """The receiver has lost something: a successor must not take what was planned before for points in time."""

    async def lives() -> None:
        rig = Rig(tmp_path)
        await rig.connect()
        await rig.write(1, 1, 1)
        await rig.mark()
        await rig.attest()
        rig.cut()
        await rig.spill()
        rig.core.needs = Needs.FULL
        await rig.spill()
        await rig.kill()
        assert not rig.core.marks.pending
        assert rig.core.needs is Needs.UNKNOWN

    asyncio.run(lives())


async def _spilled(directory: Path) -> Rig:
    """The link is cut, and the ring has run over into the spill."""
    rig = Rig(directory)
    await rig.connect()
    await rig.settle()
    rig.cut()
    for value in range(1, 60):
        await rig.write(value % BLOCKS, 1, value)
        await rig.spill()
    assert rig.overflow.told()["state"] == "holding"
    return rig


def test_the_spill_is_bounded_and_says_so(tmp_path):
    async def lives() -> None:
        rig = await _spilled(tmp_path)
        for _ in range(200):
            rig.writer.append(1, 0, os.urandom(BLOCK))
            rig.writer.publish()
            await rig.spill()
        told = rig.overflow.told()
        assert told["state"] == "full"
        assert told["used"] <= told["size"] == SPILL
        assert rig.ring.words[Word.DROPPING], "then the tap's dirty map takes what comes"

    asyncio.run(lives())


def test_what_was_damaged_in_the_spill_is_a_lack_that_the_receiver_shows(tmp_path):
    async def lives() -> None:
        rig = await _spilled(tmp_path)
        await rig.mark()
        await rig.attest()
        for path in (tmp_path / "spill").glob("*"):
            data = bytearray(path.read_bytes())
            data[200] ^= 1
            path.write_bytes(data)
        with pytest.raises(IntegrityError):
            await rig.settle()
        rig.cut()
        assert rig.overflow.lost() > 0
        rig.core.look(rig.port.look())
        rig.core.welcomed(rig.receiver.welcome())
        assert rig.core.wants is Needs.FULL
        assert not rig.core.marks.pending

    asyncio.run(lives())


def test_a_boot_ends_the_spill_with_its_ring(tmp_path):
    async def lives() -> None:
        rig = await _spilled(tmp_path)
        (tmp_path / "key").unlink()
        await rig.kill()
        assert rig.overflow.told()["used"] == 0
        assert rig.overflow.start == rig.port.released

    asyncio.run(lives())


def test_what_is_on_disk_is_not_what_the_guest_wrote(tmp_path):
    async def lives() -> None:
        rig = Rig(tmp_path)
        secret = b"a patient's name"
        for _ in range(28):
            rig.writer.append(1, 0, os.urandom(BLOCK - 16) + secret)
            rig.writer.publish()
            await rig.spill()
        found = b"".join(path.read_bytes() for path in (tmp_path / "spill").glob("*"))
        assert len(found) > 4 * BLOCK
        assert secret not in found
        assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600

    asyncio.run(lives())


def test_a_pass_of_before_a_loss_does_not_make_it_good():
    """Each acknowledgement tells of the newest pass again: one that ended before records were lost heals nothing, and one
    that was under way begins anew, under a name that the receiver has not heard yet."""
    core = Progress(EPOCH, 0, 1)
    view = RingView(1, 1, 0, (1,), False, 0, 0, 0, 9)
    core.look(view)
    done = SyncPlace("first", 1, 0, done=True)
    core.welcomed(Welcome(Position(EPOCH, 0), needs="initial"))
    core.start_sync(Sync("first", "initial", {1: 1 << 20}, 1 << 20))
    core.acknowledged(Ack(EPOCH, 0, 0, done))
    assert core.needs is Needs.NOTHING
    core.disconnected()
    core.lose(5)
    core.welcomed(Welcome(Position(EPOCH, 0), last_mark=1, needs="nothing", sync=done))
    core.acknowledged(Ack(EPOCH, 0, 0, done))
    assert core.needs is Needs.FULL

    sync = core.start_sync(Sync("first", "full", {1: 1 << 20}, 1 << 20))
    assert sync.active
    core.acknowledged(Ack(EPOCH, 0, 0, SyncPlace(sync.id, 1, 65536)))
    core.disconnected()
    core.lose(8)
    core.welcomed(Welcome(Position(EPOCH, 6), last_mark=1, needs="full", sync=SyncPlace(sync.id, 1, 65536)))
    assert sync.resume.offset == 0
    assert not sync.begun
    core.acknowledged(Ack(EPOCH, 6, 0, SyncPlace("first.again", 1, 0, done=True)))
    assert core.needs is Needs.FULL
    core.acknowledged(Ack(EPOCH, 6, 0, SyncPlace(sync.id, 1, 0, done=True)))
    assert core.needs is Needs.NOTHING


def test_what_is_being_packed_stays_in_the_ring_though_the_spill_has_it(tmp_path):
    """A worker thread reads it there: the tap must not write over it."""

    async def lives() -> None:
        rig = Rig(tmp_path)
        await rig.connect()
        await rig.send()  # the definition
        await rig.burst(12, 1)
        assert await rig.send()
        batch = rig.packing[0][0]
        before = rig.ring.words[Word.RELEASED]
        await rig.burst(14, 40)
        await rig.spill()
        assert rig.overflow.told()["state"] == "holding"
        assert rig.ring.words[Word.RELEASED] == before
        await rig.burst(8, 90)
        batch.verify()  # type: ignore[attr-defined]
        await rig.pack()
        await rig.spill()
        assert rig.ring.words[Word.RELEASED] > before
        await rig.settle()
        rig.check()

    asyncio.run(lives())


def test_the_stream_goes_on_in_the_middle_of_a_chunk(tmp_path):
    """The receiver's place, or a mark, need not be where a chunk of the spill ends."""

    async def lives() -> None:
        rig = Rig(tmp_path)
        await rig.connect()
        await rig.send()
        await rig.burst(2, 1)
        while await rig.send():
            await rig.pack()
        rig.receiver.fsync()  # durable, and the acknowledgement is lost
        await rig.burst(22, 5)
        await rig.mark()
        await rig.attest()
        await rig.burst(2, 50)
        rig.cut()
        await rig.spill()
        chunk = rig.overflow.chunk_after(0)
        assert chunk is not None
        assert chunk.first == 1 < 3 <= chunk.last
        await rig.settle()
        assert set(rig.check()) == {1}
        assert rig.receiver.position == rig.port.published

    asyncio.run(lives())
