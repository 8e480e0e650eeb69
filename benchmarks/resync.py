"""A full pass over a disk that differs a little from its replica, against reading it once (`nbdcopy SRC null:`).

    python benchmarks/resync.py [--size 1GiB] [--store /var/tmp] [--output benchmarks/results/resync.json]

The disk is a raw file in memory, half filled (random and text by turns, in pieces of 1 MiB), served by qemu-nbd. After
the first sync 0, 0.1, 1 and 10 % of its filled 4 KiB blocks are changed where no tap sees it (one half random, one half
words), scattered one by one or in clusters of 1 MiB, and a new ring makes a full pass necessary. `cold` is the first
pass: the receiver has no signatures yet, so both sides read and hash all. Bytes: what crossed the link in both
directions, against the zstd-1 size of exactly the changed blocks, all in one; `over` is what crossed beyond 1.3 times
that, as a part of the disk (goal: 0.05 % at most). rsync, where there is one, copies the same changes from file to file
on this machine, without a network.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pipeline import payloads
from benchmarks.stream_rig import MiB, cpu_seconds, start, stream
from drctl.model.extent import parse_bytes
from tests.integration.link_rig import until

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 4096
CASES = [("cold", 0.0), ("scattered", 0.0)] + [
    (how, part) for part in (0.001, 0.01, 0.1) for how in ("scattered", "clustered")
]


def fill(path: Path, size: int) -> None:
    text = (b"".join(payloads(65536, "compressible")) * 17)[:MiB]
    with path.open("r+b") as file:
        for at in range(0, size // 2, MiB):
            file.seek(at)
            file.write(os.urandom(MiB) if at // MiB % 2 else text)


def change(path: Path, size: int, how: str, part: float, seed: int) -> list[bytes]:
    """Change blocks of the filled half; their new contents."""
    dice = random.Random(seed)
    count = round(size // 2 // BLOCK * part)
    if how == "clustered":
        runs = dice.sample(range(size // 2 // MiB), -(-count * BLOCK // MiB))
        blocks = [run * (MiB // BLOCK) + n for run in runs for n in range(MiB // BLOCK)][:count]
    else:
        blocks = dice.sample(range(size // 2 // BLOCK), count)
    words = [dice.randbytes(dice.randrange(2, 7)).hex().encode() for _ in range(3000)]
    made = []
    with path.open("r+b") as file:
        for number, block in enumerate(blocks):
            data = dice.randbytes(BLOCK) if number % 2 else b" ".join(dice.choices(words, k=BLOCK // 4))[:BLOCK]
            file.seek(block * BLOCK)
            file.write(data)
            made.append(data)
    return made


def read_once(rig) -> float:
    """Seconds of one pass that throws all away."""
    export = rig.exports["1"]
    uri = f"nbd+unix:///{export['export']}?socket={export['socket']}"
    begun = time.monotonic()
    subprocess.run(["nbdcopy", uri, "null:"], check=True, timeout=600)
    return time.monotonic() - begun


def link_bytes(status: dict) -> int:
    """What crossed in both directions."""
    return status["link"]["sent_bytes"] + status["link"]["received_bytes"]


def one(rig, size: int, how: str, part: float, seed: int) -> dict:
    rig.kill("shipper")
    changed = change(rig.guest.path(1), size, how, part, seed)
    rig.guest.new_ring(f"{seed:032x}")
    rig.start_shipper(peer=f"127.0.0.1:{rig.receiver_port}", interval=600)
    until(lambda: rig.status()["needs"] == "full", 60)
    once = min(read_once(rig) for _ in range(2))
    pids = {name: rig.processes[name].pid for name in ("shipper", "receiver")}
    cpu, sent = {name: cpu_seconds(pid) for name, pid in pids.items()}, link_bytes(rig.status())
    begun = time.monotonic()
    rig.sync("full", 600)
    took = time.monotonic() - begun
    status = rig.status()
    crossed = link_bytes(status) - sent
    least = len(zstd.compress(b"".join(changed), 1)) if changed else 0
    rig.mark(timeout=60)
    return {
        "how": how,
        "part": part,
        "seconds": round(took, 2),
        "read_once_s": round(once, 2),
        "ratio": round(took / once, 2),
        "changed_bytes": len(changed) * BLOCK,
        "changed_zstd": least,
        "sent_bytes": status["sync"]["sent_bytes"],
        "crossed_bytes": crossed,
        "over": round((crossed - 1.3 * least) / size, 6),
        **{f"{name}_cpu_s": round(cpu_seconds(pid) - cpu[name], 2) for name, pid in pids.items()},
    }


def rsync(size: int, store: str) -> list[dict]:
    """The peer: the same changes, from a file in memory to one in the store."""
    if shutil.which("rsync") is None:
        return []
    ours, theirs = Path("/dev/shm/drctl-bench-rsync.raw"), Path(store) / "drctl-bench-rsync.raw"
    rows = []
    try:
        ours.touch()
        os.truncate(ours, size)
        fill(ours, size)
        shutil.copyfile(ours, theirs)
        for seed, (how, part) in enumerate(CASES[1:], 100):
            change(ours, size, how, part, seed)
            begun = time.monotonic()
            subprocess.run(["rsync", "--inplace", "--no-whole-file", "--ignore-times", ours, theirs], check=True)
            rows.append({"how": how, "part": part, "seconds": round(time.monotonic() - begun, 2)})
    finally:
        ours.unlink(missing_ok=True)
        theirs.unlink(missing_ok=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--store", default="/var/tmp", help="directory on the disk that the replica is on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "resync.json")
    options = parser.parse_args()
    size = parse_bytes(options.size)
    rows = []
    with stream(size, ring_bytes=64 * MiB, store=options.store, slots=16384, interval=600) as rig:
        fill(rig.guest.path(1), size)
        start(rig, sync=False)
        rig.sync("initial", 300)
        rig.mark(timeout=60)
        for seed, (how, part) in enumerate(CASES, 1):
            rows.append(one(rig, size, how, part, seed))
            print(json.dumps(rows[-1]), flush=True)
    result = {"size": options.size, "load_average": os.getloadavg(), "rows": rows, "rsync": rsync(size, options.store)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print("| changed | s | read once s | ratio | changed, zstd | crossed | over, of the disk |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['part']:.1%} {row['how']} | {row['seconds']} | {row['read_once_s']} | {row['ratio']} | "
            f"{row['changed_zstd'] / 1e6:.2f} MB | {row['crossed_bytes'] / 1e6:.2f} MB | {row['over']:.3%} |"
        )
    for row in result["rsync"]:
        print(f"rsync {row['part']:.1%} {row['how']}: {row['seconds']} s")


if __name__ == "__main__":
    main()
