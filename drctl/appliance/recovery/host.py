"""Recovery on a real host: the steps with qemu-img, view servers, stores and a hypervisor in their hands."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Protocol

from drctl.appliance.recovery.definitions import FittingHost, LibvirtDefinitions
from drctl.appliance.recovery.images import QemuImages
from drctl.appliance.recovery.ports import Room, Tools
from drctl.appliance.recovery.recoveries import Recovery
from drctl.appliance.recovery.sources import ReceiverSources
from drctl.appliance.recovery.state import RecoveryFiles
from drctl.appliance.recovery.store import GroupStores
from drctl.appliance.recovery.views import Spawner, ViewProcesses
from drctl.model.extent import GiB
from drctl.model.ports import AddressBook, Hypervisor

#: Left free by tests, so that the journal beside them can grow while one is ended.
SCRATCH_RESERVE = 1 * GiB
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SystemClock:
    """The host's clocks."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class RecoveryHost(Hypervisor, FittingHost, Protocol):
    """A hypervisor whose networks can be told addresses, and whose files can be had."""

    @property
    def addresses(self) -> AddressBook: ...


def open_recovery(home: Path, run: Path, host: RecoveryHost, spawner: Spawner) -> Recovery:
    """The recoveries of the appliance with these directories. Call `resume` on it, then `supervise` each 250 ms."""
    stores = home / "store"
    views = ViewProcesses(run, stores, spawner)
    images = QemuImages()
    tools = Tools(
        hypervisor=host,
        stores=GroupStores(stores),
        images=images,
        views=views,
        sources=ReceiverSources(run / "receiver.sock"),
        definitions=LibvirtDefinitions(views, host, images),
        addresses=host.addresses,
        clock=SystemClock(),
        room=Room(home / "scratch", home / "images", SCRATCH_RESERVE),
        sleep=time.sleep,
        new_uuid=lambda: str(uuid.uuid4()),
    )
    return Recovery(tools, RecoveryFiles(home / "recoveries"), _BOOT_ID.read_text().strip())
