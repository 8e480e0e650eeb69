"""How much the stream sustains: ring → shipper → TLS → receiver → journal with fsync, both ends on this machine.

    python benchmarks/pipeline.py [--seconds 45] [--memory-seconds 15] [--output benchmarks/results/pipeline.json]

For each kind of write (4 KiB and 64 KiB, compressible and random data) a writer process keeps at most 64 MiB of backlog
in the ring: what it gets rid of is what is sustained without a growing backlog. First with the journal on a disk
(`--store`), then for some seconds in memory: where the two differ the disk is the limit. CPU seconds per GB are from
/proc/PID/stat; the writer's own are shown because it shares the machine. `limit` names the stage: the disk when CPU was
idle, else the process that used most of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stream_rig import MiB, cpu_seconds, disk_rate, drained, rpo, start, stream
from drctl.store.ring import Ring
from drctl.store.ring_writer import RingWriter
from drctl.wire.ring import Word
from tests.integration.link_rig import LinkRig

DISK = 1024 * MiB
BACKLOG = 64 * MiB
PROCESSES = ("shipper", "receiver")


def payloads(size: int, kind: str) -> list[bytes]:
    dice = random.Random(1)
    if kind == "random":
        return [dice.randbytes(size) for _ in range(64)]
    words = [f"{dice.randrange(1 << 20):x} ".encode() for _ in range(4096)]
    return [b"".join(dice.choices(words, k=size // 3))[:size] for _ in range(64)]


def write_at(ring_path: str, bell: str, size: int, kind: str, rate: float, seconds: float, result) -> None:
    """The tap's part alone: append, publish, ring the bell; at `rate` MB/s, 0: as fast as the backlog allows."""
    ring = Ring.open(Path(ring_path))
    writer = RingWriter(ring)
    ring.words[Word.ORDERED_SEQUENCE] = ring.words[Word.PUBLISHED]
    ring.words[Word.ORDERED_STAMP] = ring.words[Word.ORDER_STAMP]
    data = [memoryview(each) for each in payloads(size, kind)]
    dice = random.Random(2)
    places = [dice.randrange(DISK // size) * size for _ in range(4096)]
    door = os.open(bell, os.O_RDWR | os.O_NONBLOCK)
    first = ring.words[Word.PUBLISHED]
    begun, written = time.monotonic(), 0
    while (now := time.monotonic()) < begun + seconds:
        writer.poll(time.monotonic_ns())
        room = BACKLOG // size - (first + written - ring.words[Word.RELEASED])
        due = (now - begun) * rate * 1e6 / size - written if rate else room
        for _ in range(int(min(due, MiB // size * 4))):
            writer.append(1, places[written % 4096], data[written % 64])
            written += 1
        writer.publish()
        if ring.words[Word.READER_WAITING]:
            ring.words[Word.READER_WAITING] = 0
            os.write(door, b"x")
        time.sleep(0.002)
    result.put((written, time.monotonic() - begun, time.process_time()))


def one(rig: LinkRig, size: int, kind: str, rate: float, seconds: float) -> dict:
    pids = {name: rig.processes[name].pid for name in PROCESSES}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    start_ = rig.status()
    result: multiprocessing.Queue = multiprocessing.Queue()
    args = (str(rig.guest.ring_path), str(rig.guest.bell_path), size, kind, rate, seconds, result)
    process = multiprocessing.Process(target=write_at, args=args)
    process.start()
    written, took, writer_cpu = result.get(timeout=seconds + 60)
    backlog, age = rig.status()["backlog_bytes"], rpo(rig)
    process.join()
    drain = drained(rig)
    end = rig.status()
    gigabytes = written * size / 1e9
    # What was still in the ring at the end was not shipped within the time.
    sustained = (written * size - backlog) / took
    cpu = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()} | {"writer": writer_cpu}
    busiest = max(PROCESSES, key=lambda name: cpu[name])
    return {
        "size": size,
        "data": kind,
        "offered_MBps": rate or None,
        "MBps": round(sustained / 1e6, 1),
        "iops": round(sustained / size),
        "backlog_MB": round(backlog / 1e6, 1),
        "drain_s": round(drain, 2),
        "rpo_s": round(age, 2),
        "dropped": end["ring"]["dropped"] - start_["ring"]["dropped"],
        "wire_ratio": round((end["link"]["sent_bytes"] - start_["link"]["sent_bytes"]) / (gigabytes * 1e9), 3),
        "cores_used": round(sum(cpu.values()) / (took + drain), 2),
        "limit": f"CPU: {busiest}" if sum(cpu.values()) / (took + drain) > 0.75 * (os.cpu_count() or 1) else "waiting",
        **{f"{name}_cpu_s_per_GB": round(spent / gigabytes, 2) for name, spent in cpu.items()},
    }


def measure(store: str, seconds: float, options: argparse.Namespace) -> list[dict]:
    rows = []
    with stream(DISK, store=store) as rig:
        start(rig)
        for size in map(int, options.sizes.split(",")):
            for kind in options.data.split(","):
                row = {"journal": store, **one(rig, size, kind, options.rate, seconds)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--memory-seconds", type=float, default=15, help="with the journal in memory; 0: not")
    parser.add_argument("--rate", type=float, default=0, help="MB/s offered; 0: as much as goes")
    parser.add_argument("--sizes", default="4096,65536")
    parser.add_argument("--data", default="compressible,random")
    parser.add_argument("--store", default="/var/tmp", help="directory on the journal's disk")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pipeline.json")
    options = parser.parse_args()
    load = os.getloadavg()
    disk = round(disk_rate(options.store), 1)
    print(f"the disk takes {disk} MB/s with fdatasync after each 4 MiB; load average {load[0]:.1f}")
    rows = measure(options.store, options.seconds, options)
    if options.memory_seconds:
        rows += measure("/dev/shm", options.memory_seconds, options)
    for row in rows:
        if row["limit"] == "waiting":
            where = "writer, or others on this machine" if row["journal"] == "/dev/shm" else f"disk ({disk} MB/s)"
            row["limit"] = where
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"seconds": options.seconds, "disk_MBps": disk, "load_average": load, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print("| journal | size | data | MB/s | IOPS | cores | shipper s/GB | receiver s/GB | wire | RPO s | limit |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['journal']} | {row['size']} | {row['data']} | {row['MBps']:,.0f} | {row['iops']:,} "
            f"| {row['cores_used']} | {row['shipper_cpu_s_per_GB']} | {row['receiver_cpu_s_per_GB']} "
            f"| {row['wire_ratio']} | {row['rpo_s']} | {row['limit']} |"
        )


if __name__ == "__main__":
    main()
