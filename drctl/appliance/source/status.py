"""The source's side of `group.status`, as docs/internals.md lists it. What is not known is null, never 0."""

from __future__ import annotations

import time
from typing import Any

from drctl.appliance.source.disk_changes import disk_changes
from drctl.appliance.source.protection import Protection
from drctl.errors import DrctlError


def source_status(protection: Protection) -> dict[str, Any]:
    state = protection.state
    status = protection.shipper.status
    newest = protection.shipper.newest
    link = status.get("link") or {}
    wall = time.time()
    return {
        "group": state.spec.name,
        "role": "source",
        "phase": state.phase.value,
        "desired": state.desired.value,
        "reason": state.reason or str(status.get("no_mark_because") or ""),
        "generation": state.generation,
        "epoch": state.epoch,
        "interval": state.spec.checkpoint_interval,
        "rpo_seconds": max(0.0, wall - newest["wall_ns"] / 1e9) if newest else None,
        "last_checkpoint": {"number": newest["number"], "time": newest["time"]} if newest else None,
        "link": {
            "state": link.get("state", "unknown"),
            "offset_ms": link.get("offset_ms"),
            "error": link.get("error"),
            "limit": link.get("limit"),
        },
        "backlog_bytes": status.get("backlog_bytes"),
        "sync": _sync(status, protection.shipper.sync_eta()),
        "machines": _machines(protection),
        "changes": [each.words(state.spec.name) for each in disk_changes(state, protection.machines)]
        if state.epoch
        else [],
        "ring": _ring(status),
        "spill": _spill(status),
        "dirty_map": _dirty_map(status),
        "boot": protection.boot.told() if protection.boot else None,
        "strays": list(protection.strays.names),
        "processes": {"tap": protection.worker.tap_pid(), "shipper": protection.worker.shipper_pid()},
    }


def _sync(status: dict[str, Any], eta: float | None) -> dict[str, Any] | None:
    sync = status.get("sync") or {}
    if not sync.get("mode") or sync.get("state") == "done":
        return None
    return {
        "mode": sync["mode"],
        "state": sync.get("state"),
        "done_bytes": sync.get("done_bytes"),
        "total_bytes": sync.get("total_bytes"),
        "matched_bytes": sync.get("matched_bytes"),
        "sent_bytes": sync.get("sent_bytes"),
        "eta": eta,
    }


def _ring(status: dict[str, Any]) -> dict[str, Any] | None:
    ring = status.get("ring")
    return {"size": ring["size"], "used": ring["used"], "dropping": ring["dropping"]} if ring else None


def _spill(status: dict[str, Any]) -> dict[str, Any] | None:
    spill = status.get("spill")
    return {name: spill[name] for name in ("size", "used", "state", "error")} if spill else None


def _dirty_map(status: dict[str, Any]) -> dict[str, Any] | None:
    """Bytes that were dropped and have to be read again, of all that the map can note."""
    ring = status.get("ring")
    return {"size": ring["dirty_limit"], "used": ring["dirty_bytes"]} if ring and "dirty_limit" in ring else None


def _machines(protection: Protection) -> list[dict[str, Any]]:
    machines = []
    for machine in protection.machines:
        try:
            states = protection.tapping.states(protection.state, machine)
        except DrctlError as exc:
            states = {disk.target: f"unknown: {exc.message}" for disk in machine.disks}
        machines.append(
            {
                "name": machine.name,
                "state": machine.state.value,
                "disks": [
                    {"target": disk.target, "size": disk.size, "state": states.get(disk.target, "not protected")}
                    for disk in machine.disks
                ],
            }
        )
    return machines
