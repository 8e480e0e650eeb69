"""Replicas' checkpoints as disks on an ESX host's datastore: where they go, how they are made and removed.

A recovery's disks are whole copies, made before its machines start: ESXi reads no NBD, so no view stands below them."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import time
from contextlib import closing
from pathlib import Path

import msgspec

from drctl.appliance.esx.guests import STATE_SECONDS, EsxGuests
from drctl.appliance.esx.recovered import ROOT, TESTS, is_ours
from drctl.appliance.recovery.ports import Told
from drctl.appliance.recovery.state import RecoveryRecord
from drctl.appliance.recovery.store import GroupStores
from drctl.errors import HypervisorRefused, IntegrityError, NotFound, StepFailed
from drctl.hypervisor.esx.answers import Filesystem
from drctl.hypervisor.esx.inventory import VOLUMES
from drctl.hypervisor.esx.replica import CopyNote, ReplicaDisks
from drctl.model.extent import GiB
from drctl.store import atomic

#: Left free on the datastore by tests.
RESERVE = 2 * GiB
#: How often it is asked what a disk takes.
ALLOCATED_SECONDS = 30.0
_LONGEST = 60


def safe(name: str) -> str:
    """A file name of any name; two names have two."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_LONGEST]
    plain = re.sub(r"^[.-]", "_", plain) or "_"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class EsxRoom:
    """Where recoveries' files go: on the datastore that the appliance's `uri` names, else the one with most room."""

    reserve = RESERVE

    def __init__(self, guests: EsxGuests, datastore: str = "") -> None:
        self._guests = guests
        self._name = datastore
        self._uuid = ""

    @property
    def scratch(self) -> Path:
        return self._root() / TESTS

    @property
    def images(self) -> Path:
        return self._root() / "groups"

    def overlay(self, directory: Path, machine: str, disk: str) -> Path:
        """Each machine has a directory of its own, as ESXi wants it."""
        return directory.parent / safe(directory.name) / safe(machine) / f"{safe(disk)}.vmdk"

    def _root(self) -> Path:
        if not self._uuid:
            self._uuid = self._choose().uuid
        return Path(VOLUMES) / self._uuid / ROOT

    def _choose(self) -> Filesystem:
        """Raises NotFound, HypervisorRefused."""
        stores = self._guests.inventory().datastores
        if self._name:
            found = [one for one in stores if self._name in (one.name, one.uuid)]
            if not found:
                raise NotFound("datastore", self._name, known=sorted(one.name for one in stores))
            return found[0]
        if not stores:
            raise HypervisorRefused(f"{self._guests.host.name} has no datastore that is mounted")
        return max(stores, key=lambda one: (one.free, one.uuid))


class StoreViews:
    """A recovery's disks are read from the store in this process, while they are copied: no server is needed."""

    def ensure(self, recovery: RecoveryRecord) -> bool:
        del recovery
        return False

    def alive(self, recovery: RecoveryRecord) -> bool:
        del recovery
        return True

    def end(self, recovery: RecoveryRecord) -> None:
        """Nothing runs."""

    def socket(self, recovery: RecoveryRecord) -> str:
        del recovery
        return ""

    def backing(self, recovery: RecoveryRecord, export: str) -> str:
        """Which disk of which checkpoint."""
        return json.dumps([recovery.group, recovery.checkpoint, recovery.epoch, export])

    def close(self) -> None:
        """Nothing is held."""


class CopyFiles:
    """How far copies are: a small file for each disk, durable."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, path: str) -> CopyNote | None:
        """None for one that is not there or is damaged: then it is copied from its start."""
        try:
            return msgspec.convert(atomic.read_json(self._file(path)), CopyNote)
        except (FileNotFoundError, msgspec.ValidationError, IntegrityError, ValueError):
            return None

    def save(self, note: CopyNote) -> None:
        atomic.make_directory(self._directory)
        atomic.write_json(self._file(note.path), msgspec.to_builtins(note))

    def remove(self, path: str) -> None:
        self._file(path).unlink(missing_ok=True)

    def _file(self, path: str) -> Path:
        return self._directory / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"


class EsxImages:
    """Images of recoveries there. Safe from any thread. Touches nothing that is not below our directory."""

    copies = True

    def __init__(self, stores: GroupStores, guests: EsxGuests, disks: ReplicaDisks) -> None:
        self._stores = stores
        self._guests = guests
        self._disks = disks
        self._grown: dict[str, tuple[float, int]] = {}

    def exists(self, path: Path) -> bool:
        return self._disks.exists(str(path))

    def create(self, path: Path, backing: str, size: int, told: Told) -> None:
        del size
        group, checkpoint, epoch, export = json.loads(backing)
        with self._stores.open(group) as store, closing(store.open_view(checkpoint, epoch)) as view:
            self._disks.write(_ours(path), view.disk(export), backing, told)

    def put(self, path: Path, data: bytes) -> None:
        self._disks.put(_ours(path), data)

    def backing(self, path: Path) -> str | None:
        """It stands alone from the start."""
        del path
        return None

    def localize(self, path: Path) -> None:
        """It is."""

    def allocated(self, path: Path) -> int:
        """What a disk has grown by since it was made: what its machine wrote where there was nothing."""
        then, grown = self._grown.get(str(path), (float("-inf"), 0))
        if time.monotonic() - then > ALLOCATED_SECONDS:
            grown = self._disks.grown(str(path))
            self._grown[str(path)] = (time.monotonic(), grown)
        return grown

    def remove(self, path: Path) -> None:
        """A disk, with its directory when it was the last; a directory; or a file.

        Raises StepFailed while a machine that the host knows stands on it."""
        text = _ours(path)
        if path.suffix == ".vmdk":
            self._demand_free(posixpath.dirname(text))
            self._disks.delete(text)
            self._remove_emptied(posixpath.dirname(text))
        elif path.suffix in (".iso", ".vmx"):
            self._guests.host.session.run(["rm", "-f", text])
        elif self._disks.exists(text):
            self._demand_free(text)
            self._disks.remove_directory(text)

    def _remove_emptied(self, directory: str) -> None:
        """The machine's directory without disks, and the one above when nothing else is in it."""
        session = self._guests.host.session
        (answer,) = session.run(["find", directory, "-name", "*.vmdk"])
        if answer.code or answer.out.strip():
            return
        self._disks.remove_directory(directory)
        session.run(["rmdir", posixpath.dirname(directory)])

    def _demand_free(self, directory: str) -> None:
        inside = f"{directory}/"
        for machine in self._guests.inventory().machines:
            files = [machine.vmx, *(layer.path for disk in machine.disks for layer in disk.layers)]
            if any(file.startswith(inside) for file in files):
                raise StepFailed(
                    f"{machine.name} stands on {directory}, and {self._guests.host.name} knows it still",
                    hint="unregister it there, and give the command again",
                )

    def free(self, directory: Path) -> int:
        uuid = str(directory).split("/")[3]
        stores = [one for one in self._guests.inventory(STATE_SECONDS).filesystems if one.uuid == uuid]
        return stores[0].free if stores and stores[0].mounted else 0


def _ours(path: Path) -> str:
    """Raises HypervisorRefused for what is not below our directory."""
    if not is_ours(str(path)):
        raise HypervisorRefused(f"{path} is not below {ROOT}: it is left alone")
    return str(path)
