"""Kill tap and shipper under load, again and again: does the guest's QEMU survive it?

    python benchmarks/kill_loop.py --kills 200 [--mode none|qsd|guest] [--qemu /usr/bin/qemu-system-x86_64]
    python benchmarks/kill_loop.py --kills 3000 --mode guest [--device virtio-blk|virtio-scsi] [--iothread]

Run it on your own QEMU before you trust the guest's life to it.

`none` (a QEMU without machine) and `qsd` (qemu-storage-daemon) need no guest: fio writes 4 KiB at depth 32 through
QEMU's block layer, where a guest's writes pass, too. The kills fall in turn on the tap, the shipper and both, in four
phases: `first sync`; `live` (order proven); `catching up` (the tap came back a moment ago, QEMU sends again what
failed); `view` (live, while a view server is being read from). Only kills with writes in flight in the phase meant
count. Before each live or view phase the load rests for a moment, and a checkpoint is compared with the disk, bit for
bit.

`guest` kills under two real guests of a lab, whose witnesses write with O_DIRECT to virtio disks and whose supervisor
mends: phases `first sync`, `live`, `catching up`, `view` (a test runs from a view) and `full pass`. At its end the
guests' logs are looked through, and every checkpoint that is listed is judged by the witness. `--device` is what its
disks are to it, `--iothread` lets a thread of its own serve them. On a QEMU before 9.0 drctl refuses to protect such
disks, since there the end of an NBD client ends QEMU: then that refusal is the answer, with both guests unharmed; no
kill is counted, and the exit code is 0.

A death is a QEMU that ended, or a write that failed for the guest. Trouble is a recovery that did not come in time or
a checkpoint that was wrong. The exit code is 1 when there was either.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kill_guest import run_guest
from benchmarks.kill_stream import StreamBench
from benchmarks.lab_world import machine
from drctl.errors import DrctlError

BINARIES = {"none": "qemu-system-x86_64", "qsd": "qemu-storage-daemon", "guest": "qemu-system-x86_64"}
#: What the lab calls a guest's disks.
BUSES = {"virtio-blk": "virtio", "virtio-scsi": "scsi"}
#: Of each phase in one cycle: which processes each kill takes.
ROUNDS = {
    "first sync": (("tap",), ("shipper",)),
    "live": (("tap",), ("shipper",), ("tap", "shipper")),
    "catching up": (("tap",), ("shipper",), ("tap",), ("shipper",)),
    "view": (("tap",), ("shipper",), ("tap", "shipper")),
}


@dataclass
class Tally:
    """What was killed, and what came of it."""

    counted: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    deaths: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def count(self, phase: str, victims: tuple[str, ...], hit: bool) -> None:
        if hit:
            self.counted[f"{phase}: {' and '.join(victims)}"] += 1
        else:
            self.missed += 1


def into(bench: StreamBench, phase: str) -> bool:
    """Bring about the phase in which the next kill shall fall; whether it is there."""
    if phase == "first sync":
        bench.start_shipper()
        if bench.rig.status()["sync"]["job"] != "running":
            bench.sync("initial")
        time.sleep(random.random() * 0.7)
        return bench.syncing()
    if phase == "catching up":
        bench.start_shipper()
        bench.kill("tap")
        time.sleep(0.3)  # blocks get dirty while nobody takes them
        bench.mend()
        return not bench.ordered()
    bench.settle()
    time.sleep(random.random() * 0.3)
    return bench.ordered()


def cycle(bench: StreamBench, tally: Tally) -> Iterator[None]:
    """All phases of one group. Yields after each kill."""
    bench.begin()
    for phase, rounds in ROUNDS.items():
        if phase == "view":
            bench.settle()
            bench.begin_view()
        for victims in rounds:
            there = into(bench, phase)
            tally.count(phase, victims, bench.kill(*victims) and there)
            time.sleep(0.1)
            if reason := bench.dead():
                tally.deaths.append(f"{phase}: {reason}\n{bench.log()}")
                return
            bench.mend()
            yield
    bench.settle()


def run(kills: int, mode: str, binary: str) -> Tally:
    tally = Tally()
    bench = StreamBench(mode, binary)
    compared = 0
    try:
        while tally.counted.total() < kills:
            try:
                for _ in cycle(bench, tally):
                    if tally.counted.total() >= kills:
                        break
            except (DrctlError, AssertionError, OSError, RuntimeError) as exc:
                death = bench.dead()
                (tally.deaths if death else tally.trouble).append(f"{death or 'trouble'}: {exc!r}\n{bench.log()}")
            if (tally.deaths or tally.trouble) and len(tally.deaths) + len(tally.trouble) > 20:
                break
            if bench.dead() or bench.mirror is None or tally.trouble:
                compared += bench.compared
                bench.close()
                bench = StreamBench(mode, binary)
            if tally.missed > kills * 2:
                raise SystemExit("too few kills met writes in flight: is the machine overloaded?")
    finally:
        compared += bench.compared
        bench.close()
    tally.more["checkpoints_compared_with_the_disk"] = compared
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--qemu", default="", help="binary to test; default: the installed one of the mode")
    parser.add_argument("--mode", choices=tuple(BINARIES), default="none")
    parser.add_argument("--device", choices=tuple(BUSES), default="virtio-blk", help="of --mode guest")
    parser.add_argument("--iothread", action="store_true", help="of --mode guest")
    parser.add_argument("--append", type=Path, help="JSON file whose list of runs the result is added to")
    arguments = parser.parse_args()
    binary = arguments.qemu or BINARIES[arguments.mode]
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    started, load = time.monotonic(), round(os.getloadavg()[0], 1)
    if arguments.mode == "guest":
        tally = run_guest(arguments.kills, Tally(), bus=BUSES[arguments.device], iothread=arguments.iothread)
    else:
        tally = run(arguments.kills, arguments.mode, binary)
    result = {
        "qemu": version,
        "mode": arguments.mode,
        **({"device": arguments.device, "iothread": arguments.iothread} if arguments.mode == "guest" else {}),
        "kills_with_writes_in_flight": tally.counted.total(),
        "by_phase_and_process": dict(sorted(tally.counted.items())),
        "kills_not_counted": tally.missed,
        "deaths": len(tally.deaths),
        "trouble": tally.trouble,
        **tally.more,
        "seconds": round(time.monotonic() - started),
        "load_at_start": load,
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    print(json.dumps(result))
    for death in tally.deaths:
        print(death, file=sys.stderr)
    if arguments.append:
        add(arguments.append, result)
    return 1 if tally.deaths or tally.trouble else 0


def add(path: Path, result: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "runs": []}
    known["runs"].append(result)
    path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
