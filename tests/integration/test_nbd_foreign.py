"""The tap against clients that others wrote: libnbd, qemu-img, fio, and QEMU's mirror."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from drctl.wire.ring import DiskWord, Word
from tests.integration.tap_rig import MiB, Mirror, TapRig, until

TOOLS = ("nbdinfo", "nbdcopy", "qemu-io", "qemu-img", "qemu-storage-daemon", "fio")
pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason=f"needs {', '.join(TOOLS)} (see setup.sh)"
)


@pytest.fixture
def rig() -> Iterator[TapRig]:
    made = TapRig(disks=2)
    yield made
    made.close()


@pytest.fixture
def mirror(rig: TapRig) -> Iterator[Mirror]:
    made = Mirror(rig)
    made.attach()
    yield made
    made.monitor.close()


def run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nbdinfo_reads_every_export(rig: TapRig) -> None:
    told = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={rig.socket}"))
    exports = {export["export-name"]: export for export in told["exports"]}
    assert set(exports) == set(rig.exports)
    one = exports["vm.vda"]
    assert one["export-size"] == rig.size
    assert (one["block_size_minimum"], one["block_size_preferred"], one["block_size_maximum"]) == (512, 4096, 32 * MiB)
    assert (one["can_zero"], one["can_fua"], one["can_flush"]) == (True, True, True)
    assert (one["can_trim"], one["can_multi_conn"], one["is_read_only"]) == (False, False, False)


def test_nbdcopy_leaves_its_file_in_the_ring(rig: TapRig) -> None:
    image = bytearray(rig.size)
    chooser = random.Random(2)
    for _ in range(40):
        offset = chooser.randrange(rig.size - MiB) // 512 * 512
        image[offset : offset + 65536] = chooser.randbytes(65536)
    source = rig.directory / "source.raw"
    source.write_bytes(image)
    run("nbdcopy", str(source), rig.uri())
    assert rig.replay(bytearray(b"\xff" * rig.size)) == image


def test_qemu_img_and_qemu_io_write_what_they_say(rig: TapRig) -> None:
    run("qemu-img", "bench", "-w", "-f", "raw", "-c", "2000", "-d", "16", "-s", "4k", "--pattern", "65", rig.uri())
    assert rig.word(Word.PUBLISHED) == 2000
    assert rig.replay(bytearray(rig.size))[: 2000 * 4096] == b"A" * (2000 * 4096)
    commands = (
        "write -P 1 512 512",
        "write -P 2 1M 8M",
        "write -z 2M 64k",
        "writev -P 3 0 4k 8k",
        "flush",
        "read 0 1M",
    )
    run("qemu-io", "-f", "raw", *(part for command in commands for part in ("-c", command)), rig.uri("vm.vdb"))
    expected = bytearray(rig.size)
    expected[512:1024] = b"\1" * 512
    expected[MiB : 9 * MiB] = b"\2" * 8 * MiB
    expected[2 * MiB : 2 * MiB + 65536] = bytes(65536)
    expected[:12288] = b"\3" * 12288
    assert rig.replay(bytearray(rig.size), 11) == expected


@pytest.mark.parametrize(("block", "depth"), [("512", 64), ("4k", 32), ("1M", 8)])
def test_fio_is_answered_at_every_depth(rig: TapRig, block: str, depth: int) -> None:
    told = run(
        "fio", "--name=f", "--ioengine=nbd", f"--uri={rig.uri()}", "--rw=randwrite", f"--bs={block}",
        f"--iodepth={depth}", f"--size={rig.size}", "--io_size=20M", "--refill_buffers", "--output-format=json",
    )  # fmt: skip
    job = json.loads(told[told.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert rig.disk_word(DiskWord.WRITES) == job["write"]["total_ios"]
    assert rig.disk_word(DiskWord.BYTES) == 20 * MiB


def test_every_byte_of_the_mirror_is_in_the_ring_in_order(rig: TapRig, mirror: Mirror) -> None:
    """Writes that follow each other, as a guest's that depend on each other do, and the same place twice."""
    chooser = random.Random(9)
    expected = []
    commands = []
    for n in range(120):
        offset, length = 512 * chooser.randrange(2000), 512 * chooser.choice((1, 7, 8, 16, 128))
        commands.append(f"write -P {n + 1} {offset} {length}")
        expected.append((offset, bytes([n + 1]) * length))
    mirror.io(*commands)
    assert [(offset, data) for _, _, offset, data in rig.records()] == expected
    assert rig.disk_word(DiskWord.CONNECTION) == 1


def test_after_a_load_ring_and_disk_are_the_same(rig: TapRig, mirror: Mirror) -> None:
    assert mirror.load("--io_size=40M", "--bs=512-64k").wait(60) == 0
    mirror.io("write -z 1M 4M", "discard 10M 1M", "flush")
    assert rig.word(Word.DROPPED) == 0
    assert rig.replay(bytearray(rig.size)) == mirror.disk.read_bytes()
    mirror.detach()
    until(lambda: rig.disk_word(DiskWord.CONNECTION) == 0)


def test_two_mirrors_share_one_sequence(rig: TapRig, mirror: Mirror) -> None:
    """What was written on one disk after the other's write was acknowledged comes after it in the ring."""
    second = Mirror(rig, "vm.vdb")
    second.attach()
    for n in range(6):
        mirror.io(f"write -P {2 * n + 1} {n * 4096} 4k")
        second.io(f"write -P {2 * n + 2} {n * 4096} 4k")
    assert [(disk, data[0]) for _, disk, _, data in rig.records()] == [(10 + n % 2, n + 1) for n in range(12)]
    second.monitor.close()


def test_a_killed_tap_hurts_no_guest_and_nothing_is_lost(rig: TapRig, mirror: Mirror) -> None:
    """Acknowledged writes are in the ring, failed ones in QEMU's bitmap; together they are the disk."""
    load = mirror.load("--time_based", "--runtime=3", "--rate_iops=4000")
    for _ in range(3):
        time.sleep(0.5)
        rig.kill_tap()
        time.sleep(0.1)
        rig.start_tap()
        mirror.resume_until_clean()
    assert load.wait(30) == 0
    mirror.io("flush")
    mirror.resume_until_clean()
    assert mirror.daemon.poll() is None
    assert rig.word(Word.DROPPED) == 0
    assert rig.replay(bytearray(rig.size)) == mirror.disk.read_bytes()


def test_a_sink_lets_a_mirror_end_whose_tap_is_dead(rig: TapRig, mirror: Mirror) -> None:
    mirror.io("write -P 1 0 4k")
    rig.kill_tap()
    mirror.io("write -P 2 8k 4k")
    until(lambda: mirror.job()["status"] == "standby")
    rig.start_sink()
    mirror.resume_until_clean()
    mirror.detach()
    assert rig.kill_tap(signal.SIGTERM) == 0
    assert [data[0] for *_, data in rig.records()] == [1]


def test_a_full_ring_is_never_felt_by_the_mirror() -> None:
    rig = TapRig(capacity=2 * MiB, slots=1024)
    try:
        mirror = Mirror(rig)
        mirror.attach()
        assert mirror.load("--io_size=30M").wait(60) == 0
        assert mirror.job()["status"] == "ready"
        assert rig.word(Word.DROPPING) == 1
        image = rig.replay(bytearray(rig.size))
        _fetch_dirty(rig, mirror, image)
        assert image == mirror.disk.read_bytes()
        mirror.monitor.close()
    finally:
        rig.close()


def _fetch_dirty(rig: TapRig, mirror: Mirror, image: bytearray) -> None:
    """What the shipper does: read again from the disk what the maps note."""
    with mirror.disk.open("rb") as disk:
        for _ in range(2):
            request = rig.reader.request_drain()
            until(lambda request=request: rig.reader.drain_ready(request))
            for extent in rig.reader.dirty_extents(10):
                disk.seek(extent.offset)
                image[extent.offset : extent.end] = disk.read(extent.length)
            rig.reader.clear(10)
