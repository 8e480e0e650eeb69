"""View servers as child processes: started, adopted, asked whether they answer, ended. Knows no store."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from drctl.appliance.process import Child
from drctl.appliance.recovery.state import RecoveryRecord
from drctl.errors import StepFailed
from drctl.wire.nbd import NBDMAGIC

MODULE = "drctl.replication.view_server"
#: A view opens within 2 s; this is for a machine in distress.
START_SECONDS = 30.0
#: A server that lives but doesn't greet for so long hangs: it is killed, its guests wait meanwhile. Not shorter, for a
#: healthy server on an overloaded host greets late, and killing it would not help.
HANG_SECONDS = 6.0


class Spawner(Protocol):
    """Children that outlive the supervisor, as appliance/process.py has them."""

    def find(self, name: str) -> Child | None: ...

    def ensure(self, name: str, module: str, arguments: Sequence[str]) -> tuple[Child, bool]: ...

    def end(self, name: str, timeout_seconds: float = 5.0, *, force: bool = False) -> None: ...


class ViewProcesses:
    """One view server per recovery, on run/views/ID.sock, for the store at `stores`/GROUP. Safe from any thread."""

    def __init__(self, run: Path, stores: Path, spawner: Spawner) -> None:
        self._directory = run / "views"
        self._stores = stores
        self._spawner = spawner
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._probes: dict[str, Probe] = {}

    def ensure(self, recovery: RecoveryRecord) -> bool:
        with self._locks[recovery.id]:
            config = self._write_config(recovery)
            _, started = self._spawner.ensure(self._name(recovery), MODULE, [str(config)])
            self._wait(recovery)
            return started

    def alive(self, recovery: RecoveryRecord) -> bool:
        """It runs, and has greeted a client lately; never waits. A hung one is killed here."""
        if self._locks[recovery.id].locked():
            return True  # somebody is starting it now
        if self._spawner.find(self._name(recovery)) is None:
            return False
        probe = self._probes.setdefault(recovery.id, Probe(self.socket(recovery)))
        if not probe.hangs():
            return True
        self._probes.pop(recovery.id).close()
        self._spawner.end(self._name(recovery), force=True)
        return False

    def end(self, recovery: RecoveryRecord) -> None:
        with self._locks[recovery.id]:
            self._spawner.end(self._name(recovery))
            if probe := self._probes.pop(recovery.id, None):
                probe.close()
            self._config(recovery).unlink(missing_ok=True)
            Path(self.socket(recovery)).unlink(missing_ok=True)

    def socket(self, recovery: RecoveryRecord) -> str:
        return str(self._directory / f"{recovery.id}.sock")

    def backing(self, recovery: RecoveryRecord, export: str) -> str:
        return f"nbd+unix:///{quote(export)}?socket={quote(self.socket(recovery))}"

    def close(self) -> None:
        while self._probes:
            self._probes.popitem()[1].close()

    def _name(self, recovery: RecoveryRecord) -> str:
        return f"view-{recovery.id}"

    def _config(self, recovery: RecoveryRecord) -> Path:
        return self._directory / f"{recovery.id}.json"

    def _write_config(self, recovery: RecoveryRecord) -> Path:
        path = self._config(recovery)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(
            json.dumps(
                {
                    "store": str(self._stores / recovery.group),
                    "group": recovery.group,
                    "checkpoint": recovery.checkpoint,
                    "epoch": recovery.epoch,
                    "view": recovery.id,
                    "socket": self.socket(recovery),
                    "exports": [disk.export for _, disk in recovery.disks()],
                }
            )
        )
        temporary.replace(path)
        return path

    def _wait(self, recovery: RecoveryRecord) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not _greets(self.socket(recovery)):
            if self._spawner.find(self._name(recovery)) is None:
                raise StepFailed(f"the view server of {recovery.id} ended", hint=f"see logs/{self._name(recovery)}.log")
            if time.monotonic() > deadline:
                raise StepFailed(f"the view server of {recovery.id} does not answer after {START_SECONDS:.0f} s")
            time.sleep(0.02)


def _greets(path: str, timeout_seconds: float = 1.0) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_seconds)
            sock.connect(path)
            return sock.recv(8) == NBDMAGIC.to_bytes(8, "big")
    except OSError:
        return False


class Probe:
    """Asks a server for its greeting again and again without ever waiting. One thread at a time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._sock: socket.socket | None = None
        self._since = 0.0

    def hangs(self) -> bool:
        """True when a greeting is due for longer than HANG_SECONDS."""
        now = time.monotonic()
        if self._sock is None:
            self._begin(now)
            return False
        try:
            self._sock.recv(8)
        except BlockingIOError:
            return now - self._since > HANG_SECONDS
        except OSError:
            pass
        self.close()
        return False

    def _begin(self, now: float) -> None:
        if now - self._since < 1.0:
            return
        self._since = now
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            return
        self._sock = sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
