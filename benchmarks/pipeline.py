"""How fast the stream goes: ring → shipper → TLS → receiver → journal with fsync, at given rates of writes.

    python benchmarks/pipeline.py [--seconds 10] [--rates 100,200] [--directory DIR]

For each kind of write (4 KiB and 64 KiB, compressible and random data) a writer process fills the ring at each rate
(MB/s). A rate is *sustained* when the ring's backlog at the end is no larger than two seconds of it. CPU seconds per GB
are from /proc/PID/stat of shipper and receiver. The writer's own CPU is shown because it shares the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drctl.store.ring import Ring
from drctl.store.ring_writer import RingWriter
from drctl.wire.ring import Word
from tests.integration.link_rig import LinkRig, MiB

DISK = 1024 * MiB
GOAL = 80.0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def payloads(size: int, kind: str) -> list[bytes]:
    dice = random.Random(1)
    if kind == "random":
        return [dice.randbytes(size) for _ in range(64)]
    words = [f"{dice.randrange(1 << 20):x} ".encode() for _ in range(4096)]
    return [b"".join(dice.choices(words, k=size // 3))[:size] for _ in range(64)]


def write_at(ring_path: str, bell: str, size: int, kind: str, rate: float, seconds: float, result) -> None:
    """The tap's part alone: append, publish, ring the bell; in batches of 10 ms."""
    ring = Ring.open(Path(ring_path))
    writer = RingWriter(ring)
    ring.words[Word.ORDERED_SEQUENCE] = ring.words[Word.PUBLISHED]
    ring.words[Word.ORDERED_STAMP] = ring.words[Word.ORDER_STAMP]
    data = [memoryview(each) for each in payloads(size, kind)]
    dice = random.Random(2)
    places = [dice.randrange(DISK // size) * size for _ in range(4096)]
    door = os.open(bell, os.O_RDWR | os.O_NONBLOCK)
    begun, written = time.monotonic(), 0
    while (now := time.monotonic()) < begun + seconds:
        writer.poll(time.monotonic_ns())
        while written * size < (now - begun) * rate * 1e6:
            writer.append(1, places[written % 4096], data[written % 64])
            written += 1
        writer.publish()
        if ring.words[Word.READER_WAITING]:
            ring.words[Word.READER_WAITING] = 0
            os.write(door, b"x")
        time.sleep(0.01)
    result.put((written, time.process_time()))


def one(rig: LinkRig, size: int, kind: str, rate: float, seconds: float) -> dict:
    pids = {name: rig.processes[name].pid for name in ("shipper", "receiver")}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    start = rig.status()
    result: multiprocessing.Queue = multiprocessing.Queue()
    args = (str(rig.guest.ring_path), str(rig.guest.bell_path), size, kind, rate, seconds, result)
    process = multiprocessing.Process(target=write_at, args=args)
    begun = time.monotonic()
    process.start()
    written, writer_cpu = result.get()
    backlog = rig.status()["backlog_bytes"]
    process.join()
    while (end := rig.status())["backlog_bytes"]:
        time.sleep(0.05)
    took = time.monotonic() - begun
    gigabytes = written * size / 1e9
    return {
        "size": size,
        "data": kind,
        "rate": rate,
        "written_MB": round(gigabytes * 1000),
        "backlog_MB": round(backlog / 1e6, 1),
        "dropped": end["ring"]["dropped"] - start["ring"]["dropped"],
        "drained_MBps": round(gigabytes * 1000 / took, 1),
        "wire_ratio": round((end["link"]["sent_bytes"] - start["link"]["sent_bytes"]) / (gigabytes * 1e9), 3),
        "sustained": backlog <= 2 * rate * 1e6 and end["ring"]["dropped"] == start["ring"]["dropped"],
        "writer_cpu_s_per_GB": round(writer_cpu / gigabytes, 2),
        **{
            f"{name}_cpu_s_per_GB": round((cpu_seconds(pid) - before[name]) / gigabytes, 2)
            for name, pid in pids.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rates", default="80,160")
    parser.add_argument("--sizes", default="4096,65536")
    parser.add_argument("--directory", default="/var/tmp")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="drctl-pipeline-", dir=options.directory))
    short = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))
    rig = LinkRig(directory, short, sizes={1: DISK}, ring_bytes=512 * MiB, slots=1 << 18, interval=5)
    try:
        rig.start_receiver()
        rig.start_shipper(peer=f"127.0.0.1:{rig.receiver_port}")
        rig.serve_disks()
        rig.sync("initial", 120)
        for size in map(int, options.sizes.split(",")):
            for kind in ("compressible", "random"):
                for rate in map(float, options.rates.split(",")):
                    print(json.dumps(one(rig, size, kind, rate, options.seconds)), flush=True)
    finally:
        rig.close()
        shutil.rmtree(directory)
        shutil.rmtree(short)


if __name__ == "__main__":
    main()
