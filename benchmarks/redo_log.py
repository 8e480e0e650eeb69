"""How fast one core reads the grains of a redo log: tables parsed, every grain copied out of the page cache.

Scattered: neighbours on the disk are nowhere neighbours in the file, the worst case; or in runs of 64 KiB. On a busy
machine the CPU's time counts."""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from drctl.hypervisor import redo_log
from drctl.model.extent import SECTOR, Extent

GRAIN = 4096
TABLE = 4096


def sesparse(path: Path, disk: int, grains: int, run: int) -> None:
    """A seSparse redo log with `grains` grains in runs of `run`, in random order."""
    chance = np.random.default_rng(7)
    runs = np.sort(chance.choice(disk // GRAIN // run, grains // run, replace=False))
    offsets = (chance.permutation(runs)[:, None] * run + np.arange(run)).ravel()
    index = np.arange(len(offsets), dtype=np.uint64)
    tables = disk // GRAIN // TABLE
    entries = np.zeros(tables * TABLE, "<u8")
    entries[offsets] = (
        (np.uint64(3) << np.uint64(60)) | (index & np.uint64(0xFFF)) << np.uint64(48) | index >> np.uint64(12)
    )
    directory = np.uint64(1 << 60) | np.arange(tables, dtype="<u8")
    sectors = -(-tables * 8 // SECTOR)
    at = 2048 + sectors
    first = at + tables * 64
    words = [
        0xCAFEBABE,
        0x200000001,
        disk // SECTOR,
        8,
        64,
        *[0] * 5,
        1,
        1,
        2,
        2,
        4,
        2044,
        2048,
        sectors,
        at,
        tables * 64,
    ]
    words += [0, 0, 0, 0, first, disk // SECTOR]
    with path.open("wb") as file:
        file.write(struct.pack("<26Q", *words).ljust(SECTOR, b"\0"))
        file.write(struct.pack("<4Q", 0xCAFECAFE, 0, 1, 0).ljust(SECTOR, b"\0"))
        file.seek(2048 * SECTOR)
        file.write(directory.tobytes().ljust(sectors * SECTOR, b"\0"))
        file.write(entries.tobytes())
        for begin in range(0, len(offsets), 65536):
            file.write(os.urandom(min(65536, len(offsets) - begin) * GRAIN))


def measure(path: Path) -> dict[str, float]:
    descriptor = os.open(path, os.O_RDONLY)
    size = path.stat().st_size

    def read(ranges: Sequence[Extent]) -> list[bytes]:
        return [os.pread(descriptor, one.length, one.offset) for one in ranges]

    began, cpu = time.perf_counter(), time.process_time()
    log = redo_log.parse(read, size)
    parsed = time.perf_counter() - began
    total = sum(len(piece) for _, piece in redo_log.grains(log, read))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    os.close(descriptor)
    assert total == log.data_bytes
    return {"bytes": total, "parse_seconds": parsed, "MB_per_s": total / wall / 1e6, "MB_per_cpu_s": total / cpu / 1e6}


def main() -> None:
    grains = int(sys.argv[1]) if len(sys.argv) > 1 else 1 << 17
    results = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        for name, run in (("scattered", 1), ("runs of 64 KiB", 16)):
            path = Path(place) / "log"
            sesparse(path, 64 << 30, grains, run)
            measure(path)
            results[name] = max((measure(path) for _ in range(3)), key=lambda found: found["MB_per_cpu_s"])
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
