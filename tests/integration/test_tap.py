"""The tap as a process: what it acknowledged is in its ring, whatever is done to it."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from drctl.store.ring import exports_path, write_exports
from drctl.wire import nbd
from drctl.wire.ring import DiskWord, OrderReason, Word
from tests.integration.tap_rig import Make, MiB, TapRig, Writer, until


def test_one_sequence_over_all_disks(make: Make) -> None:
    rig = make(disks=3)
    writers = [rig.writer(name) for name in rig.exports]
    chooser = random.Random(5)
    expected = []
    for n in range(300):
        which, length = chooser.randrange(3), 512 * chooser.randint(1, 64)
        offset, data = 512 * chooser.randrange(1000), chooser.randbytes(length)
        assert writers[which].write(offset, data) == 0
        expected.append((n + 1, 10 + which, offset, data))
    assert list(rig.records()) == expected
    assert [rig.disk_word(DiskWord.CONNECTION, 10 + n) for n in range(3)] == [1, 2, 3]


def test_zeroes_flushes_and_reads_are_answered(make: Make) -> None:
    rig = make()
    writer = rig.writer()
    writer.send(1, 4096, command=nbd.NBD_CMD_WRITE_ZEROES, length=40 * MiB)
    writer.send(2, 0, command=nbd.NBD_CMD_FLUSH)
    writer.send(3, 0, command=nbd.NBD_CMD_READ, length=3 * MiB + 512)
    assert [writer.reply() for _ in range(3)] == [(0, 1), (0, 2), (0, 3)]
    assert writer._receive(3 * MiB + 512) == bytes(3 * MiB + 512)
    assert [(offset, len(data)) for _, _, offset, data in rig.records()] == [(4096, 40 * MiB)]


def test_a_client_that_does_not_take_its_replies_is_not_read(make: Make) -> None:
    """Its answers wait, bounded; the others are served meanwhile."""
    rig = make(disks=2)
    greedy, other = rig.writer(), rig.writer("vm.vdb")
    asked = [nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, 0, nbd.NBD_CMD_READ, cookie, 0, 16 * MiB) for cookie in range(200)]
    greedy.socket.sendall(b"".join(asked))
    for n in range(50):
        assert other.write(n * 512, b"o" * 512) == 0
    memory = Path(f"/proc/{rig.tap.pid}/smaps_rollup").read_text()
    private = sum(int(line.split()[1]) for line in memory.splitlines() if line.startswith("Private"))
    assert private < 128 * 1024 + 60 * 1024  # the ring is 128 MiB of it
    for cookie in range(3):
        assert greedy.reply() == (0, cookie)
        assert greedy._receive(16 * MiB) == bytes(16 * MiB)


def test_a_second_writer_is_turned_away_while_the_first_lives(make: Make) -> None:
    rig = make()
    first = rig.writer()
    assert "has a writer already" in rig.writer().refusal
    assert first.write(0, bytes(512)) == 0
    assert rig.disk_word(DiskWord.CONNECTION) == 1
    first.socket.close()
    second = rig.writer()
    assert second.refusal == ""
    assert rig.disk_word(DiskWord.CONNECTION) == 2


@pytest.mark.parametrize("goodbye", ["disc", "close", "garbage"])
def test_a_connection_that_ends_loses_order(make: Make, goodbye: str) -> None:
    """However it ends: from then on writes may pass the tap by."""
    rig = make(disks=2)
    writer, other = rig.writer(), rig.writer("vm.vdb")
    assert writer.write(0, b"1" * 512) == 0
    stamp, losses = rig.word(Word.ORDER_STAMP), rig.word(Word.LOSSES)
    if goodbye == "disc":
        writer.disc()
    elif goodbye == "close":
        writer.socket.close()
    else:
        writer.socket.sendall(b"\xff" * 28)
    # Whatever is written on another disk from now on finds the loss noted.
    assert other.write(0, b"2" * 512) == 0
    until(lambda: rig.word(Word.ORDER_STAMP) == stamp + 1)
    assert rig.word(Word.LAST_REASON) == OrderReason.CONNECTION_LOST
    assert rig.disk_word(DiskWord.CONNECTION) == 0
    assert rig.disk_word(DiskWord.CONNECTION, 11) == 2
    # Only a goodbye says that nothing more was on its way.
    if goodbye == "disc":
        until(lambda: rig.disk_word(DiskWord.ENDED) > rig.disk_word(DiskWord.WRITTEN) > 0)
        assert rig.word(Word.LOSSES) == losses
    else:
        until(lambda: rig.word(Word.LOSSES) == losses + 1)
        assert rig.disk_word(DiskWord.ENDED) == 0
    again = rig.writer()
    assert rig.disk_word(DiskWord.CONNECTION) == 3
    assert again.write(0, bytes(512)) == 0


def test_a_loss_is_noted_before_a_write_that_came_with_it(make: Make) -> None:
    """Both wait in the sockets while the tap is stopped: the loss must be seen first."""
    rig = make(disks=2)
    first, second = rig.writer(), rig.writer("vm.vdb")
    stamp = rig.word(Word.ORDER_STAMP)
    os.kill(rig.tap.pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{rig.tap.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    second.send(1, 0, b"depends on what was lost" + bytes(488))
    first.socket.close()
    os.kill(rig.tap.pid, signal.SIGCONT)
    while rig.word(Word.PUBLISHED) == 0:
        pass
    assert rig.word(Word.ORDER_STAMP) == stamp + 1
    assert second.reply() == (0, 1)


def test_a_refused_write_loses_order(make: Make) -> None:
    rig = make()
    writer = rig.writer()
    stamp = rig.word(Word.ORDER_STAMP)
    assert writer.write(rig.size, bytes(512)) == nbd.NBD_ENOSPC
    assert rig.word(Word.ORDER_STAMP) == stamp + 1
    assert rig.word(Word.LAST_REASON) == OrderReason.WRITE_REFUSED
    assert writer.write(0, bytes(512)) == 0


def test_sigterm_ends_it_cleanly(make: Make) -> None:
    rig = make()
    writer = rig.writer()
    writer.write(0, bytes(512))
    assert rig.kill_tap(signal.SIGTERM) == 0
    assert rig.disk_word(DiskWord.CONNECTION) == 0
    assert rig.word(Word.LAST_REASON) == OrderReason.CONNECTION_LOST
    with pytest.raises(ConnectionResetError):
        writer.reply()
    with pytest.raises(ConnectionRefusedError):
        rig.writer()
    rig.start_tap()
    assert rig.writer().write(0, bytes(512)) == 0


def test_the_socket_is_for_the_owner_alone(make: Make) -> None:
    rig = make()
    assert rig.socket.stat().st_mode & 0o777 == 0o600
    assert rig.bell.stat().st_mode & 0o777 == 0o600


def _flood(writer: Writer, stop: threading.Event, sent: dict[int, tuple[int, bytes]]) -> None:
    """Distinct writes, 32 in flight, until the tap is gone or `stop`."""
    chooser = random.Random(3)
    cookie = 0
    try:
        while not stop.is_set():
            data = cookie.to_bytes(8, "little") + chooser.randbytes(504) + bytes(512 * chooser.randrange(16))
            sent[cookie] = (512 * chooser.randrange(4096), data)
            writer.send(cookie, *sent[cookie])
            cookie += 1
            if cookie - len(writer.acknowledged) >= 32:
                writer.reply()
        while len(writer.acknowledged) < cookie:
            writer.reply()
    except OSError:
        pass


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.4])
def test_all_that_was_acknowledged_outlives_kill_9(make: Make, seconds: float) -> None:
    rig = make(disks=2)
    writers = [rig.writer(name) for name in rig.exports]
    sent: list[dict[int, tuple[int, bytes]]] = [{}, {}]
    threads = [
        threading.Thread(target=_flood, args=(w, threading.Event(), s)) for w, s in zip(writers, sent, strict=True)
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    rig.kill_tap()
    for thread in threads:
        thread.join(10)
    stamp = rig.word(Word.ORDER_STAMP)
    rig.start_tap()
    assert rig.word(Word.ORDER_STAMP) == stamp + 1
    assert rig.word(Word.LAST_REASON) == OrderReason.TAP_RESTARTED
    assert rig.disk_word(DiskWord.CONNECTION) == 0
    published = rig.word(Word.PUBLISHED)
    records = list(rig.records())
    assert [record[0] for record in records] == list(range(1, published + 1))
    for disk, (writer, written) in enumerate(zip(writers, sent, strict=True)):
        mine = [(offset, data) for _, number, offset, data in records if number == 10 + disk]
        # In the order in which they were sent, none missing up to the last, all acknowledged ones among them.
        assert mine == list(written.values())[: len(mine)]
        assert len(writer.acknowledged) > 10
        assert set(writer.acknowledged) <= set(range(len(mine)))
    assert rig.writer().write(0, bytes(512)) == 0
    assert rig.word(Word.PUBLISHED) == published + 1


def test_a_full_ring_never_refuses_and_every_drop_is_noted(make: Make) -> None:
    rig = make(capacity=MiB, slots=4096)
    writer = rig.writer()
    written: dict[int, tuple[int, bytes]] = {}
    stop = threading.Event()
    thread = threading.Thread(target=_flood, args=(writer, stop, written))
    thread.start()
    kept: list[tuple[int, bytes]] = []
    try:
        for _ in range(6):  # the shipper falls behind, wakes, falls behind
            until(lambda: rig.word(Word.DROPPING) == 1)
            time.sleep(0.02)
            taken = [(offset, data) for _, _, offset, data in rig.records()]
            kept += taken
            rig.reader.release(rig.reader.released + len(taken))
    finally:
        stop.set()
        thread.join(10)
    kept += [(offset, data) for _, _, offset, data in rig.records()]
    assert set(writer.acknowledged) == set(written)
    assert not any(writer.acknowledged.values())
    dropped = list(written.values())
    for record in kept:
        dropped.remove(record)
    assert len(dropped) == rig.word(Word.DROPPED) > 0
    dirty = _drain(rig)
    for offset, data in dropped:
        assert set(range(offset // 4096, (offset + len(data) - 1) // 4096 + 1)) <= dirty
    rig.reader.release(rig.reader.published)
    until(lambda: rig.word(Word.DROPPING) == 0)
    assert writer.write(0, b"n" * 512) == 0
    assert [data for *_, data in rig.records()] == [b"n" * 512]


def _drain(rig: TapRig) -> set[int]:
    found: set[int] = set()
    for _ in range(2):
        request = rig.reader.request_drain()
        until(lambda request=request: rig.reader.drain_ready(request), 1)
        for extent in rig.reader.dirty_extents(10):
            found.update(range(extent.offset // 4096, -(-extent.end // 4096)))
        rig.reader.clear(10)
    return found


def test_writes_larger_than_a_quarter_of_the_ring_are_not_offered(make: Make) -> None:
    """They would be dropped each time; a client that was told splits them."""
    rig = make(capacity=4 * MiB)
    info = subprocess.run(["nbdinfo", "--no-content", rig.uri()], capture_output=True, text=True, check=True).stdout
    assert "block_size_maximum: 1048576" in info


def test_the_bell_rings_once_for_a_waiting_shipper(make: Make) -> None:
    rig = make()
    writer = rig.writer()
    bell = os.open(rig.bell, os.O_RDONLY | os.O_NONBLOCK)
    ear = select.poll()
    ear.register(bell, select.POLLIN)
    assert writer.write(0, bytes(512)) == 0
    assert not ear.poll(100)
    rig.reader.wait()
    assert writer.write(0, bytes(512)) == 0
    assert writer.write(0, bytes(512)) == 0
    assert ear.poll(1000)
    assert os.read(bell, 100) == b"\0"
    assert rig.word(Word.READER_WAITING) == 0
    os.close(bell)


def test_the_heart_beats_when_idle_and_when_busy(make: Make) -> None:
    rig = make()

    def slowest(seconds: float) -> float:
        worst, end = 0.0, time.monotonic() + seconds
        while time.monotonic() < end:
            worst = max(worst, (time.monotonic_ns() - rig.word(Word.HEARTBEAT)) / 1e9)
            time.sleep(0.001)
        return worst

    assert rig.word(Word.TAP_PID) == rig.tap.pid
    assert slowest(0.5) < 0.1
    writer, stop = rig.writer(), threading.Event()
    thread = threading.Thread(target=_flood, args=(writer, stop, {}))
    thread.start()
    try:
        # Other tests may share the machine: what matters is that load does not stop it.
        assert slowest(0.5) < 0.25
    finally:
        stop.set()
        thread.join(10)


def test_the_tap_stays_small(make: Make) -> None:
    rig = make()
    writer = rig.writer()
    for n in range(64):
        writer.write(0, bytes([n]) * 65536)
    private = shared_name = 0
    for line in Path(f"/proc/{rig.tap.pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            shared_name = ".ring" in line or ".dirty" in line
        elif line.startswith("Private") and not shared_name:
            private += int(line.split()[1])
    assert private < 20 * 1024


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["a", "b"], 2), (["/nonexistent/a.ring", "s", "b"], 1), (["/etc/passwd", "s", "b"], 31)],
)
def test_what_can_not_be_served_ends_with_a_reason(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "drctl.replication.tap", *arguments], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == code
    assert done.stderr.startswith("tap: ")
    assert "Traceback" not in done.stderr


def test_a_second_tap_on_a_ring_is_refused_and_the_first_lives_on(make: Make) -> None:
    rig = make()
    writer = rig.writer()
    stamp = rig.word(Word.ORDER_STAMP)
    second = rig.run(sys.executable, "-m", "drctl.replication.tap", str(rig.ring_path), str(rig.socket), str(rig.bell))
    assert second.wait(10) == 13
    assert writer.write(0, bytes(512)) == 0
    assert rig.word(Word.ORDER_STAMP) == stamp


def test_exports_that_are_not_the_rings_disks_are_refused(make: Make) -> None:
    rig = make(start=False)
    write_exports(exports_path(rig.ring_path), {"vm.vda": (10, rig.size * 2)})
    tap = rig.run(sys.executable, "-m", "drctl.replication.tap", str(rig.ring_path), str(rig.socket), str(rig.bell))
    assert tap.wait(10) == 31


def test_the_sink_takes_everything_and_keeps_nothing(make: Make) -> None:
    rig = make()
    rig.kill_tap()
    published = rig.word(Word.PUBLISHED)
    rig.start_sink()
    writer = rig.writer()
    assert writer.write(0, bytes(MiB)) == 0
    assert writer.write(rig.size, bytes(512)) == nbd.NBD_ENOSPC
    assert rig.word(Word.PUBLISHED) == published
    assert rig.kill_tap(signal.SIGTERM) == 0


def test_a_crowd_of_clients_is_bounded(make: Make) -> None:
    rig = make()
    crowd = []
    for _ in range(300):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        until(lambda client=client: client.connect_ex(str(rig.socket)) == 0)
        crowd.append(client)
    turned_away = sum(client.recv(18) == b"" for client in crowd)
    for client in crowd:
        client.close()
    assert turned_away == 300 - 256

    def enters() -> bool:
        with suppress(ConnectionError):
            return rig.writer().refusal == ""
        return False

    until(enters)
