"""How long the first sync of a disk takes, against `nbdcopy --flush` of the same disk over the same link to a file.

    python benchmarks/first_sync.py [--size 8GiB] [--filled 0.25] [--output benchmarks/results/first_sync.json]

The disk is a sparse raw file in memory, served by qemu-nbd; its filled part is one half random, one half text (zstd-1
makes 0.46 of it), in pieces of 64 MiB spread evenly. The copy is done when it is durable: SYNC_END acknowledged, or
nbdcopy's flush. `1 Gbit/s` runs in a network namespace of its own whose loopback is held to that rate by tc tbf (needs
root; left out with a note where that does not work); `uncapped` is the plain loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pipeline import payloads
from benchmarks.stream_rig import MiB, cpu_seconds, disk_rate, start, stream
from drctl.model.extent import parse_bytes
from tests.integration.link_rig import free_port, until

PIECE = 64 * MiB


def fill(path: Path, size: int, part: float) -> int:
    """Write the data; the bytes written."""
    text = (b"".join(payloads(65536, "compressible")) * (PIECE // (4 * MiB) + 1))[:PIECE]
    count = max(2, round(size * part / PIECE))
    with path.open("r+b") as file:
        for number in range(count):
            file.seek(number * (size // count) // MiB * MiB)
            file.write(os.urandom(PIECE) if number % 2 else text)
    return count * PIECE


def ours(size: int, part: float, store: str) -> dict:
    with stream(size, ring_bytes=64 * MiB, store=store, slots=16384) as rig:
        filled = fill(rig.guest.path(1), size, part)
        start(rig, sync=False)
        pids = {name: rig.processes[name].pid for name in ("shipper", "receiver")}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        until(lambda: rig.status()["needs"] != "unknown")
        begun = time.monotonic()
        rig.sync("initial", 300)
        took = time.monotonic() - begun
        cpu = {f"{name}_cpu_s": round(cpu_seconds(pid) - before[name], 2) for name, pid in pids.items()}
        sent = rig.status()["link"]["sent_bytes"]
        return {
            "what": "drctl",
            "seconds": round(took, 2),
            "filled_MB": filled // 10**6,
            "link_MB": sent // 10**6,
            **cpu,
        }


def theirs(size: int, part: float, store: str) -> dict:
    memory = Path(tempfile.mkdtemp(prefix="drctl-bench-", dir="/dev/shm"))
    disk = Path(tempfile.mkdtemp(prefix="drctl-bench-", dir=store))
    image, port = memory / "disk.raw", free_port()
    image.touch()
    os.truncate(image, size)
    try:
        filled = fill(image, size, part)
        serve = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-b", "127.0.0.1", "-p", str(port), "-x", "d", image]
        with subprocess.Popen(serve) as server:
            uri = f"nbd://127.0.0.1:{port}/d"
            until(lambda: subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False).returncode == 0)
            copy = disk / "copy.raw"
            copy.touch()
            os.truncate(copy, size)
            begun = time.monotonic()
            subprocess.run(["nbdcopy", "--flush", "--destination-is-zero", uri, str(copy)], check=True, timeout=300)
            took = time.monotonic() - begun
            server.terminate()
        return {"what": "nbdcopy --flush", "seconds": round(took, 2), "filled_MB": filled // 10**6}
    finally:
        shutil.rmtree(memory)
        shutil.rmtree(disk)


def both(link: str, options: argparse.Namespace) -> list[dict]:
    size = parse_bytes(options.size)
    rows = [{"link": link, **run(size, options.filled, options.store)} for run in (theirs, ours)]
    rows[1]["ratio"] = round(rows[1]["seconds"] / rows[0]["seconds"], 2)
    return rows


def capped(options: argparse.Namespace) -> list[dict]:
    """The same in a network namespace whose loopback is slow. Run as a process, because a namespace is one's own."""
    script = (
        "ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 1mb latency 50ms && exec "
        + " ".join([sys.executable, str(Path(__file__).resolve()), "--inner", "--size", options.size,
                    "--filled", str(options.filled), "--store", options.store])
    )  # fmt: skip
    done = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"no capped link here: {done.stderr[-400:]}")
        return []
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8GiB")
    parser.add_argument("--filled", type=float, default=0.25)
    parser.add_argument("--store", default="/var/tmp", help="directory on the disk that the copies are made on")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "first_sync.json")
    options = parser.parse_args()
    if options.inner:
        sys.stdout.write(json.dumps(both("1 Gbit/s", options)) + "\n")
        return
    disk = round(disk_rate(options.store), 1)
    rows = capped(options) + both("uncapped", options)
    result = {"size": options.size, "disk_MBps": disk, "load_average": os.getloadavg(), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.size}, {options.filled:.0%} filled; the disk takes {disk} MB/s with fdatasync after each 4 MiB")
    print("| link | copy | seconds | over the link MB | ratio |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['link']} | {row['what']} | {row['seconds']} | {row.get('link_MB', '')} | {row.get('ratio', '')} |"
        )


if __name__ == "__main__":
    main()
