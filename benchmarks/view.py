"""How long a view takes to open, what memory it takes, and how fast it reads, over a big journal.

`python benchmarks/view.py [--records N] [--disk GIB] [--directory DIR] [--result FILE] [--keep]`. Each measurement runs
in a process of its own. Blocks are checked against the last segment that wrote them."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.journal_generator import BLOCK, blocks_of, build, fill
from benchmarks.lab_world import machine
from drctl.store.group_store import GroupStore

MiB, GiB = 1 << 20, 1 << 30
RESULT = Path(__file__).parent / "results" / "view.json"


def measure(root: Path, number: int) -> dict[str, object]:
    """In this process: open a view of checkpoint `number` and read."""
    begin = time.perf_counter()
    store = GroupStore.open(root)
    view = store.open_view(number)
    disk = view.disk("web.vda")
    opened = time.perf_counter() - begin
    begin = time.perf_counter()
    disk.read(0, MiB)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for offset in range(MiB, 65 * MiB, MiB):
        disk.read(offset, MiB)
    sequential = 64 / (time.perf_counter() - begin)
    rng = np.random.default_rng(1)
    places = rng.integers(0, disk.size // BLOCK, 300).tolist()
    begin = time.perf_counter()
    blocks = [bytes(disk.read(place * BLOCK, BLOCK)) for place in places]
    random_read = (time.perf_counter() - begin) / len(places)
    begin = time.perf_counter()
    for place in places:
        disk.read(place * BLOCK, BLOCK)
    warm = (time.perf_counter() - begin) / len(places)
    check(disk.size, number, places, blocks)
    return {
        "checkpoint": number,
        "layers": view.layers,
        "open_s": round(opened, 3),
        "first_MiB_ms": round(first * 1e3, 1),
        "sequential_MiB_s": round(sequential, 1),
        "random_4KiB_cold_ms": round(random_read * 1e3, 2),
        "random_4KiB_warm_ms": round(warm * 1e3, 3),
        "peak_rss_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def check(size: int, number: int, places: list[int], blocks: list[bytes]) -> None:
    """Every block read is of the newest segment that wrote it (marks are in the middle and at the end of segments)."""
    wanted = dict.fromkeys(places, 0)
    known = np.array(sorted(wanted), np.uint64)
    for log in range(1, (number + 1) // 2 + 1):
        written = blocks_of(log, size)
        if number == 2 * log - 1:
            written = written[: (len(written) // 16 // 2 + 1) * 16]
        for place in known[np.isin(known, written)].tolist():
            wanted[place] = fill(log)
    for place, block in zip(places, blocks, strict=True):
        if block != bytes([wanted[place]]) * BLOCK:
            raise SystemExit(f"block {place} of checkpoint {number} is wrong")


def checked(root: Path, number: int) -> object:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--directory", str(root), "--measure", str(number)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(told, end="", flush=True)
    return json.loads(told)


def save(path: Path, result: dict[str, object]) -> None:
    """Put it into the file, in place of an older one of as many records."""
    known = json.loads(path.read_text()) if path.exists() else []
    known = [each for each in known if each["records"] != result["records"]] + [result]
    path.write_text(json.dumps(sorted(known, key=lambda each: each["records"]), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--disk", type=int, default=256, help="GiB")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file that takes the result")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.directory, options.measure)))
        return
    work = Path(tempfile.mkdtemp(prefix="drctl-view-", dir=options.directory))
    try:
        begin = time.perf_counter()
        count = build(work / "big", options.records, options.disk * GiB)
        built = time.perf_counter() - begin
        used = sum(path.stat().st_size for path in work.rglob("*.*") if path.suffix in (".seg", ".run"))
        runs = sum(path.stat().st_size for path in work.rglob("*.run"))
        result: dict[str, object] = {
            "records": options.records,
            "segments": count,
            "files_MiB": used // MiB,
            "runs_MiB": runs // MiB,
            "build_s": round(built, 1),
            **machine(),
        }
        print(json.dumps(result), flush=True)
        result["views"] = [checked(work / "big", number) for number in (2 * count, count | 1)]
        options.result.parent.mkdir(exist_ok=True)
        save(options.result, result)
    finally:
        if options.keep:
            print(work)
        else:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
