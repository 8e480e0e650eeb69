"""Machines that leave, crash, come back, are written unseen: whatever happens to them and to the stream meanwhile, no
checkpoint is a lie, and passes are about the machines that need one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.replication.sync_progress import SyncState
from tests.scenario.stream_model import BLOCKS, Stream
from tests.scenario.test_stream import settle

#: The blocks of each machine's disk.
MACHINES = {"web": range(4), "db": range(4, BLOCKS)}


class Supervised(Stream):
    """A stream with the supervisor's memory of its machines: which run, which left in order, which need a pass."""

    def __init__(self, capacity: int = 1000) -> None:
        super().__init__(capacity)
        self.running = set(MACHINES)
        #: Machines that are off and left in order, and whose images were not written since.
        self.left: set[str] = set()
        self.needed: set[str] = set(MACHINES)
        self.passed: set[str] = set()
        self.blocks: list[int] = []
        self.read_blocks = 0
        self.losses = self.proven = 0

    # the machines

    def guest(self, name: str, block: int, value: int) -> str:
        """A write of a machine; only a running one writes."""
        if name not in self.running:
            return "off"
        return self.write({MACHINES[name][block % 4]: value})

    def unseen(self, name: str, block: int, value: int) -> None:
        self.disk[MACHINES[name][block % 4]] = value
        self.history.append((self.ring.published, list(self.disk)))

    def lose_order(self) -> str:
        self.losses += 1
        return super().lose_order()

    def reconnect_disk(self) -> str:
        self.losses += 1
        return super().reconnect_disk()

    def prove_order(self) -> str:
        self.proven = self.losses
        return super().prove_order()

    def power_off(self, name: str) -> None:
        """In order: nothing is lost but the connection."""
        if name in self.running:
            in_order = self.losses == self.proven and name not in self.needed and not self.ring.dropping
            self._gone(name)
            if in_order:
                self.left.add(name)
            else:
                self.miss(name)

    def crash(self, name: str, block: int, value: int) -> None:
        """A write that nobody was told of is on the disk and not in the ring."""
        if name in self.running:
            self._gone(name)
            self.unseen(name, block, value)
            self.miss(name)

    def _gone(self, name: str) -> None:
        self.running.discard(name)
        self.ring.connection += 1
        self.ring.stamp += 1

    def tamper(self, name: str, block: int, value: int) -> None:
        """Somebody writes to the image of a machine that is off."""
        if name not in self.running:
            self.unseen(name, block, value)
            self.left.discard(name)
            self.miss(name)

    def power_on(self, name: str, block: int, value: int, *, late: bool) -> None:
        """It is attached, after its first write when that is `late`."""
        if name in self.running:
            return
        if late:
            self.unseen(name, block, value)
        if late or name not in self.left:
            self.miss(name)
        self.left.discard(name)
        self.running.add(name)
        self.ring.connection += 1

    def miss(self, name: str) -> None:
        if self.core.sync is not None and self.core.sync.active:
            self.core.cancel_sync()
            self.reading.clear()
        self.needed.add(name)
        self.passing = ""

    # the supervisor

    def attest(self, reason: str = "") -> str:
        missing = [name for name in MACHINES if name in self.needed or name not in self.running | self.left]
        return super().attest(reason or (f"{missing[0]} needs a pass" if missing else ""))

    def start_sync(self) -> str:
        self.follow()
        self.ring.poll()
        self.core.look(self.ring.view())
        if not self.core.connected or (self.core.sync is not None and self.core.sync.active):
            return "not now"
        wants = self.core.wants.value
        if wants in ("initial", "full"):
            # What is known of the machines stays: the receiver does not know whether it has seen the epoch whole.
            self.passed = set(MACHINES)
        elif self.needed:
            wants, self.passed = "full", set(self.needed)
        elif wants == "dirty":
            return self._start_drain()
        else:
            self.passing = ""
            return "nothing"
        blocks = sorted(block for name in self.passed for block in MACHINES[name])
        if not self.passing:
            self.read_blocks += len(blocks)
        self._start(wants, blocks)
        self.follow()
        return f"{wants} {blocks}"

    def follow(self) -> None:
        """A pass that is whole at the other side makes good what its machines missed."""
        sync = self.core.sync
        if sync is not None and self.passing and sync.id == self.passing and sync.state is SyncState.DONE:
            self.needed -= self.passed

    def _restart_reads(self) -> None:
        super()._restart_reads()
        if self.core.sync is not None and not self.core.sync.active:
            self.todo = []


def live(capacity: int = 1000) -> Supervised:
    stream = Supervised(capacity)
    stream.prove_order()
    stream.connect()
    stream.start_sync()
    settle(stream)
    stream.follow()
    stream.mark()
    settle(stream)
    assert stream.check() == 1
    stream.read_blocks = 0
    return stream


def rest(stream: Supervised) -> None:
    """A quiet while: everything runs again and is at the other side."""
    for name in MACHINES:
        stream.power_on(name, 0, 0, late=False)
    stream.connect()
    for _ in range(8):
        settle(stream)
        stream.start_sync()
        settle(stream)
        stream.follow()
    stream.prove_order()
    stream.mark()
    settle(stream)
    stream.check()


def newest(stream: Supervised) -> list[int]:
    found = stream.receiver.checkpoints()
    return found[max(found)][1]


def test_a_power_cycle_in_order_reads_nothing() -> None:
    stream = live()
    stream.guest("db", 1, 5)
    stream.power_off("db")
    stream.prove_order()
    stream.mark()
    settle(stream)
    assert newest(stream) == stream.disk
    stream.power_on("db", 0, 0, late=False)
    stream.guest("db", 2, 6)
    rest(stream)
    assert stream.read_blocks == 0
    assert newest(stream) == stream.disk


@pytest.mark.parametrize("fault", ["crash", "late", "tamper", "loss"])
def test_a_fault_costs_its_machine_alone(fault: str) -> None:
    stream = live()
    if fault == "crash":
        stream.crash("db", 1, 5)
    else:
        if fault == "loss":
            stream.lose_order()
        stream.power_off("db")
        if fault == "tamper":
            stream.tamper("db", 3, 9)
    stream.guest("web", 0, 8)
    stream.power_on("db", 2, 7, late=fault == "late")
    rest(stream)
    assert stream.read_blocks == len(MACHINES["db"])
    assert newest(stream) == stream.disk


NAME = st.sampled_from(sorted(MACHINES))
BLOCK, VALUE = st.integers(0, 3), st.integers(1, 99)
ACTIONS = st.one_of(
    st.tuples(st.just("guest"), NAME, BLOCK, VALUE),
    st.tuples(st.just("guest"), NAME, BLOCK, VALUE),
    st.tuples(st.sampled_from(["power_off"]), NAME),
    st.tuples(st.sampled_from(["crash", "tamper"]), NAME, BLOCK, VALUE),
    st.tuples(st.sampled_from(["on", "on", "on_late"]), NAME, BLOCK, VALUE),
    st.tuples(
        st.sampled_from(
            [
                "connect",
                "connect_kept",
                "disconnect",
                "crash_receiver",
                "crash_shipper",
                "lose_order",
                "prove_order",
                "prove_order",
                "send",
                "send",
                "send",
                "fsync",
                "hear",
                "mark",
                "mark",
                "attest",
                "attest",
                "start_sync",
                "start_sync",
                "read",
                "read",
                "settle",
                "settle",
                "follow",
            ]
        )
    ),
    st.tuples(st.just("deliver"), st.integers(1, 5)),
    st.tuples(st.sampled_from(["arrive", "arrive_early"]), st.integers(0, 3)),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(ACTIONS, min_size=20, max_size=80), st.sampled_from([4, 1000]))
def test_no_checkpoint_is_a_lie_whatever_the_machines_do(actions, capacity) -> None:
    stream = live(capacity)
    for name, *arguments in actions:
        if name == "settle":
            settle(stream)
        elif name in ("on", "on_late"):
            stream.power_on(*arguments, late=name == "on_late")
        else:
            getattr(stream, name)(*arguments)
        stream.check()
    rest(stream)
    assert newest(stream) == stream.disk
