"""Recoveries as durable objects: tests, failovers and switchovers, each a JSON file. Knows no store, no process.

A recovery's file is written before what it announces is done and again after, so whoever reads it after a crash knows
what may exist and looks. Times are wall seconds since the epoch (UTC) of this host's clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from drctl.errors import IntegrityError, NotFound, UnsupportedFormat
from drctl.model.address import CardAddress, ReIp
from drctl.model.checkpoint import Checkpoint
from drctl.model.move import Settlement
from drctl.store import atomic

FORMAT = 1


class RecoveryKind(StrEnum):
    TEST = "test"
    FAILOVER = "failover"
    SWITCHOVER = "switchover"


class RecoveryPhase(StrEnum):
    """The life of a recovery.

    starting      steps are being done; a supervisor that finds it goes on
    running       every machine runs or has failed with a reason; the view is guarded
    committing    disks are localized under the running guests
    committed     every disk stands alone, the view is gone; nothing is guarded any more
    rolling-back  its machines are being stopped, and the reign given back
    rolled-back   the group does not reign here any more; the overlays are kept for a while
    stopping      everything is being removed
    ended         nothing of it is left but this record
    """

    STARTING = "starting"
    RUNNING = "running"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ROLLING_BACK = "rolling-back"
    ROLLED_BACK = "rolled-back"
    STOPPING = "stopping"
    ENDED = "ended"


#: Phases in which a view stands under guests, so that it must be guarded.
GUARDED = frozenset({RecoveryPhase.STARTING, RecoveryPhase.RUNNING, RecoveryPhase.COMMITTING})
#: Phases in which it is being taken down; a new supervisor goes on with that.
ENDING = frozenset({RecoveryPhase.STOPPING, RecoveryPhase.ROLLING_BACK})
LIVE = GUARDED | ENDING


class MachinePhase(StrEnum):
    """How far one machine has come; each word says what is true at the host.

    planned  overlay (its disks have files)  defined (the host knows it)  started  running  failed (see its reason)
    """

    PLANNED = "planned"
    OVERLAY = "overlay"
    DEFINED = "defined"
    STARTED = "started"
    RUNNING = "running"
    FAILED = "failed"


@dataclass(slots=True)
class RecoveredDisk:
    """One disk: `export` is its name in the view, `overlay` the file that takes the guest's writes.

    Invariant: once `localized`, the overlay has no backing file and needs no view."""

    target: str
    export: str
    overlay: str
    size: int
    localized: bool = False


@dataclass(slots=True)
class RecoveredCard:
    """A network card as the machine has it here, in the order of its definition. `network` is "" where it is on none of
    libvirt's; `reserved` the address that this recovery has, or is about to have, reserved for it there."""

    mac: str
    network: str = ""
    reserved: str = ""


@dataclass(slots=True)
class RecoveredMachine:
    """One machine of a recovery. `name` at the source, `recovery_name` here; written by one thread at a time."""

    name: str
    recovery_name: str
    uuid: str
    disks: list[RecoveredDisk]
    phase: MachinePhase = MachinePhase.PLANNED
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    stalls: int = 0
    #: Files that were laid beside its overlays, and `tpm` for the state of its TPM: not a second time.
    laid: list[str] = field(default_factory=list)
    cards: list[RecoveredCard] = field(default_factory=list)


@dataclass(slots=True)
class MachineChange:
    """What a plan wants of one machine otherwise than its definition and its group have it. Memory in bytes; 0, False
    and no networks: as they are. `networks` take precedence over the group's, network by network. `re_ip` says how the
    machine gets `addresses` before it boots."""

    memory: int = 0
    vcpus: int = 0
    new_macs: bool = False
    networks: dict[str, str] = field(default_factory=dict)
    re_ip: ReIp | None = None
    addresses: tuple[CardAddress, ...] = ()


@dataclass(slots=True)
class Auto:
    """What the appliance does by itself at `due` (wall seconds), unless `cancelled` says why not."""

    action: Settlement
    due: float
    cancelled: str = ""


@dataclass(slots=True)
class RecoveryRecord:
    """A test, failover or switchover of a group at one checkpoint. Invariant: `checkpoint` is pinned while the phase
    is guarded.

    `generation` is the one that it reigns with, 0 for a test; `given_back` the one that a rollback left behind. `boot`
    is the host's boot when its machines were started: another one means that the host has restarted since. `label` is
    whatever the one who ordered a test knows it by again; `changes` by machine what was ordered for one alone;
    `held` are machines that are ready and off until they are told to boot."""

    id: str
    kind: RecoveryKind
    group: str
    selector: str
    checkpoint: int
    checkpoint_time: float
    machines: list[RecoveredMachine]
    epoch: str = ""
    generation: int = 0
    phase: RecoveryPhase = RecoveryPhase.STARTING
    reason: str = ""
    source_is_down: str = ""
    given_back: int = 0
    auto: Auto | None = None
    boot: str = ""
    label: str = ""
    scratch_limit: int = 0
    changes: dict[str, MachineChange] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    view_restarts: int = 0
    times: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    def choose(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.epoch, self.checkpoint_time = checkpoint.number, checkpoint.epoch, checkpoint.time

    @property
    def test(self) -> bool:
        return self.kind is RecoveryKind.TEST

    @property
    def guarded(self) -> bool:
        return self.phase in GUARDED

    @property
    def needs_view(self) -> bool:
        """A view stands, or should, under some disk of a guest."""
        return self.guarded and "view" in self.times and not all(disk.localized for _, disk in self.disks())

    def disks(self) -> Iterator[tuple[RecoveredMachine, RecoveredDisk]]:
        return ((machine, disk) for machine in self.machines for disk in machine.disks)

    def failed(self) -> list[RecoveredMachine]:
        return [machine for machine in self.machines if machine.phase is MachinePhase.FAILED]

    def exit_code(self) -> int:
        """0 when all machines run, 3 when some failed, 40 (a step failed) when none runs."""
        failed = len(self.failed())
        if not failed:
            return 0
        return 40 if failed == len(self.machines) else 3

    def state(self) -> str:
        """One word for the operator: `starting`, `staged`, `running`, `partly`, `failed`, `committing`, `committed`,
        `rolling-back`, `rolled-back`, `stopping`, `stopped`."""
        if self.phase is RecoveryPhase.RUNNING and self.held and len(self.failed()) < len(self.machines):
            return "staged"
        if self.phase is RecoveryPhase.RUNNING:
            return {0: "running", 3: "partly", 40: "failed"}[self.exit_code()]
        return "stopped" if self.phase is RecoveryPhase.ENDED else self.phase.value

    def rto(self) -> float | None:
        """Seconds from the order to the last machine's start; None before."""
        running = [machine.times["running"] for machine in self.machines if "running" in machine.times]
        return max(running) - self.times["ordered"] if running else None

    def as_dict(self) -> dict[str, Any]:
        """The recovery as the JSON object that docs/internals.md describes."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        data["checkpoint"] = {"number": self.checkpoint, "time": self.checkpoint_time, "epoch": self.epoch}
        data["state"] = self.state()
        data["started"] = self.times.get("ordered")
        data["rto_seconds"] = self.rto()
        data["exit_code"] = self.exit_code()
        for machine in data["machines"]:
            machine["state"] = machine["phase"]
        return data


class RecoveryFiles:
    """The directory of recoveries; each save is atomic and durable when it returns."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, recovery: RecoveryRecord) -> None:
        atomic.make_directory(self._directory)
        atomic.write_json(self._directory / f"{recovery.id}.json", msgspec.to_builtins(recovery))

    def load(self, identity: str) -> RecoveryRecord:
        """Raises NotFound, IntegrityError (not readable) or UnsupportedFormat."""
        path = self._directory / f"{identity}.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFound("recovery", identity, known=self.names()) from None
        try:
            recovery = msgspec.json.decode(data, type=RecoveryRecord)
        except msgspec.MsgspecError as exc:
            raise IntegrityError(f"{path}: {exc}", file=path) from exc
        if recovery.format != FORMAT:
            raise UnsupportedFormat(f"{path}: format {recovery.format}, known: {FORMAT}", file=path)
        return recovery

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._directory.glob("*.json"))

    def remove(self, identity: str) -> None:
        (self._directory / f"{identity}.json").unlink(missing_ok=True)
