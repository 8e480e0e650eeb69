"""Twenty guests restart at once: what is read of their disks, and how long no checkpoint is made.

    python benchmarks/restart.py [--guests 20] [--groups 3] [--rounds 3] [--interval 1] [--delay 2]

A lab's libvirt and appliances, and guests that are a boot sector (tiny_guest.py), so that drctl is measured and not how
long two cores take to emulate twenty boots: each writes `--delay` seconds after its BIOS, and from then on. All are
powered off at once, by the power button; when a checkpoint of each group holds how they left, all are started at once.
Goals: 0 bytes read from disks, and no gap between two neighbouring checkpoints of a group longer than 5 s. A guest that
writes before its mirror is there costs a pass of its own disks. The control is the same before the groups are
protected: how long all take to be off, and to write again."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from typing import Any

import msgspec

from benchmarks import tiny_guest
from benchmarks.lab_world import World, save, world
from drctl.appliance.client import Client
from drctl.errors import DrctlError
from drctl.lab import site, user
from drctl.model.group import GroupSpec

GOAL_GAP_SECONDS = 5.0
WAIT_SECONDS = 600.0
#: Writes a second of each guest.
RATE = 5.0


class Restart:
    """A lab's site with guests in groups, and restarts of all of them."""

    def __init__(self, made: World, guests: int, groups: int, delay: float) -> None:
        self.made = made
        self.alpha = made.layout.site("alpha")
        self.guests = [f"tiny-{number:02}" for number in range(1, guests + 1)]
        self.groups = {f"group{index}": self.guests[index::groups] for index in range(groups)}
        sector = tiny_guest.boot_sector(delay, RATE)
        for guest in self.guests:
            self._define(guest, sector)
        self.all("start")
        self.await_(lambda: all(self.written(guest) for guest in self.guests), "all guests write")

    def _define(self, guest: str, sector: bytes) -> None:
        paths = tiny_guest.make_disks(self.alpha.images, guest, sector)
        definition = self.made.directory / f"{guest}.xml"
        definition.write_text(tiny_guest.domain_xml(guest, str(uuid.uuid4()), self.alpha.images))
        if os.geteuid() == 0:
            owner = pwd.getpwnam(user.name())
            for path in (*paths, definition):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        site.virsh(self.alpha, "define", str(definition))

    def protect(self, interval: float) -> None:
        made = self.made
        for name, machines in self.groups.items():
            spec = GroupSpec(name, "alpha", "beta", tuple(machines), checkpoint_interval=interval, ring_size=64 * 2**20)
            for where in ("beta", "alpha"):
                made.call(where, "group.put", spec=msgspec.to_builtins(spec))
        self.each(lambda name: made.call("alpha", "replicate.start", group=name))
        self.await_live()

    def written(self, guest: str) -> int:
        return max(tiny_guest.newest(self.alpha.images / f"{guest}.{target}.raw") for target in tiny_guest.TARGETS)

    def writes_again(self, guest: str, since: float) -> bool:
        return any(
            (self.alpha.images / f"{guest}.{target}.raw").stat().st_mtime > since for target in tiny_guest.TARGETS
        )

    def all(self, verb: str) -> None:
        """As an operator's script does it: a virsh for each, all at once."""

        def one(guest: str) -> None:
            with suppress(DrctlError):  # a guest that is quick is off before the command returns, which fails then
                site.virsh(self.alpha, verb, guest, timeout=600)

        with ThreadPoolExecutor(len(self.guests)) as pool:
            list(pool.map(one, self.guests))

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

    def restart(self, between: Callable[[], None]) -> dict[str, float]:
        """Power off and start all; `between` is done while they are off. Seconds."""
        begun = time.time()
        self.all("shutdown")
        self.await_(self._all_off, "all guests are off")
        off = time.time()
        between()
        begin = time.time()
        self.all("start")
        started = time.time()
        self.await_(lambda: all(self.writes_again(guest, begin) for guest in self.guests), "all guests write again")
        return {
            "all_off_s": round(off - begun, 1),
            "start_commands_s": round(started - begin, 1),
            "all_write_again_s": round(time.time() - begin, 1),
            "load": round(os.getloadavg()[0], 1),
        }

    def run(self) -> dict[str, Any]:
        """A restart of the protected guests, and what it cost."""
        before, begun = self.shippers(), time.time()
        held = lambda: all(disk["held"] for disk in self.disks())  # noqa: E731
        times = self.restart(lambda: self.await_(held, "checkpoints hold how they left"))
        self.await_live()
        after = self.shippers()
        read = {name: _read(before[name], after[name]) for name in self.groups}
        gaps = self.gaps(begun)
        return {"bytes_read": sum(read.values()), "longest_gap_s": max(gaps.values()), "gap_by_group_s": gaps, **times}

    def _all_off(self) -> bool:
        states = site.domain_states(self.alpha)
        return all(states.get(guest) == "shut off" for guest in self.guests)


def _read(before: dict[str, Any], after: dict[str, Any]) -> int:
    same = before["epoch"] == after["epoch"] and before["sync"]["id"] == after["sync"]["id"]
    return int(after["sync"]["read_bytes"]) - (int(before["sync"]["read_bytes"]) if same else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=20)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--delay", type=float, default=2.0, help="seconds from a guest's BIOS to its first write")
    arguments = parser.parse_args()
    rows = []
    with world(guests=1, start=False, agent=False) as made:
        bench = Restart(made, arguments.guests, arguments.groups, arguments.delay)
        control = [bench.restart(lambda: None) for _ in range(arguments.rounds)]
        print({"control": control}, flush=True)
        bench.protect(arguments.interval)
        for _ in range(arguments.rounds):
            rows.append(bench.run())
            print(rows[-1], flush=True)
    save("restart", {
        "guests": arguments.guests, "disks": 2 * arguments.guests, "groups": arguments.groups,
        "interval_s": arguments.interval, "first_write_after_s": arguments.delay,
        "goal_gap_s": GOAL_GAP_SECONDS, "goal_bytes_read": 0, "control": control, "rows": rows,
    })  # fmt: skip
    met = all(row["bytes_read"] == 0 and row["longest_gap_s"] <= GOAL_GAP_SECONDS for row in rows)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
