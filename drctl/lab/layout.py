"""Where everything of a lab lies, and lab.json, its record of what it started."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from drctl.errors import IntegrityError
from drctl.lab.process import Process

DEFAULT_DIRECTORY = Path("/var/tmp/drctl-lab")
SITES = ("alpha", "beta")
#: A unix socket's path has at most 107 bytes (sun_path of sockaddr_un, unix(7)); libvirt adds up to 70 to ours.
RUN_PREFIX = "drl-"


@dataclass(frozen=True, slots=True)
class Site:
    """One site's directories. `run` is short and holds sockets; all else lies under `root`."""

    name: str
    root: Path
    run: Path

    @property
    def home(self) -> Path:
        """The appliance's home."""
        return self.root / "home"

    @property
    def appliance_run(self) -> Path:
        return self.run / "a"

    @property
    def control(self) -> Path:
        return self.appliance_run / "control.sock"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def config(self) -> Path:
        """libvirt's XDG_CONFIG_HOME: a symlink under `run`, since libvirt puts sockets into it."""
        return self.run / "c"

    @property
    def socket(self) -> Path:
        return self.run / "s" / "libvirt-sock"

    @property
    def uri(self) -> str:
        return f"qemu+unix:///session?socket={self.socket}"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a lab is made. `rate` in records per second and chain (0: as fast as it goes); `sync_every`: fdatasync after
    each n-th record (0: never); `accelerator`: `kvm`, `tcg` or `auto`; `bus` of the disks: `virtio` or `scsi`
    (virtio-scsi), in a thread of their own with `iothread`."""

    guests: int = 2
    image_format: str = "raw"
    chains: int = 4
    slots: int = 2048
    rate: int = 50
    sync_every: int = 0
    memory_mib: int = 224
    accelerator: str = "auto"
    bus: str = "virtio"
    iothread: bool = False
    agent: bool = True
    appliances: bool = True
    start: bool = True


class Guest(msgspec.Struct, frozen=True):
    name: str
    uuid: str


@dataclass
class State:
    """lab.json. `run` is the short directory of sockets; `links` the port of each site's link; `started` the guests
    that were started once: a second `lab up` leaves those to the operator."""

    lab: str
    run: str
    user: str
    accelerator: str
    options: Options
    guests: list[Guest] = field(default_factory=list)
    links: dict[str, int] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    format: int = 1

    def process(self, name: str) -> Process | None:
        return next((process for process in self.processes if process.name == name), None)

    def remember(self, process: Process) -> None:
        self.processes = [other for other in self.processes if other.name != process.name] + [process]


@dataclass(frozen=True, slots=True)
class Layout:
    """The directories of one lab."""

    directory: Path
    run: Path

    def site(self, name: str) -> Site:
        return Site(name, self.directory / name, self.run / name[0])

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.site(name) for name in SITES)

    @property
    def witness_log(self) -> Path:
        return self.directory / "witness.log"

    @property
    def recorder_socket(self) -> Path:
        return self.run / "recorder.sock"

    def serial(self, guest: str) -> Path:
        """What the guest says on its serial port; outside of both sites, as it belongs to the observer."""
        return self.directory / "serial" / f"{guest}.log"


def state_path(directory: Path) -> Path:
    return directory / "lab.json"


def load(directory: Path) -> State | None:
    """The lab's state, or None when there is no lab there. Raises IntegrityError."""
    path = state_path(directory)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        state = msgspec.json.decode(data, type=State)
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        raise IntegrityError(f"{path}: {exc}", hint=f"remove {directory} by hand if no lab runs there") from exc
    if state.format != 1:
        raise IntegrityError(f"{path}: format {state.format}, known: 1")
    return state


def save(directory: Path, state: State) -> None:
    """Replaces lab.json at once."""
    path = state_path(directory)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)
