"""What a guest's writes cost behind the mirror: to the tap alone, to the tap with the whole pipeline behind it
(compression, TLS, a journal with fsync), to `nbdkit memory` (in C), to any other target, to none.

    python benchmarks/tap.py [--seconds 2] [--rounds 3] [--source file|null|slow|all] [--load 4k-qd1]...
                             [--target NAME:socket=PATH,export=NAME]... [--output benchmarks/results/tap.json]

qemu-storage-daemon exports a raw disk; fio writes to it as a guest would; the disk is mirrored (sync=none,
copy-mode=write-blocking) to the target. Every round runs every target once, in turning order, so that noise of the
machine meets all alike; the result is the median of each and its ratio to nbdkit's. A run writes 256 MiB at most, so
that the ring holds what the pipeline has not shipped: its backlog at the end, the time until that is drained, and the
age of the newest durable checkpoint (RPO) stand in the same row.

Source `file` is in the page cache: the worst case, since the disk itself costs nothing. Source `slow` takes 1 ms for a
write (nbdkit's delay filter has no shorter one) and knows no cache: what a guest with O_DIRECT on real storage feels;
see the columns against `no mirror`. Ratios of one run may be compared, absolute numbers of two machines not. On a busy
machine the processor time that the target spent per write says most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stream_rig import EXPORT, drained, rpo, start, start_tap, stream
from drctl.model.identity import StreamIdentity
from drctl.store.ring import Ring, exports_path, write_exports
from drctl.wire.ring import Word

MiB = 1 << 20
DISK = 256 * MiB
RING = 256 * MiB
#: A run ends after so many bytes, or its seconds.
BURST = 256 * MiB


@dataclass(frozen=True)
class Load:
    block: str
    depth: int

    @property
    def name(self) -> str:
        return f"{self.block}-qd{self.depth}"


LOADS = [Load("4k", 1), Load("4k", 16), Load("4k", 32), Load("64k", 16), Load("1M", 8)]


@dataclass(frozen=True)
class Target:
    """Where the mirror goes; `socket` empty: there is no mirror. `pid`: whose processor time is counted, 0 if nobody's.
    `check` is called after each run."""

    name: str
    socket: str = ""
    export: str = ""
    pid: int = 0
    check: Callable[[], None] = lambda: None
    #: Called after each load, while the mirror stands: what else is worth telling.
    after: Callable[[], dict[str, float]] = dict


class Monitor:
    """The least QMP that this needs."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        wait_for(lambda: self.socket.connect_ex(str(path)) == 0)
        self.file = self.socket.makefile("r")
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> object:
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (answer := json.loads(self.file.readline())):
            pass
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened in {seconds} s")
        time.sleep(0.005)


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as started:
        try:
            yield started
        finally:
            started.send_signal(signal.SIGTERM)
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()


@contextmanager
def tap(directory: Path) -> Iterator[Target]:
    """The tap, with a ring that is released as a shipper would, but by nobody who costs anything."""
    path = directory / "bench.ring"
    ring = Ring.create(path, StreamIdentity("bench", "bench", 1, "ab" * 16), {0: DISK}, RING, 65536)
    write_exports(exports_path(path), {EXPORT: (0, DISK)})
    stop = threading.Event()

    def release() -> None:
        while not stop.wait(0.005):
            ring.words[Word.RELEASED] = ring.words[Word.PUBLISHED]

    def check() -> None:
        if ring.words[Word.DROPPED]:
            raise RuntimeError("the ring was full: this would measure the dropping of writes")

    releaser = threading.Thread(target=release)
    releaser.start()
    tap_socket = directory / "tap.sock"
    try:
        arguments = ["-m", "drctl.replication.tap", str(path), str(tap_socket), str(directory / "bell")]
        with process(sys.executable, *arguments) as started:
            wait_for(tap_socket.exists)
            yield Target("tap", str(tap_socket), EXPORT, started.pid, check)
    finally:
        stop.set()
        releaser.join()
        ring.close()


@contextmanager
def pipeline() -> Iterator[Target]:
    """The tap with all that is behind it in production, its journal on the disk of /var/tmp."""
    with stream(DISK, ring_bytes=2 * RING) as rig:
        start(rig)
        tap_socket = start_tap(rig)

        def after() -> dict[str, float]:
            backlog, age = rig.status()["backlog_bytes"], rpo(rig)
            if rig.status()["ring"]["dropped"]:
                raise RuntimeError("the ring was full: this would measure the dropping of writes")
            return {"backlog_MB": backlog / 1e6, "rpo_s": age, "drain_s": drained(rig)}

        yield Target("pipeline", str(tap_socket), EXPORT, rig.processes["tap"].pid, after=after)


@contextmanager
def slow_disk(directory: Path) -> Iterator[str]:
    """A disk that takes 1 ms for each write; the qemu-storage-daemon option that uses it."""
    path = directory / "slow.sock"
    arguments = ["--filter=delay", "memory", f"size={DISK}", "delay-write=1ms"]
    with process("nbdkit", "--foreground", "--threads=32", "--unix", str(path), *arguments):
        wait_for(path.exists)
        yield f"driver=nbd,server.type=unix,server.path={path}"


@contextmanager
def nbdkit(directory: Path) -> Iterator[Target]:
    """A memory disk served by C code of others: the peer to beat."""
    path = directory / "nbdkit.sock"
    with process("nbdkit", "--foreground", "--unix", str(path), "memory", f"size={DISK}") as started:
        wait_for(path.exists)
        yield Target("nbdkit memory", str(path), "", started.pid)


@contextmanager
def storage(directory: Path, kind: str) -> Iterator[tuple[Monitor, str]]:
    """A qemu-storage-daemon with the guest's disk; its monitor, and the address of the disk as the guest sees it."""
    image, monitor, device = directory / "disk.raw", directory / f"{kind}.qmp", directory / f"{kind}.dev"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, DISK)
    slow = slow_disk(directory) if kind == "slow" else nullcontext(f"driver=null-co,size={DISK}")
    with slow as protocol:
        protocol = f"driver=file,filename={image}" if kind == "file" else protocol
        with serving(protocol, monitor, device) as connected:
            yield connected, f"nbd+unix:///guest?socket={device}"
    image.unlink()


@contextmanager
def serving(protocol: str, monitor: Path, device: Path) -> Iterator[Monitor]:
    arguments = [
        "--blockdev", f"{protocol},node-name=protocol", "--blockdev", "driver=raw,file=protocol,node-name=source",
        "--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off", "--monitor", "chardev=qmp",
        "--nbd-server", f"addr.type=unix,addr.path={device}",
        "--export", "type=nbd,id=guest,node-name=source,name=guest,writable=on",
    ]  # fmt: skip
    with process("qemu-storage-daemon", *arguments):
        connected = Monitor(monitor)
        try:
            yield connected
        finally:
            connected.close()


@contextmanager
def mirrored(monitor: Monitor, target: Target) -> Iterator[None]:
    if not target.socket:
        yield
        return
    server = {"type": "unix", "path": target.socket}
    monitor("blockdev-add", **{"driver": "nbd", "node-name": "target", "server": server, "export": target.export})
    job = {
        "job-id": "mirror", "device": "source", "target": "target", "sync": "none", "copy-mode": "write-blocking",
        "on-target-error": "stop", "granularity": 4096, "auto-dismiss": False,
    }  # fmt: skip
    monitor("blockdev-mirror", **job)
    wait_for(lambda: status(monitor) == "ready")
    yield
    if status(monitor) != "ready":
        raise RuntimeError("the mirror did not survive the run")
    monitor("block-job-cancel", device="mirror")
    wait_for(lambda: status(monitor) == "concluded")
    monitor("job-dismiss", id="mirror")
    monitor("blockdev-del", **{"node-name": "target"})
    target.check()


def status(monitor: Monitor) -> str:
    return str(monitor("query-jobs")[0]["status"])  # type: ignore[index]


def processor_seconds(pid: int) -> float:
    """User and system time of all threads of a process."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(address: str, load: Load, seconds: int, target: Target) -> dict[str, float]:
    """One run, with the processor time that the target spent on each write: it does not depend on who else ran."""
    before = processor_seconds(target.pid)
    result = fio(address, load, seconds)
    spent = processor_seconds(target.pid) - before
    return result | {"cpu_us": spent / result.pop("writes") * 1e6} | target.after()


def fio(address: str, load: Load, seconds: int) -> dict[str, float]:
    """Random writes over the whole disk: writes per second, and microseconds until each was acknowledged."""
    done = subprocess.run(
        ["fio", "--name=guest", "--ioengine=nbd", f"--uri={address}", "--rw=randwrite", f"--bs={load.block}",
         f"--iodepth={load.depth}", f"--size={DISK}", f"--runtime={seconds}",
         f"--io_size={BURST}", "--thread",
         "--randrepeat=0", "--norandommap", "--output-format=json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    write = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write"]
    latency = write["clat_ns"]["percentile"]
    return {
        "writes": write["total_ios"],
        "iops": write["iops"],
        "MB/s": write["bw_bytes"] / 1e6,
        "p50_us": latency["50.000000"] / 1e3,
        "p99_us": latency["99.000000"] / 1e3,
    }


def measure(directory: Path, kind: str, targets: list[Target], options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one source: load, target, medians of all rounds, and every single run."""
    loads = [load for load in LOADS if not options.load or load.name in options.load]
    if kind == "slow" and not options.load:
        loads = [load for load in loads if load.depth <= 16]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    with storage(directory, kind) as (monitor, address):
        for target in targets:  # page in both sides
            with mirrored(monitor, target):
                fio(address, Load("1M", 8), 1)
                target.after()
        for number in range(options.rounds):
            for load in loads:
                turn = number % len(targets)
                for target in targets[turn:] + targets[:turn]:
                    with mirrored(monitor, target):
                        result = run(address, load, options.seconds, target)
                        runs.setdefault((load.name, target.name), []).append(result)
    rows = []
    for (load_name, target_name), results in runs.items():
        middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
        rows.append({"source": kind, "load": load_name, "target": target_name, **middle, "runs": results})
    return rows


def table(rows: list[dict[str, object]], peer: str) -> Iterator[str]:
    """A Markdown table; rates as a part of the peer's and of the disk's without a mirror, and what is added to those
    latencies."""
    yield (
        f"| source | load | target | writes/s | MB/s | p50 µs | p99 µs | target's CPU µs/write | rate / {peer} "
        "| rate / no mirror | p50 added | p99 added ms | backlog MB | drain s | RPO s |"
    )
    yield "|---" * 15 + "|"
    found = {(row["source"], row["load"], row["target"]): row for row in rows}
    for row in rows:
        theirs, plain = (found.get((row["source"], row["load"], name)) for name in (peer, "no mirror"))
        cells = [f"{row['iops']:,.0f}", f"{row['MB/s']:,.0f}", f"{row['p50_us']:,.0f}", f"{row['p99_us']:,.0f}"]
        cells += [f"{row['cpu_us'] or 0:,.1f}"]
        cells += [f"{row['iops'] / other['iops']:.2f}" if other else "–" for other in (theirs, plain)]  # type: ignore[operator]
        if plain:
            cells += [f"{row['p50_us'] / plain['p50_us'] - 1:+.0%}"]  # type: ignore[operator]
            cells += [f"{(row['p99_us'] - plain['p99_us']) / 1000:+.2f}"]  # type: ignore[operator]
        else:
            cells += ["–", "–"]
        cells += [f"{row[name]:.1f}" if name in row else "–" for name in ("backlog_MB", "drain_s", "rpo_s")]
        yield f"| {row['source']} | {row['load']} | {row['target']} | " + " | ".join(cells) + " |"


def machine() -> dict[str, object]:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")

    def version(*arguments: str) -> str:
        return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout.splitlines()[0]

    return {
        "cpu": model.partition(": ")[2],
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": version("qemu-storage-daemon", "--version"),
        "nbdkit": version("nbdkit", "--version"),
        "fio": version("fio", "--version"),
    }


def other(text: str) -> Target:
    """`NAME:socket=PATH,export=NAME`: something that listens already, e.g. a whole pipeline."""
    name, _, rest = text.rpartition(":socket=")
    path, _, export = rest.partition(",export=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r}; write NAME:socket=PATH,export=NAME")
    return Target(name or "other", path, export)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=2, help="of each run (fio takes whole ones)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", choices=["file", "null", "slow", "all"], help="default: file and slow")
    parser.add_argument("--load", action="append", choices=[load.name for load in LOADS], help="default: all")
    parser.add_argument("--target", action="append", type=other, default=[], help="another target, already listening")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tap.json")
    options = parser.parse_args(arguments)
    before = machine()
    memory, disk = (
        Path(tempfile.mkdtemp(prefix="drctl-bench-", dir="/dev/shm")),
        Path(tempfile.mkdtemp(prefix="drctl-bench-", dir="/var/tmp")),
    )
    try:
        with nbdkit(memory) as peer, tap(memory) as ours, pipeline() as whole:
            targets = [Target("no mirror"), peer, ours, whole, *options.target]
            kinds = {None: ["file", "slow"], "all": ["file", "null", "slow"]}.get(options.source, [options.source])
            rows = [row for kind in kinds for row in measure(disk, kind, targets, options)]
    finally:
        shutil.rmtree(memory)
        shutil.rmtree(disk)
    lines = list(table(rows, "nbdkit memory"))
    print("\n".join(lines))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"seconds": options.seconds, "rounds": options.rounds, "machine": before, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
