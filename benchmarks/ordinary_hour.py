"""An hour of ordinary life: how long do guests stall, against the same guests without replication?

    python benchmarks/ordinary_hour.py [--minutes 60] [--control-minutes 0] [--interval 1] [--rate 50]

Two guests of a lab write all the while, each record only after the one before it is complete. First a control run
without any replication, as long (or `--control-minutes`); then the group is protected, and once it is live the same
time passes with a mark each second, segments that rotate and are merged, a history of one minute so that checkpoints
are promoted into the bases all the while, and one upgrade half way. A stall is the time between
two acknowledgements of one chain of records, as the host saw them (it hears of them each 10 ms). Goals: p99.9 at most
50 ms, and the longest at most 250 ms above the control's."""

from __future__ import annotations

import argparse
import bisect
import json
import os
import time
from typing import Any

import msgspec

from benchmarks.lab_world import GROUP, World, percentile, save, world
from drctl.lab import lab, layout, process
from drctl.model.group import GroupSpec, Retention, Rung

GOAL_P999_MS, GOAL_MAX_MS = 50, 250
HISTORY = 60.0
#: A segment is closed at 64 MiB; in a shorter run there may be none to be promoted.
PROMOTES_MINUTES = 20


def stalls(made: World, begin_ns: int, end_ns: int) -> list[float]:
    """Milliseconds between two acknowledgements of each chain. Chain 0 is left out: it waits for the other guest."""
    found: list[float] = []
    for log in made.observer.logs("alpha", until_ns=end_ns).values():
        first, last = bisect.bisect_left(log.times, begin_ns), bisect.bisect_right(log.times, end_ns)
        for chain in range(1, log.chains):
            since, number = begin_ns, log.newest(chain, begin_ns)
            for moment, row in zip(log.times[first:last], log.numbers[first:last], strict=True):
                if row[chain] != number:
                    found.append((moment - since) / 1e6)
                    since, number = moment, row[chain]
            found.append((end_ns - since) / 1e6)
    return found


def told(name: str, values: list[float], seconds: float) -> dict[str, Any]:
    row = {
        "acknowledgements": len(values),
        "p50_ms": round(percentile(values, 0.5), 1),
        "p99_ms": round(percentile(values, 0.99), 1),
        "p999_ms": round(percentile(values, 0.999), 1),
        "max_ms": round(max(values), 1),
        "longest_ms": [round(each) for each in sorted(values)[-5:]],
        "seconds": round(seconds),
        "load": [round(each, 1) for each in os.getloadavg()],
    }
    print({name: row}, flush=True)
    return row


def protect(made: World, interval: float) -> None:
    state = layout.load(made.directory)
    assert state is not None
    retention = Retention(history=HISTORY, ladder=(Rung(HISTORY / 2, 0), Rung(HISTORY, 5)))
    machines = tuple(guest.name for guest in state.guests)
    spec = GroupSpec(GROUP, "alpha", "beta", machines, checkpoint_interval=interval, retention=retention)
    for where in ("beta", "alpha"):
        made.call(where, "group.put", spec=msgspec.to_builtins(spec))
    made.call("alpha", "replicate.start", group=GROUP)
    made.wait_live()


def upgrade(made: World) -> dict[str, Any]:
    """What `appliance upgrade` does on a host: a supervisor of another installation takes over, lets its tap inherit
    the connections of the one before, and starts a shipper of its own. The lab has one installation: the tap's is made
    another one's by its pid file, the shipper is ended as the upgrade does."""
    alpha = made.layout.site("alpha")
    state = layout.load(made.directory)
    assert state is not None
    supervisor = state.process("alpha/appliance")
    assert supervisor is not None
    before = made.pids("alpha")
    path = alpha.appliance_run / "pids" / f"tap-{GROUP}.json"
    process.stop([supervisor])
    known = json.loads(path.read_text())
    known["command"] = ["/opt/drctl-before/bin/python", *known["command"][1:]]
    owner = path.stat()
    path.write_text(json.dumps(known))
    os.chown(path, owner.st_uid, owner.st_gid)
    begun = time.monotonic()
    lab.up(made.directory)
    name = f"tap-{GROUP}"
    deadline = time.monotonic() + 60
    while made.pids("alpha").get(name) == before[name] and time.monotonic() < deadline:
        time.sleep(0.1)
    after = made.pids("alpha")
    return {
        "another_tap": after.get(name) != before[name],
        "seconds": round(time.monotonic() - begun, 1),
        "phase": made.call("alpha", "group.status", group=GROUP)["phase"],
    }


def live(made: World, minutes: float) -> tuple[int, int, dict[str, Any]]:
    begin = time.time_ns()
    time.sleep(minutes * 30)
    upgraded = upgrade(made)
    while time.time_ns() < begin + int(minutes * 60e9):
        time.sleep(0.2)
    return begin, time.time_ns(), upgraded


def life(made: World, begin_ns: int) -> dict[str, Any]:
    """What the store went through meanwhile: else it was no ordinary life."""
    status = made.call("beta", "group.status", group=GROUP)
    info = json.loads((made.store / "group.json").read_text())
    newest, oldest = status["checkpoints"]["newest"], status["checkpoints"]["oldest"]
    return {
        "newest_checkpoint": newest["number"],
        "oldest_checkpoint": oldest["number"],
        "promoted_up_to_log": info["base_position"],
        "segments": len(list(made.store.glob("streams/*/*/*.seg"))),
        "journal_mib": round(status["journal"]["bytes"] / 2**20, 1),
        "marks_per_second": round(newest["number"] / max(1.0, newest["time"] - begin_ns / 1e9), 2),
        "phase": made.call("alpha", "group.status", group=GROUP)["phase"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--control-minutes", type=float, default=0, help="0: as long")
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--rate", type=int, default=50, help="records a second and chain that guests want to write")
    arguments = parser.parse_args()
    with world(guests=2, rate=arguments.rate) as made:
        time.sleep(10)
        begin = time.time_ns()
        time.sleep((arguments.control_minutes or arguments.minutes) * 60)
        end = time.time_ns()
        control = told("control", stalls(made, begin, end), (end - begin) / 1e9)
        protect(made, arguments.interval)
        time.sleep(10)
        begin, end, upgraded = live(made, arguments.minutes)
        values = stalls(made, begin, end)
        replicated = told("replicated", values, (end - begin) / 1e9)
        lived = life(made, begin)
    result = {
        "control": control,
        "replicated": replicated,
        "life": lived,
        "upgrade": upgraded,
        "p999_above_control_ms": round(replicated["p999_ms"] - control["p999_ms"], 1),
        "max_above_control_ms": round(replicated["max_ms"] - control["max_ms"], 1),
        "goals_ms": {"p999": GOAL_P999_MS, "max": GOAL_MAX_MS},
        "minutes": arguments.minutes,
    }
    print(json.dumps(result))
    save("ordinary_hour", result)
    met = result["p999_above_control_ms"] <= GOAL_P999_MS and result["max_above_control_ms"] <= GOAL_MAX_MS
    promoted = lived["promoted_up_to_log"] or arguments.minutes < PROMOTES_MINUTES
    whole = upgraded["another_tap"] and promoted and lived["phase"] == "live"
    return 0 if met and whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
