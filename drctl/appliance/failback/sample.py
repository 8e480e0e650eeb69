"""`failback.sample`: hashes of some blocks of a group's disks here; a command line that has both sites' can tell how
much a failback would send. Changes nothing."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from drctl.appliance.config import Home
from drctl.appliance.control import Progress
from drctl.appliance.failback.exports import OldExports
from drctl.appliance.failback.seal import Finding
from drctl.appliance.process import Processes
from drctl.appliance.replica.seed_files import disks_by_name
from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.appliance.source.passes import Passes
from drctl.errors import Refused
from drctl.model.group import GroupDisk, GroupSpec
from drctl.replication.disk_connection import Export
from drctl.replication.sample import Sampled, sample
from drctl.wire.signature import KEY_SIZE, SIGNED

#: A report of progress after so many bytes.
_TELL = 256 * SIGNED


class FailbackSample:
    """Methods may be called from any thread."""

    def __init__(self, home: Home, host: Any, processes: Processes) -> None:
        self._home = home
        self._host = host
        self._processes = processes

    def take(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, disks, which `running`|`old`, key (hex), stride} → {group, seconds, samples {DISK: base64}}.

        `running`: the disks as their machines have them now; `old`: of machines that are off."""
        name, key, stride = str(params["group"]), bytes.fromhex(str(params["key"])), int(params["stride"])
        if len(key) != KEY_SIZE or stride < 1:
            raise Refused("a sample needs a key and a stride")
        disks = disks_by_name(params)
        opened = self._running if params.get("which") == "running" else self._old
        begun = time.monotonic()
        told = 0

        def tell(done: int) -> None:
            nonlocal told
            if done >= told + _TELL:
                told = done
                progress({"step": "sample", "done_bytes": done})

        with opened(name, disks) as exports:
            wanted = [Sampled(d.name, d.size, exports[d.number]) for d in disks.values() if d.number in exports]
            found = asyncio.run(sample(wanted, key, stride, tell))
        samples = {disk: base64.b64encode(hashes).decode() for disk, hashes in found.items()}
        return {"group": name, "seconds": time.monotonic() - begun, "samples": samples}

    @contextmanager
    def _old(self, name: str, disks: Mapping[str, GroupDisk]) -> Iterator[Mapping[int, Export]]:
        finding = Finding(self._host, self._home.store / name)
        finding.look(list(disks.values()))
        with OldExports(self._home.run, self._processes).serve(f"sample-{name}", finding.old) as exports:
            yield exports

    @contextmanager
    def _running(self, name: str, disks: Mapping[str, GroupDisk]) -> Iterator[Mapping[int, Export]]:
        machines = [self._host.machine(one) for one in dict.fromkeys(disk.machine for disk in disks.values())]
        states = tuple(DiskState(d.number, d.machine, d.target, d.size) for d in disks.values())
        state = GroupState(GroupSpec(name, "", "", tuple(machine.name for machine in machines)), disks=states)
        passes = Passes(self._home, name, self._host, self._processes)
        exports = passes.begin("sample", [disk.number for disk in states], state, machines)
        try:
            yield {number: Export(each.socket, each.export) for number, each in exports.items()}
        finally:
            passes.end()
