"""A full pass over a disk that differs a little from its replica, against reading it once (`nbdcopy SRC null:`).

    python -m benchmarks.resync [--size 8GiB] [--rounds 3] [--peer-size 2GiB] [--store /var/tmp]

The disk is a sparse raw file in memory, half filled (random and text by turns, in pieces of 1 MiB), served by qemu-nbd.
After the first sync 0, 0.1, 1 and 10 % of its filled 4 KiB blocks are changed where no tap sees it (one half random,
one half words), scattered one by one or in clusters of 1 MiB, and a new ring makes a full pass necessary; the disk is
read by nbdcopy right before and right after. The rounds go over all cases in turn, and medians are told. `cold`: the
receiver has no signatures, so both sides read and hash all; with 1 % changed that is what a failback does after it has
taken the old disks for bases (by a rename), and is told against the first sync, the full copy.

Bytes: what crossed the link in both directions, against the zstd-1 size of exactly the changed blocks, all in one;
`over` is what crossed beyond 1.3 times that, as a part of the disk (goal: 0.05 % at most).

With --peer-size the same is done to a disk of that size with `rsync --inplace --no-whole-file` beside it, from the same
file to a copy on the store's disk, both on this machine; its bytes are those that it says it sent and received.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lab_world import save
from benchmarks.pipeline import payloads
from benchmarks.stream_rig import MiB, cpu_seconds, start, stream
from drctl.model.extent import parse_bytes
from tests.integration.link_rig import LinkRig, until

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 4096
CASES = [("scattered", 0.0)] + [(how, part) for part in (0.001, 0.01, 0.1) for how in ("scattered", "clustered")]
NOISE = 64 * MiB


def fill(path: Path, size: int) -> None:
    """Half of it, each random piece another part of one long noise."""
    text = (b"".join(payloads(65536, "compressible")) * 17)[:MiB]
    noise, dice = os.urandom(NOISE), random.Random(size)
    with path.open("r+b") as file:
        for at in range(0, size // 2, MiB):
            file.seek(at)
            begin = dice.randrange(NOISE - MiB)
            file.write(noise[begin : begin + MiB] if at // MiB % 2 else text)


def change(path: Path, size: int, how: str, part: float, seed: int) -> list[bytes]:
    """Change blocks of the filled half; their new contents."""
    dice = random.Random(seed)
    count = round(size // 2 // BLOCK * part)
    if how == "clustered":
        runs = dice.sample(range(size // 2 // MiB), -(-count * BLOCK // MiB))
        blocks = [run * (MiB // BLOCK) + n for run in runs for n in range(MiB // BLOCK)][:count]
    else:
        blocks = dice.sample(range(size // 2 // BLOCK), count)
    words = b" ".join(dice.randbytes(dice.randrange(2, 7)).hex().encode() for _ in range(200_000))
    made = []
    with path.open("r+b", buffering=0) as file:
        for number, block in enumerate(blocks):
            begin = dice.randrange(len(words) - BLOCK)
            data = os.urandom(BLOCK) if number % 2 else words[begin : begin + BLOCK]
            file.seek(block * BLOCK)
            file.write(data)
            made.append(data)
    return made


def zstd_size(blocks: list[bytes]) -> int:
    """Of all in one, as one stream."""
    packer = zstd.ZstdCompressor(1)
    return sum(len(packer.compress(block)) for block in blocks) + len(packer.flush()) if blocks else 0


def read_once(rig: LinkRig) -> float:
    """Seconds of one pass that throws all away."""
    export = rig.exports["1"]
    uri = f"nbd+unix:///{export['export']}?socket={export['socket']}"
    begun = time.monotonic()
    subprocess.run(["nbdcopy", uri, "null:"], check=True, timeout=600)
    return time.monotonic() - begun


def link_bytes(status: dict) -> int:
    """What crossed in both directions."""
    return status["link"]["sent_bytes"] + status["link"]["received_bytes"]


def settled(rig: LinkRig) -> None:
    """Until nothing is merged or promoted in the background."""

    def pids() -> list[int]:
        listed = subprocess.run(
            ["pgrep", "-P", str(rig.processes["receiver"].pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def quiet() -> bool:
        before = sum(cpu_seconds(pid) for pid in pids())
        time.sleep(1)
        return sum(cpu_seconds(pid) for pid in pids()) - before < 0.1

    until(quiet, 120, why="maintenance at rest")


def forget_signatures(rig: LinkRig) -> None:
    rig.kill("receiver")
    for path in (rig.store_root / "signatures").glob("*.*"):
        path.unlink()
    rig.start_receiver()


def one(rig: LinkRig, size: int, case: tuple[str, float], seed: int, *, cold: bool = False) -> dict:
    how, part = case
    rig.kill("shipper")
    if cold:
        forget_signatures(rig)
    changed = change(rig.guest.path(1), size, how, part, seed)
    rig.guest.new_ring(f"{seed:032x}")
    rig.start_shipper(peer=f"127.0.0.1:{rig.receiver_port}", interval=600)
    until(lambda: rig.status()["needs"] == "full", 60)
    settled(rig)
    before = read_once(rig)
    pids = {name: rig.processes[name].pid for name in ("shipper", "receiver", "nbd1")}
    cpu, sent = {name: cpu_seconds(pid) for name, pid in pids.items()}, link_bytes(rig.status())
    begun = time.monotonic()
    rig.sync("full", 900)
    took = time.monotonic() - begun
    used = {f"{name}_cpu_s": round(cpu_seconds(pid) - cpu[name], 2) for name, pid in pids.items()}
    status = rig.status()
    once = (before + read_once(rig)) / 2
    crossed, least = link_bytes(status) - sent, zstd_size(changed)
    rig.mark(timeout=60)
    return {
        "how": how,
        "part": part,
        "cold": cold,
        "seconds": round(took, 2),
        "read_once_s": round(once, 2),
        "ratio": round(took / once, 2),
        "changed_bytes": len(changed) * BLOCK,
        "changed_zstd": least,
        "sent_bytes": status["sync"]["sent_bytes"],
        "crossed_bytes": crossed,
        "over": round((crossed - 1.3 * least) / size, 6),
        "load": round(os.getloadavg()[0], 1),
        **used,
    }


def rsync(ours: Path, theirs: Path) -> dict:
    """The peer: seconds, and bytes that crossed between its two processes."""
    begun = time.monotonic()
    command = ["rsync", "--inplace", "--no-whole-file", "--ignore-times", "--stats", ours, theirs]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    took = time.monotonic() - begun
    counts = [int(each.replace(",", "")) for each in re.findall(r"Total bytes (?:sent|received): ([\d,]+)", told)]
    return {"rsync_s": round(took, 2), "rsync_bytes": sum(counts)}


def first_sync(rig: LinkRig, size: int) -> dict:
    fill(rig.guest.path(1), size)
    start(rig, sync=False)
    begun = time.monotonic()
    rig.sync("initial", 900)
    took = time.monotonic() - begun
    crossed = link_bytes(rig.status())
    rig.mark(timeout=60)
    return {"seconds": round(took, 2), "crossed_bytes": crossed}


def measure(size: int, rounds: int, options: argparse.Namespace, peer: Path | None) -> dict:
    rows = []
    with stream(size, ring_bytes=64 * MiB, store=options.store, slots=16384, interval=600) as rig:
        copy = first_sync(rig, size)
        if peer is not None:
            shutil.copyfile(rig.guest.path(1), peer)
        seed = 0
        for number in range(rounds):
            colds = [("scattered", 0.0, True), ("scattered", 0.01, True)] if number == 0 and peer is None else []
            for how, part, cold in [*colds, *((*case, False) for case in CASES)]:
                seed += 1
                row = one(rig, size, (how, part), seed, cold=cold)
                if peer is not None:
                    row |= rsync(rig.guest.path(1), peer)
                rows.append(row)
                print(json.dumps(row), flush=True)
    return {"size": size, "first_sync": copy, "rows": rows, "medians": medians(rows)}


def medians(rows: list[dict]) -> list[dict]:
    """One row for each case."""
    made = []
    for how, part, cold in dict.fromkeys((row["how"], row["part"], row["cold"]) for row in rows):
        same = [row for row in rows if (row["how"], row["part"], row["cold"]) == (how, part, cold)]
        numbers = {name: median(row[name] for row in same) for name in same[0] if name not in ("how", "part", "cold")}
        made.append({"how": how, "part": part, "cold": cold, "rounds": len(same), **numbers})
    return made


def table(result: dict) -> None:
    print(f"\n{result['size'] / 2**30:g} GiB, half filled; first sync {result['first_sync']}")
    print("| changed | s | read once s | ratio | changed, zstd | crossed | over, of the disk | rsync s | rsync bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in result["medians"]:
        peer = f"{row['rsync_s']} | {row['rsync_bytes'] / 1e6:.2f} MB" if "rsync_s" in row else "- | -"
        print(
            f"| {row['part']:.1%} {row['how']}{' cold' if row['cold'] else ''} | {row['seconds']:.2f} | "
            f"{row['read_once_s']:.2f} | {row['ratio']:.2f} | {row['changed_zstd'] / 1e6:.2f} MB | "
            f"{row['crossed_bytes'] / 1e6:.2f} MB | {row['over']:.4%} | {peer} |"
        )


def beside(options: argparse.Namespace) -> dict | None:
    if not parse_bytes(options.peer_size) or shutil.which("rsync") is None:
        return None
    peer = Path(options.store) / f"drctl-bench-rsync-{os.getpid()}.raw"
    try:
        return measure(parse_bytes(options.peer_size), 1, options, peer)
    finally:
        peer.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8GiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-size", default="2GiB", help="0: no rsync")
    parser.add_argument("--store", default="/var/tmp", help="directory on the disk that the replica is on")
    parser.add_argument("--output", default="resync", help="name of the result")
    options = parser.parse_args()
    result = {"disk": measure(parse_bytes(options.size), options.rounds, options, None), "beside": beside(options)}
    save(options.output, result)
    for each in result.values():
        if each is not None:
            table(each)


if __name__ == "__main__":
    main()
