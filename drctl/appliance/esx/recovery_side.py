"""The recovery role of an ESX host's appliance: stores and journals here, machines and their disks on the host."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from drctl.appliance.config import Home
from drctl.appliance.control import Handler, Progress
from drctl.appliance.esx.conversion import EsxDefinitions
from drctl.appliance.esx.datastore import CopyFiles, EsxImages, EsxRoom, StoreViews
from drctl.appliance.esx.guests import EsxGuests
from drctl.appliance.esx.recovered import NoAddresses, RecoveredOnEsx
from drctl.appliance.process import Processes
from drctl.appliance.recovery.host import SystemClock
from drctl.appliance.recovery.ports import Tools
from drctl.appliance.recovery.recoveries import Recovery
from drctl.appliance.recovery.sources import ReceiverSources
from drctl.appliance.recovery.state import RecoveryFiles
from drctl.appliance.recovery.store import GroupStores
from drctl.appliance.replica.checkpoint_serve import CheckpointServer
from drctl.appliance.replica.expiry import StoreExpiry
from drctl.appliance.replica.held_store import HeldStores
from drctl.appliance.replica.receiver_link import ReceiverLink
from drctl.appliance.replica.seed_service import SeedService
from drctl.appliance.replica.service import StoreService
from drctl.errors import DrctlError, Refused
from drctl.hypervisor.esx.replica import ReplicaDisks

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def open_esx_recovery(home: Path, run: Path, guests: EsxGuests, datastore: str = "") -> Recovery:
    """The recoveries of an appliance with these directories on this host. See recovery.host.open_recovery."""
    stores = GroupStores(home / "store")
    disks = ReplicaDisks(guests.host.session, guests.disks, CopyFiles(home / "copies"))
    machines, images = RecoveredOnEsx(guests, disks), EsxImages(stores, guests, disks)
    tools = Tools(
        hypervisor=machines,
        stores=stores,
        images=images,
        views=StoreViews(),
        sources=ReceiverSources(run / "receiver.sock"),
        definitions=EsxDefinitions(guests, images, machines.networks),
        addresses=NoAddresses(),
        clock=SystemClock(),
        room=EsxRoom(guests, datastore),
        sleep=time.sleep,
        new_uuid=lambda: str(uuid.uuid4()),
    )
    return Recovery(tools, RecoveryFiles(home / "recoveries"), _BOOT_ID.read_text().strip())


class RecoverySide:
    """All of an ESX appliance that concerns groups replicated to it. Methods may be called from any thread."""

    def __init__(self, home: Home, guests: EsxGuests, processes: Processes, datastore: str = "") -> None:
        receiver = home.run / "receiver.sock"
        self.recovery = open_esx_recovery(home.path, home.run, guests, datastore)
        self.expiry = StoreExpiry(home.store, receiver)
        self.stores = StoreService(home.store, self.expiry, self.recovery.recoveries)
        self._served = CheckpointServer(home.run, home.store, processes)
        self._receiver = ReceiverLink(home, processes)
        self._held = HeldStores(receiver)
        self._seeds = SeedService(home.store, self._held)

    def start(self) -> None:
        self._receiver.ensure()
        self._served.sweep()
        self._held.forgotten()
        self.recovery.resume()

    def supervise(self) -> None:
        """Call it each half second. Raises DrctlError."""
        self._receiver.ensure()
        self.expiry.sweep()
        self.recovery.supervise()

    def close(self) -> None:
        self._served.close()
        self.recovery.close()

    def findings(self) -> list[dict[str, str]]:
        """What would come of the groups' machines here. What can't be looked at is told elsewhere."""
        try:
            return self.recovery.fit.findings()
        except DrctlError:
            return []

    def handlers(self) -> dict[str, Handler]:
        return {
            "group.fit": self.recovery.fit.look,
            "replicate.seed": self._seeds.take,
            **self.stores.handlers(),
            "checkpoint.serve": self._served.serve,
            **self.recovery.handlers(),
            "fence.note": lambda _params, _progress: {},  # the operator's machine fenced; only history is written here
            **dict.fromkeys(("failback.plan", "failback.protect", "failback.disks", "failback.prepare"), _no_failback),
        }


def _no_failback(params: dict[str, Any], progress: Progress) -> Any:
    del progress
    raise Refused(
        f"{params.get('group')}: a failback from or to an ESX host can't be made by this version",
        hint="see docs/esx.md",
    )
