"""Twenty guests restart at once: what is read of their disks, and how long no checkpoint is made.

    python benchmarks/restart.py [--guests 20] [--groups 3] [--rounds 1] [--interval 1]

A lab with small guests that write, protected in some groups. All are powered off in order, at once; when a checkpoint
of each group holds how they left, all are started at once. Goals: 0 bytes read from disks, and no gap between two
neighbouring checkpoints of a group longer than 5 s. All guests share two processors here, emulated: how long they take
to boot is the machine's, not drctl's; a guest that writes before its mirror is there costs a pass of its own disks."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from typing import Any

import msgspec

from benchmarks.lab_world import World, save, world
from drctl.appliance.client import Client
from drctl.errors import DrctlError
from drctl.lab import layout, site
from drctl.model.group import GroupSpec

GOAL_GAP_SECONDS = 5.0
WAIT_SECONDS = 900.0


class Restart:
    """A lab whose guests are in groups, and one restart of all of them."""

    def __init__(self, made: World, groups: int, interval: float) -> None:
        self.made = made
        self.alpha = made.layout.site("alpha")
        state = layout.load(made.directory)
        assert state is not None
        self.guests = [guest.name for guest in state.guests]
        self.groups = {f"group{index}": self.guests[index::groups] for index in range(groups)}
        for name, machines in self.groups.items():
            spec = GroupSpec(name, "alpha", "beta", tuple(machines), checkpoint_interval=interval, ring_size=64 * 2**20)
            for where in ("beta", "alpha"):
                made.call(where, "group.put", spec=msgspec.to_builtins(spec))
        self.each(lambda name: made.call("alpha", "replicate.start", group=name))
        self.await_live()

    def each(self, act: Any) -> list[Any]:
        with ThreadPoolExecutor(len(self.groups)) as pool:
            return list(pool.map(act, self.groups))

    def await_(self, reached: Any, what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            with suppress(DrctlError, OSError, ValueError, KeyError):
                if reached():
                    return
            time.sleep(0.2)
        raise SystemExit(f"not within {WAIT_SECONDS:.0f} s: {what}")

    def await_live(self) -> None:
        """Every group is live, with a checkpoint of after this call."""
        now = time.time()

        def live(name: str) -> bool:
            newest = self.made.call("beta", "group.status", group=name)["checkpoints"]["newest"]
            phase = self.made.call("alpha", "group.status", group=name)["phase"]
            return bool(newest and newest["time"] > now and phase == "live")

        for name in self.groups:
            self.await_(lambda name=name: live(name), f"{name} is live")

    def disks(self) -> Iterator[dict[str, Any]]:
        for name in self.groups:
            yield from json.loads((self.alpha.home / "groups" / f"{name}.json").read_text())["disks"]

    def shippers(self) -> dict[str, dict[str, Any]]:
        sockets = {name: self.alpha.appliance_run / "shippers" / f"{name}.sock" for name in self.groups}
        return {name: Client(f"unix:{path}").call("status") for name, path in sockets.items()}

    def gaps(self, since: float) -> dict[str, float]:
        """The longest time between two neighbouring checkpoints of each group, from the last before `since` on."""
        longest = {}
        for name in self.groups:
            times = [row["time"] for row in self.made.call("beta", "checkpoint.list", group=name)]
            first = max((index for index, moment in enumerate(times) if moment <= since), default=0)
            longest[name] = round(max(later - earlier for earlier, later in pairwise(times[first:])), 2)
        return longest

    def run(self) -> dict[str, Any]:
        before, begun = self.shippers(), time.time()
        with ThreadPoolExecutor(len(self.guests)) as pool:
            list(pool.map(self._press, self.guests))
            self.await_(self._all_off, "all guests are off")
            self.await_(lambda: all(disk["held"] for disk in self.disks()), "checkpoints hold how they left")
            off = time.time()
            list(pool.map(lambda guest: site.virsh(self.alpha, "start", guest, timeout=600), self.guests))
        started = time.time()
        for guest in self.guests:
            self.made.observer.await_up(guest, "alpha", after_ns=int(off * 1e9), timeout=WAIT_SECONDS)
        up = time.time()
        self.await_live()
        after = self.shippers()
        read = {name: _read(before[name], after[name]) for name in self.groups}
        return {
            "bytes_read": sum(read.values()),
            "bytes_read_by_group": read,
            "longest_gap_s": max(self.gaps(begun).values()),
            "gap_by_group_s": self.gaps(begun),
            "all_off_after_s": round(off - begun, 1),
            "start_commands_s": round(started - off, 1),
            "all_up_after_s": round(up - off, 1),
            "load": round(os.getloadavg()[0], 1),
        }

    def _press(self, guest: str) -> None:
        """A guest whose agent is quick is off before the command returns, which fails then."""
        with suppress(DrctlError):
            site.virsh(self.alpha, "shutdown", guest, timeout=300)

    def _all_off(self) -> bool:
        running = [guest for guest in self.guests if site.virsh(self.alpha, "domstate", guest).strip() != "shut off"]
        if running and int(time.time()) % 15 == 0:
            for guest in running:
                self._press(guest)
        return not running


def _read(before: dict[str, Any], after: dict[str, Any]) -> int:
    same = before["epoch"] == after["epoch"] and before["sync"]["id"] == after["sync"]["id"]
    return int(after["sync"]["read_bytes"]) - (int(before["sync"]["read_bytes"]) if same else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=20)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--rate", type=int, default=2, help="records a second and chain of each guest")
    arguments = parser.parse_args()
    rows = []
    with world(guests=arguments.guests, rate=arguments.rate, chains=2, slots=256) as made:
        bench = Restart(made, arguments.groups, arguments.interval)
        for _ in range(arguments.rounds):
            rows.append(bench.run())
            print(rows[-1], flush=True)
    save("restart", {
        "guests": arguments.guests, "groups": arguments.groups, "interval_s": arguments.interval,
        "goal_gap_s": GOAL_GAP_SECONDS, "goal_bytes_read": 0, "rows": rows,
    })  # fmt: skip
    met = all(row["bytes_read"] == 0 and row["longest_gap_s"] <= GOAL_GAP_SECONDS for row in rows)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
