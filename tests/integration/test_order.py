"""What a proof of order promises, judged by the ring itself: two QEMUs, writes that depend on each other across both.

Pair i writes a counter to its block of disk one, waits for the acknowledgement, then writes it to its block of disk two.
So at every instant of the guests' life `two <= one <= two + 1`, and every prefix of the stream from a proven
sequence on must say the same.
"""

import signal
import struct
import threading
import time

import pytest

from drctl.hypervisor.block_graph import MirrorName
from drctl.hypervisor.mirror import Mirror
from drctl.wire.ring import DiskWord, Word
from tests.integration.qemu_rig import DEVICE, SOURCE, Rig, have, until
from tests.integration.tap_rig import TapRig, Writer

pytestmark = pytest.mark.skipif(not have("qemu-system-x86_64"), reason="QEMU is not installed")
PAIRS = 16
BLOCK = 4096
EPOCH = "0d" * 16


class Guests:
    """The two disks, their mirrors, and the pairs of writers."""

    def __init__(self, mode):
        self.tap = TapRig(disks=2)
        self.rigs = [Rig(mode, size=self.tap.size) for _ in range(2)]
        self.numbers = [10, 11]
        self.mirrors = [
            Mirror(rig.monitor, MirrorName.of(1, EPOCH, number), SOURCE)
            for rig, number in zip(self.rigs, self.numbers, strict=True)
        ]
        for mirror, export in zip(self.mirrors, self.tap.exports, strict=True):
            mirror.attach(str(self.tap.socket), export)
        self.stopping = False
        self.failures = []
        self.threads = [threading.Thread(target=self._pair, args=(number,)) for number in range(PAIRS)]
        for thread in self.threads:
            thread.start()

    def _pair(self, number):
        writers = [Writer().enter(rig.device_socket, DEVICE) for rig in self.rigs]
        counter = 0
        while not self.stopping and not self.failures:
            counter += 1
            for writer in writers:
                if writer.write(number * BLOCK, struct.pack("<Q", counter) * (BLOCK // 8)):
                    self.failures.append(f"pair {number}: an I/O error at {counter}")
        for writer in writers:
            writer.disc()

    def prove(self):
        """The first ordered sequence of both disks, as the supervisor finds it."""
        while True:
            stamp = self.tap.word(Word.ORDER_STAMP)
            proven = [
                mirror.prove_order(
                    lambda: self.tap.word(Word.PUBLISHED),
                    lambda number=number: self.tap.disk_word(DiskWord.CONNECTION, number) != 0,
                )
                for mirror, number in zip(self.mirrors, self.numbers, strict=True)
            ]
            if self.tap.word(Word.ORDER_STAMP) == stamp:
                return max(proven)

    def close(self):
        self.stopping = True
        for thread in self.threads:
            thread.join(20)
        for rig in self.rigs:
            rig.close()
        self.tap.close()


class Judge:
    """Replays the ring record by record. `violations` counts prefixes that no instant of the guests' life looked like."""

    def __init__(self, tap):
        self.tap = tap
        self.one = [0] * PAIRS
        self.two = [0] * PAIRS
        self.judged = 0
        self.torn_outside = 0

    def follow(self, first, last):
        """Everything up to `last`; from `first` on it must be in order."""
        for sequence, disk, offset, data in self.tap.records():
            if sequence > last:
                break
            if sequence == first + 1:
                self.demand_all(first)
            pair = offset // BLOCK
            (self.one if disk == 10 else self.two)[pair] = struct.unpack_from("<Q", data)[0]
            if sequence > first:
                assert self.holds(pair), (
                    f"sequence {sequence}, ordered from {first}: {self.one[pair]}, {self.two[pair]}"
                )
                self.judged += 1
            else:
                self.torn_outside += not self.holds(pair)
        self.tap.reader.release(last)

    def demand_all(self, first):
        for pair in range(PAIRS):
            assert self.holds(pair), f"pair {pair} is torn at the proven sequence {first}"

    def holds(self, pair):
        return self.two[pair] <= self.one[pair] <= self.two[pair] + 1


def run(mode, kills):
    guests = Guests(mode)
    judge = Judge(guests.tap)
    try:
        for _ in range(kills):
            first = guests.prove()
            time.sleep(0.2)
            guests.tap.kill_tap()
            last = guests.tap.word(Word.PUBLISHED)
            time.sleep(0.05)
            judge.follow(first, last)
            guests.tap.start_tap()
        assert not guests.failures
        assert all(rig.alive() for rig in guests.rigs)
    finally:
        guests.close()
    assert judge.judged > 20 * kills, "too little was written to judge anything"
    return judge


@pytest.mark.parametrize("mode", ["none", "qsd"])
def test_every_prefix_after_a_proof_is_an_instant_of_the_guests_life(mode):
    run(mode, 4)


@pytest.mark.long
def test_every_prefix_after_each_of_a_hundred_proofs_is_an_instant_of_the_guests_life():
    judge = run("none", 100)
    assert judge.torn_outside, "order was never lost: the kills tested nothing"


@pytest.mark.parametrize("mode", ["none", "qsd"])
def test_a_clean_bitmap_is_not_believed_while_what_cleaned_it_is_on_its_way(mode):
    """Blocks that no tap took are written again while the tap stands still: QEMU counts 0, and the ring has none of it."""
    tap, rig = TapRig(), Rig(mode, size=64 << 20)
    mirror = Mirror(rig.monitor, MirrorName.of(1, EPOCH, 10), SOURCE)
    guest = Writer().enter(rig.device_socket, DEVICE)
    proven = []

    def prove():
        proven.append(
            mirror.prove_order(lambda: tap.word(Word.PUBLISHED), lambda: tap.disk_word(DiskWord.CONNECTION) != 0)
        )

    prover = threading.Thread(target=prove)
    try:
        mirror.attach(str(tap.socket), "vm.vda")
        tap.kill_tap()
        for block in range(4):
            assert guest.write(block * BLOCK, b"x" * BLOCK) == 0
        assert mirror.inspect().dirty == 4 * BLOCK
        tap.start_tap()
        while not tap.disk_word(DiskWord.CONNECTION):  # in standby, too, writes are sent: they connect
            assert guest.write(BLOCK, b"x" * BLOCK) == 0
        assert mirror.inspect().dirty, "else there is nothing to test"
        arrived = tap.word(Word.PUBLISHED)
        tap.tap.send_signal(signal.SIGSTOP)
        for block in range(4):
            guest.send(block, block * BLOCK, b"y" * BLOCK)
        until(lambda: mirror.inspect().dirty == 0, what="a clean bitmap")
        assert tap.word(Word.PUBLISHED) == arrived
        prover.start()
        prover.join(1.0)
        assert not proven, "proven while acknowledged writes were missing at the tap"
        tap.tap.send_signal(signal.SIGCONT)
        prover.join(20)
        assert proven
        assert proven[0] >= arrived + 4
    finally:
        tap.tap.send_signal(signal.SIGCONT)
        if prover.is_alive():
            prover.join(20)
        guest.socket.close()
        rig.close()
        tap.close()
