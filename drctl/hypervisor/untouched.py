"""Whether anything was written to a disk since its QEMU opened it. Pure but for the monitor that is handed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from drctl.hypervisor.qmp import Monitor, command

#: Counters of a guest's device (`query-blockstats`). They rise when a request has *ended*: drain before they are read.
_WRITES: Final = (
    "wr_operations",
    "wr_bytes",
    "failed_wr_operations",
    "unmap_operations",
    "unmap_bytes",
    "failed_unmap_operations",
)


def untouched(monitor: Monitor, source: str) -> bool:
    """Nothing was written through node `source`, by the guest or by anybody else, since QEMU opened it.

    Call it after the mirror's barrier (`Mirror.attach`): whatever was on its way before has ended by then, and is
    counted; what is written later only makes the answer a wrong no. Discards don't move a node's
    `wr_highest_offset`, so the devices' own counters must be 0 too, those of all devices of the machine: which of them
    sits on this node is not told while a mirror stands between."""
    nodes = monitor(command("query-blockstats", query_nodes=True))
    return judge(source, nodes, monitor(command("query-blockstats")))


def judge(source: str, nodes: Iterable[Mapping[str, Any]], devices: Iterable[Mapping[str, Any]]) -> bool:
    """Decide by the two answers. What was not seen is a no."""
    found = [node["stats"] for node in nodes if node.get("node-name") == source]
    if len(found) != 1 or found[0].get("wr_highest_offset") != 0:
        return False
    counted = [device["stats"] for device in devices if device.get("qdev")]
    return bool(counted) and all(stats.get(name, 0) == 0 for stats in counted for name in _WRITES)
