"""Bitmaps of what a machine writes while its disks are not mirrored: QEMU's own, in its memory.

They end with the QEMU that keeps them; a disk whose bitmap is gone has to be compared as a whole. A bitmap that records
can't be exported (QEMU refuses it), so it is stopped first, by whoever sees later writes in another way."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from drctl.errors import StepFailed
from drctl.hypervisor.qmp import Monitor, command
from drctl.model.extent import Extent, KiB

PREFIX = "drctl-changes-"
#: Bytes that one bit stands for: 2 MiB of memory for a TiB.
GRANULARITY = 64 * KiB
#: A map of a whole disk is read from memory.
_MAP_SECONDS = 120.0


def start(monitor: Monitor, bitmaps: Mapping[str, str]) -> None:
    """Record what is written to the nodes {node: bitmap's name} from one moment on; what we recorded before goes.

    All requests are drained at that moment (QEMU's transaction does so): what was written before is complete, and at
    the mirror's target; what comes after is in the bitmap. Raises HypervisorRefused, and then nothing is recorded."""
    forget(monitor, bitmaps)
    actions = [
        {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": name, "granularity": GRANULARITY}}
        for node, name in bitmaps.items()
    ]
    monitor(command("transaction", actions=actions))


def found(monitor: Monitor) -> dict[tuple[str, str], bool]:
    """{(node, bitmap): whether it records} of ours."""
    return {
        (str(node["node-name"]), str(bitmap["name"])): bool(bitmap.get("recording"))
        for node in monitor(command("query-named-block-nodes", flat=True))
        for bitmap in node.get("dirty-bitmaps") or ()
        if str(bitmap.get("name", "")).startswith(PREFIX) and not bitmap.get("inconsistent")
    }


def stop(monitor: Monitor, node: str, name: str) -> None:
    """It keeps what it has. Raises HypervisorRefused when there is no such bitmap."""
    monitor(command("block-dirty-bitmap-disable", node=node, name=name))


def forget(monitor: Monitor, nodes: Iterable[str]) -> None:
    """Remove all of ours from these nodes. Raises HypervisorRefused for one that is in use."""
    wanted = set(nodes)
    for node, name in found(monitor):
        if node in wanted:
            monitor(command("block-dirty-bitmap-remove", node=node, name=name))


def changed(socket: str, export: str, bitmap: str) -> list[Extent]:
    """What a bitmap has, of a disk that is exported with it. Raises StepFailed."""
    options = {
        "driver": "nbd",
        "export": export,
        "server.type": "unix",
        "server.path": socket,
        "x-dirty-bitmap": f"qemu:dirty-bitmap:{bitmap}",
    }
    image = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
    try:
        done = subprocess.run(
            ["qemu-img", "map", "--output=json", "--image-opts", image],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_MAP_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise StepFailed(f"qemu-img map: {exc}") from exc
    if done.returncode:
        raise StepFailed(f"qemu-img map: {done.stderr.strip() or 'it gave no reason'}")
    try:
        return list(_dirty(json.loads(done.stdout)))
    except (ValueError, KeyError, TypeError) as exc:
        raise StepFailed(f"qemu-img map told what is no map: {exc}") from exc


def _dirty(rows: list[dict[str, Any]]) -> Iterator[Extent]:
    """With x-dirty-bitmap a dirty place is told as one without data (QEMU's iotest 223)."""
    for row in rows:
        if not row["data"]:
            yield Extent(int(row["start"]), int(row["length"]))
