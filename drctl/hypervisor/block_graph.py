"""What QEMU's queries say about a disk's nodes and mirrors, and the names that drctl gives to its own. Pure.

Names carry generation, epoch and disk number, so that whoever comes later (a restarted supervisor, a person at a
monitor) knows whose job it is and under which authority it was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from drctl.errors import NotFound

#: Unit of the mirror's dirty bitmap, bytes. Sequential 4 KiB writes through a mirror of 4 KiB granularity are a third
#: faster than with QEMU's default of 64 KiB, and a failed write costs one block.
GRANULARITY = 4096

#: QEMU refuses longer node names (`char node_name[32]`).
_NODE_NAME_LIMIT = 31

_JOB = re.compile(r"drctl-g(\d+)-([0-9a-f]{8})-d(\d+)$")


@dataclass(frozen=True, slots=True)
class MirrorName:
    """Whose mirror it is: the first 8 hex digits of the epoch are enough, since generations part what they don't."""

    generation: int
    epoch: str
    disk: int

    def __post_init__(self) -> None:
        if len(self.node) > _NODE_NAME_LIMIT:
            raise ValueError(f"{self.node!r} is longer than QEMU's {_NODE_NAME_LIMIT} characters for a node name")

    @classmethod
    def of(cls, generation: int, epoch: str, disk: int) -> Self:
        """The name for a disk under a whole epoch (32 hex digits)."""
        return cls(generation, epoch[:8], disk)

    @classmethod
    def parse(cls, job: str) -> Self | None:
        """The name behind a job id; None when the job is not drctl's."""
        found = _JOB.match(job)
        return cls(int(found[1]), found[2], int(found[3])) if found else None

    @property
    def job(self) -> str:
        return f"drctl-g{self.generation}-{self.epoch}-d{self.disk}"

    @property
    def node(self) -> str:
        """The node of the connection to the tap."""
        return f"{self.job}-n"


@dataclass(frozen=True, slots=True)
class MirrorState:
    """One look at a disk's mirror job.

    `status` is QEMU's (`ready`, `standby`, `concluded`…), `io_status` `ok`, `failed` or `nospace`; both empty when the
    job is not there. `dirty` is what QEMU knows to be missing at the tap, in bytes; None when it can't be told."""

    name: MirrorName
    present: bool
    status: str = ""
    io_status: str = ""
    paused: bool = False
    dirty: int | None = None
    error: str = ""

    @property
    def healthy(self) -> bool:
        """Every write of the guest reaches the tap, as far as QEMU has noticed."""
        return self.present and self.status == "ready" and self.io_status == "ok"

    @property
    def clean(self) -> bool:
        return self.present and self.dirty == 0


def look(name: MirrorName, jobs: Iterable[Mapping[str, Any]], dirty: int | None) -> MirrorState:
    """The state of one mirror out of `query-block-jobs`."""
    for job in jobs:
        if job.get("device") == name.job:
            return MirrorState(
                name,
                present=True,
                status=str(job.get("status", "")),
                io_status=str(job.get("io-status", "")),
                paused=bool(job.get("paused")),
                dirty=dirty,
                error=str(job.get("error", "")),
            )
    return MirrorState(name, present=False)


def found_mirrors(jobs: Iterable[Mapping[str, Any]]) -> list[MirrorState]:
    """All of drctl's mirrors in `query-block-jobs`, of any generation; their dirty counts are not known."""
    every = list(jobs)
    names = [MirrorName.parse(str(job.get("device", ""))) for job in every]
    return [look(name, every, None) for name in names if name is not None]


def dirty_bytes(nodes: Iterable[Mapping[str, Any]], *places: str) -> int | None:
    """What a mirror whose bitmap is at one of the nodes `places` has still to send, out of `query-named-block-nodes`;
    None when there is no mirror.

    The job's bitmap has no name and is not recording (in write-blocking mode QEMU sets its bits itself, when a write
    failed). QEMU 7.2 keeps it at the source's node, QEMU 10.0 at the job's filter above that (both seen). A named one
    is somebody's; a nameless one of another job can only add bits, and then the answer errs to the safe side."""
    counts = [
        int(bitmap["count"])
        for node in nodes
        if node.get("node-name") in places
        for bitmap in node.get("dirty-bitmaps", ())
        if not bitmap.get("name")
    ]
    return sum(counts) if counts else None


def has_filter(nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any mirror's filter is among `query-named-block-nodes`."""
    return any(node.get("drv") == "mirror_top" for node in nodes)


def filters(statistics: Iterable[Mapping[str, Any]], source: str) -> list[str]:
    """The nodes right above `source`, out of `query-blockstats` with `query-nodes` (where a node's child is called its
    parent). The filters of jobs are there; their names are QEMU's own."""
    return [str(node.get("node-name", "")) for node in statistics if node.get("parent", {}).get("node-name") == source]


def virtual_size(nodes: Iterable[Mapping[str, Any]], name: str) -> int:
    """Bytes that a node shows to its user. Raises NotFound."""
    for node in nodes:
        if node.get("node-name") == name:
            return int(node["image"]["virtual-size"])
    raise NotFound("block node", name)


def source_node(devices: Sequence[Mapping[str, Any]], alias: str) -> str:
    """The root node of the device that libvirt calls `alias` (`virtio-disk0`), out of `query-block`.

    `qdev` is `/machine/peripheral/virtio-disk0/virtio-backend` for virtio and the alias itself for SCSI, IDE and SATA.
    Raises NotFound."""
    for device in devices:
        path = str(device.get("qdev", "")).split("/")
        if alias in path:
            return str(device.get("inserted", {}).get("node-name", ""))
    raise NotFound("block device", alias, known=[str(device.get("qdev", "")) for device in devices])
