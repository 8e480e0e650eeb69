"""Checkpoints served as read-only NBD exports for as long as somebody's call lasts, and pinned meanwhile.

What is left of a supervisor that died in the middle is taken away when the next one starts: the call that it was for
has ended with it."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.control import Progress
from drctl.appliance.process import Child
from drctl.appliance.recovery.store import GroupStores
from drctl.appliance.recovery.views import MODULE, START_SECONDS
from drctl.errors import DrctlError, NotFound, PreconditionFailed, StepFailed
from drctl.model.checkpoint import Checkpoint
from drctl.model.group import GroupDisk

PREFIX = "serve-"
LOOPBACK = "127.0.0.1"
#: How often the caller is told that it lasts, and thereby looked after.
TELL_SECONDS = 0.5

log = logging.getLogger(__name__)


class Spawner(Protocol):
    """Children, as appliance/process.py has them."""

    def names(self) -> list[str]: ...

    def find(self, name: str) -> Child | None: ...

    def run(self, name: str, command: Sequence[str], *, ready: Path, timeout_seconds: float = 5.0) -> Child: ...

    def end(self, name: str, timeout_seconds: float = 5.0, *, force: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class _Service:
    """One checkpoint that is being served."""

    id: str
    group: str
    checkpoint: Checkpoint
    disks: tuple[GroupDisk, ...]
    socket: Path
    config: Path
    port: int


class CheckpointServer:
    """View servers of this host that end with the call they are for. Methods may be called from any thread."""

    def __init__(self, run: Path, stores: Path, spawner: Spawner) -> None:
        self._views = run / "views"
        self._directory = stores
        self._stores = GroupStores(stores)
        self._spawner = spawner
        self._closing = threading.Event()

    def sweep(self) -> None:
        """Take away what an earlier supervisor left. Call it before the first `serve`."""
        for name in [each for each in self._spawner.names() if each.startswith(PREFIX)]:
            self._spawner.end(name)
        for left in self._views.glob(f"{PREFIX}*"):
            left.unlink(missing_ok=True)
        for group in self._stores.groups():
            with (
                suppress(DrctlError),
                self._stores.open(group) as store,
            ):  # a damaged store must not keep us from starting
                for pin in [each for each in store.pins() if each.startswith(PREFIX)]:
                    store.unpin(pin)

    def close(self) -> None:
        """End what is being served."""
        self._closing.set()

    def serve(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, checkpoint, disks [names; all when empty], port (null: none, 0: any), seconds (0: until the caller
        leaves)} → {served_seconds}; first progress {socket, address, checkpoint, disks [{name, machine, target,
        size}]}, then {left_seconds}."""
        seconds = float(params.get("seconds") or 0)
        service = self._begin(params)
        begin = time.monotonic()
        try:
            self._start(service)
            progress(_told(service))
            while not self._closing.wait(TELL_SECONDS):
                left = begin + seconds - time.monotonic() if seconds else None
                if left is not None and left <= 0:
                    break
                if self._spawner.find(service.id) is None:
                    raise StepFailed(f"the view server of {service.group} ended", hint=f"see logs/{service.id}.log")
                progress({"left_seconds": left})
        finally:
            self._end(service)
        return {"served_seconds": time.monotonic() - begin}

    def _begin(self, params: dict[str, Any]) -> _Service:
        """Choose, and pin what was chosen."""
        group, wanted = str(params.get("group")), [str(name) for name in params.get("disks") or ()]
        identity = f"{PREFIX}{uuid.uuid4().hex[:12]}"
        port = _port(params.get("port"))
        chosen = self._stores.choose(group, str(params.get("checkpoint") or "latest"), time.time())
        with self._stores.open(group) as store:
            store.pin(identity, chosen.number, chosen.epoch)
            try:
                with closing(store.open_view(chosen.number, chosen.epoch)) as view:
                    disks = tuple(view.disks)
                names = [disk.name for disk in disks]
                for name in wanted:
                    if name not in names:
                        raise NotFound("disk", name, known=names)
            except DrctlError:
                store.unpin(identity)
                raise
        picked = tuple(disk for disk in disks if not wanted or disk.name in wanted)
        paths = self._views / f"{identity}.sock", self._views / f"{identity}.json"
        return _Service(identity, group, chosen, picked, *paths, port)

    def _start(self, service: _Service) -> None:
        self._views.mkdir(parents=True, exist_ok=True)
        config = {
            "store": str(self._directory / service.group),
            "group": service.group,
            "checkpoint": service.checkpoint.number,
            "epoch": service.checkpoint.epoch,
            "view": service.id,
            "socket": str(service.socket),
            "port": service.port,
            "exports": [disk.name for disk in service.disks],
        }
        service.config.write_text(json.dumps(config))
        command = [sys.executable, "-m", MODULE, str(service.config)]
        self._spawner.run(service.id, command, ready=service.socket, timeout_seconds=START_SECONDS)
        log.info("%s: checkpoint #%d is served on %s", service.group, service.checkpoint.number, service.socket)

    def _end(self, service: _Service) -> None:
        self._spawner.end(service.id)
        for path in (service.socket, service.config):
            path.unlink(missing_ok=True)
        self._stores.unpin(service.group, service.id)


def _told(service: _Service) -> dict[str, Any]:
    return {
        "socket": str(service.socket),
        "address": f"{LOOPBACK}:{service.port}" if service.port else None,
        "checkpoint": {"number": service.checkpoint.number, "time": service.checkpoint.time},
        "disks": [
            {"name": disk.name, "machine": disk.machine, "target": disk.target, "size": disk.size}
            for disk in service.disks
        ],
    }


def _port(wanted: Any) -> int:
    """A port of the loopback address that is free now; 0 when none is wanted. Raises PreconditionFailed."""
    if wanted is None:
        return 0
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((LOOPBACK, int(wanted)))
        except (OSError, OverflowError) as exc:
            raise PreconditionFailed(f"port {wanted} of {LOOPBACK} can't be had: {exc}", hint="another --port") from exc
        return int(sock.getsockname()[1])
