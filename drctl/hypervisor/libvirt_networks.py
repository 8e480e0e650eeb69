"""DHCP reservations on a libvirt host's networks (virNetworkUpdate): dnsmasq takes them up at once, guests go on."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Final

import libvirt

from drctl.errors import HypervisorRefused
from drctl.hypervisor.libvirt_connection import Connection

_ADD: Final = libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST
_DELETE: Final = libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE
_HOST: Final = libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST
_LIVE: Final = libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
_CONFIG: Final = libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG
#: The first <ip> that has a <dhcp>.
_ANY_PART: Final = -1


class LibvirtNetworks:
    """Methods block and may be called from any thread; they raise HostUnreachable, NotFound or HypervisorRefused."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def reserved(self, network: str, mac: str) -> str:
        """The IPv4 address that is reserved for a MAC address; "" for none."""
        found = self._look(self._network(network), network)
        return next((ip for one, ip in found if one == mac.lower()), "")

    def reserve(self, network: str, mac: str, ip: str, *, lasting: bool) -> None:
        """`lasting`: also in the definition of a network that has one."""
        place = self._network(network)
        found = self._look(place, network)
        if (mac.lower(), ip) in found:
            return
        if other := next((one for one, taken in found if taken == ip), ""):
            raise HypervisorRefused(f"network {network} has {ip} reserved for {other}", network=network, ip=ip)
        self._update(place, network, _ADD, mac, ip, self._scope(place, network, lasting=lasting))

    def release(self, network: str, mac: str, ip: str) -> None:
        """From wherever it is; nothing happens when it is nowhere."""
        place = self._network(network)
        for scope in self._scopes(place, network):
            if (mac.lower(), ip) in self._look(place, network, scope):
                self._update(place, network, _DELETE, mac, ip, scope)

    def _network(self, name: str) -> libvirt.virNetwork:
        with self._connection.translated(network=name):
            return self._connection.get().networkLookupByName(name)

    def _scopes(self, place: libvirt.virNetwork, name: str) -> list[int]:
        with self._connection.translated(network=name):
            return [_LIVE] * bool(place.isActive()) + [_CONFIG] * bool(place.isPersistent())

    def _scope(self, place: libvirt.virNetwork, name: str, *, lasting: bool) -> int:
        scopes = self._scopes(place, name)
        if not lasting and _LIVE in scopes:
            return _LIVE
        return sum(scopes)

    def _look(self, place: libvirt.virNetwork, name: str, scope: int = _LIVE) -> list[tuple[str, str]]:
        """(MAC address, IP address) of each reservation."""
        with self._connection.translated(network=name):
            root = ET.fromstring(place.XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE if scope == _CONFIG else 0))
        hosts = root.iterfind("ip/dhcp/host")
        return [(one.get("mac", "").lower(), one.get("ip", "")) for one in hosts]

    def _update(self, place: libvirt.virNetwork, name: str, command: int, mac: str, ip: str, scope: int) -> None:
        with self._connection.translated(network=name):
            text = ET.tostring(ET.Element("host", {"mac": mac, "ip": ip}), encoding="unicode")
            place.update(command, _HOST, _ANY_PART, text, scope)
