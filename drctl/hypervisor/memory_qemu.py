"""A model of QEMU's block layer in memory, for tests: the commands that mirror, export and attestation use.

It answers with QEMU 7.2's words, states and refusals. What it can't judge, real QEMU does in the integration tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from drctl.hypervisor.qmp import unpack
from drctl.model.extent import GiB


class _QmpError(Exception):
    def __init__(self, description: str, name: str = "GenericError") -> None:
        super().__init__(description)
        self.answer = {"error": {"class": name, "desc": description}}


@dataclass
class MemoryTap:
    """The other end of mirrors. A connection stands as long as the tap lives the life in which it was made."""

    alive: bool = True
    life: int = 1
    size: int = GiB

    def die(self) -> None:
        self.alive = False

    def live_again(self) -> None:
        self.alive, self.life = True, self.life + 1


@dataclass
class MemoryJob:
    """A mirror job as QEMU 7.2 keeps it."""

    name: str
    source: str
    target: str
    status: str = "ready"
    io_status: str = "ok"
    paused: bool = False
    dirty: int = 0
    canceled: bool = False
    error: str = ""


@dataclass
class MemoryQemu:
    """A monitor: call it with a command. `disks` is alias → (node, size); `taps` socket → tap."""

    disks: dict[str, tuple[str, int]]
    taps: dict[str, MemoryTap] = field(default_factory=dict)
    nodes: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: The tap's life in which each node's connection was made.
    lives: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, MemoryJob] = field(default_factory=dict)
    exports: dict[str, str] = field(default_factory=dict)
    server: str = ""
    status: str = "running"
    migration: str = ""
    #: Whether a job's bitmap is at its filter (QEMU 10), not at the source (QEMU 7.2).
    bitmap_at_filter: bool = False
    #: Every command in order, for tests that care what was done, and what was not.
    log: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, sent: dict[str, Any]) -> Any:
        self.log.append(sent)
        handler: Callable[..., Any] | None = getattr(self, "_do_" + sent["execute"].replace("-", "_"), None)
        if handler is None:
            return unpack(
                sent, _QmpError(f"The command {sent['execute']} has not been found", "CommandNotFound").answer
            )
        try:
            arguments = {key.replace("-", "_"): value for key, value in sent.get("arguments", {}).items()}
            return handler(**arguments)
        except _QmpError as exc:
            return unpack(sent, exc.answer)

    def done(self) -> list[str]:
        """The names of all commands so far."""
        return [sent["execute"] for sent in self.log]

    def write(self, node: str, length: int = 4096) -> None:
        """A write of the guest: to the disk, then to the tap if one is attached."""
        for job in self.jobs.values():
            if job.source == node and job.status != "concluded" and not self._reach(job):
                self._fail(job, length)

    def _reach(self, job: MemoryJob) -> bool:
        """Whether a request gets to the tap. A dead connection is found out by the first, made anew by the second."""
        tap = self.taps[self.nodes[job.target][0]]
        if self.connected(job.target):
            return True
        known_dead = self.lives.pop(job.target, None) is None
        if known_dead and tap.alive:
            self.lives[job.target] = tap.life
        return False

    def connected(self, node: str) -> bool:
        """Whether a mirror's connection to its tap stands, which QEMU itself does not know."""
        tap = self.taps[self.nodes[node][0]]
        return tap.alive and self.lives.get(node) == tap.life

    def _fail(self, job: MemoryJob, length: int) -> None:
        job.status, job.io_status, job.paused = "standby", "failed", True
        job.dirty += length

    def _run(self, job: MemoryJob) -> None:
        """What the job's own coroutine does when it is let."""
        if job.paused:
            return
        if job.dirty:
            if not self._reach(job):
                self._fail(job, 0)
                return
            job.dirty = 0
        if job.canceled:
            job.status = "concluded"

    # -- queries

    def _do_query_block(self) -> list[dict[str, Any]]:
        return [
            {"qdev": f"/machine/peripheral/{alias}/virtio-backend", "inserted": {"node-name": node}}
            for alias, (node, _) in self.disks.items()
        ]

    def _do_query_named_block_nodes(self, flat: bool = False) -> list[dict[str, Any]]:
        found = [_node(name, size, []) for name, (_, size) in self.nodes.items()]
        for node, size in self.disks.values():
            bitmaps = list(self._bitmaps(node))
            found.append(_node(node, size, [] if self.bitmap_at_filter else bitmaps))
            if bitmaps:
                found.append(_node(f"#over-{node}", size, bitmaps if self.bitmap_at_filter else []))
                found[-1]["drv"] = "mirror_top"
        return found

    def _do_query_blockstats(self, query_nodes: bool = False) -> list[dict[str, Any]]:
        nodes = [node for node, _ in self.disks.values()]
        return [{"node-name": node} for node in nodes] + [
            {"node-name": f"#over-{node}", "parent": {"node-name": node}} for node in nodes if list(self._bitmaps(node))
        ]

    def _bitmaps(self, node: str) -> Iterator[dict[str, Any]]:
        for job in self.jobs.values():
            if job.source == node and job.status != "concluded":
                yield {"recording": False, "persistent": False, "busy": False, "granularity": 4096, "count": job.dirty}

    def _do_query_block_jobs(self) -> list[dict[str, Any]]:
        for job in self.jobs.values():
            self._run(job)
        return [
            {
                "device": job.name,
                "type": "mirror",
                "status": job.status,
                "io-status": job.io_status,
                "paused": job.paused,
                **({"error": job.error} if job.error else {}),
            }
            for job in self.jobs.values()
        ]

    def _do_query_status(self) -> dict[str, Any]:
        return {"status": self.status, "running": self.status == "running"}

    def _do_query_migrate(self) -> dict[str, Any]:
        return {"status": self.migration} if self.migration else {}

    def _do_query_block_exports(self) -> list[dict[str, Any]]:
        return [{"id": each, "type": "nbd", "node-name": node} for each, node in self.exports.items()]

    # -- nodes and jobs

    def _do_blockdev_add(self, node_name: str, server: dict[str, str], **_: Any) -> dict[str, Any]:
        if node_name in self.nodes:
            raise _QmpError(f"Duplicate nodes with node-name='{node_name}'")
        tap = self.taps.get(server["path"])
        if tap is None or not tap.alive:
            raise _QmpError(f"Failed to connect to '{server['path']}': Connection refused")
        self.lives[node_name] = tap.life
        self.nodes[node_name] = (server["path"], tap.size)
        return {}

    def _do_blockdev_del(self, node_name: str) -> dict[str, Any]:
        if node_name not in self.nodes:
            raise _QmpError(f"Failed to find node with node-name='{node_name}'")
        if any(job.target == node_name for job in self.jobs.values() if job.status != "concluded"):
            raise _QmpError(f"Node {node_name} is in use")
        del self.nodes[node_name]
        self.lives.pop(node_name, None)
        return {}

    def _do_blockdev_mirror(self, job_id: str, device: str, target: str, **_: Any) -> dict[str, Any]:
        if job_id in self.jobs:
            raise _QmpError(f"Job ID '{job_id}' already in use")
        if device not in [node for node, _ in self.disks.values()]:
            raise _QmpError(f"Cannot find device='{device}' nor node-name='{device}'")
        if any(job.source == device and job.status != "concluded" for job in self.jobs.values()):
            raise _QmpError(f"Node '{device}' is busy: block device is in use by block job: mirror")
        self.jobs[job_id] = MemoryJob(job_id, device, target)
        return {}

    def _job(self, name: str) -> MemoryJob:
        if name not in self.jobs:
            raise _QmpError(f"Block job '{name}' not found", "DeviceNotActive")
        return self.jobs[name]

    def _do_block_job_pause(self, device: str) -> dict[str, Any]:
        job = self._job(device)
        if job.paused:
            raise _QmpError("Job is already paused")
        job.status, job.paused = "standby", True
        return {}

    def _do_block_job_resume(self, device: str) -> dict[str, Any]:
        job = self._job(device)
        if not job.paused:
            raise _QmpError("Can't resume a job that was not paused")
        job.status, job.io_status, job.paused = "ready", "ok", False
        return {}

    def _do_block_job_cancel(self, device: str, force: bool = False) -> dict[str, Any]:
        job = self._job(device)
        if job.paused and not force:
            raise _QmpError(f"The block job for device '{device}' is currently paused")
        job.canceled = True
        return {}

    def _do_job_dismiss(self, id: str) -> dict[str, Any]:
        if self._job(id).status != "concluded":
            raise _QmpError(f"Job '{id}' in state 'ready' cannot accept command verb 'dismiss'")
        del self.jobs[id]
        return {}

    def _do_transaction(self, actions: list[Any]) -> dict[str, Any]:
        return {}

    def _do_human_monitor_command(self, command_line: str) -> str:
        for job in self.jobs.values():
            if job.target in command_line.split():
                self._reach(job)
        return ""

    # -- exports

    def _do_nbd_server_start(self, addr: dict[str, Any]) -> dict[str, Any]:
        if self.server:
            raise _QmpError("NBD server already running")
        self.server = addr["data"]["path"]
        return {}

    def _do_nbd_server_stop(self) -> dict[str, Any]:
        if not self.server:
            raise _QmpError("NBD server not running")
        self.server = ""
        self.exports.clear()
        return {}

    def _do_block_export_add(self, id: str, node_name: str, **_: Any) -> dict[str, Any]:
        if not self.server:
            raise _QmpError("NBD server not running")
        if node_name not in [node for node, _ in self.disks.values()]:
            raise _QmpError(f"Cannot find device='' nor node-name='{node_name}'")
        self.exports[id] = node_name
        return {}

    def _do_block_export_del(self, id: str, mode: str = "safe") -> dict[str, Any]:
        if self.exports.pop(id, None) is None:
            raise _QmpError(f"Export '{id}' is not found")
        return {}


def _node(name: str, size: int, bitmaps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"node-name": name, "image": {"virtual-size": size}, **({"dirty-bitmaps": bitmaps} if bitmaps else {})}
