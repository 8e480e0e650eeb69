"""The ways into the disks for one pass of the reader: QEMU's own exports of running machines, `qemu-nbd` for others.

QEMU has one NBD server, and others want it too: it is ours only while a pass runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.config import Home
from drctl.appliance.process import Processes
from drctl.appliance.source.change_tracking import ChangeTracking, write_extents
from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.appliance.source.image_stamp import RUNNING
from drctl.appliance.source.shipper_link import Export
from drctl.errors import DrctlError, StepFailed
from drctl.hypervisor import change_bitmap
from drctl.hypervisor.reader_export import export_start, export_stop
from drctl.model.machine import Machine, MachineState

log = logging.getLogger(__name__)


class ExportingHost(Protocol):
    def monitor(self, name: str, sent: dict[str, Any]) -> Any: ...

    def source_node(self, name: str, target: str) -> str: ...


@dataclass(frozen=True, slots=True)
class _Running:
    """A pass: which disks, which machines export them, which qemu-nbd processes serve the rest."""

    mode: str
    numbers: tuple[int, ...]
    machines: tuple[str, ...]
    servers: tuple[str, ...]


class Passes:
    """At most one pass of one group at a time. Called from the protection's thread only."""

    def __init__(self, home: Home, group: str, host: ExportingHost, processes: Processes) -> None:
        self._home = home
        self._group = group
        self._host = host
        self._processes = processes
        self.tracking = ChangeTracking(host)
        self._now: _Running | None = None

    @property
    def running(self) -> bool:
        return self._now is not None

    @property
    def mode(self) -> str:
        """Of the pass that runs; "" when none does."""
        return self._now.mode if self._now else ""

    def begin(
        self,
        mode: str,
        numbers: Sequence[int],
        state: GroupState,
        machines: Iterable[Machine],
        changed: Sequence[int] = (),
    ) -> dict[int, Export]:
        """Open the disks for reading, those that `changed` only where their bitmaps say so. Raises HypervisorRefused,
        then nothing is left open."""
        machines = list(machines)
        bitmaps = self.tracking.stop(state, machines, changed) if changed else {}
        exports: dict[int, Export] = {}
        opened: list[str] = []
        servers: list[str] = []
        try:
            for machine in machines:
                disks = [d for d in state.disks if d.machine == machine.name and d.number in numbers]
                if not disks:
                    continue
                if machine.state is MachineState.STARTING:
                    raise StepFailed(f"{machine.name} is starting")
                if machine.state in RUNNING:
                    opened.append(machine.name)
                    exports |= self._from_qemu(machine.name, disks, bitmaps)
                else:
                    for disk in disks:
                        servers.append(self._server_name(disk))
                        exports |= self._from_image(machine, disk)
        except DrctlError:
            self._close(opened, servers)
            raise
        self._now = _Running(mode, tuple(numbers), tuple(opened), tuple(servers))
        return exports

    def end(self) -> tuple[int, ...]:
        """Close what is open; the disks that the pass was about."""
        now, self._now = self._now, None
        if now is None:
            return ()
        self._close(now.machines, now.servers)
        return now.numbers

    def _from_qemu(self, machine: str, disks: Sequence[DiskState], bitmaps: Mapping[int, str]) -> dict[int, Export]:
        socket = self._socket(machine)
        nodes = {disk.name: self._host.source_node(machine, disk.target) for disk in disks}
        names = {disk.name: bitmaps[disk.number] for disk in disks if disk.number in bitmaps}
        export_start(partial(self._host.monitor, machine), str(socket), nodes, names)
        return {disk.number: Export(str(socket), disk.name, self._extents(socket, disk, names)) for disk in disks}

    def _extents(self, socket: Path, disk: DiskState, names: Mapping[str, str]) -> str:
        """The file of what a bitmap has; "" where there is none, or it can't be read: all of the disk, then."""
        if disk.name not in names:
            return ""
        path = self._home.run / "exports" / f"{self._group}-{disk.number}.extents"
        try:
            extents = change_bitmap.changed(str(socket), disk.name, names[disk.name])
        except DrctlError as exc:
            log.warning("%s: all of it is read: %s", disk.name, exc.message)
            return ""
        log.info("%s: %d bytes were written while paused", disk.name, sum(extent.length for extent in extents))
        write_extents(path, extents)
        return str(path)

    def _from_image(self, machine: Machine, disk: DiskState) -> dict[int, Export]:
        facts = next(d for d in machine.disks if d.target == disk.target)
        socket = self._socket(disk.name)
        socket.unlink(missing_ok=True)
        # Read-only and persistent: the reader may connect again after a broken link.
        arguments = ["--read-only", "--persistent", "--shared=16", f"--socket={socket}", f"--export-name={disk.name}"]
        # Sharing is forced: else QEMU could not start the machine while its qcow2 image is read. What is read while
        # it starts is worth nothing, and read again: its disks are attached anew.
        path = facts.source.replace(",", ",,")
        node = f"driver={facts.format},file.driver={_protocol(facts.source)},file.filename={path},force-share=on"
        arguments += ["--image-opts", node]
        self._processes.run(self._server_name(disk), ["qemu-nbd", *arguments], ready=socket)
        return {disk.number: Export(str(socket), disk.name)}

    def _close(self, machines: Iterable[str], servers: Iterable[str]) -> None:
        for machine in machines:
            try:
                export_stop(partial(self._host.monitor, machine), str(self._socket(machine)))
            except DrctlError as exc:
                log.info("%s: reader's export not closed: %s", machine, exc.message)
        for server in servers:
            self._processes.end(server, force=True)  # it only reads; and a guest that starts may be waiting for us

    def _server_name(self, disk: DiskState) -> str:
        return f"export-{self._group}-{disk.number}"

    def _socket(self, name: str) -> Path:
        return self._home.run / "exports" / f"{self._group}-{name}.sock"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A pass that has to run now. `equal`: disks that it leaves out because the other side has them as they are;
    `changed`: disks that differ only where their bitmaps say.

    `mode` is "" when none has to run, or the link does not stand."""

    mode: str = ""
    numbers: tuple[int, ...] = ()
    equal: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()

    @property
    def missed(self) -> list[int]:
        """Disks of which nothing is known but by reading all of them."""
        return [number for number in self.numbers if number not in self.changed]


def pass_wanted(wants: str, holds: int, state: GroupState, *, dropping: bool) -> Wanted:
    """What to do about the shipper's `wants`. `holds`: the largest number of a checkpoint that the receiver has.

    With `full` the receiver does not know whether it has the disks whole. It has those that are held by a checkpoint
    which it still knows: nothing was written to them since but what is in this epoch's stream."""
    every = tuple(disk.number for disk in state.disks)
    if wants == "initial":
        return Wanted(wants, every)
    if wants == "full":
        equal = tuple(d.number for d in state.disks if not d.pass_needed and (state.equal or 0 < d.held <= holds))
        rest = tuple(number for number in every if number not in equal)
        return Wanted(wants, rest, equal, _changed(rest, holds, state)) if rest else Wanted("clean", (), equal)
    if wants in ("nothing", "dirty") and (pending := tuple(d.number for d in state.disks if d.pass_needed)):
        log.info("%s: disks %s have missed writes", state.spec.name, pending)
        return Wanted("full", pending, (), _changed(pending, holds, state))
    if wants == "dirty" and not dropping:
        return Wanted("dirty", every)
    return Wanted()


def _changed(numbers: Sequence[int], holds: int, state: GroupState) -> tuple[int, ...]:
    disks = [state.disk(number) for number in numbers]
    return tuple(disk.number for disk in disks if disk.tracked and 0 < disk.tracked_since <= holds)


def _protocol(path: str) -> str:
    return "host_device" if Path(path).is_block_device() else "file"
