"""`appliance.toml`: what one appliance knows of itself and of its peers. Written by the installer or the lab."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from drctl.errors import ConfigInvalid, NotFound
from drctl.model.extent import GiB
from drctl.toml.table import Table, read_toml

RUN = "/run/drctl"
SCRATCH_LIMIT = 64 * GiB


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An appliance at another site. `link` is ADDRESS:PORT, `uuid` the name in its certificate."""

    site: str
    host: str
    link: str
    uuid: str


class ApplianceToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's keys. `uri` is libvirt's, `run` a directory on tmpfs, `link` where this appliance listens."""

    site: str
    host: str
    uri: str
    link: str
    uuid: str
    run: str = RUN
    images: str = ""
    scratch_limit: int = SCRATCH_LIMIT
    peer: tuple[Peer, ...] = ()


@dataclass(frozen=True, slots=True)
class Home:
    """The persistent directory of one appliance, and what lies where in it (docs/internals.md)."""

    path: Path
    config: ApplianceToml

    @property
    def run(self) -> Path:
        return Path(self.config.run)

    @property
    def tls(self) -> Path:
        return self.path / "tls"

    @property
    def groups(self) -> Path:
        return self.path / "groups"

    @property
    def store(self) -> Path:
        return self.path / "store"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def control(self) -> Path:
        return self.run / "control.sock"

    def peer(self, site: str) -> Peer:
        """The appliance that keeps this one's groups at `site`. Raises NotFound."""
        for peer in self.config.peer:
            if peer.site == site:
                return peer
        known = sorted({peer.site for peer in self.config.peer})
        raise NotFound("peer site", site, known=known, hint=f"add [[peer]] site = {site!r} to appliance.toml")

    def make_directories(self) -> None:
        """All of them, for this user only."""
        for path in (self.path, self.groups, self.store, self.logs, self.path / "recoveries", self.run):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("rings", "taps", "shippers", "views", "exports", "pids"):
            (self.run / name).mkdir(mode=0o700, exist_ok=True)


def load(home: Path) -> Home:
    """Read `home/appliance.toml`. Raises ConfigInvalid, naming file, line and key."""
    file = home / "appliance.toml"
    if not home.exists() or not file.exists():
        raise ConfigInvalid(str(file), 0, "", "is not there", hint="no appliance is set up here")
    top = read_toml(file)
    peers = tuple(_peer(table) for table in top.tables("peer"))
    config = ApplianceToml(
        site=top.text("site"),
        host=top.text("host"),
        uri=top.text("uri"),
        link=top.text("link"),
        uuid=top.text("uuid"),
        run=top.text("run", RUN),
        images=top.text("images", ""),
        scratch_limit=top.size("scratch_limit", SCRATCH_LIMIT),
        peer=peers,
    )
    top.finish()
    return Home(home, config)


def _peer(table: Table) -> Peer:
    peer = Peer(site=table.text("site"), host=table.text("host"), link=table.text("link"), uuid=table.text("uuid"))
    table.finish()
    return peer
