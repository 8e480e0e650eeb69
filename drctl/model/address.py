"""Addresses that a recovered machine is to have at the other site, card by card, and the ways to give them. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import StrEnum


class ReIp(StrEnum):
    """How a machine gets its addresses.

    guest-agent  commands in the guest, once it runs
    cloud-init   a NoCloud seed in its CD-ROM drive when it boots
    dhcp         a reservation on the network of the recovery site that its card is mapped to
    """

    GUEST_AGENT = "guest-agent"
    CLOUD_INIT = "cloud-init"
    DHCP = "dhcp"


@dataclass(frozen=True, slots=True)
class CardAddress:
    """What one network card is to have. `card` counts the machine's cards in the order of its definition, from 1.

    `ip` are addresses with their prefix (`10.9.0.11/24`; of DHCP without), `interface` is what the guest calls the
    card, for a guest whose cloud-init has to know. Invariant: all addresses are valid (see `check_addresses`)."""

    card: int
    ip: tuple[str, ...]
    gateway: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    interface: str = ""

    def of_family(self, version: int) -> tuple[tuple[str, ...], str]:
        """(addresses, gateway or "") of IPv4 or IPv6."""
        ips = tuple(one for one in self.ip if family(one) == version)
        return ips, next((one for one in self.gateway if family(one) == version), "")


def family(address: str) -> int:
    """4 or 6, of an address with or without a prefix."""
    return ipaddress.ip_interface(address).version


def bare(address: str) -> str:
    """The address in its shortest spelling, without its prefix."""
    return str(ipaddress.ip_interface(address).ip)


def check_addresses(way: ReIp, wanted: CardAddress) -> str:
    """What is wrong with it, in words; "" when it can be given that way."""
    if way is ReIp.DHCP:
        return _check_reservation(wanted)
    for one in wanted.ip:
        if "/" not in one or _invalid(one):
            return f"{one!r} is no address with its prefix, e.g. 10.9.0.11/24"
    for one in (*wanted.gateway, *wanted.dns):
        if "/" in one or _invalid(one):
            return f"{one!r} is no address, e.g. 10.9.0.1"
    families = [family(one) for one in wanted.gateway]
    if len(families) != len(set(families)):
        return "has two gateways of one kind"
    if odd := [version for version in families if not wanted.of_family(version)[0]]:
        return f"has a gateway of IPv{odd[0]}, and no address of that kind"
    return ""


def _check_reservation(wanted: CardAddress) -> str:
    if wanted.gateway or wanted.dns or wanted.search:
        return "has more than an address: a network's DHCP tells all its guests the same gateway and name servers"
    if len(wanted.ip) != 1 or "/" in wanted.ip[0] or _invalid(wanted.ip[0]) or family(wanted.ip[0]) != 4:
        return "must be one IPv4 address without a prefix, e.g. 10.9.0.11: that is what a card can be reserved"
    return ""


def _invalid(text: str) -> bool:
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return True
    return False
