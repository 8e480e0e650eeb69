"""A QEMU without a guest, writers that go through its block layer as a guest's writes do, and targets to mirror to.

Used by the integration tests of the mirror and by `benchmarks/kill_loop.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drctl.errors import HostUnreachable
from drctl.hypervisor.qmp import QmpSocket, command

#: The node that a guest's disk would have as its root, and the export that stands for the guest's device.
SOURCE = "source"
DEVICE = "device"


def have(*tools: str) -> bool:
    return all(shutil.which(tool) for tool in tools)


def until(condition: Callable[[], Any], timeout: float = 10.0, what: str = "condition") -> Any:
    """The first true value of `condition`. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} not reached in {timeout} s")
        time.sleep(0.005)
    return value


class Rig:
    """One QEMU (`mode` `none`: qemu-system -M none, `qsd`: qemu-storage-daemon) with a raw disk in a directory.

    `iothread`: the device lives in a thread of its own, as a guest's with `<driver iothread=…>`."""

    def __init__(self, mode: str = "none", *, size: int = 64 << 20, binary: str = "", iothread: bool = False) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="drctl-rig-", dir="/var/tmp"))
        self.size = size
        self.mode = mode
        self.disk = self.directory / "disk.raw"
        self.tap_socket = self.directory / "tap.sock"
        self.device_socket = self.directory / "device.sock"
        self._binary = binary or {"none": "qemu-system-x86_64", "qsd": "qemu-storage-daemon"}[mode]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.disk.touch()
        os.truncate(self.disk, size)
        try:
            self._start(iothread)
        except BaseException:
            self._end_processes()
            raise

    def _start(self, iothread: bool) -> None:
        monitor_path = self.directory / "qmp.sock"
        blockdev = {"driver": "raw", "node-name": SOURCE, "file": {"driver": "file", "filename": str(self.disk)}}
        arguments = ["--blockdev", json.dumps(blockdev)]
        if iothread:
            arguments += ["--object", "iothread,id=thread0"]
        if self.mode == "none":
            arguments += ["-M", "none", "-nodefaults", "-display", "none", "-S"]
            arguments += ["-qmp", f"unix:{monitor_path},server=on,wait=off"]
        else:
            arguments += ["--chardev", f"socket,id=qmp,path={monitor_path},server=on,wait=off"]
            arguments += ["--monitor", "chardev=qmp"]
        self.qemu = self.run(self._binary, *arguments)
        self.monitor = until(lambda: _monitor(monitor_path), what="QMP socket")
        self._export(iothread)

    def _export(self, iothread: bool) -> None:
        """The guest's device: a writable vhost-user or NBD export would both do; NBD is what qemu-io and fio speak.

        The one NBD server of the QEMU is taken by it, so the reader's export is tested on another path."""
        self.monitor(command("nbd-server-start", addr=_unix(self.device_socket)))
        extra: dict[str, Any] = {"iothread": "thread0", "fixed_iothread": True} if iothread else {}
        self.monitor(
            command("block-export-add", id=DEVICE, type="nbd", node_name=SOURCE, writable=True, name=DEVICE, **extra)
        )

    @property
    def device(self) -> str:
        return f"nbd+unix:///{DEVICE}?socket={self.device_socket}"

    def run(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        log = (self.directory / "log").open("ab")
        process = subprocess.Popen(arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, **options)
        log.close()
        self._processes.append(process)
        return process

    def target(self, export: str = "m.vda") -> subprocess.Popen[bytes]:
        """A tap's stand-in: qemu-nbd on a raw file. A socket of a dead one is replaced."""
        image = self.directory / "target.raw"
        if not image.exists():
            image.touch()
            os.truncate(image, self.size)
        self.tap_socket.unlink(missing_ok=True)
        process = self.run(
            "qemu-nbd", "--format=raw", "--persistent", "--shared=4", "--cache=writeback", "--discard=unmap",
            f"--export-name={export}", f"--socket={self.tap_socket}", str(image),
        )  # fmt: skip
        until(self.tap_socket.exists, what="target's socket")
        return process

    def sink(self, export: str = "m.vda") -> subprocess.Popen[bytes]:
        """drctl's own sink on the tap's socket."""
        exports = self.directory / "exports.json"
        exports.write_text(json.dumps({"exports": {export: {"number": 0, "size": self.size}}}))
        self.tap_socket.unlink(missing_ok=True)
        process = self.run(
            sys.executable, "-m", "drctl.replication.tap", "--sink", str(exports), str(self.tap_socket)
        )  # fmt: skip
        until(self.tap_socket.exists, what="sink's socket")
        return process

    def connected(self) -> bool:
        """Whether QEMU has a connection to what listens on the tap's socket now."""
        table = Path("/proc/net/unix").read_text().splitlines()
        # State 03 is connected; the accepting side of a connection carries the path that the listener was bound to: a
        # tap's has a tilde, since it gets its name when it listens.
        bound = (str(self.tap_socket), f"{self.tap_socket}~")
        return any(line.endswith(bound) and line.split()[5] == "03" for line in table)

    def write(self, offset: int, length: int, pattern: int = 0xA5) -> None:
        """One write of the guest; fails when the guest would see an I/O error."""
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", f"write -P {pattern:#x} {offset} {length}", self.device],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "wrote" in done.stdout, done.stdout

    def load(self, seconds: float, *, depth: int = 32, block: str = "4k") -> subprocess.Popen[bytes]:
        """Random writes, 4 KiB at depth 32, until killed or for `seconds`."""
        return self.run(
            "fio", "--name=load", "--ioengine=nbd", f"--uri={self.device}", "--rw=randwrite", f"--bs={block}",
            f"--iodepth={depth}", f"--runtime={seconds}", "--time_based", "--thread", "--randrepeat=0",
            f"--size={self.size}", cwd=self.directory,
        )  # fmt: skip

    def alive(self) -> bool:
        return self.qemu.poll() is None

    def kill(self, process: subprocess.Popen[bytes], how: int = signal.SIGKILL) -> int:
        process.send_signal(how)
        return process.wait(10)

    def compare(self) -> bool:
        """Whether source and target hold the same bytes (both idle)."""
        return self.disk.read_bytes() == (self.directory / "target.raw").read_bytes()

    def _end_processes(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)

    def close(self) -> None:
        self._end_processes()
        self.monitor.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _monitor(path: Path) -> QmpSocket | None:
    """A socket is there before somebody listens on it."""
    try:
        return QmpSocket(str(path))
    except HostUnreachable:
        return None


def _unix(path: Path) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": str(path)}}
