"""What forbids a snapshot cycle, out of one look at a host. Pure.

A snapshot that is taken on a datastore that fills up stops its machines: better none than one that can't be removed."""

from __future__ import annotations

from collections.abc import Sequence

from drctl.errors import HypervisorRefused, OutOfSpace, PreconditionFailed
from drctl.hypervisor.esx.answers import Filesystem
from drctl.hypervisor.esx.inventory import VOLUMES, EsxMachine, Inventory
from drctl.model.extent import GiB, format_bytes

#: A datastore with less free space takes no snapshot of ours, and loses those that it has.
FREE_BYTES, FREE_SHARE = GiB, 0.02
#: ESXi allows 32 layers; a cycle needs two, and somebody else's backup one.
MOST_LAYERS = 29


def demand_fit(inventory: Inventory, wanted: Sequence[str]) -> None:
    """A cycle may begin over these machines (paths of .vmx).

    Raises HypervisorRefused, PreconditionFailed; OutOfSpace for a datastore that is nearly full."""
    if inventory.maintenance:
        raise HypervisorRefused("the host is in maintenance mode: no snapshot is taken there")
    machines = [one for one in inventory.machines if one.vmx in wanted]
    for machine in machines:
        _demand_layers(machine)
        for store in _stores(machine, inventory):
            demand_space(store)


def demand_space(store: Filesystem) -> None:
    """Raises OutOfSpace when the datastore is nearly full."""
    if store.free < max(FREE_BYTES, FREE_SHARE * store.size):
        raise OutOfSpace(
            f"datastore {store.name} is nearly full: {format_bytes(store.free)} free of {format_bytes(store.size)}",
            hint="free space there; until then no snapshot of ours is kept, and afterwards the disks are compared",
        )


def stores_of(inventory: Inventory, wanted: Sequence[str]) -> list[Filesystem]:
    """The datastores that these machines' files lie on."""
    machines = [one for one in inventory.machines if one.vmx in wanted]
    return list(dict.fromkeys(store for one in machines for store in _stores(one, inventory)))


def _stores(machine: EsxMachine, inventory: Inventory) -> list[Filesystem]:
    paths = [machine.vmx, *(layer.path for disk in machine.disks for layer in disk.layers)]
    uuids = {path.removeprefix(f"{VOLUMES}/").partition("/")[0] for path in paths}
    return [one for one in inventory.filesystems if one.uuid in uuids]


def _demand_layers(machine: EsxMachine) -> None:
    for disk in machine.disks:
        if disk.disk.refusal:
            raise PreconditionFailed(
                f"{machine.name}: disk {disk.disk.target} can't be replicated: {disk.disk.refusal}",
                hint="take the machine out of the group, or change the disk",
                machine=machine.name,
            )
        if len(disk.layers) > MOST_LAYERS:
            raise HypervisorRefused(
                f"{machine.name}: disk {disk.disk.target} has {len(disk.layers)} layers: one more may be refused",
                hint="remove snapshots that nobody needs",
                machine=machine.name,
            )
