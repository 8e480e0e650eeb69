"""`appliance.toml`: what one appliance knows of itself and of its peers. Written by the installer or the lab."""

from __future__ import annotations

import grp
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from drctl.errors import ConfigInvalid, NotFound, SetupFailed
from drctl.model.extent import GiB
from drctl.model.hook import TIME_LIMIT
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
    """The file's keys. `uri` is libvirt's, `run` a directory on tmpfs, `link` where this appliance listens.

    `qemu_group` is a group that guests' QEMUs and the appliance are in, where they run as different users; `metrics`
    is a file that is written for node_exporter's textfile collector; `notify` a command that is told of changed states,
    `notify_timeout` its limit in seconds."""

    site: str
    host: str
    uri: str
    link: str
    uuid: str
    run: str = RUN
    qemu_group: str = ""
    metrics: str = ""
    images: str = ""
    scratch_limit: int = SCRATCH_LIMIT
    notify: tuple[str, ...] = ()
    notify_timeout: float = TIME_LIMIT
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
        for name in ("rings", "taps", "shippers", "views", "exports", "pids", "links"):
            (self.run / name).mkdir(mode=0o700, exist_ok=True)
        if self.config.qemu_group:
            self._open_to_guests()

    def _open_to_guests(self) -> None:
        """Let guests' QEMUs reach the sockets and overlays that are for them, and nothing else. Raises SetupFailed.

        What is made in these directories belongs to their group. QEMU makes sockets of its own in `exports`."""
        try:
            group = grp.getgrnam(self.config.qemu_group).gr_gid
        except KeyError as exc:
            name = self.config.qemu_group
            raise SetupFailed(f"there is no group {name}", hint="mend qemu_group in appliance.toml") from exc
        overlays = [self.path / "images", self.path / "scratch"]
        for path in overlays:
            path.mkdir(exist_ok=True)
        modes = {self.path: 0o710, self.run: 0o710, self.run / "taps": 0o2710, self.run / "views": 0o2710}
        for path, mode in {**modes, self.run / "exports": 0o2770, **dict.fromkeys(overlays, 0o2770)}.items():
            os.chown(path, -1, group)
            path.chmod(mode)


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
        qemu_group=top.text("qemu_group", ""),
        metrics=top.text("metrics", "", pattern=r"/\S+\.prom", example="/var/lib/prometheus/node-exporter/drctl.prom"),
        images=top.text("images", ""),
        scratch_limit=top.size("scratch_limit", SCRATCH_LIMIT),
        notify=top.strings("notify", (), unique=False),
        notify_timeout=top.duration("notify_timeout", TIME_LIMIT, minimum=1, maximum=600),
        peer=peers,
    )
    top.finish()
    return Home(home, config)


def _peer(table: Table) -> Peer:
    peer = Peer(site=table.text("site"), host=table.text("host"), link=table.text("link"), uuid=table.text("uuid"))
    table.finish()
    return peer
