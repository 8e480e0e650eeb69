"""A pass that compares: any interleaving of reads, guest writes, dropped blocks, unseen writes, broken links and dead
processes, over any content of the replica, ends with the guest's disk; and no checkpoint is a lie.

A disk is 8 cells. What is compared at once is 4 of them, a part is 2, a guest writes single cells: so a write is always
smaller than what is compared. What the receiver tells of a cell is how it is at any moment of the log since the pass
began: a fresh look, or an old one, or one of each."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.model.extent import Extent
from drctl.replication.progress import SendSyncData
from drctl.replication.sync_progress import Read, SyncState
from tests.scenario.stream_model import BLOCKS, Frame, Stream

WHOLE, PART = 4, 2


@dataclass
class Question:
    """A range that is being compared. `had`: what was read, `floor`: PUBLISHED before."""

    whole: Read
    floor: int
    had: list[int]


@dataclass
class ComparedStream(Stream):
    """The receiver has a replica of an older epoch; the supervisor knows when a disk was written unseen."""

    content: list[int] = field(default_factory=list)
    capacity: int = 1000

    def __post_init__(self) -> None:
        super().__init__(self.capacity)
        old = [Frame("begin", 0, sync="old"), Frame("blocks", 0, dict(enumerate(self.content)))]
        self.receiver.log += [*old, Frame("end", 0, sync="old")]
        self.receiver.sync()
        self.questions: list[Question] = []
        self.fetching: list[tuple[Read, list[Extent], list[int]]] = []
        #: The replica when the pass began, as the receiver looked at it then.
        self.look_back: list[int] | None = None
        self.unseen_since = False

    def replica(self) -> list[int]:
        disk = [0] * BLOCKS
        for frame in self.receiver.log:
            for block, value in frame.values.items():
                disk[block] = value
        return disk

    def _frames(self, step) -> list[Frame]:
        if isinstance(step, SendSyncData) and step.read.whole is not None:
            assert step.position <= step.read.floor
            values = {at + n: value for at, data in step.read.pieces for n, value in enumerate(data)}
            return [Frame("blocks", step.position, values)]
        return super()._frames(step)

    # unseen writes

    def unseen(self, blocks: dict[int, int]) -> None:
        """The mirror is gone, the guest writes, the mirror is back: a pass over the disk is needed."""
        self.disk = [blocks.get(block, value) for block, value in enumerate(self.disk)]
        self.reconnect_disk()
        self.history.append((self.ring.published, list(self.disk)))
        self.unseen_since = True
        self.passing = ""
        self.core.look(self.ring.view())
        self.core.cancel_sync()
        self._restart_reads()

    def prove_order(self) -> str:
        return "" if self.unseen_since else super().prove_order()

    # the pass

    def start_sync(self) -> str:
        active = self.core.sync is not None and self.core.sync.active
        if self.unseen_since and not active and self.core.wants.value in ("nothing", "dirty"):
            self._start("full", list(range(BLOCKS)))
            return "full sync"
        return super().start_sync()

    def _start(self, mode: str, blocks: list[int]) -> None:
        self.ours = self.syncs + 1
        super()._start(mode, blocks)
        self.covers = self.ring.connection

    def _restart_reads(self) -> None:
        super()._restart_reads()
        self.look_back = None
        sync = self.core.sync
        if sync is not None and sync.active and sync.mode == "full":
            self.todo = [at for at in range(0, BLOCKS, WHOLE) if at + WHOLE > sync.resume.offset]

    def hear(self) -> str:
        told = super().hear()
        sync = self.core.sync
        if sync is not None and sync.mode == "full" and not sync.active and self.covers == self.ring.connection:
            self.unseen_since = False
        return told

    def read(self) -> str:
        sync = self.core.sync
        if sync is None or sync.mode != "full" or sync.state is not SyncState.READING:
            return super().read()
        if not sync.begun or not self.core.connected:
            return "not begun there"
        if not self.todo:
            sync.finished_reading()
            return "all issued"
        at = self.todo.pop(0)
        whole = sync.compare(0, Extent(at, WHOLE))
        self.questions.append(Question(whole, self.ring.published, self.disk[at : at + WHOLE]))
        return f"compare {at}"

    def answer(self, index: int, late: bool, looks: tuple[bool, bool]) -> None:
        """One question is answered. `late`: the disk was read after it was asked for; `looks`: at which moment the
        receiver looked for signatures and for parts: when the pass began, or now."""
        if not self.questions:
            return
        question = self.questions.pop(index % len(self.questions))
        sync, whole = self.core.sync, question.whole
        if sync is None or whole.attempt != sync.attempt or whole not in sync.reads or not self.core.connected:
            return
        if self.look_back is None:
            self.look_back = self.replica()
        at = whole.extent.offset
        had = self.disk[at : at + WHOLE] if late else question.had
        theirs = [(self.look_back if old else self.replica())[at : at + WHOLE] for old in looks]
        parts = []
        if had != theirs[0]:
            parts = [
                Extent(at + n, PART) for n in range(0, WHOLE, PART) if had[n : n + PART] != theirs[1][n : n + PART]
            ]
        if parts and self.core.cursor <= question.floor:
            part = sync.part(whole, question.floor)
            sync.part_arrived(part, _pieces(parts, at, had))
        elif parts:
            part = sync.part(whole, self.ring.published)
            self.fetching.append((part, parts, self.disk[at : at + WHOLE]))
        sync.compared(whole)
        sync.progress_due = sync.reached.id == sync.id

    def fetched(self, index: int, late: bool) -> None:
        """A part that was read again is there: as it was when it was asked for, or as it is now."""
        if not self.fetching:
            return
        part, parts, had = self.fetching.pop(index % len(self.fetching))
        sync = self.core.sync
        if sync is not None and part.attempt == sync.attempt and part in sync.held:
            at = part.extent.offset
            sync.part_arrived(part, _pieces(parts, at, self.disk[at : at + WHOLE] if late else had))

    def settle(self) -> None:
        """Everything reaches the other side."""
        for _ in range(300):
            if self.send() != "nothing":
                continue
            moved = bool(self.wire or self.questions or self.fetching)
            self.deliver(1000)
            self.fsync()
            self.hear()
            if self.core.sync is not None and self.core.sync.active:
                self.read()
                while self.reading:
                    self.arrive()
                moved = True
            while self.questions:
                self.answer(0, False, (False, False))
            while self.fetching:
                self.fetched(0, False)
            if self.core.marks.to_attest():
                self.attest()
                moved = True
            if not moved:
                return


def _pieces(parts: list[Extent], at: int, had: list[int]) -> list[tuple[int, list[int]]]:
    return [(part.offset, had[part.offset - at : part.end - at]) for part in parts]


#: Few values: a block that is written back to what it was is what a comparison may get wrong.
VALUES = st.integers(0, 2)
CELLS = st.dictionaries(st.integers(0, BLOCKS - 1), VALUES, min_size=1, max_size=3)
PLAIN = (
    "connect connect_kept disconnect crash_receiver prove_order prove_order send send send send fsync hear fsync hear"
)
PLAIN += " mark attest start_sync start_sync read read read settle"
ACTIONS = st.one_of(
    st.tuples(st.just("write"), CELLS, st.integers(1, 2)),
    st.tuples(st.just("write"), CELLS, st.integers(1, 2)),
    st.tuples(st.just("unseen"), CELLS),
    st.tuples(st.sampled_from(PLAIN.split())),
    st.tuples(st.just("deliver"), st.integers(1, 5)),
    st.tuples(st.just("answer"), st.integers(0, 3), st.booleans(), st.tuples(st.booleans(), st.booleans())),
    st.tuples(st.just("answer"), st.integers(0, 3), st.booleans(), st.tuples(st.booleans(), st.booleans())),
    st.tuples(st.just("fetched"), st.integers(0, 3), st.booleans()),
    st.tuples(st.sampled_from(["arrive", "arrive_early"]), st.integers(0, 3)),
)


def play(stream: ComparedStream, actions) -> None:
    for name, *arguments in actions:
        if name == "start_sync" and not stream.core.connected:
            continue
        getattr(stream, name)(*arguments)
        stream.check()


def come_back(stream: ComparedStream) -> None:
    """A quiet while; then there is a checkpoint, and it is the guest's disk."""
    stream.connect()
    for _ in range(6):
        stream.settle()
        stream.start_sync()
        stream.settle()
    stream.prove_order()
    told = stream.mark()
    stream.settle()
    stream.check()
    found = stream.receiver.checkpoints()
    assert found, told
    assert found[max(found)][1] == stream.disk


@settings(max_examples=200, deadline=None)
@given(
    st.lists(VALUES, min_size=BLOCKS, max_size=BLOCKS), st.lists(ACTIONS, max_size=60), st.sampled_from([3, 6, 1000])
)
def test_any_interleaving_ends_equal(content, actions, capacity):
    stream = ComparedStream(content=content, capacity=capacity)
    stream.connect()
    stream.start_sync()
    play(stream, actions)
    come_back(stream)


def test_only_what_differs_is_sent():
    stream = ComparedStream(content=[0, 0, 0, 0, 0, 5, 0, 0])
    stream.connect()
    stream.start_sync()
    stream.settle()
    sent = [frame.values for frame in stream.receiver.log[3:] if frame.kind == "blocks"]
    assert sent == [{4: 0, 5: 0}]
    come_back(stream)


def test_the_model_can_fail():
    """A look from before the pass is not good enough: what an earlier pass sent would stay."""
    stream = ComparedStream(content=[0] * BLOCKS)
    stream.connect()
    before = stream.replica()
    stream.unseen({0: 7})
    stream.start_sync()
    stream.settle()
    stream.unseen({0: 0})
    stream.start_sync()
    stream.send()
    stream.deliver(10)
    stream.fsync()
    stream.hear()
    stream.look_back = before
    dice = random.Random(1)
    while stream.todo:
        stream.read()
        stream.answer(dice.randrange(3), False, (True, True))
    stream.settle()
    assert stream.replica() != stream.disk
