"""`make bench`: every benchmark, one after the other, results under benchmarks/results/.

    python benchmarks/run.py [--quick] [--only NAME[,NAME]]

Each is a program of its own with options of its own; this one only knows their names and how long they take. Run them
on a machine that does nothing else: two cores hold both sites and the load generator."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: (name, arguments, arguments with --quick)
BENCHMARKS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("startup", (), ("--rounds", "7")),
    ("fleet", (), ("--rounds", "2")),
    ("tap", (), ("--rounds", "2", "--seconds", "1")),
    ("pipeline", (), ("--seconds", "10")),
    ("first_sync", (), ()),
    ("resync", (), ("--size", "1GiB", "--rounds", "1", "--peer-size", "256MiB")),
    ("memory", (), ()),
    ("view_read", (), ()),
    ("view", (), ("--records", "2000000")),
    ("rto", (), ("--guests", "1", "--rounds", "2", "--history-seconds", "20")),
    ("rpo", (), ("--seconds", "60")),
    ("outage", ("--minute", "6"), ("--minute", "2", "--control", "10")),
    ("plans", (), ("--guests", "3", "--rounds", "1", "--history-seconds", "10")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs: to see that all work, not to quote")
    parser.add_argument("--only", default="", help="names, separated by commas")
    arguments = parser.parse_args()
    wanted = [name for name in arguments.only.split(",") if name]
    failed = []
    for name, full, quick in BENCHMARKS:
        if wanted and name not in wanted:
            continue
        command = [sys.executable, "-m", f"benchmarks.{name}", *(quick if arguments.quick else full)]
        print(f"== {name}: {' '.join(command[1:])}", flush=True)
        begun = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        print(f"== {name}: exit {done.returncode}, {time.monotonic() - begun:.0f} s\n", flush=True)
        if done.returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
