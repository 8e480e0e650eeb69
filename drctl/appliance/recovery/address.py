"""Addresses that a recovered machine is given before it boots: a seed for cloud-init, reservations of DHCP.

Written down before it is done, and looked at before it is done again, so that any prefix may be repeated. A reservation
that was there before is used and never removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from drctl.appliance.recovery.ports import Tools
from drctl.appliance.recovery.seed_image import seed_image
from drctl.appliance.recovery.state import MachineChange, RecoveredCard, RecoveredMachine, RecoveryRecord
from drctl.errors import DrctlError, NotFound, StepFailed
from drctl.model.address import CardAddress, ReIp


def seed_path(recovery: RecoveryRecord, machine: RecoveredMachine) -> str:
    """Where the machine's seed is, beside its overlays; "" when it has none."""
    if _change(recovery, machine).re_ip is not ReIp.CLOUD_INIT or not machine.disks:
        return ""
    suffix = "" if recovery.test else f"-g{recovery.generation}"
    return str(Path(machine.disks[0].overlay).parent / f"{machine.name}.seed{suffix}.iso")


def prepare(tools: Tools, recovery: RecoveryRecord, machine: RecoveredMachine, save: Callable[[], None]) -> None:
    """Before the machine starts; its cards are known. Raises StepFailed, HypervisorRefused, OutOfSpace."""
    change = _change(recovery, machine)
    if path := seed_path(recovery, machine):
        cards = [(_card(machine, one).mac, one) for one in change.addresses]
        tools.images.put(Path(path), seed_image(f"drctl-{recovery.id}-{machine.uuid}", cards))
    elif change.re_ip is ReIp.DHCP:
        for one in change.addresses:
            _reserve(tools, recovery, machine, one, save)


def _reserve(
    tools: Tools, recovery: RecoveryRecord, machine: RecoveredMachine, wanted: CardAddress, save: Callable[[], None]
) -> None:
    card, ip = _card(machine, wanted), wanted.ip[0]
    if not card.network:
        raise StepFailed(
            f"{machine.name}: its card {wanted.card} is on no network of this host, so nothing can be reserved there",
            hint="map it: networks or test_networks of the machine or its group",
        )
    there = tools.addresses.reserved(card.network, card.mac)
    if there and there != ip:
        raise StepFailed(f"{machine.name}: {card.network} has {there} reserved for {card.mac}, and {ip} is wanted")
    if there:
        return
    card.reserved = ip
    save()
    tools.addresses.reserve(card.network, card.mac, ip, lasting=not recovery.test)


def release(tools: Tools, machine: RecoveredMachine) -> str:
    """Take back what was reserved; what went wrong, or nothing. A network that is gone holds none."""
    for card in machine.cards:
        if not card.reserved:
            continue
        try:
            tools.addresses.release(card.network, card.mac, card.reserved)
        except NotFound:
            pass
        except DrctlError as exc:
            return f"{machine.recovery_name}: {card.reserved} is still reserved: {exc.message}"
        card.reserved = ""
    return ""


def _card(machine: RecoveredMachine, wanted: CardAddress) -> RecoveredCard:
    if wanted.card > len(machine.cards):
        raise StepFailed(f"{machine.name} has no network card {wanted.card}, but {len(machine.cards)}")
    return machine.cards[wanted.card - 1]


def _change(recovery: RecoveryRecord, machine: RecoveredMachine) -> MachineChange:
    return recovery.changes.get(machine.name, MachineChange())
