"""A whole stream for benchmarks: ring in memory, shipper, TLS, receiver, and a journal on a real disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drctl.store.ring import exports_path, write_exports
from tests.integration.link_rig import LinkRig, until

MiB = 1 << 20
EXPORT = "vm.vda"


@contextmanager
def stream(
    size: int, ring_bytes: int = 512 * MiB, store: str = "/var/tmp", interval: float = 1.0, slots: int = 1 << 18
) -> Iterator[LinkRig]:
    """The rig with a disk (number 1) of `size` bytes, nothing started yet. `store`: where the journal is kept."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    memory = Path(tempfile.mkdtemp(prefix="drctl-bench-", dir="/dev/shm"))
    disk = Path(tempfile.mkdtemp(prefix="drctl-bench-", dir=store))
    short = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))
    (memory / "store").symlink_to(disk)
    rig = LinkRig(memory, short, sizes={1: size}, ring_bytes=ring_bytes, slots=slots, interval=interval)
    try:
        yield rig
    finally:
        rig.close()
        for directory in (memory, disk, short):
            shutil.rmtree(directory, ignore_errors=True)


def start(rig: LinkRig, *, sync: bool = True) -> None:
    """Receiver and shipper without the relay between them; with `sync` the first sync is done, too."""
    rig.start_receiver()
    rig.start_shipper(peer=f"127.0.0.1:{rig.receiver_port}")
    rig.serve_disks()
    if sync:
        rig.sync("initial", 120)


def start_tap(rig: LinkRig) -> Path:
    """Put a real tap in the place of the rig's guest; the socket it serves EXPORT on."""
    guest = rig.guest
    guest._stop.set()
    guest._thread.join()
    write_exports(exports_path(guest.ring_path), {EXPORT: (1, guest.sizes[1])})
    path = rig.short / "tap.sock"
    command = [sys.executable, "-m", "drctl.replication.tap", str(guest.ring_path), str(path), str(guest.bell_path)]
    rig.processes["tap"] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until(path.exists, 60, why="tap up")
    return path


def drained(rig: LinkRig, timeout: float = 120) -> float:
    """Wait until nothing is in the ring; the seconds that took."""
    begun = time.monotonic()
    until(lambda: rig.status()["backlog_bytes"] == 0, timeout, why="backlog drained")
    return time.monotonic() - begun


def rpo(rig: LinkRig) -> float:
    """Seconds since the newest proven and durable mark was cut."""
    newest = rig.status()["marks"]["newest"]
    return time.time() - newest["wall_ns"] / 1e9 if newest else float("nan")


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def disk_rate(directory: str, seconds: float = 2.0) -> float:
    """MB/s of a plain writer of 4 MiB pieces, each with fdatasync: what a journal on this disk can have at most."""
    data = os.urandom(4 * MiB)
    file, path = tempfile.mkstemp(prefix="drctl-bench-", dir=directory)
    try:
        begun, count = time.monotonic(), 0
        while time.monotonic() < begun + seconds:
            os.pwrite(file, data, count * len(data))
            os.fdatasync(file)
            count += 1
        return count * len(data) / 1e6 / (time.monotonic() - begun)
    finally:
        os.close(file)
        Path(path).unlink()
