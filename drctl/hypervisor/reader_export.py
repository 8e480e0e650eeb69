"""The reader's way into a running machine: its disks as read-only NBD exports of QEMU itself.

QEMU has one NBD server. It is ours only for the time of a pass; another's is left alone. It works beside the mirror and
under load. **Never for a disk with an I/O thread on QEMU older than 9.0**: there the first client that leaves ends QEMU
(measured on 7.2.22: assertion in `nbd_blockdev_client_closed`); such disks are refused before they get here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from drctl.errors import HypervisorRefused
from drctl.hypervisor.qmp import Monitor, command

_PREFIX: Final = "drctl-reader-"
#: Between starting its server and adding an export to it others are this fast; a server without exports for so long is
#: one that was left behind.
_ORPHAN_SECONDS: Final = 1.0


def export_start(
    monitor: Monitor,
    socket: str,
    exports: Mapping[str, str],
    bitmaps: Mapping[str, str] | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Serve the nodes `exports` (export name → node) read-only on a unix socket. What an earlier pass left is replaced.
    `bitmaps`: of some exports a bitmap that does not record, told to clients that ask for it.

    Raises HypervisorRefused when somebody else uses QEMU's NBD server, naming the exports."""
    export_stop(monitor)
    _start_server(monitor, socket, sleep)
    try:
        for number, (name, node) in enumerate(sorted(exports.items())):
            export: dict[str, Any] = {"id": f"{_PREFIX}{number}", "type": "nbd", "name": name, "writable": False}
            if bitmap := (bitmaps or {}).get(name):
                export["bitmaps"] = [bitmap]
            monitor(command("block-export-add", node_name=node, **export))
    except HypervisorRefused:
        monitor(command("nbd-server-stop"))
        raise


def export_stop(monitor: Monitor) -> None:
    """End our exports, and the server when it is ours. Nothing to do when there are none."""
    ids = _exports(monitor)
    ours = [each for each in ids if each.startswith(_PREFIX)]
    if ours and len(ours) == len(ids):
        monitor(command("nbd-server-stop"))  # ends its exports, and the clients, too
        return
    for export in ours:
        monitor(command("block-export-del", id=export, mode="hard"))


def _start_server(monitor: Monitor, socket: str, sleep: Callable[[float], None]) -> None:
    start = command("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    with suppress(HypervisorRefused):
        monitor(start)
        return
    _demand_unused(monitor)
    sleep(_ORPHAN_SECONDS)
    _demand_unused(monitor)
    with suppress(HypervisorRefused):
        monitor(command("nbd-server-stop"))
    monitor(start)


def _demand_unused(monitor: Monitor) -> None:
    """Raises HypervisorRefused when QEMU's NBD server serves somebody, or a migration is about to use it."""
    foreign = [each for each in _exports(monitor) if not each.startswith(_PREFIX)]
    migration = str(monitor(command("query-migrate")).get("status", "")) if not foreign else ""
    if foreign or migration in ("setup", "active", "pre-switchover", "device"):
        user = f"exports {', '.join(foreign)}" if foreign else "a migration"
        raise HypervisorRefused(
            f"QEMU's NBD server is in use by {user}",
            hint="a backup or a migration is running; the reader waits for its end",
            exports=foreign,
        )


def _exports(monitor: Monitor) -> list[str]:
    found: list[dict[str, Any]] = monitor(command("query-block-exports"))
    return [str(each.get("id", "")) for each in found if each.get("type", "nbd") == "nbd"]
