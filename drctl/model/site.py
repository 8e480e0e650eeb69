"""Sites, hosts, and how their appliances are reached."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class HostKind(StrEnum):
    LIBVIRT = "libvirt"
    ESX = "esx"


#: Where an appliance's program is installed.
PREFIX = "/opt/drctl"


@dataclass(frozen=True, slots=True)
class Login:
    """How a host is reached by SSH. An empty `user` is whoever gives the command; without `identity` the agent's and
    the usual keys are offered; without `known_hosts` the user's and the system's files are read."""

    host: str
    user: str = ""
    port: int = 22
    identity: str = ""
    known_hosts: str = ""

    def __str__(self) -> str:
        at = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{at}{host}" + (f":{self.port}" if self.port != 22 else "")


@dataclass(frozen=True, slots=True)
class ApplianceMachine:
    """The machine that `drctl appliance install` makes for an ESX host's appliance. Sizes in bytes.

    `image` is a directory of `drctl appliance build`, `network` a port group; `address` is ADDRESS/PREFIX, or empty for
    DHCP; `authorized_key` a file with the operator's public key."""

    image: str
    datastore: str
    network: str
    authorized_key: str
    address: str = ""
    gateway: str = ""
    nameservers: tuple[str, ...] = ()
    memory: int = 2 << 30
    vcpus: int = 2
    disk: int = 32 << 30


@dataclass(frozen=True, slots=True)
class Host:
    """A hypervisor. `control` is the appliance's control address, `unix:PATH` on the machine that `login` reaches
    (None: on this one).

    `link` is where the appliance of this host listens for streams, `ADDRESS:PORT`; `prefix` where its program lies;
    `fence` is a command that makes sure that it can't run guests, `fence_timeout` its limit in seconds.

    An ESX host's `login` is its own, and its appliance runs elsewhere: where it is `served`, on the machine that
    `appliance` reaches (None: on this one). `machine` is what that is, where drctl makes it."""

    name: str
    site: str
    kind: HostKind
    uri: str
    control: str
    link: str
    login: Login | None = None
    prefix: str = PREFIX
    fence: tuple[str, ...] = ()
    fence_timeout: float = 60.0
    served: bool = True
    appliance: Login | None = None
    machine: ApplianceMachine | None = None

    @property
    def control_login(self) -> Login | None:
        """Where its appliance is."""
        return self.appliance if self.kind is HostKind.ESX else self.login


@dataclass(frozen=True, slots=True)
class Site:
    name: str
    hosts: tuple[Host, ...]
