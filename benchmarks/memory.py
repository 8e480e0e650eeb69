"""Memory and processor time of the processes of a stream: at rest, under full load, and at rest again.

    python benchmarks/memory.py [--idle 10] [--load 30] [--output benchmarks/results/memory.json]

Private memory (USS) is summed over /proc/PID/smaps without the ring and the dirty maps, which are files in memory and
shown apart: a page of them is `private` only because the other process has not looked at it yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stream_rig import EXPORT, MiB, cpu_seconds, drained, start, start_tap, stream
from tests.integration.link_rig import LinkRig

DISK = 1024 * MiB
PROCESSES = ("tap", "shipper", "receiver")


def memory(pid: int) -> tuple[float, float]:
    """MiB that are the process's own, and MiB of mapped files in memory (ring, maps)."""
    own = shared = 0
    in_ring = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            in_ring = "/dev/shm/" in line
        elif in_ring and word == "Rss:":
            shared += int(rest.split()[0])
        elif not in_ring and word in ("Private_Clean:", "Private_Dirty:"):
            own += int(rest.split()[0])
    return own / 1024, shared / 1024


def watch(rig: LinkRig, phase: str, seconds: float) -> list[dict]:
    """One row per process: USS at most, at the beginning and at the end; its part of a core."""
    pids = {name: rig.processes[name].pid for name in PROCESSES}
    cpu = {name: cpu_seconds(pid) for name, pid in pids.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in PROCESSES}
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        for name, pid in pids.items():
            samples[name].append(memory(pid))
        time.sleep(1)
    took = time.monotonic() - begun
    return [
        {
            "phase": phase,
            "process": name,
            "uss_MiB_max": round(max(own for own, _ in taken), 1),
            "uss_MiB_begin": round(taken[0][0], 1),
            "uss_MiB_end": round(taken[-1][0], 1),
            "ring_and_maps_MiB": round(taken[-1][1], 1),
            "cpu_percent": round(100 * (cpu_seconds(pids[name]) - cpu[name]) / took, 2),
        }
        for name, taken in samples.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=float, default=10, help="seconds")
    parser.add_argument("--load", type=float, default=30, help="seconds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    with stream(DISK, ring_bytes=256 * MiB, interval=5.0) as rig:
        start(rig)
        socket = start_tap(rig)
        time.sleep(4)
        rows = watch(rig, "idle", options.idle)
        command = [
            "fio", "--name=guest", "--ioengine=nbd", f"--uri=nbd+unix:///{EXPORT}?socket={socket}", "--rw=randwrite",
            "--bs=64k", "--iodepth=16", f"--size={DISK}", f"--runtime={options.load + 5:.0f}", "--time_based",
            "--rate=200m", "--thread", "--norandommap", "--buffer_compress_percentage=50", "--refill_buffers",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as guest:
            time.sleep(2)
            rows += watch(rig, "full load", options.load)
            guest.wait(60)
        drained(rig)
        time.sleep(4)
        rows += watch(rig, "idle again", options.idle)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"load_average": os.getloadavg(), "rows": rows}, indent=1) + "\n")
    print("| phase | process | USS MiB max | begin | end | ring and maps MiB | CPU % |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
