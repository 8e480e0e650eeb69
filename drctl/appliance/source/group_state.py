"""What the source side remembers of a group across restarts: `home/groups/NAME.json`."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from drctl.errors import AlreadyExists, IntegrityError, NotFound
from drctl.model.group import GroupDisk, GroupSpec
from drctl.model.machine import Machine
from drctl.model.phase import Phase

FORMAT = 1


class DiskState(msgspec.Struct, frozen=True):
    """A disk with its number. `pass_needed`: writes may have been missed, the reader has to go over it.

    `left` is the image as it was when its machine powered off in order (image_stamp.Stamp), or None; `left_at` the
    moment at which that was known, CLOCK_MONOTONIC nanoseconds of the boot in which the epoch began. `held` is the
    number of a checkpoint that is durable at the other side and holds all that was written to the disk before it left
    (0: none yet): after it nothing was written but what the tap of this epoch has seen."""

    number: int
    machine: str
    target: str
    size: int
    pass_needed: bool = True
    left: tuple[int, int, int] | None = None
    left_at: int = 0
    held: int = 0
    #: A bitmap of QEMU that has all that was written to the disk since before the checkpoint of number `tracked_since`,
    #: which is durable at the other side and holds all that was written before; "": there is none to be trusted.
    tracked: str = ""
    tracked_since: int = 0

    def missed(self) -> DiskState:
        """Writes to it may have been missed."""
        return msgspec.structs.replace(self.recorded(), tracked="", tracked_since=0)

    def recorded(self) -> DiskState:
        """Writes to it may have been missed, but not by its bitmap, where it has one."""
        return msgspec.structs.replace(self, pass_needed=True, left=None, left_at=0, held=0)

    def after_epoch(self) -> DiskState:
        """What is still known of it when the ring is gone: one that had left, and is held there, has missed nothing."""
        if self.left is not None and self.held and not self.pass_needed:
            return self
        return self.recorded()

    @property
    def name(self) -> str:
        return f"{self.machine}.{self.target}"


class GuestNote(msgspec.Struct, frozen=True):
    """A guest as the boot guard knows it. `autostart`: libvirt's flag was on, and is off because we took it over."""

    name: str
    uuid: str = ""
    autostart: bool = False


class Desired(StrEnum):
    """What the operator asked for; the protection works towards it."""

    STOPPED = "stopped"
    PROTECTED = "protected"
    PAUSED = "paused"


class GroupState(msgspec.Struct, frozen=True):
    """Invariant: numbers of disks are never reused; `epoch` names the ring in `run/rings` or is empty."""

    spec: GroupSpec
    desired: Desired = Desired.STOPPED
    phase: Phase = Phase.UNPROTECTED
    reason: str = ""
    generation: int = 1
    epoch: str = ""
    next_number: int = 0
    disks: tuple[DiskState, ...] = ()
    #: Machines that were migrated away: off here, and alive where we can't see their writes.
    moved: tuple[str, ...] = ()
    #: The guests, noted while they are protected: whom to start at the host's boot, and whom to refuse.
    guests: tuple[GuestNote, ...] = ()
    #: The pass that is under way, or was the newest: to go on with it, or to know it again. Forgotten when one of its
    #: disks misses a write.
    sync: str = ""
    #: The disks are known to be what the other side holds, though no stream says so: a switchover was rolled back.
    equal: bool = False
    format: int = FORMAT

    def disk(self, number: int) -> DiskState:
        return next(disk for disk in self.disks if disk.number == number)

    def with_disk(self, number: int, **changes: object) -> GroupState:
        disks = tuple(
            msgspec.structs.replace(disk, **changes) if disk.number == number else disk for disk in self.disks
        )
        return msgspec.structs.replace(self, disks=disks)

    def with_held(self, checkpoint: int, marked_ns: int) -> GroupState:
        """The other side has a checkpoint of this epoch that was marked at `marked_ns` (CLOCK_MONOTONIC)."""
        if not any(disk.left is not None and not disk.held and disk.left_at < marked_ns for disk in self.disks):
            return self
        return msgspec.structs.replace(
            self,
            disks=tuple(
                msgspec.structs.replace(disk, held=checkpoint)
                if disk.left is not None and not disk.held and disk.left_at < marked_ns
                else disk
                for disk in self.disks
            ),
        )

    def with_left(self, left: Mapping[int, tuple[int, int, int] | None], now_ns: int) -> GroupState:
        """So the images of these disks are while their machines are off, known at `now_ns` (CLOCK_MONOTONIC)."""
        disks = tuple(
            msgspec.structs.replace(disk, left=left[disk.number], left_at=now_ns, held=0)
            if disk.number in left
            else disk
            for disk in self.disks
        )
        return msgspec.structs.replace(self, disks=disks)

    def with_clean(self, held: Mapping[int, int]) -> GroupState:
        """These disks came back before anything was written to them; with the checkpoints that hold them."""
        disks = tuple(
            msgspec.structs.replace(disk, pass_needed=False, held=held[disk.number]) if disk.number in held else disk
            for disk in self.disks
        )
        return msgspec.structs.replace(self, disks=disks)

    def with_missed(self, numbers: Container[int]) -> GroupState:
        """These disks were, or may have been, written unseen."""
        disks = tuple(disk.missed() if disk.number in numbers else disk for disk in self.disks)
        return msgspec.structs.replace(self, disks=disks, sync="")

    def after_pass(self, numbers: Container[int]) -> tuple[DiskState, ...]:
        """The disks, when a pass over some of them is whole at the other side."""
        changes: dict[str, Any] = {"pass_needed": False, "tracked": "", "tracked_since": 0}
        return tuple(msgspec.structs.replace(d, **changes) if d.number in numbers else d for d in self.disks)

    def with_recorded(self, numbers: Container[int]) -> GroupState:
        """These disks were written, and their bitmaps have it."""
        disks = tuple(disk.recorded() if disk.number in numbers else disk for disk in self.disks)
        return msgspec.structs.replace(self, disks=disks, sync="")

    def with_disks_of(self, other: GroupState) -> GroupState:
        """This state with the disks of another."""
        return msgspec.structs.replace(self, disks=other.disks, next_number=other.next_number, sync=other.sync)

    def with_machines(self, machines: Sequence[Machine]) -> GroupState:
        """The disks of the machines as they are now: known ones keep their numbers, new ones get the next."""
        known = {(disk.machine, disk.target): disk for disk in self.disks}
        disks: list[DiskState] = []
        number = self.next_number
        for machine in machines:
            for disk in machine.disks:
                old = known.get((machine.name, disk.target))
                if old is not None:
                    known_size = disk.size == old.size
                    disks.append(old if known_size else msgspec.structs.replace(old.missed(), size=disk.size))
                else:
                    disks.append(DiskState(number, machine.name, disk.target, disk.size))
                    number += 1
        return msgspec.structs.replace(self, disks=tuple(disks), next_number=number)

    def group_disks(self) -> tuple[GroupDisk, ...]:
        return tuple(GroupDisk(d.number, d.machine, d.target, d.size) for d in self.disks)


class GroupFiles:
    """The group states of one appliance; each change is whole on disk before it is believed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._directory.glob("*.json"))

    def load(self, name: str) -> GroupState:
        """Raises NotFound, or IntegrityError naming the file."""
        file = self._file(name)
        try:
            return msgspec.json.decode(file.read_bytes(), type=GroupState)
        except FileNotFoundError:
            raise NotFound("group", name, known=self.names()) from None
        except (msgspec.DecodeError, ValueError) as exc:
            raise IntegrityError(f"{file}: {exc}", hint="the file is damaged; apply the group again") from exc

    def save(self, state: GroupState) -> None:
        file = self._file(state.spec.name)
        temporary = file.with_suffix(".new")
        with temporary.open("wb") as out:
            out.write(msgspec.json.encode(state))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)

    def remove(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def put(self, spec: GroupSpec) -> GroupState:
        """Create or change a group. Raises AlreadyExists when a machine belongs to another group already."""
        for other in self.names():
            if other != spec.name:
                taken = set(self.load(other).spec.machines) & set(spec.machines)
                if taken:
                    raise AlreadyExists(
                        f"machine {sorted(taken)[0]!r} is protected by group {other!r} already",
                        hint=f"a machine belongs to one group; take it out of groups/{other}.toml first",
                    )
        try:
            old = self.load(spec.name)
        except NotFound:
            state = GroupState(spec)
        else:
            state = msgspec.structs.replace(old, spec=spec)
        self.save(state)
        return state

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def spec_from(data: dict[str, object]) -> GroupSpec:
    """A GroupSpec as it came over the control socket. Raises IntegrityError when it is not one."""
    try:
        return msgspec.convert(data, GroupSpec)
    except msgspec.ValidationError as exc:
        raise IntegrityError(
            f"not a group: {exc}", hint="command line and appliance are of different versions"
        ) from exc
