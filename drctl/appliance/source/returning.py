"""Machines that leave in order and come back before they write: they are live at once, and nothing of them is read.

Owned by the protection's thread; only `happened` may be called from others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from drctl.appliance.source.departure import Ends, stamp_at_end
from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.appliance.source.image_stamp import REACHABLE, RUNNING, Stamp, image_stamp
from drctl.appliance.source.side_by_side import each
from drctl.hypervisor.untouched import untouched
from drctl.model.machine import Disk, Machine

log = logging.getLogger(__name__)

#: Events (hypervisor/libvirt.py) after which `stopped` does not mean that the guest powered off.
_NOT_IN_ORDER = frozenset(("destroyed", "crashed", "migrated", "saved", "failed"))


class ReturnHost(Protocol):
    def ended_in_order(self, name: str) -> bool: ...

    def monitor(self, name: str, sent: dict[str, Any]) -> Any: ...

    def source_node(self, name: str, target: str) -> str: ...


class Returning:
    """What is known of how the group's machines end, from one look to the next."""

    def __init__(self, host: ReturnHost, ring: Ends) -> None:
        self._host = host
        self._ring = ring
        self._lock = threading.Lock()
        #: Machines all of whose mirrors were in place at the newest look at which they could be asked.
        self._mirrored: frozenset[str] = frozenset()
        #: Ends told by events since then: machine → whether it powered off.
        self._ends: dict[str, bool] = {}
        #: Disks of which it was told already that they were not left in order.
        self._told: set[int] = set()

    def happened(self, machine: str, event: str) -> None:
        """An event of the hypervisor, from any thread. An empty machine: events were lost."""
        with self._lock:
            if not machine:
                self._ends.clear()
            elif event in _NOT_IN_ORDER:
                self._ends[machine] = False
            elif event == "stopped":
                self._ends.setdefault(machine, True)

    def attached(self, machines: Collection[str], others: Collection[str]) -> None:
        """A look found these machines with all their mirrors. The others are off, or are being started: of them it says
        nothing, and how they left may be understood later than at the first look."""
        with self._lock:
            self._mirrored = frozenset(machines) | self._mirrored & frozenset(others)
            for machine in machines:
                self._ends.pop(machine, None)

    def departed(self, state: GroupState, machines: Iterable[Machine]) -> dict[int, Stamp]:
        """Disks of machines that are off of which it was not known yet how they were left, and is now: in order."""
        left: dict[int, Stamp] = {}
        for machine in machines:
            if machine.state in RUNNING or machine.name in state.moved:
                continue
            unknown = [d for d in _disks_of(state, machine) if d.left is None and not d.pass_needed]
            if unknown and self._host.ended_in_order(machine.name):
                left |= self._stamps(machine, unknown)
        return left

    def returning(self, state: GroupState, machines: Iterable[Machine], missing: Collection[int]) -> dict[int, int]:
        """Of the running machines' disks without mirrors, those that nobody has written since they were left in order,
        as far as their files tell, with their `held`. Whether the guest has written since is asked by `clean`."""
        back: dict[int, int] = {}
        for machine in machines:
            disks = _disks_of(state, machine)
            if machine.state not in REACHABLE or not disks or any(disk.number not in missing for disk in disks):
                continue
            facts = _facts(machine)
            known = [disk for disk in disks if disk.left is not None and not disk.pass_needed]
            back |= {d.number: d.held for d in known if image_stamp(facts[d.target].source) == d.left}
            unseen = [disk for disk in disks if disk.left is None and not disk.pass_needed]
            if unseen and self._powered_off(machine.name):
                back |= dict.fromkeys(self._stamps(machine, unseen), 0)
        return back

    def clean(self, state: GroupState, machines: Iterable[Machine], numbers: Collection[int]) -> set[int]:
        """Those of the disks, attached meanwhile, that were not written between power-on and their mirror."""
        known = {disk.machine for disk in state.disks if disk.number in numbers}
        asked = [machine for machine in machines if machine.name in known]
        return set().union(*each(lambda machine: self._clean_of(state, machine, numbers), asked))

    def _clean_of(self, state: GroupState, machine: Machine, numbers: Collection[int]) -> set[int]:
        found: set[int] = set()
        for disk in _disks_of(state, machine):
            if disk.number in numbers:
                node = self._host.source_node(machine.name, disk.target)
                if untouched(partial(self._host.monitor, machine.name), node):
                    found.add(disk.number)
                else:
                    log.info("%s: %s was written before its mirror was there", machine.name, disk.target)
        return found

    def _powered_off(self, machine: str) -> bool:
        """It is another QEMU than at the last look, and events tell how the one before ended."""
        with self._lock:
            return self._ends.get(machine, False)

    def _stamps(self, machine: Machine, disks: Sequence[DiskState]) -> dict[int, Stamp]:
        facts, mirrored = _facts(machine), machine.name in self._mirrored
        stamps: dict[int, Stamp] = {}
        for disk in disks:
            stamp = stamp_at_end(disk.number, facts[disk.target], self._ring, mirrored=mirrored)
            if stamp is not None:
                stamps[disk.number] = stamp
                self._told.discard(disk.number)
            elif disk.number not in self._told:
                self._told.add(disk.number)
                log.info("%s: %s was not left in order, as far as is known", machine.name, disk.target)
        return stamps


def _facts(machine: Machine) -> Mapping[str, Disk]:
    return {disk.target: disk for disk in machine.disks}


def _disks_of(state: GroupState, machine: Machine) -> list[DiskState]:
    """The group's disks of a machine, as far as it still has them in their size."""
    sizes = {disk.target: disk.size for disk in machine.disks}
    return [disk for disk in state.disks if disk.machine == machine.name and sizes.get(disk.target) == disk.size]
