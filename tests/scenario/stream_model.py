"""A whole stream in memory: guest, tap's ring, source core, lossy link, receiver, all driven step by step.

The bytes are small: a disk is a list of blocks, a write puts a value into some of them. The receiver keeps a log of
frames and makes them durable when told; a checkpoint is the log up to a MARK whose PROOF is durable. The oracle is the
guest's own history.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from drctl.errors import WrongPhase
from drctl.model.extent import Extent
from drctl.replication.marks import RingView
from drctl.replication.progress import (
    Pending,
    Progress,
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
from drctl.replication.sync_progress import Read, Sync, SyncState
from drctl.wire.link import Ack, Position, SyncPlace, Welcome

BLOCKS = 8
EPOCH = "e" * 32


def _pending(step: Step | None) -> Pending | None:
    """What the core should have said of a step before it made it."""
    match step:
        case None:
            return None
        case SendRecords():
            return Pending.LIVE
        case SendSyncData():
            return Pending.SYNC
    return Pending.URGENT


@dataclass
class Record:
    """One write of the guest: block → value. `parts`: over how many frames it is split."""

    blocks: dict[int, int]
    parts: int = 1


@dataclass
class Ring:
    """The tap's ring. Holds `capacity` records that are not released; what does not fit is dropped into a map."""

    capacity: int = 1000
    records: list[Record] = field(default_factory=list)
    released: int = 0
    stamp: int = 1
    ordered_stamp: int = 1
    ordered_sequence: int = 0
    connection: int = 1
    dropping: bool = False
    dropped: int = 0
    maps: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))
    active: int = 0

    @property
    def published(self) -> int:
        return len(self.records)

    def view(self) -> RingView:
        return RingView(
            self.stamp,
            self.ordered_stamp,
            self.ordered_sequence,
            (self.connection,),
            self.dropping,
            self.dropped,
            0,
            0,
            self.published,
        )

    def poll(self) -> None:
        """The tap leaves dropping by itself when half of the ring is free."""
        if self.dropping and self.published - self.released <= self.capacity // 2:
            self.dropping = False

    def write(self, record: Record) -> int:
        """Its sequence, 0 when it was dropped."""
        self.poll()
        used = self.published - self.released
        if self.dropping or used >= self.capacity:
            if not self.dropping:
                self.stamp += 1
                self.dropping = True
            self.maps[self.active].update(record.blocks)
            self.dropped += 1
            return 0
        self.records.append(record)
        return self.published


@dataclass
class Frame:
    """What travels. `position`: the stream's position after it."""

    kind: str
    position: int
    values: dict[int, int] = field(default_factory=dict)
    partial: bool = False
    number: int = 0
    sync: str = ""
    place: SyncPlace | None = None
    mode: str = ""


@dataclass
class Receiver:
    """The other side: a log, of which the first `durable` frames survive a crash."""

    log: list[Frame] = field(default_factory=list)
    durable: int = 0
    definition: int = 0

    def crash(self) -> None:
        del self.log[self.durable :]

    def sync(self) -> Ack:
        self.durable = len(self.log)
        return Ack(EPOCH, self.position, self.proven, self.sync_place)

    @property
    def position(self) -> int:
        for frame in reversed(self.log[: self.durable]):
            if frame.kind == "data":
                return frame.position - (1 if frame.partial else 0)
        return 0

    def _durable(self, kind: str) -> list[Frame]:
        return [frame for frame in self.log[: self.durable] if frame.kind == kind]

    @property
    def last_mark(self) -> int:
        return max((frame.number for frame in self._durable("mark")), default=0)

    @property
    def proven(self) -> int:
        return max((frame.number for frame in self._durable("proof")), default=0)

    @property
    def sync_place(self) -> SyncPlace | None:
        place = None
        for frame in self.log[: self.durable]:
            if frame.kind == "begin":
                place = SyncPlace(frame.sync, 0, 0)
            elif frame.kind == "progress":
                place = frame.place
            elif frame.kind == "end":
                place = SyncPlace(frame.sync, 0, 0, done=True)
        return place

    def welcome(self) -> Welcome:
        place = self.sync_place
        seen = self.last_mark > 0
        ended = bool(self._durable("end"))
        if not ended and not seen:
            needs = "initial"
        elif place is not None and not place.done:
            needs = "full"
        else:
            needs = "nothing" if seen else "full"
        return Welcome(
            position=Position(EPOCH, self.position),
            last_mark=self.last_mark,
            proven_mark=self.proven,
            last_number=self.last_mark,
            sync=place,
            definition_version=self.definition,
            needs=needs,
        )

    def checkpoints(self) -> dict[int, tuple[int, list[int]]]:
        """number → (sequence, disk) of the restorable ones: a durable MARK with a durable PROOF after it."""
        disk = [0] * BLOCKS
        marks: dict[int, tuple[int, list[int]]] = {}
        found: dict[int, tuple[int, list[int]]] = {}
        for frame in self.log[: self.durable]:
            for block, value in frame.values.items():
                disk[block] = value
            if frame.kind == "mark":
                marks[frame.number] = (frame.position, list(disk))
            elif frame.kind == "proof" and frame.number in marks:
                found[frame.number] = marks[frame.number]
        return found


class Stream:
    """The pair. Actions return a line that says what happened, for the scenario scripts."""

    def __init__(self, capacity: int = 1000) -> None:
        self.disk = [0] * BLOCKS
        self.ring = Ring(capacity)
        self.core = Progress(EPOCH, 0, 1)
        self.receiver = Receiver()
        #: Frames on the way, and acknowledgements on the way back.
        self.wire: list[Frame] = []
        self.back: list[Ack] = []
        #: (sequence, disk afterwards) of every write, in the order of acknowledgement.
        self.history: list[tuple[int, list[int]]] = [(0, list(self.disk))]
        #: Reads in flight, each with what the disk held when it was issued.
        self.reading: list[tuple[Read, int]] = []
        self.clock = 0
        self.syncs = 0
        #: The supervisor's name of the pass that is wanted: it lives on when a shipper dies.
        self.passing = ""
        self.todo: list[int] = []
        self.draining: int | None = None

    # the guest

    def write(self, blocks: dict[int, int], parts: int = 1) -> str:
        for block, value in blocks.items():
            self.disk[block] = value
        sequence = self.ring.write(Record(blocks, parts))
        self.history.append((sequence or self.ring.published, list(self.disk)))
        return f"#{sequence}" if sequence else "dropped"

    def lose_order(self) -> str:
        self.ring.stamp += 1
        return f"stamp {self.ring.stamp}"

    def reconnect_disk(self) -> str:
        self.ring.connection += 1
        self.ring.stamp += 1
        return f"connection {self.ring.connection}, stamp {self.ring.stamp}"

    def prove_order(self) -> str:
        self.ring.ordered_sequence = self.ring.published
        self.ring.ordered_stamp = self.ring.stamp
        return f"ordered from #{self.ring.published} under stamp {self.ring.stamp}"

    # the link

    def connect_kept(self) -> str:
        """A new connection, before which the receiver makes durable what it had of the old one."""
        self.receiver.sync()
        return self.connect()

    def connect(self) -> str:
        """A new connection; what the receiver had not made durable of the old one is gone."""
        self.disconnect()
        self.receiver.crash()
        self.core.look(self.ring.view())
        welcome = self.receiver.welcome()
        self.core.welcomed(welcome)
        self.ring.released = max(self.ring.released, self.core.released)
        self._restart_reads()
        return f"at #{welcome.position.sequence}, needs {self.core.wants}"

    def disconnect(self) -> str:
        lost = len(self.wire)
        self.core.disconnected()
        self.wire.clear()
        self.back.clear()
        return f"lost {lost} frames"

    def crash_receiver(self) -> str:
        self.receiver.crash()
        return self.disconnect()

    def crash_shipper(self) -> str:
        self.disconnect()
        self.core = Progress(EPOCH, self.ring.released, 1)
        self.core.look(self.ring.view())
        self.reading.clear()
        self.todo.clear()
        self.draining = None
        return "new shipper"

    def limit(self) -> str:
        """The link's limit begins, or ends: records go first while there is one."""
        self.core.records_first = not self.core.records_first
        return "limited" if self.core.records_first else "unlimited"

    def send(self) -> str:
        """One step of the core onto the wire."""
        self.core.look(self.ring.view())
        pending = self.core.pending()
        step = self.core.next_step()
        assert pending is _pending(step), (pending, step)
        frames = [] if step is None else self._frames(step)
        self.wire += frames
        return " ".join(_told(frame) for frame in frames) or "nothing"

    def _frames(self, step) -> list[Frame]:
        match step:
            case SendRecords(after, upto):
                assert self.ring.released <= after < upto <= self.ring.published
                self.core.shipped(after + 1)
                return self._record(after + 1)
            case SendDefinition(version):
                return [Frame("definition", self.core.cursor, number=version)]
            case SendMark(mark, position):
                assert position == mark.sequence
                return [Frame("mark", position, number=mark.number)]
            case SendProof(mark, position):
                return [Frame("proof", position, number=mark.number)]
            case SendSyncBegin(sync, position):
                return [Frame("begin", position, sync=sync.id, mode=sync.mode)]
            case SendSyncData(read, position):
                assert position <= read.floor
                values = dict(zip(range(read.extent.offset, read.extent.end), read.data, strict=True))
                return [Frame("blocks", position, values)]
            case SendSyncProgress(place, position):
                return [Frame("progress", position, place=place, sync=place.id)]
            case SendSyncEnd(sync, position):
                return [Frame("end", position, sync=sync.id)]
        raise AssertionError(step)

    def _record(self, sequence: int) -> list[Frame]:
        record = self.ring.records[sequence - 1]
        blocks = list(record.blocks.items())
        parts = min(record.parts, len(blocks))
        share = -(-len(blocks) // parts)
        pieces = [dict(blocks[at : at + share]) for at in range(0, len(blocks), share)]
        return [Frame("data", sequence, piece, partial=piece is not pieces[-1]) for piece in pieces]

    def deliver(self, count: int = 1) -> str:
        """Frames reach the receiver's memory."""
        arrived, self.wire = self.wire[:count], self.wire[count:]
        for frame in arrived:
            self.receiver.log.append(frame)
            if frame.kind == "definition":
                self.receiver.definition = frame.number
        return f"{len(arrived)} delivered"

    def fsync(self) -> str:
        """The receiver makes durable what it has, and says so."""
        ack = self.receiver.sync()
        self.back.append(ack)
        return f"durable #{ack.sequence}, mark {ack.mark}"

    def hear(self) -> str:
        """The oldest acknowledgement reaches the source."""
        if not self.back or not self.core.connected:
            return "nothing"
        ack = self.back.pop(0)
        self.core.acknowledged(ack)
        self.ring.released = max(self.ring.released, self.core.released)
        self._finish_drain()
        return f"released #{self.ring.released}, mark {ack.mark}"

    # marks

    def mark(self) -> str:
        self.clock += 1
        try:
            mark = self.core.plan_mark(self.ring.view(), self.clock, self.clock)
        except WrongPhase as exc:
            return exc.message.partition(": ")[2]
        assert mark is not None
        return f"mark {mark.number} at #{mark.sequence}"

    def attest(self, reason: str = "") -> str:
        mark = self.core.marks.to_attest()
        if mark is None:
            return "nothing to attest"
        self.core.attested(mark.number, reason, self.ring.view())
        return f"mark {mark.number} {'refused' if reason else 'yes' if mark.attested else mark.failure}"

    # syncs

    def start_sync(self) -> str:
        """The pass that is wanted, as the sync job runs it."""
        self.ring.poll()
        self.core.look(self.ring.view())
        if self.core.sync is not None and self.core.sync.active:
            return "one runs already"
        wants = self.core.wants.value
        if wants not in ("initial", "full"):
            self.passing = ""
        if wants == "dirty":
            return self._start_drain()
        if wants in ("initial", "full"):
            self._start(wants, list(range(BLOCKS)))
            return f"{wants} sync"
        return f"wants {wants}"

    def _start_drain(self) -> str:
        inactive = self.ring.active ^ 1
        if not self.ring.maps[inactive]:
            self.draining = self.ring.dropped
            self.ring.active ^= 1
            inactive ^= 1
        if not self.ring.maps[inactive]:
            self._drained()
            return "nothing dropped"
        blocks = sorted(self.ring.maps[inactive])
        self._start("dirty", blocks)
        return f"dirty sync of {blocks}"

    def _start(self, mode: str, blocks: list[int]) -> None:
        self.syncs += 1
        identity = f"{self.syncs}-{self.clock}"
        if mode != "dirty":
            identity = self.passing = self.passing or identity
        self.core.start_sync(Sync(identity, mode, {0: BLOCKS}, len(blocks)))
        self.blocks = blocks
        self._restart_reads()

    def _restart_reads(self) -> None:
        sync = self.core.sync
        self.reading.clear()
        if sync is not None and sync.active:
            self.attempt = sync.attempt
            self.todo = [block for block in self.blocks if block >= sync.resume.offset]

    def read(self) -> str:
        """Issue the next read: the floor is noted now."""
        sync = self.core.sync
        if sync is None or sync.state is not SyncState.READING:
            return "no sync to read for"
        if not self.todo:
            sync.finished_reading()
            return "all issued"
        block = self.todo.pop(0)
        self.reading.append((sync.issue(0, Extent(block, 1), self.ring.published), self.disk[block]))
        return f"block {block}, floor #{self.ring.published}"

    def arrive(self, index: int = 0, *, early: bool = False) -> str:
        """The disk answers one of the reads: with what was on it when it was asked (`early`), or what is now."""
        sync = self.core.sync
        if sync is None or not self.reading:
            return "nothing is read"
        read, sampled = self.reading.pop(index % len(self.reading))
        block = read.extent.offset
        value = sampled if early else self.disk[block]
        sync.arrived(read, [value], zero=False)
        if block % 3 == 2:
            sync.progress_due = True
        return f"block {block} is {value}"

    def arrive_early(self, index: int = 0) -> str:
        return self.arrive(index, early=True)

    def flood(self, value: int) -> str:
        """More writes at once than a small ring takes."""
        return " ".join(self.write({at % BLOCKS: value + at, (at + 3) % BLOCKS: value + at}, 2) for at in range(7))

    def _finish_drain(self) -> None:
        sync = self.core.sync
        if sync is not None and sync.mode == "dirty" and not sync.active and self.ring.maps[self.ring.active ^ 1]:
            self.ring.maps[self.ring.active ^ 1].clear()
            self._drained()

    def _drained(self) -> None:
        if self.draining is not None:
            self.core.drained(self.draining)
            self.draining = None
        self.core.look(self.ring.view())

    # the oracle

    def check(self) -> int:
        """Every listed checkpoint is a state that the guest's disk had, and holds all that was acknowledged before the
        mark was cut. Returns how many there are."""
        core, ring = self.core, self.ring
        assert ring.released <= self.receiver.position or not self.receiver.durable
        assert ring.released <= core.cursor <= ring.published
        found = self.receiver.checkpoints()
        for number, (sequence, disk) in found.items():
            allowed = [state for at, state in self.history if at == sequence]
            assert disk in allowed, f"checkpoint {number} at #{sequence}: {disk} is none of {allowed}"
        return len(found)


def _told(frame: Frame) -> str:
    match frame.kind:
        case "data":
            return f"#{frame.position}{'~' if frame.partial else ''}"
        case "mark" | "proof" | "definition":
            return f"{frame.kind.upper()}({frame.number})"
        case "blocks":
            return "READ(" + ",".join(f"{block}={value}" for block, value in frame.values.items()) + ")"
        case _:
            return f"SYNC_{frame.kind.upper()}"
