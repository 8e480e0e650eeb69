"""What a command works with: the configuration, the appliances' clients, the screen, the clock.

The only module of the command line that constructs clients. Everything is made when first asked for."""

from __future__ import annotations

import copy
import os
import pwd
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from drctl.cli.config import Config, config_candidates, load_config, nothing_found
from drctl.cli.render import Screen
from drctl.errors import ConfigInvalid, Refused
from drctl.model.site import Host, HostKind, Login, Site

if TYPE_CHECKING:  # paramiko takes long to import; whoever has no remote host must not pay for it
    from drctl.appliance.remote_socket import RemoteSocket
    from drctl.hypervisor.shell import Shell

HOME = Path("/var/lib/drctl")
SCHEMA_VERSION = 1

Progress = Callable[[dict[str, Any]], None]


class ClientLike(Protocol):
    """An appliance as the command line sees it. Raises DrctlError, ApplianceUnreachable among them."""

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Any: ...


class WallClock:
    """This machine's clocks."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator said about where to look: options first, then the environment."""

    config: Path | None = None
    home: Path | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def locate(self) -> Path:
        """The configuration file, or a local appliance's home directory. Raises ConfigInvalid."""
        if self.config and self.home:
            raise Refused("--config and --home exclude each other", hint="--home looks at the local appliance alone")
        if named := self.config or self.home:
            return named
        for variable in ("DRCTL_CONFIG", "DRCTL_HOME"):
            if value := self.environment.get(variable):
                return Path(value)
        candidates = config_candidates(self.environment)
        for place, marker in [*((candidate, candidate) for candidate in candidates), (HOME, HOME / "appliance.toml")]:
            if is_there(marker):
                return place
        raise nothing_found(candidates, HOME)

    @property
    def operator(self) -> str:
        """Who gives the command, also behind sudo."""
        try:
            own = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            own = f"uid {os.getuid()}"
        return self.environment.get("SUDO_USER") or own

    @property
    def home_directory(self) -> Path:
        """The local appliance's home, whether it exists or not."""
        return self.home or Path(self.environment.get("DRCTL_HOME") or HOME)


class Context:
    """One run of the command line. Tests make it with a Config and clients of their own."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        config: Config | None = None,
        clients: Mapping[str, ClientLike] | None = None,
        screen: Screen | None = None,
        clock: WallClock | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.screen = screen or Screen()
        self.clock = clock or WallClock()
        #: The token of the lease that this run holds (leased.py); every call carries it.
        self.lease = ""
        self._given = config
        self._clients: dict[str, ClientLike] = dict(clients or {})
        self._shells: dict[Login, Shell] = {}

    @cached_property
    def config(self) -> Config:
        """The configuration, or the local appliance alone. Raises ConfigInvalid."""
        if self._given is not None:
            return self._given
        place = self.settings.locate()
        if is_there(place / "appliance.toml") and not is_there(place / "drctl.toml"):
            return local_config(place)
        if not is_there(place):
            hint = "if it is lost: on a recovery host --home DIR needs none (drctl --home /var/lib/drctl status)"
            raise ConfigInvalid(str(place), 0, "", "is not there", hint=hint)
        return load_config(place)

    def client(self, host: Host) -> ClientLike:
        """The client of the host's appliance; nothing is connected yet."""
        if host.name not in self._clients:
            self._clients[host.name] = self._connect(host)
        return self._clients[host.name]

    def _connect(self, host: Host) -> ClientLike:
        if not host.served:
            from drctl.cli.esx_client import EsxClient

            return EsxClient(host.name, str(host.login), self.shell(host))
        from drctl.appliance.client import Client

        return Client(self._remote(host, host.control_login) if host.control_login else host.control)

    def shell(self, host: Host) -> Shell:
        """The host by SSH; nothing is connected yet. One connection per login is kept. Raises ConfigInvalid."""
        if host.login is None:
            file, hint = str(self.config.directory), f'write ssh = "root@ADDRESS" below [[host]] name = "{host.name}"'
            raise ConfigInvalid(file, 0, "ssh", f"host {host.name!r} has no ssh", hint=hint)
        return self._shell(host.login)

    def appliance_shell(self, host: Host) -> Shell:
        """Where the host's appliance is, by SSH. Raises ConfigInvalid."""
        return self._shell(host.control_login) if host.control_login else self.shell(host)

    def _shell(self, login: Login) -> Shell:
        from drctl.hypervisor.shell import Shell

        return self._shells.setdefault(login, Shell(login))

    def close(self) -> None:
        """End the connections that were kept."""
        for shell in self._shells.values():
            shell.close()

    def _remote(self, host: Host, login: Login) -> RemoteSocket:
        from drctl.appliance.remote_socket import RemoteSocket

        return RemoteSocket(self._shell(login), host.control.removeprefix("unix:"), host.prefix)

    def call(
        self,
        host: Host,
        method: str,
        *,
        timeout: float | None = None,
        on_progress: Progress | None = None,
        **params: Any,
    ) -> Any:
        """One method of the host's appliance. Raises DrctlError. `by` says for the history who gave the command."""
        lease = {"lease": self.lease} if self.lease else {}
        return self.client(host).call(
            method, {**params, **lease, "by": self.settings.operator}, on_progress=on_progress, timeout=timeout
        )

    def under(self, lease: str) -> Context:
        """The same run of the command line, whose calls carry this lease: who works on several groups has several."""
        other = copy.copy(self)
        other.lease = lease
        return other

    def header(self) -> None:
        """Say on stderr which configuration and sites this command read."""
        self.screen.say(f"{self.config.origin}; {_sites(self.config)}")

    def document(self, kind: str, **fields: Any) -> None:
        """Print a JSON document with the schema's version on stdout."""
        names = [site.name for site in self.config.sites]
        self.screen.json(
            {"schema_version": SCHEMA_VERSION, "kind": kind, "read": {"from": self.config.origin, "sites": names}}
            | fields
        )


def is_there(path: Path) -> bool:
    """Whether the path exists and may be looked at: an appliance's home is for root alone."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises where a directory may not be entered


def local_config(home: Path) -> Config:
    """The world of a recovery host without any configuration: its own appliance. Raises ConfigInvalid."""
    from drctl.appliance.config import load

    appliance = load(home)
    own = appliance.config
    host = Host(own.host, own.site, HostKind.LIBVIRT, own.uri, f"unix:{appliance.control}", own.link)
    return Config(f"site {own.site}, local appliance at {home}; no config", None, (Site(own.site, (host,)),))


def _sites(config: Config) -> str:
    if config.directory is None:
        return "this site alone"
    names = ", ".join(site.name for site in config.sites)
    return f"sites {names}" if len(config.sites) > 1 else f"site {names}"
