"""A tap in a process of its own, a ring to look into, a client that knows what was acknowledged, and QEMU's mirror."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from drctl.model.identity import StreamIdentity
from drctl.store.ring import Ring, exports_path, write_exports
from drctl.store.ring_reader import RingReader
from drctl.wire import nbd
from drctl.wire.ring import RECORD_WRITE, DiskWord, Word

MiB = 1 << 20
IDENTITY = StreamIdentity("web", "alpha-1", 1, "c0ffee00" * 4)


def until(condition: Callable[[], Any], timeout: float = 30.0) -> Any:
    """The first true value of `condition`; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.002)
    return value


class TapRig:
    """A ring on tmpfs, its tap, and whatever else a test runs in the same directory."""

    def __init__(
        self, *, disks: int = 1, size: int = 64 * MiB, capacity: int = 128 * MiB, slots: int = 65536, start: bool = True
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="drctl-tap-", dir="/dev/shm"))
        self.ring_path = self.directory / "web.ring"
        self.socket = self.directory / "web.sock"
        self.bell = self.directory / "web.bell"
        self.size = size
        self.exports = {f"vm.vd{chr(97 + n)}": (10 + n, size) for n in range(disks)}
        self.ring = Ring.create(self.ring_path, IDENTITY, dict(self.exports.values()), capacity, slots)
        self.reader = RingReader(self.ring)
        write_exports(exports_path(self.ring_path), self.exports)
        self._processes: list[subprocess.Popen[Any]] = []
        self._writers: list[Writer] = []
        if start:
            self.tap = self.start_tap()

    def start_tap(self) -> subprocess.Popen[Any]:
        arguments = [self.ring_path, self.socket, self.bell]
        return self._serve("-m", "drctl.replication.tap", *map(str, arguments))

    def start_sink(self) -> subprocess.Popen[Any]:
        return self._serve("-m", "drctl.replication.tap", "--sink", str(exports_path(self.ring_path)), str(self.socket))

    def _serve(self, *arguments: str) -> subprocess.Popen[Any]:
        before = self.socket.stat().st_ino if self.socket.exists() else None
        process = self.run(sys.executable, *arguments)
        until(lambda: self.socket.exists() and self.socket.stat().st_ino != before)
        self.tap = process
        return process

    def run(self, *arguments: str) -> subprocess.Popen[Any]:
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    def writer(self, export: str = "vm.vda") -> Writer:
        """A client of its own, closed with the rig."""
        self._writers.append(Writer())
        return self._writers[-1].enter(self.socket, export)

    def kill_tap(self, how: int = signal.SIGKILL) -> int:
        self.tap.send_signal(how)
        return self.tap.wait(10)

    def uri(self, export: str = "vm.vda") -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    def word(self, word: Word) -> int:
        return self.ring.words[word]

    def disk_word(self, word: DiskWord, disk: int = 10) -> int:
        return self.ring.disk_word(disk, word)

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def records(self, after: int | None = None) -> Iterator[tuple[int, int, int, bytes]]:
        """(sequence, disk, offset, data) of all that is published and not released; zeroes written out."""
        position = self.reader.released if after is None else after
        while batch := self.reader.batch(position, max_bytes=MiB):
            for index, row in enumerate(batch.descriptors.tolist()):
                data = bytes(batch.payload(index)) if row[5] == RECORD_WRITE else bytes(row[3] * 512)
                yield row[0], row[4], row[2] * 512, data
            position = batch.last

    def replay(self, image: bytearray, disk: int = 10) -> bytearray:
        """Apply the ring's records of a disk to `image`."""
        for _, number, offset, data in self.records():
            if number == disk:
                image[offset : offset + len(data)] = data
        return image

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
        for writer in self._writers:
            writer.socket.close()
        self.reader.close()
        self.ring.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class Writer:
    """A blocking NBD client that writes, many in flight, and knows which cookies were acknowledged."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.acknowledged: dict[int, int] = {}
        self.refusal = ""

    def enter(self, path: Path, export: str) -> Writer:
        self.socket.connect(str(path))
        self._receive(18)
        entry = nbd.pack_option(nbd.NBD_OPT_GO, nbd.pack_string(export) + b"\0\0")
        self.socket.sendall(nbd.CLIENT_FLAGS.pack(3) + entry)
        self.refusal = self._go()
        return self

    def _receive(self, count: int) -> bytes:
        data = bytearray(count)
        left = memoryview(data)
        while left:
            got = self.socket.recv_into(left)
            if not got:
                raise ConnectionResetError("the tap hung up")
            left = left[got:]
        return bytes(data)

    def _go(self) -> str:
        while True:
            _, _, kind, length = nbd.OPTION_REPLY.unpack(self._receive(nbd.OPTION_REPLY.size))
            data = self._receive(length)
            if kind != nbd.NBD_REP_INFO:
                return data.decode() if kind & nbd.NBD_REP_FLAG_ERROR else ""

    def send(
        self, cookie: int, offset: int, data: bytes = b"", *, command: int = nbd.NBD_CMD_WRITE, length: int = 0
    ) -> None:
        head = nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, 0, command, cookie, offset, length or len(data))
        self.socket.sendall(head + data)

    def reply(self) -> tuple[int, int]:
        """(error, cookie) of the next reply."""
        _, error, cookie = nbd.SIMPLE_REPLY.unpack(self._receive(nbd.SIMPLE_REPLY.size))
        self.acknowledged[cookie] = error
        return error, cookie

    def write(self, offset: int, data: bytes) -> int:
        """Write and wait; the error."""
        self.send(0, offset, data)
        return self.reply()[0]

    def disc(self) -> None:
        self.send(0, 0, command=nbd.NBD_CMD_DISC)
        self.socket.close()


class Monitor:
    """A QMP client that waits for each answer."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        until(lambda: self._socket.connect_ex(str(path)) == 0)
        # One file for reading and writing would throw away events read ahead at each write.
        self._file = self._socket.makefile("r")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        body = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self._socket.sendall(json.dumps(body).encode() + b"\n")
        while "event" in (answer := json.loads(self._file.readline())):
            pass
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Mirror:
    """qemu-storage-daemon with a raw disk, exported as the guest's device, mirrored to an NBD export."""

    def __init__(self, rig: TapRig, export: str = "vm.vda") -> None:
        self.rig, self.export = rig, export
        self.disk = rig.directory / f"{export}.raw"
        self.disk.touch()
        os.truncate(self.disk, rig.size)
        monitor, device = rig.directory / f"{export}.qmp", rig.directory / f"{export}.dev"
        self.device = f"nbd+unix:///guest?socket={device}"
        self.daemon = rig.run(
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,filename={self.disk},node-name=file",
            "--blockdev", "driver=raw,file=file,node-name=source",
            "--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off", "--monitor", "chardev=qmp",
            "--nbd-server", f"addr.type=unix,addr.path={device}",
            "--export", "type=nbd,id=guest,node-name=source,name=guest,writable=on",
        )  # fmt: skip
        self.monitor = Monitor(monitor)

    def attach(self) -> None:
        server = {"type": "unix", "path": str(self.rig.socket)}
        self.monitor("blockdev-add", driver="nbd", node_name="target", server=server, export=self.export)
        self.monitor(
            "blockdev-mirror", job_id="tap", device="source", target="target", sync="none",
            copy_mode="write-blocking", on_target_error="stop", granularity=4096, auto_dismiss=False,
        )  # fmt: skip
        until(lambda: self.job()["status"] == "ready")

    def job(self) -> dict[str, Any]:
        return self.monitor("query-jobs")[0]  # type: ignore[no-any-return]

    def resume_until_clean(self) -> None:
        """Resume until what failed was written again. (The dirty count of the job's bitmap is what tells.)"""

        def clean() -> bool:
            if self.job()["status"] == "standby":
                self.monitor("block-job-resume", device="tap")
            nodes = self.monitor("query-named-block-nodes")
            return self.job()["status"] == "ready" and not any(
                bitmap["count"] for node in nodes for bitmap in node.get("dirty-bitmaps", [])
            )

        until(clean, 30)

    def detach(self) -> None:
        """End the job as drctl does: where the last flush failed (the connection was not there yet), resume and go on."""

        def ended() -> bool:
            if self.job()["status"] == "standby":
                self.monitor("block-job-resume", device="tap")
            return self.job()["status"] == "concluded"

        self.monitor("block-job-cancel", device="tap")
        until(ended)
        self.monitor("job-dismiss", id="tap")
        self.monitor("blockdev-del", node_name="target")

    def io(self, *commands: str) -> str:
        """Guest I/O by qemu-io; its output. Fails when the guest would see an error."""
        arguments = ["qemu-io", "-f", "raw", *(part for command in commands for part in ("-c", command)), self.device]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "failed" not in done.stdout, done.stdout
        return done.stdout

    def load(self, *options: str) -> subprocess.Popen[Any]:
        """Random writes of 4 KiB at depth 32 by a client of the device, until all is written once."""
        return self.rig.run(
            "fio", "--name=load", "--ioengine=nbd", f"--uri={self.device}", "--rw=randwrite", "--bs=4k", "--iodepth=32",
            f"--size={self.rig.size}", "--thread", "--refill_buffers", *options,
        )  # fmt: skip


#: The fixture `make`: options of a TapRig.
Make = Callable[..., TapRig]
