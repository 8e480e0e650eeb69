"""Sites, hosts, and how their appliances are reached."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class HostKind(StrEnum):
    LIBVIRT = "libvirt"
    ESX = "esx"


@dataclass(frozen=True, slots=True)
class Host:
    """A hypervisor. `control` is the appliance's control address: `unix:PATH` or `ssh:USER@HOST`.

    `link` is where the appliance of this host listens for streams, `ADDRESS:PORT`."""

    name: str
    site: str
    kind: HostKind
    uri: str
    control: str
    link: str


@dataclass(frozen=True, slots=True)
class Site:
    name: str
    hosts: tuple[Host, ...]
