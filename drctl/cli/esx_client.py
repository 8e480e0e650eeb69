"""What an ESX host tells the command line: as an appliance would, but read over SSH, since none runs there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from drctl.cli.inventory import ESX_METHODS
from drctl.errors import Refused
from drctl.hypervisor.esx.host import EsxHost, describe
from drctl.model.extent import format_bytes
from drctl.model.machine import MachineState

if TYPE_CHECKING:
    from drctl.hypervisor.esx.inventory import EsxMachine, Inventory
    from drctl.hypervisor.esx.session import Runner


NOT_YET = "an ESX host can be looked at, not yet protected"


class EsxClient:
    """A ClientLike of one ESX host. vim-cmd is slow: a caller's limit of a few seconds is not kept to."""

    def __init__(self, name: str, address: str, shell: Runner) -> None:
        self._address = address
        self._host = EsxHost(name, shell)

    def call(
        self, method: str, params: dict[str, Any] | None = None, *, on_progress: object = None, timeout: object = None
    ) -> Any:
        """Raises DrctlError; Refused for what needs an appliance."""
        del params, on_progress, timeout
        if method not in ESX_METHODS:
            raise Refused(
                f"{self._host.name}: {method} needs an appliance, and none can be had on an ESX host yet",
                hint="ESX hosts can be looked at: drctl host list, vm list, doctor (docs/esx.md)",
            )
        inventory = self._host.inventory()
        if method == "machine.list":
            return [_as_json(one) for one in inventory.machines]
        return {
            "state": "none",
            "uri": f"esx://{self._address}",
            "versions": {"hypervisor": describe(inventory.version)},
            "space": {
                store.name: {"path": f"/vmfs/volumes/{store.name}", "total": store.size, "free": store.free}
                for store in inventory.datastores
            },
            "findings": list(examine(inventory)),
        }


def _as_json(machine: EsxMachine) -> dict[str, Any]:
    """As an appliance tells a machine. No disk of an ESX host can be replicated by this version: it says so."""
    told = asdict(machine.machine)
    return told | {"disks": [disk | {"refusal": disk["refusal"] or NOT_YET} for disk in told["disks"]]}


def examine(inventory: Inventory) -> Iterator[dict[str, str]]:
    """What would stand in the way of a recovery on or from this host."""
    if inventory.maintenance:
        yield _finding("warning", "host", "is in maintenance mode: no machine can be started there")
    for number in inventory.invalid:
        hint = f"mend its .vmx, or let the host forget it: vim-cmd vmsvc/unregister {number}"
        yield _finding("warning", f"machine {number}", "the host can't read its .vmx and skips it", hint)
    for store in inventory.filesystems:
        if not store.mounted:
            yield _finding("warning", store.name or store.uuid, "is not mounted")
    names = [one.name for one in inventory.machines]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield _finding("warning", name, "more than one machine has this name", "a group could not tell which it means")
    for machine in inventory.machines:
        yield from _machine(machine)


def _machine(machine: EsxMachine) -> Iterator[dict[str, str]]:
    for remark in machine.remarks:
        hint = "they grow, and merging them costs stun: remove those that nobody needs"
        yield _finding("info", machine.name, remark, hint if "snapshots" in remark else "")
    if machine.machine.state is MachineState.RUNNING:
        for disk in machine.machine.disks:
            if disk.refusal:
                size = format_bytes(disk.size)
                yield _finding("info", f"{machine.name}.{disk.target}", f"{size} can't be replicated: {disk.refusal}")


def _finding(severity: str, subject: str, message: str, hint: str = "") -> dict[str, str]:
    return {"severity": severity, "subject": subject, "message": message, "hint": hint}
