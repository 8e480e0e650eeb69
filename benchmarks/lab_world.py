"""A lab for benchmarks: two sites, guests that write, a relay with latency in the link, one group protected."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from drctl.appliance.client import Client
from drctl.lab import lab, layout, process
from drctl.lab.layout import Layout, Options
from drctl.lab.observer import Observer
from drctl.model.group import GroupSpec
from tests.integration.link_rig import Relay

GROUP = "web"


@dataclass
class World:
    directory: Path
    layout: Layout
    observer: Observer
    relay: Any

    def call(self, site: str, method: str, timeout: float = 120.0, **params: Any) -> Any:
        address = f"unix:{self.layout.site(site).control}"
        return Client(address).call(method, params, timeout=timeout)

    @property
    def store(self) -> Path:
        return self.layout.site("beta").home / "store" / GROUP

    def pids(self, site: str) -> dict[str, int]:
        """Pids of the site's appliance children by name."""
        found = {}
        for path in (self.layout.site(site).appliance_run / "pids").glob("*.json"):
            found[path.stem] = int(json.loads(path.read_text())["pid"])
        return found

    def protect(self, interval: float, ring_size: int = 128 * 2**20) -> None:
        state = layout.load(self.directory)
        assert state is not None
        machines = tuple(guest.name for guest in state.guests)
        spec = GroupSpec(GROUP, "alpha", "beta", machines, checkpoint_interval=interval, ring_size=ring_size)
        for site in ("beta", "alpha"):
            self.call(site, "group.put", spec=msgspec.to_builtins(spec))
        self.call("alpha", "replicate.start", group=GROUP)
        self.wait_live()

    def wait_live(self, timeout: float = 300.0) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.call("beta", "group.status", group=GROUP)["checkpoints"]["count"]:
                return
            time.sleep(0.2)
        raise SystemExit(f"not live after {timeout:.0f} s: {self.call('alpha', 'group.status', group=GROUP)['reason']}")


@contextmanager
def world(
    guests: int = 2, rate: int = 50, latency: float = 0.0, link: Callable[[int], Any] | None = None, **options: Any
) -> Iterator[World]:
    """A lab in a directory of its own, gone at the end. `latency`: one way, in seconds. `link`: makes what stands in
    the link, to that port, in the relay's place."""
    directory = Path(tempfile.mkdtemp(prefix="drctl-bench-", dir="/var/tmp"))
    directory.rmdir()
    relay = None
    try:
        lab.up(directory, Options(guests=guests, rate=rate, **options))
        state = layout.load(directory)
        assert state is not None
        places = Layout(directory, Path(state.run))
        relay = link(state.links["beta"]) if link is not None else Relay(state.links["beta"], latency)
        toml = places.site("alpha").home / "appliance.toml"
        toml.write_text(toml.read_text().replace(f"127.0.0.1:{state.links['beta']}", f"127.0.0.1:{relay.port}"))
        supervisor = state.process("alpha/appliance")
        assert supervisor is not None
        process.stop([supervisor])
        lab.up(directory)
        made = World(directory, places, Observer(directory), relay)
        _await_appliances(made)
        yield made
    finally:
        if relay is not None:
            relay.close()
        lab.down(directory)


def _await_appliances(made: World) -> None:
    for site in ("alpha", "beta"):
        for _ in range(200):
            try:
                made.call(site, "appliance.info")
                break
            except Exception:
                time.sleep(0.1)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def uss_mib(pid: int) -> float:
    """Private memory (USS), MiB, from smaps_rollup; shared maps (ring, journal) are not in it."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1])
    return total / 1024


def save(name: str, result: dict[str, Any]) -> None:
    """Write a result beside the others, with the machine it was measured on."""
    directory = Path(__file__).resolve().parent / "results"
    directory.mkdir(exist_ok=True)
    result = {"machine": machine(), "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), **result}
    (directory / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def machine() -> dict[str, Any]:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model.partition(": ")[2],
        "cores": os.cpu_count(),
        "kernel": os.uname().release,
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def median(values: list[float]) -> float:
    return statistics.median(values)
