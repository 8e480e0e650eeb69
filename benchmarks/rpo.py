"""RPO on the lab: how old is the newest restorable checkpoint, at worst, while guests write over a slow link.

    python benchmarks/rpo.py [--seconds 600] [--rates 50,200] [--latency-ms 10]

Two real guests with witnesses, `checkpoint_interval = 1s`, a relay of 20 ms round trip in the link. A checkpoint counts
from the moment when the recovery site's store lists it, seen by a reader of that store every 20 ms. Right before the
next one is listed the RPO is at its worst: listed(k+1) - marked(k). Printed is that minus the interval."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from itertools import pairwise

from benchmarks.lab_world import percentile, save, world
from drctl.store.group_store import GroupStore

INTERVAL = 1.0


def listings(store_root: str, seconds: float) -> list[tuple[float, float]]:
    """(marked, listed) of each checkpoint that appears, both by the recovery site's clock."""
    seen: list[tuple[float, float]] = []
    newest = -1
    end = time.monotonic() + seconds
    with closing(GroupStore.open(store_root)) as store:
        while time.monotonic() < end:
            marks = store.marks()
            now = time.time()
            for mark in marks[-4:]:
                if mark.number > newest:
                    newest = mark.number
                    seen.append((mark.time, now))
            time.sleep(0.02)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rates", default="50")
    parser.add_argument("--latency-ms", type=float, default=10)
    arguments = parser.parse_args()
    rows = []
    for rate in (int(each) for each in arguments.rates.split(",")):
        with world(guests=2, rate=rate, latency=arguments.latency_ms / 1e3) as made:
            made.protect(INTERVAL)
            before = {seen.guest: sum(seen.numbers) for seen in made.observer.seen()}
            begun = time.monotonic()
            seen = listings(made.store, arguments.seconds)
            elapsed = time.monotonic() - begun
            after = {each.guest: sum(each.numbers) for each in made.observer.seen()}
        worst = [listed - marked for (marked, _), (_, listed) in pairwise(seen)]
        over = [value - INTERVAL for value in worst]
        row = {
            "records_per_second_wanted": rate * 4 * 2,
            "records_per_second": round(sum(after[g] - before.get(g, 0) for g in after) / elapsed, 1),
            "round_trip_ms": 2 * arguments.latency_ms,
            "checkpoints": len(seen),
            "over_interval_p50_ms": round(percentile(over, 0.5) * 1e3),
            "over_interval_p99_ms": round(percentile(over, 0.99) * 1e3),
            "over_interval_max_ms": round(max(over) * 1e3),
            "goal_p99_ms": round(2 * arguments.latency_ms + 150),
        }
        print(row, flush=True)
        rows.append(row)
    save("rpo", {"interval_s": INTERVAL, "seconds": arguments.seconds, "rows": rows})


if __name__ == "__main__":
    main()
