"""`drctl.toml`: the sites, their hosts and the defaults of groups; and where it is looked for. Knows no appliance."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from drctl.cli.limit_file import LinkLimit, read_link_limits
from drctl.errors import ConfigInvalid, NotFound
from drctl.model.bandwidth import RateLimit
from drctl.model.extent import GiB, MiB, format_bytes
from drctl.model.group import Retention
from drctl.model.hook import TIME_LIMIT, Hook
from drctl.model.site import PREFIX, ApplianceMachine, Host, HostKind, Login, Site
from drctl.toml.table import Table, read_toml

FILE = "drctl.toml"
#: What names of sites, hosts and groups are made of: they become parts of file names and of unix socket paths,
#: which the kernel limits to 107 bytes in all.
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}"
MINIMUM_INTERVAL = 0.5
MAXIMUM_INTERVAL = 60.0
MINIMUM_RING = 16 * MiB
#: A group whose source is an ESX host has a checkpoint per cycle of snapshots, each of which stuns its machines.
CYCLE_INTERVAL, MINIMUM_CYCLE_INTERVAL, MAXIMUM_CYCLE_INTERVAL = 300.0, 30.0, 86400.0
#: Where the appliance of an ESX host runs, when it is this machine.
HERE = "local"
#: Room comes back in pieces of a sixteenth, each of several chunks.
MINIMUM_SPILL = 64 * MiB


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a group file may leave out. Interval in seconds, sizes in bytes."""

    checkpoint_interval: float = 5.0
    ring_size: int = 256 * MiB
    spill_size: int = GiB
    retention: Retention = field(default_factory=Retention)


@dataclass(frozen=True, slots=True)
class Config:
    """The operator's view of the world. `origin` is what headers say about where it came from;
    `directory` holds groups/*.toml, or is None when there is no configuration (the local appliance alone)."""

    origin: str
    directory: Path | None
    sites: tuple[Site, ...]
    defaults: Defaults = field(default_factory=Defaults)
    link_limits: tuple[LinkLimit, ...] = ()
    hook: Hook = field(default_factory=Hook)

    @property
    def hosts(self) -> tuple[Host, ...]:
        return tuple(host for site in self.sites for host in site.hosts)

    def site(self, name: str) -> Site:
        """Raises NotFound."""
        for site in self.sites:
            if site.name == name:
                return site
        raise NotFound("site", name, known=[site.name for site in self.sites])

    def host(self, name: str) -> Host:
        """Raises NotFound."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise NotFound("host", name, known=[host.name for host in self.hosts])

    def limits_from(self, site: str) -> dict[str, tuple[RateLimit, ...]]:
        """What is said of the links from a site to each other one, in the order of the file."""
        return {
            other.name: tuple(each.limit for each in self.link_limits if each.concerns(site, other.name))
            for other in self.sites
            if other.name != site
        }


def config_candidates(environment: Mapping[str, str]) -> list[Path]:
    """The places where a configuration is looked for when none is named, in order."""
    user = Path(environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME", "/")) / ".config")
    return [Path(FILE), user / "drctl" / FILE, Path("/etc/drctl") / FILE]


def load_config(path: Path) -> Config:
    """Read a drctl.toml, or the one in a directory. Raises ConfigInvalid."""
    file = path / FILE if path.is_dir() else path
    top = read_toml(file)
    names = _sites(top)
    hosts = _hosts(top, names, file.parent)
    defaults = read_defaults(top.table("defaults"))
    limits = read_link_limits(top, names)
    hook = Hook(
        command=top.strings("notify", (), unique=False),
        time_limit=top.duration("notify_timeout", TIME_LIMIT, minimum=1, maximum=600),
        directory=str(file.parent),
    )
    top.finish()
    sites = tuple(Site(name, tuple(host for host in hosts if host.site == name)) for name in names)
    return Config(f"config {file}", file.parent, sites, defaults, limits, hook)


def read_defaults(table: Table) -> Defaults:
    """The `[defaults]` table. Raises ConfigInvalid."""
    base = Defaults()
    defaults = Defaults(
        checkpoint_interval=read_interval(table, base.checkpoint_interval),
        ring_size=table.size("ring_size", base.ring_size, minimum=MINIMUM_RING),
        spill_size=read_spill(table, base.spill_size),
        retention=Retention(
            history=table.duration("history", base.retention.history, minimum=60),
            journal_limit=table.size("journal_limit", base.retention.journal_limit, minimum=GiB // 4),
        ),
    )
    table.finish()
    return defaults


def read_spill(table: Table, default: int) -> int:
    """`spill_size` in bytes, 0 for none. Raises ConfigInvalid."""
    size = table.size("spill_size", default)
    if 0 < size < MINIMUM_SPILL:
        hint = f'at least {format_bytes(MINIMUM_SPILL)}, or "0 B" for none'
        raise table.error("spill_size", f"{format_bytes(size)} is too small", hint=hint)
    return size


def read_cycle_interval(table: Table) -> float:
    """`checkpoint_interval` of a group whose source is an ESX host: between snapshot cycles. Raises ConfigInvalid."""
    return table.duration(
        "checkpoint_interval", CYCLE_INTERVAL, minimum=MINIMUM_CYCLE_INTERVAL, maximum=MAXIMUM_CYCLE_INTERVAL
    )


def read_interval(table: Table, default: float) -> float:
    """`checkpoint_interval` in seconds. Raises ConfigInvalid."""
    return table.duration("checkpoint_interval", default, minimum=MINIMUM_INTERVAL, maximum=MAXIMUM_INTERVAL)


def _sites(top: Table) -> list[str]:
    names: list[str] = []
    for table in top.tables("site"):
        name = table.text("name", pattern=NAME, example="alpha")
        if name in names:
            raise table.error("name", f"site {name!r} is there twice")
        table.finish()
        names.append(name)
    if not names:
        raise top.error("", "names no site", hint='write [[site]] and name = "alpha" for each site')
    return names


def _hosts(top: Table, sites: list[str], directory: Path) -> list[Host]:
    hosts: list[Host] = []
    for table in top.tables("host"):
        host = _host(table, sites, directory)
        if any(host.name == other.name for other in hosts):
            raise table.error("name", f"host {host.name!r} is there twice")
        hosts.append(host)
    return hosts


def _host(table: Table, sites: list[str], directory: Path) -> Host:
    kind = HostKind(table.choice("kind", list(HostKind), HostKind.LIBVIRT))
    appliance = table.text("appliance", "") if kind is HostKind.ESX else ""
    host = Host(
        name=table.text("name", pattern=NAME, example="alpha1"),
        site=table.choice("site", sites),
        kind=kind,
        uri=table.text("uri", "qemu:///system"),
        control=table.text("control", "unix:/run/drctl/control.sock"),
        link=table.text("link", "", pattern=r"\S+:\d{1,5}", example="192.0.2.10:7077"),
        login=_login(table, directory),
        prefix=table.text("prefix", PREFIX, pattern=r"/\S+", example=PREFIX),
        fence=table.strings("fence", (), unique=False),
        fence_timeout=table.duration("fence_timeout", 60.0, minimum=1, maximum=600),
        served=kind is not HostKind.ESX or bool(appliance),
        appliance=None if appliance in ("", HERE) else _login(table, directory, "appliance"),
    )
    if kind is HostKind.ESX and "machine" in table:
        host = replace(host, machine=_machine(table, directory, host.appliance))
    table.finish()
    if kind is HostKind.ESX and host.login is None:
        raise table.error("ssh", "is missing: an ESX host is reached over SSH alone", hint='write ssh = "root@esx1"')
    if not host.control.startswith("unix:/"):
        hint = 'write control = "unix:/run/drctl/control.sock"; over SSH it is a path there, with ssh = "root@HOST"'
        raise table.error("control", f"{host.control!r} is not unix:PATH with an absolute path", hint=hint)
    return host


def _machine(above: Table, directory: Path, appliance: Login | None) -> ApplianceMachine:
    """`[host.machine]`: the machine that an ESX host's appliance is installed on. Raises ConfigInvalid."""
    if appliance is None or not appliance.identity or not appliance.known_hosts:
        hint = 'write appliance = "root@ADDRESS", appliance_identity = "FILE" and appliance_known_hosts = "known_hosts"'
        raise above.error(
            "machine", "can't be reached: it needs an address, a key, and a file for its own key", hint=hint
        )
    table = above.table("machine")
    machine = ApplianceMachine(
        image=_file(table.text("image", "image"), directory),
        datastore=table.text("datastore"),
        network=table.text("network", "VM Network"),
        authorized_key=_file(table.text("authorized_key", f"{appliance.identity}.pub"), directory),
        address=table.text("address", "", pattern=r"[0-9a-fA-F.:]+/\d{1,3}", example="192.0.2.20/24"),
        gateway=table.text("gateway", "", pattern=r"[0-9a-fA-F.:]+", example="192.0.2.1"),
        nameservers=table.strings("nameservers", ()),
        memory=table.size("memory", 2 * GiB, minimum=GiB),
        vcpus=table.integer("vcpus", 2, minimum=1),
        disk=table.size("disk", 32 * GiB, minimum=4 * GiB),
    )
    table.finish()
    return machine


#: [USER@]HOST[:PORT]; an IPv6 address stands in brackets.
_SSH = re.compile(
    r"(?:(?P<user>[^@\s:]+)@)?(?:\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^@\s:\[\]]+))(?::(?P<port>\d{1,5}))?"
)


def _login(table: Table, directory: Path, way: str = "ssh") -> Login | None:
    """The keys `ssh`, `ssh_identity` and `ssh_known_hosts` of a host, or those of another `way`. Raises
    ConfigInvalid."""
    text = table.text(way, "")
    identity, known = (_file(table.text(f"{way}_{key}", ""), directory) for key in ("identity", "known_hosts"))
    if not text:
        if identity or known:
            raise table.error(way, "is missing", hint=f'write {way} = "root@alpha1.example"')
        return None
    found = _SSH.fullmatch(text)
    port = int(found["port"] or 22) if found else 0
    if found is None or not 0 < port < 65536:
        raise table.error(
            way, f"{text!r} is not [USER@]HOST[:PORT]", hint=f'write e.g. {way} = "root@alpha1.example:22"'
        )
    return Login(found["six"] or found["host"], found["user"] or "", port, identity, known)


def _file(text: str, directory: Path) -> str:
    """A file named in drctl.toml: `~` is the operator's home, a relative path begins beside drctl.toml."""
    return str(directory / Path(text).expanduser()) if text else ""


def nothing_found(places: list[Path], home: Path) -> ConfigInvalid:
    """The error of a command line that has neither a configuration nor a local appliance."""
    looked = ", ".join(str(place) for place in [*places, home / "appliance.toml"])
    hint = "drctl init writes one; or name it: --config"
    if home.is_dir() and not os.access(home, os.X_OK):
        hint = f"{home} is for root alone: sudo drctl finds the appliance there; or name a configuration: --config"
    return ConfigInvalid(FILE, 0, "", f"not found; looked at {looked}", hint=hint)
