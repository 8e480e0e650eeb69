"""The view server in front of foreign NBD clients: nbdinfo, nbdcopy, qemu-img, qemu-io, fio."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from drctl.model.extent import KiB, MiB
from drctl.model.group import GroupDisk
from tests.integration.store_rig import StoreRig

TOOLS = ("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")
pytestmark = pytest.mark.skipif(any(shutil.which(t) is None for t in TOOLS), reason=f"needs {', '.join(TOOLS)}")


class Served:
    """A view server process for one checkpoint."""

    def __init__(self, directory: Path, store: Path, checkpoint: int):
        self.socket = directory / "v.sock"
        self.log = directory / "view.log"
        self.config = directory / "view.json"
        self.config.write_text(
            json.dumps(
                {
                    "store": str(store),
                    "group": "erp",
                    "checkpoint": checkpoint,
                    "view": "v1",
                    "socket": str(self.socket),
                    "exports": [],
                }
            )
        )
        self.start()

    def start(self):
        begin = time.monotonic()
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "drctl.replication.view_server", str(self.config)]
            self.process = subprocess.Popen(command, stderr=log)
        while not self._greets():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - begin < 20
            time.sleep(0.01)
        self.opened = time.monotonic() - begin

    def _greets(self):
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.socket))
            except OSError:
                return False
            return sock.recv(8) == b"NBDMAGIC"

    def url(self, export):
        return f"nbd+unix:///{export}?socket={self.socket}"

    def rss(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * KiB

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(10)


def run(*argv):
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    """Two disks with data, holes, large and small writes, zeroes; checkpoints in between."""
    rng = random.Random(7)
    root = tmp_path_factory.mktemp("store") / "erp"
    disks = [GroupDisk(1, "db", "vda", 48 * MiB), GroupDisk(2, "web", "vda", 8 * MiB)]
    base = rng.randbytes(10 * MiB) + bytes(6 * MiB) + rng.randbytes(8 * MiB)
    rig = StoreRig(root, "erp", disks, {"db.vda": base}, segment=4 * MiB)
    rig.mark()
    for _ in range(3):
        where = [rng.randrange(48 * MiB // 512) * 512 for _ in range(400)]
        rig.write_many("db.vda", [(o, rng.randbytes(min(512 * rng.randint(1, 8), 48 * MiB - o))) for o in where])
        rig.write("db.vda", rng.randrange(40) * MiB, rng.randbytes(3 * MiB))
        rig.write("web.vda", rng.randrange(7) * MiB, b"abcd" * (256 * KiB))
        rig.zero("db.vda", rng.randrange(40) * MiB, 2 * MiB)
        rig.mark()
    yield rig
    rig.close()


@pytest.fixture
def served(rig, tmp_path):
    server = Served(tmp_path, rig.root, 3)
    yield server
    server.close()


def test_nbdinfo_lists_read_only_exports_of_the_right_size(served):
    listed = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={served.socket}"))
    exports = {export["export-name"]: export for export in listed["exports"]}
    assert {name: e["export-size"] for name, e in exports.items()} == {"db.vda": 48 * MiB, "web.vda": 8 * MiB}
    assert all(e["is_read_only"] and e["can_multi_conn"] for e in exports.values())
    assert all("base:allocation" in e["contexts"] for e in exports.values())


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 4])
def test_every_checkpoint_reads_as_the_oracle_had_it(rig, tmp_path, checkpoint):
    server = Served(tmp_path, rig.root, checkpoint)
    try:
        for name, image in rig.marks[checkpoint].items():
            out = tmp_path / "out.raw"
            run("nbdcopy", server.url(name), str(out))
            assert out.read_bytes() == image
            expected = tmp_path / "expected.raw"
            expected.write_bytes(image)
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(expected), server.url(name))
    finally:
        assert server.close() == 0
    assert not server.socket.exists()


def test_allocation_tells_holes_and_never_calls_data_one(rig, served):
    extents = json.loads(run("nbdinfo", "--json", "--map", served.url("db.vda")))
    image, position = rig.marks[3]["db.vda"], 0
    for extent in extents:
        assert extent["offset"] == position
        position += extent["length"]
        if extent["type"]:
            assert not any(image[extent["offset"] : position])
    assert position == len(image)
    assert sum(e["length"] for e in extents if e["type"]) > 6 * MiB


def test_qemu_reads_across_borders_of_frames_and_pieces(rig, served):
    image = rig.marks[3]["db.vda"]
    rng = random.Random(1)
    for _ in range(30):
        length = rng.choice([512, 4096, 65536, 3 * MiB])
        offset = rng.randrange((len(image) - length) // 512) * 512
        out = served.config.with_name("part.raw")
        argv = ["qemu-img", "dd", "-f", "raw", "-O", "raw", f"if={served.url('db.vda')}", f"of={out}", "bs=512"]
        subprocess.run([*argv, f"skip={offset // 512}", f"count={(offset + length) // 512}"], check=True)
        assert out.read_bytes() == image[offset : offset + length]


def test_writes_and_foreign_exports_are_refused(served):
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 4k", served.url("db.vda")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Permission denied" in done.stdout + done.stderr
    done = subprocess.run(["nbdinfo", served.url("nope")], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_clients_that_break_the_protocol_or_leave_harm_nobody_else(served):
    for junk in (b"x" * 100, b"\0\0\0\x01" + b"IHAVEOPT" + b"\0\0\0\x07" + b"\xff\xff\xff\xff", b""):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(served.socket))
            sock.sendall(junk)
    assert "db.vda" in run("nbdinfo", "--list", f"nbd+unix:///?socket={served.socket}")


def test_many_connections_at_once_each_read_the_truth(rig, served, tmp_path):
    def copy(index):
        name = ("db.vda", "web.vda")[index % 2]
        out = tmp_path / f"copy{index}.raw"
        run("nbdcopy", "--connections=4", "--requests=16", "--request-size=262144", served.url(name), str(out))
        right[index] = out.read_bytes() == rig.marks[3][name]

    right = {}
    threads = [threading.Thread(target=copy, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == dict.fromkeys(range(6), True)
    assert served.rss() < 150 * MiB


def test_fio_reads_at_random_without_an_error(served):
    if shutil.which("fio") is None:
        pytest.skip("fio is absent")
    argv = ["fio", "--name=x", "--ioengine=nbd", f"--uri={served.url('db.vda')}", "--rw=randread", "--bs=4k"]
    done = subprocess.run(
        [*argv, "--iodepth=16", "--size=48M", "--io_size=16M", "--output-format=json"],
        check=False,
        capture_output=True,
        text=True,
    )
    if "engine nbd not loadable" in done.stderr + done.stdout:
        pytest.skip("fio has no nbd engine")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["read"]["total_ios"] == 4096


def test_a_server_killed_and_started_again_serves_the_same_socket(rig, served):
    """QEMU reconnects by itself: reconnect-delay lets the read wait, and it gets the right bytes."""
    options = f"driver=nbd,server.type=unix,server.path={served.socket},export=db.vda,reconnect-delay=20"
    reader = subprocess.Popen(
        ["qemu-io", "-r", "--image-opts", options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def read_pattern(offset):
        reader.stdin.write(f"read {offset} 512\n")
        reader.stdin.flush()
        return reader.stdout.readline()

    assert "read 512/512" in read_pattern(0)
    served.kill()
    timer = threading.Timer(1.0, served.start)
    timer.start()
    lines = [read_pattern(4096) for _ in range(3)]
    timer.join()
    out, _ = reader.communicate("quit\n")
    assert any("read 512/512" in line for line in [*lines, *out.splitlines()])
    assert "failed" not in out


def test_it_opens_within_two_seconds_and_ends_on_sigterm(rig, tmp_path):
    server = Served(tmp_path, rig.root, 4)
    assert server.opened < 2.0 * max(1.0, os.getloadavg()[0])
    assert server.close() == 0
    assert not server.socket.exists()


def test_a_checkpoint_that_is_not_there_is_said_and_nothing_is_served(rig, tmp_path):
    config = tmp_path / "c.json"
    fields = {"store": str(rig.root), "group": "erp", "checkpoint": 99, "view": "v", "socket": str(tmp_path / "s")}
    config.write_text(json.dumps(fields))
    done = subprocess.run(
        [sys.executable, "-m", "drctl.replication.view_server", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 11
    assert "#99" in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_damaged_frame_is_an_error_that_names_its_place_and_never_a_wrong_byte(tmp_path):
    disk = GroupDisk(1, "db", "vda", 4 * MiB)
    rig = StoreRig(tmp_path / "erp", "erp", [disk], {"db.vda": b"b" * (4 * MiB)})
    rig.write("db.vda", 0, random.Random(3).randbytes(64 * KiB))
    rig.write("db.vda", 1 * MiB, random.Random(4).randbytes(64 * KiB))
    rig.mark()
    rig.close()
    segment = next((tmp_path / "erp").glob("streams/**/*.seg"))
    needle = bytes(rig.images["db.vda"][1000:1032])
    data = bytearray(segment.read_bytes())
    data[data.index(needle)] ^= 1
    server = Served(tmp_path, tmp_path / "erp", 1)
    try:
        segment.write_bytes(data)
        bad = subprocess.run(
            ["qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.url("db.vda")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Input/output error" in bad.stdout + bad.stderr
        good = run("qemu-io", "-r", "-f", "raw", "-c", "read -P 98 64k 64k", server.url("db.vda"))
        assert "read 65536/65536" in good
        assert str(segment) in server.log.read_text()
    finally:
        server.close()


def test_sigterm_during_a_read_ends_cleanly(rig, served):
    reader = subprocess.Popen(
        ["nbdcopy", "--requests=1", "--request-size=4096", served.url("db.vda"), "null:"], stderr=subprocess.PIPE
    )
    time.sleep(0.2)
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(5) == 0
    reader.communicate()
