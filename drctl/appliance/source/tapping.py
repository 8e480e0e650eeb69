"""The mirrors of one group: attached, proven in order, attested, detached. Knows rings by their words, no shipper.

Blocking, and called from one thread at a time (`attest` from any). Nothing here may end a guest: every step is the
soft one of `hypervisor.mirror`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from drctl.appliance.source.disk_changes import disk_changes
from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.appliance.source.image_stamp import REACHABLE, why_not_in_order
from drctl.appliance.source.side_by_side import each
from drctl.errors import DrctlError, StepFailed
from drctl.hypervisor.attestation import ask
from drctl.hypervisor.block_graph import MirrorName, MirrorState
from drctl.hypervisor.mirror import Mirror, find
from drctl.hypervisor.qmp import Monitor
from drctl.model.machine import Machine, MachineState

log = logging.getLogger(__name__)


class RingState(Protocol):
    """What the mirrors need to know of the ring."""

    def order_stamp(self) -> int: ...

    def published(self) -> int: ...

    def connection(self, number: int) -> int:
        """0 when the disk's export has no connection."""
        ...

    def beating(self) -> bool:
        """The tap's heartbeat is fresh: a dead tap goes unnoticed by an idle guest's QEMU."""
        ...

    def tap_runs(self) -> bool:
        """The tap's process is there. Known at once, where a beat may be a second old."""
        ...

    def losses(self) -> int:
        """Losses of order so far, but for connections that said goodbye."""
        ...

    def lossless(self) -> bool:
        """None of these since order was proven."""
        ...

    def ended(self, number: int) -> int:
        """Not 0 when the disk's newest connection has ended, and said goodbye before."""
        ...

    def proven_once(self) -> bool:
        """Order was proven in this epoch."""
        ...

    def prove(self, stamp: int, sequence: int, losses: int) -> None:
        """Write down that the group is ordered from `sequence` on under `stamp`, after so many losses."""
        ...


class Host(Protocol):
    """The hypervisor, as far as mirrors need it."""

    def state(self, name: str) -> MachineState: ...

    def monitor(self, name: str, sent: dict[str, Any]) -> Any: ...

    def source_node(self, name: str, target: str) -> str:
        """The root block node of a disk of a running machine."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where the taps of a group listen, and how a sink is put there when the tap is dead."""

    socket: str
    start_sink: Callable[[], None]


class Tapping:
    """The mirrors of one group on this host. Keeps no state of its own but a lock: all is asked of QEMU."""

    def __init__(self, host: Host, ring: RingState) -> None:
        self._host = host
        self._ring = ring
        self._lock = threading.Lock()

    def missing(self, state: GroupState, machines: Iterable[Machine]) -> list[int]:
        """Numbers of the running machines' disks that have no mirror of this epoch. Their writes are being missed."""
        numbers: list[int] = []
        for machine in machines:
            if machine.state in REACHABLE:
                found = {m.name for m in find(self._monitor(machine.name)) if not _ended(m)}
                disks = _disks_of(state, machine.name)
                numbers += [
                    d.number for d in disks if MirrorName.of(state.generation, state.epoch, d.number) not in found
                ]
        return numbers

    def attach_all(
        self, state: GroupState, machines: Iterable[Machine], numbers: Collection[int], place: Place
    ) -> dict[str, DrctlError]:
        """Attach these disks, those of several machines at a time: their guests don't wait before they write.

        The machines with which that went wrong; the others have their mirrors."""
        failed: dict[str, DrctlError] = {}

        def attach(machine: Machine) -> None:
            try:
                self.attach(state, machine, numbers, place)
            except DrctlError as exc:
                failed[machine.name] = exc

        known = {disk.machine for disk in state.disks if disk.number in numbers}
        each(attach, [machine for machine in machines if machine.state in REACHABLE and machine.name in known])
        return failed

    def attach(self, state: GroupState, machine: Machine, numbers: Collection[int], place: Place) -> None:
        """Attach these disks of a running machine, after clearing away mirrors of earlier epochs."""
        self._demand_beat()
        monitor = self._monitor(machine.name)
        ours = {MirrorName.of(state.generation, state.epoch, disk.number) for disk in state.disks}
        for stale in find(monitor):
            if stale.name not in ours:
                log.info("%s: removing mirror %s of an earlier epoch", machine.name, stale.name.job)
                self._remove(state, machine.name, stale, monitor, place)
        for disk in _disks_of(state, machine.name):
            if disk.number in numbers:
                mirror = self._mirror(state, disk, monitor)
                self._clear_ended(mirror, place)
                mirror.attach(place.socket, disk.name)

    def _clear_ended(self, mirror: Mirror, place: Place) -> None:
        if mirror.inspect().present:
            mirror.detach(place.start_sink)

    def prove(self, state: GroupState, machines: Sequence[Machine], *, timeout_seconds: float = 10.0) -> str:
        """Prove the order of the whole group and write it into the ring; "" on success, else why not yet.

        The stamp and the connections must be the same before the first disk's proof and after the last's
        (see Mirror.prove_order)."""
        with self._lock:
            self._demand_beat()
            losses = self._ring.losses()
            stamp = self._ring.order_stamp()
            running = [m for m in machines if m.state in REACHABLE]
            disks = [disk for m in running for disk in _disks_of(state, m.name)]
            before = [self._ring.connection(disk.number) for disk in disks]
            published = self._ring.published()
            if self._only_goodbyes(state, stamp, losses):
                self._ring.prove(stamp, published, losses)
                return ""
            proven = each(lambda machine: self._prove_machine(state, machine, timeout_seconds), running)
            sequence = max([published, *proven])
            after = [self._ring.connection(disk.number) for disk in disks]
            if stamp != self._ring.order_stamp() or (0 not in before and before != after):
                return "order was lost again while it was being proven"
            self._ring.prove(stamp, sequence, losses)
            return ""

    def _prove_machine(self, state: GroupState, machine: Machine, timeout_seconds: float) -> int:
        """Prove a machine's disks one after the other; from where on all of them are in order."""
        monitor = self._monitor(machine.name)
        return max(
            [
                self._mirror(state, disk, monitor).prove_order(
                    self._ring.published, partial(self._connected, disk.number), timeout_seconds=timeout_seconds
                )
                for disk in _disks_of(state, machine.name)
            ],
            default=0,
        )

    def _only_goodbyes(self, state: GroupState, stamp: int, losses: int) -> bool:
        """Whether the order that was proven once is whole still: since then nothing ended but connections that had said
        goodbye, after all that was in flight on them had arrived.

        Then no write of any other disk was refused or lost, and no mirror has anything to send again, so there is
        nothing that QEMU would have to be asked. A connection whose end is not understood yet (neither there nor said
        goodbye: LOSSES may be about to rise) is waited for by the next look, or proven at length."""
        ring = self._ring
        settled = all(ring.connection(disk.number) or ring.ended(disk.number) for disk in state.disks)
        return (
            ring.proven_once()
            and settled
            and ring.lossless()
            and (stamp, losses) == (ring.order_stamp(), ring.losses())
        )

    def detach(self, state: GroupState, machines: Iterable[Machine], place: Place) -> list[str]:
        """Remove all of drctl's mirrors from the machines; what could not be removed, in words."""
        left: list[str] = []
        for machine in machines:
            if machine.state not in REACHABLE:
                continue
            try:
                monitor = self._monitor(machine.name)
                for mirror in find(monitor):
                    self._remove(state, machine.name, mirror, monitor, place)
            except DrctlError as exc:
                left.append(f"{machine.name}: {exc.message}")
        return left

    def _remove(self, state: GroupState, machine: str, found: MirrorState, monitor: Monitor, place: Place) -> None:
        """Detach a mirror of any epoch. Its disk number tells the disk: numbers are never reused."""
        disk = next((d for d in _disks_of(state, machine) if d.number == found.name.disk), None)
        if disk is not None:
            Mirror(monitor, found.name, self._host.source_node(machine, disk.target)).detach(place.start_sink)

    def attest(self, state: GroupState, machines: Sequence[Machine]) -> str:
        """Whether every disk of the group is attached now: "" for yes, else why not. Silence proves nothing.

        `machines` may be some seconds old; whether they run is asked now."""
        if not self._ring.beating():
            return "the tap does not beat"
        known = {machine.name: machine for machine in machines}
        reasons = each(lambda name: self._attest_one(state, name, known.get(name)), state.spec.machines)
        return next(filter(None, reasons), "")

    def _attest_one(self, state: GroupState, name: str, machine: Machine | None) -> str:
        if machine is None:
            return f"{name}: it is not on this host"
        try:
            reason = self._attest_machine(state, replace(machine, state=self._host.state(name)))
        except DrctlError as exc:
            return exc.message if name in exc.message else f"{name}: {exc.message}"
        return reason if not reason or reason.startswith(f"{name}: ") else f"{name}: {reason}"

    def _attest_machine(self, state: GroupState, machine: Machine) -> str:
        disks = _disks_of(state, machine.name)
        if changed := disk_changes(state, [machine]):
            return changed[0].words(state.spec.name)
        if pending := [disk.target for disk in disks if disk.pass_needed]:
            return f"{pending[0]}: the reader has to go over it"
        if machine.name in state.moved:
            return "it was moved to another host"
        if machine.state not in REACHABLE:
            return why_not_in_order(machine, disks)
        monitor = self._monitor(machine.name)
        answer = ask(monitor, [MirrorName.of(state.generation, state.epoch, disk.number) for disk in disks])
        if not answer.attached:
            return answer.reason
        unconnected = [disk.target for disk in disks if self._ring.connection(disk.number) == 0]
        return f"{unconnected[0]}: not connected to the tap" if unconnected else ""

    def states(self, state: GroupState, machine: Machine) -> dict[str, str]:
        """For people: what each disk's mirror is doing."""
        if machine.state not in REACHABLE:
            return {disk.target: "off" for disk in _disks_of(state, machine.name)}
        found = {mirror.name: mirror for mirror in find(self._monitor(machine.name))}
        words = {}
        for disk in _disks_of(state, machine.name):
            mirror = found.get(MirrorName.of(state.generation, state.epoch, disk.number))
            words[disk.target] = "detached" if mirror is None else "attached" if mirror.healthy else mirror.status
        return words

    def _connected(self, number: int) -> bool:
        """A dead tap leaves its CONNECTION words set, and an idle guest does not notice: the beat must be fresh.

        Raises StepFailed when the tap has ended: it is not to be waited for, the next look starts another."""
        if not self._ring.tap_runs():
            raise StepFailed("the tap ended while order was being proven")
        return self._ring.beating() and self._ring.connection(number) != 0

    def _demand_beat(self) -> None:
        """While a tap hangs, commands that talk to it hang the whole QEMU; the watchdog frees it. Raises StepFailed."""
        if not self._ring.beating():
            raise StepFailed("the tap does not beat")

    def _monitor(self, machine: str) -> Monitor:
        return partial(self._host.monitor, machine)

    def _mirror(self, state: GroupState, disk: DiskState, monitor: Monitor) -> Mirror:
        name = MirrorName.of(state.generation, state.epoch, disk.number)
        return Mirror(monitor, name, self._host.source_node(disk.machine, disk.target))


def _ended(mirror: MirrorState) -> bool:
    return mirror.status in ("concluded", "aborting", "null", "")


def _disks_of(state: GroupState, machine: str) -> list[DiskState]:
    return [disk for disk in state.disks if disk.machine == machine]
