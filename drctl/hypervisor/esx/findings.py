"""What would stand in the way of a recovery on or from an ESX host. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from drctl.hypervisor.esx.inventory import EsxMachine, Inventory
from drctl.model.extent import format_bytes
from drctl.model.machine import MachineState


def examine(inventory: Inventory) -> Iterator[dict[str, str]]:
    """What would stand in the way of a recovery on or from this host."""
    if inventory.maintenance:
        yield finding("warning", "host", "is in maintenance mode: no machine can be started there")
    for number in inventory.invalid:
        hint = f"mend its .vmx, or let the host forget it: vim-cmd vmsvc/unregister {number}"
        yield finding("warning", f"machine {number}", "the host can't read its .vmx and skips it", hint)
    for store in inventory.filesystems:
        if not store.mounted:
            yield finding("warning", store.name or store.uuid, "is not mounted")
    names = [one.name for one in inventory.machines]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield finding("warning", name, "more than one machine has this name", "a group could not tell which it means")
    for machine in inventory.machines:
        yield from _machine(machine)


def _machine(machine: EsxMachine) -> Iterator[dict[str, str]]:
    for remark in machine.remarks:
        hint = "they grow, and merging them costs stun: remove those that nobody needs"
        yield finding("info", machine.name, remark, hint if "snapshots" in remark else "")
    if machine.machine.state is MachineState.RUNNING:
        for disk in machine.machine.disks:
            if disk.refusal:
                size = format_bytes(disk.size)
                yield finding("info", f"{machine.name}.{disk.target}", f"{size} can't be replicated: {disk.refusal}")


def finding(severity: str, subject: str, message: str, hint: str = "") -> dict[str, str]:
    return {"severity": severity, "subject": subject, "message": message, "hint": hint}
