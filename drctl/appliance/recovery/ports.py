"""What recovery needs from the rest of the appliance, as interfaces; tests bring their own. Knows no implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.recovery.state import RecoveredMachine, RecoveryRecord
from drctl.appliance.source.guest_files import MachineFiles, Packed, Tpm
from drctl.model.checkpoint import Checkpoint
from drctl.model.group import GroupDisk, GroupSpec
from drctl.model.ports import AddressBook, Clock, Hypervisor

Progress = Callable[[dict[str, Any]], None]
#: (bytes done, bytes in total) of a copy; raises Interrupted to end it.
Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RecoverableMachine:
    """A machine as the source described it at a checkpoint."""

    name: str
    uuid: str
    definition: str
    disks: tuple[GroupDisk, ...]
    files: MachineFiles = field(default_factory=MachineFiles)


@dataclass(frozen=True, slots=True)
class Recoverable:
    """All that the store holds of a group at one checkpoint, besides the bytes of its disks."""

    spec: GroupSpec
    machines: tuple[RecoverableMachine, ...]
    source_site: str = ""
    source_host: str = ""


@dataclass(frozen=True, slots=True)
class Beside:
    """What has to lie here before the machine starts: files by path, and the state of its emulated TPM."""

    files: tuple[tuple[Path, Packed], ...] = ()
    tpm: Tpm | None = None
    tpm_version: str = ""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A definition fit for this host, and what had to be dropped or changed for that, in words."""

    definition: str
    notes: tuple[str, ...] = ()
    #: (MAC address, libvirt's network or ""), card by card
    cards: tuple[tuple[str, str], ...] = ()
    beside: Beside = Beside()


class Stores(Protocol):
    """The groups replicated to this host. Raises NotFound for a group or checkpoint that is not here."""

    def groups(self) -> list[str]: ...

    def choose(self, group: str, selector: str, now: float) -> Checkpoint:
        """The checkpoint that a selector names (see model.checkpoint.resolve), found without reading them all."""
        ...

    def recoverable(self, group: str, checkpoint: int) -> Recoverable: ...

    def newest(self, group: str) -> Recoverable | None:
        """By the newest definition, in a checkpoint or not; None before one has arrived."""
        ...

    def generation(self, group: str) -> int: ...

    def reign(self, group: str, generation: int) -> None:
        """From now on nothing of a lower generation is accepted. Durable; nothing happens when it is so already."""
        ...

    def give_back(self, group: str, generation: int) -> None:
        """Take streams of `generation` again, and of no lower one. Durable; may be repeated."""
        ...

    def pin(self, group: str, pin: str, checkpoint: int, epoch: str) -> None: ...

    def unpin(self, group: str, pin: str) -> None: ...

    def allocated(self, group: str, checkpoint: int) -> Mapping[str, int]:
        """Bytes that hold data, per disk name (MACHINE.TARGET)."""
        ...


@dataclass(frozen=True, slots=True)
class Heard:
    """What the link tells of a group's source: whether its stream stands now, and the seconds since it last spoke
    (None: not since the receiver was started)."""

    connected: bool
    seconds_ago: float | None = None


class Sources(Protocol):
    """The sources of the groups replicated to this host, as far as the link knows."""

    def heard(self, group: str) -> Heard | None:
        """None when the receiver does not answer."""
        ...


class Images(Protocol):
    """Overlay files. Raises OutOfSpace, or StepFailed with what the tool said."""

    @property
    def copies(self) -> bool:
        """Whether what is created has all that is below it from the start, so that it needs no view."""
        ...

    def exists(self, path: Path) -> bool: ...

    def create(self, path: Path, backing: str, size: int, told: Told) -> None:
        """A new overlay, whole or not there at all. `told` is for one that copies."""
        ...

    def put(self, path: Path, data: bytes) -> None:
        """A small file, whole or not there at all."""
        ...

    def backing(self, path: Path) -> str | None:
        """What the overlay still needs below it; None when it stands alone. Safe beside a running guest."""
        ...

    def localize(self, path: Path) -> None:
        """Copy all that is below into the overlay of a machine that does not run."""
        ...

    def allocated(self, path: Path) -> int: ...

    def remove(self, path: Path) -> None: ...

    def free(self, directory: Path) -> int:
        """Bytes that can still be written to the file system of `directory` (which need not exist yet)."""
        ...


class Views(Protocol):
    """View servers, one per recovery."""

    def ensure(self, recovery: RecoveryRecord) -> bool:
        """Make it answer; True when it had to be started. Raises StepFailed."""
        ...

    def alive(self, recovery: RecoveryRecord) -> bool: ...

    def end(self, recovery: RecoveryRecord) -> None: ...

    def socket(self, recovery: RecoveryRecord) -> str: ...

    def backing(self, recovery: RecoveryRecord, export: str) -> str:
        """What an overlay names as its backing file: a URL or `json:` text that QEMU understands."""
        ...

    def close(self) -> None:
        """Let go of what only this supervisor holds; the view servers go on."""
        ...


class Definitions(Protocol):
    """Definitions for this host. Raises HypervisorRefused when one can't be made."""

    def rewrite(self, recovery: RecoveryRecord, machine: RecoveredMachine, source: Recoverable) -> Rewritten:
        """The source's definition turned into one whose disks are overlays on the view."""
        ...

    def lay(self, machine: RecoveredMachine, beside: Beside) -> list[str]:
        """Put down what is not there yet, before the host knows the machine; what was put, as `laid` notes it.

        Raises OutOfSpace, HypervisorRefused, IntegrityError."""
        ...

    def clear(self, machine: RecoveredMachine) -> None:
        """Remove what was laid where the machine's files are not. Nothing happens when it is gone."""
        ...

    def settled(self, definition: str) -> str:
        """The same definition when its overlays stand alone."""
        ...

    def unmet(self, definition: str, capabilities: str) -> tuple[str, ...]:
        """What the machine needs and a host of these capabilities lacks."""
        ...


class Rooms(Protocol):
    """Where files go: `scratch` for tests, `images` for failovers; `reserve` bytes are never used up by a test."""

    @property
    def scratch(self) -> Path: ...

    @property
    def images(self) -> Path: ...

    @property
    def reserve(self) -> int: ...

    def overlay(self, directory: Path, machine: str, disk: str) -> Path:
        """The file of a disk (MACHINE.TARGET) of a machine whose recovery has this directory."""
        ...


@dataclass(frozen=True, slots=True)
class Room:
    """Directories of this host, in which overlays lie flat."""

    scratch: Path
    images: Path
    reserve: int

    def overlay(self, directory: Path, machine: str, disk: str) -> Path:
        del machine
        return directory / f"{disk}.qcow2"


@dataclass(frozen=True, slots=True)
class Tools:
    """Everything that the steps of a recovery act through."""

    hypervisor: Hypervisor
    stores: Stores
    images: Images
    views: Views
    sources: Sources
    definitions: Definitions
    addresses: AddressBook
    clock: Clock
    room: Rooms
    sleep: Callable[[float], None]
    new_uuid: Callable[[], str]
