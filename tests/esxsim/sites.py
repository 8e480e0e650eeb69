"""An ESX host that is simulated, its appliance, and a recovery site: the real shipper, link, receiver and store."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from drctl.appliance import config as configuration
from drctl.appliance.client import Client
from drctl.appliance.esx import address as esx_address
from drctl.appliance.esx.daemon import EsxAppliance
from drctl.appliance.notify import Notifier
from drctl.appliance.replica.expiry import StoreExpiry
from drctl.appliance.replica.service import StoreService
from drctl.errors import DrctlError
from drctl.hypervisor.esx.session import Runner
from drctl.hypervisor.esx.snapshots import owner
from drctl.model.checkpoint import Checkpoint
from drctl.model.group import GroupSpec
from drctl.replication import identity
from drctl.replication.identity import Peer
from drctl.store.group_store import GroupStore
from tests.esxsim.host import Door, EsxSim

SOURCE, RECOVERY = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"


def until(what: Callable[[], Any], timeout: float = 100.0) -> Any:
    """The first true value of `what`."""
    end = time.monotonic() + timeout
    while not (value := what()):
        assert time.monotonic() < end, f"did not happen within {timeout} s"
        time.sleep(0.02)
    return value


class Sites:
    """`alpha` with the ESX host `esx1`, `beta` with a receiver and a store. Nothing runs but what is started."""

    def __init__(self, sim: EsxSim, group: str = "web", interval: float = 3600.0) -> None:
        self.sim = sim
        self.group = group
        self.interval = interval
        self.place = Path(tempfile.mkdtemp(prefix="esxsites-", dir="/var/tmp"))
        self.short = Path(tempfile.mkdtemp(prefix="es-", dir="/tmp"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        identity.create_ca(self.place / "ca")
        homes = {SOURCE: self.place / "alpha", RECOVERY: self.place / "beta"}
        for name, home in homes.items():
            home.mkdir()
            identity.issue(self.place / "ca", name, home / "tls")
            identity.write_peers(home / "tls", {SOURCE: Peer("alpha"), RECOVERY: Peer("beta")})
        self.home = homes[SOURCE]
        self.store = homes[RECOVERY] / "store"
        self.store.mkdir()
        self.write_config(f"esx://root@127.0.0.1:{max(sim.port, 1)}")
        self.door = Door(sim)
        self.appliance: EsxAppliance | None = None
        self._thread: threading.Thread | None = None
        self._receiver: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def write_config(self, uri: str) -> None:
        (self.home / "appliance.toml").write_text(
            f'site = "alpha"\nhost = "esx1"\nuri = "{uri}"\nlink = ""\nuuid = "{SOURCE}"\nrun = "{self.short}/r"\n'
            f'[[peer]]\nsite = "beta"\nhost = "beta1"\nlink = "127.0.0.1:{self.port}"\nuuid = "{RECOVERY}"\n'
        )

    # -- processes --------------------------------------------------------------------------------------------------

    def start_receiver(self) -> None:
        config = self.short / "receiver.json"
        tls = self.store.parent / "tls"
        config.write_text(
            f'{{"listen": "127.0.0.1:{self.port}", "tls": "{tls}", "store": "{self.store}",'
            f' "control": "{self.short}/recv"}}'
        )
        with (self.place / "receiver.log").open("ab") as log:
            argv = [sys.executable, "-m", "drctl.replication.receiver", str(config)]
            self._receiver = subprocess.Popen(argv, stdout=log, stderr=log)

    def stop_receiver(self) -> None:
        if self._receiver is not None:
            self._receiver.kill()
            self._receiver.wait()
            self._receiver = None

    def start_appliance(self, runner: Runner | None = None) -> None:
        loaded = configuration.load(self.home)
        loaded.make_directories()
        self.appliance = EsxAppliance(loaded, Notifier({}), runner or self.door)
        self._thread = threading.Thread(target=self.appliance.serve, daemon=True)
        self._thread.start()
        until(loaded.control.exists)

    def start_process(self, uri: str = "") -> None:
        """The appliance as a process of its own, over real SSH."""
        self.write_config(uri or esx_address.render(self.sim.login()))
        with (self.place / "appliance.log").open("ab") as log:
            argv = [sys.executable, "-m", "drctl.appliance.daemon", "--home", str(self.home)]
            self._process = subprocess.Popen(argv, stdout=log, stderr=log)
        until(lambda: self._answers())

    def _answers(self) -> bool:
        try:
            return bool(self.call("appliance.info"))
        except DrctlError:
            return False

    def kill_process(self) -> None:
        """Its shippers live on, as in reality."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop_appliance(self) -> None:
        self.kill_process()
        if self.appliance is not None and self._thread is not None:
            self.appliance.stop()
            self._thread.join(30)
            assert not self._thread.is_alive()
            self.appliance = None

    def close(self) -> None:
        self.stop_appliance()
        self.stop_receiver()
        for file in (self.short / "r" / "pids").glob("*.json"):
            self._end(file)
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.rmtree(self.short, ignore_errors=True)

    def _end(self, file: Path) -> None:
        from drctl.appliance.process import Processes

        Processes(file.parent, self.home / "logs").end(file.stem, force=True)

    # -- what operators do ------------------------------------------------------------------------------------------

    def call(self, method: str, **params: Any) -> Any:
        return Client(f"unix:{self.short}/r/control.sock").call(method, {"group": self.group, **params}, timeout=120)

    def spec(self, machines: Sequence[str]) -> GroupSpec:
        hosts = {"source_host": "esx1", "recovery_host": "beta1"}
        sizes = {"checkpoint_interval": self.interval, "ring_size": 16 << 20}
        return GroupSpec(self.group, "alpha", "beta", tuple(machines), **hosts, **sizes)  # type: ignore[arg-type]

    def protect(self, *machines: str) -> None:
        from dataclasses import asdict

        spec = self.spec(machines)
        StoreService(self.store, StoreExpiry(self.store, self.short / "recv"), lambda _: []).put(spec)
        self.call("group.put", spec=asdict(spec))
        self.call("replicate.start")

    def live(self) -> None:
        """Until the first cycle, or the next after a fault, is a checkpoint."""
        until(lambda: self.call("group.status")["phase"] == "live")

    def checkpoint(self, *tags: str) -> int:
        return int(self.call("checkpoint.create", kind="crash-consistent", tags=list(tags))["number"])

    # -- what came of it --------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        with closing(GroupStore.open(self.store / self.group)) as store:
            return list(store.checkpoints())

    def image(self, name: str, number: int) -> bytes:
        """A disk as it was at a checkpoint."""
        with closing(GroupStore.open(self.store / self.group)) as store, closing(store.open_view(number)) as view:
            disk = view.disk(name)
            return bytes(disk.read(0, disk.size))

    def status(self) -> dict[str, Any]:
        return dict(self.call("group.status"))

    def snapshots(self) -> list[str]:
        return [one.name for vm in self.sim.hostd.vms.values() for one in vm.snapshots if owner(one.name)]

    def is_quiet(self) -> bool:
        try:
            return not self.status()["cycle"]["running"]
        except DrctlError:
            return False
