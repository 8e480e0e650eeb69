"""The reader's way into a running machine: its disks as read-only NBD exports of QEMU itself.

QEMU has one NBD server. It is ours only for the time of a pass; another's is left alone. It works beside the mirror and
under load. **Never for a disk with an I/O thread on QEMU older than 9.0**: there the first client that leaves ends QEMU
(measured on 7.2.22: assertion in `nbd_blockdev_client_closed`); such disks are refused before they get here.

**Never `nbd-server-stop` while somebody is connected**: of a client that is still shaking hands QEMU waits for the end
in a loop that does not listen to it, for ever, and the guest stands still (measured on 7.2.22: within seconds where a
reader connects all the time). So the socket is taken away first, the exports are ended one by one, which waits for
nobody, and the server is stopped when the kernel shows no connection to it any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from drctl.errors import HypervisorRefused
from drctl.hypervisor.qmp import Monitor, command

_PREFIX: Final = "drctl-reader-"
#: Between starting its server and adding an export to it others are this fast; a server without exports for so long is
#: one that was left behind.
_ORPHAN_SECONDS: Final = 1.0
#: Clients whose export has ended are gone in a moment; those that say nothing QEMU drops after 10 s (seen on 7.2.22).
#: One that does not leave within this is left alone.
_LEAVE_SECONDS: Final = 12.0
_LOOK_SECONDS: Final = 0.02
#: Of a listening socket in /proc/net/unix (__SO_ACCEPTCON of Linux' include/uapi/linux/net.h).
_LISTENS: Final = "00010000"


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
    export_stop(monitor, socket, sleep=sleep)
    _start_server(monitor, socket, sleep)
    try:
        for number, (name, node) in enumerate(sorted(exports.items())):
            export: dict[str, Any] = {"id": f"{_PREFIX}{number}", "type": "nbd", "name": name, "writable": False}
            if bitmap := (bitmaps or {}).get(name):
                export["bitmaps"] = [bitmap]
            monitor(command("block-export-add", node_name=node, **export))
    except HypervisorRefused:
        export_stop(monitor, socket, sleep=sleep)
        if not _exports(monitor):
            _stop_server(monitor, socket, sleep)
        raise


def export_stop(monitor: Monitor, socket: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """End our exports, and the server on `socket` when it is ours. Nothing to do when there are none.

    Raises HypervisorRefused when a client does not leave: then the server is left, without exports."""
    ids = _exports(monitor)
    ours = [each for each in ids if each.startswith(_PREFIX)]
    if not ours:
        return
    alone = len(ours) == len(ids)
    if alone:
        Path(socket).unlink(missing_ok=True)
    for export in ours:
        with suppress(HypervisorRefused):  # it has ended meanwhile
            monitor(command("block-export-del", id=export, mode="hard"))
    if alone:
        _stop_server(monitor, socket, sleep)


def _stop_server(monitor: Monitor, socket: str, sleep: Callable[[float], None]) -> None:
    """Stop a server of ours that has no exports any more, when all have left it. Raises HypervisorRefused."""
    Path(socket).unlink(missing_ok=True)
    for _ in range(round(_LEAVE_SECONDS / _LOOK_SECONDS)):
        if not connected(socket) and not _exports(monitor):
            monitor(command("nbd-server-stop"))
            return
        sleep(_LOOK_SECONDS)
    raise HypervisorRefused(
        f"QEMU's NBD server can't be stopped: somebody does not leave {socket}",
        hint="the guest would stand still; end the process that is connected there (ss -xp)",
    )


def connected(socket: str) -> int:
    """How many connections to a unix socket there are, those among them that its listener has not accepted yet."""
    rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()]
    return sum(len(row) == 8 and row[7] == socket and row[3] != _LISTENS for row in rows)


def _start_server(monitor: Monitor, socket: str, sleep: Callable[[float], None]) -> None:
    start = command("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    with suppress(HypervisorRefused):
        monitor(start)
        return
    _demand_unused(monitor)
    sleep(_ORPHAN_SECONDS)
    _demand_unused(monitor)
    _stop_server(monitor, socket, sleep)
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
