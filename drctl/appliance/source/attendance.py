"""Which machines of a group are here, how they leave and come back, and what that means for their disks.

Called from the protection's thread only. What it finds out is in the group's state when a method returns."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from drctl.appliance.source.disk_changes import disk_changes
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.image_stamp import REACHABLE, RUNNING, Stamp, untold
from drctl.appliance.source.returning import Returning
from drctl.appliance.source.tapping import Place, Tapping
from drctl.model.machine import Machine

log = logging.getLogger(__name__)

#: An image that changes while its machine is off is not read more often than this.
UNTOLD_SECONDS = 60.0
#: How a machine left may be understood a look or two later than that it is off.
UNDERSTOOD_SECONDS = 1.5


class Keeper(Protocol):
    """Who owns the group's state (Protection)."""

    @property
    def state(self) -> GroupState: ...

    def change(self, change: Callable[[GroupState], GroupState]) -> None:
        """Durable when it returns."""
        ...


class Mover(Protocol):
    def moved_away(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Attaching:
    """What an attachment needs of the protection: machines as they are right now, and an end to the pass that runs."""

    place: Place
    machines_now: Callable[[], Sequence[Machine]]
    end_pass: Callable[[], None]
    #: The disks of whose writes a bitmap of QEMU has missed none.
    recording: Callable[[GroupState, Sequence[Machine]], Collection[int]] = lambda _state, _machines: ()


class Attendance:
    """The power of one group's machines, from one look to the next."""

    def __init__(self, keeper: Keeper, host: Mover, tapping: Tapping, returning: Returning) -> None:
        self._keeper = keeper
        self._host = host
        self._tapping = tapping
        self._returning = returning
        self._running: frozenset[str] = frozenset()
        self._reachable: frozenset[str] = frozenset()
        #: When a disk of which nothing is known may be read, by number; from its first such look on.
        self._untold_due: dict[int, float] = {}

    def note_power(self, machines: Sequence[Machine], *, reading: bool) -> None:
        """A machine that went off in order stays provable while its images stay as they are; of one that did not, or
        whose images changed since, nothing is known: it has to be read, unless something is being read already."""
        running = frozenset(machine.name for machine in machines if machine.state in RUNNING)
        self._reachable = frozenset(machine.name for machine in machines if machine.state in REACHABLE)
        state = self._keeper.state
        moved = {name for name in self._running - running if self._host.moved_away(name)} | set(state.moved) - running
        self._running = running
        if moved != set(state.moved):
            self._keep(moved=tuple(sorted(moved)))
        self.note_left(self._returning.departed(self._keeper.state, machines))
        if not reading:
            self._note_untold(machines)

    def _note_untold(self, machines: Sequence[Machine]) -> None:
        now, state = time.monotonic(), self._keeper.state
        numbers = untold(state, machines)
        off = {disk.number for disk in state.disks if disk.machine not in self._running}
        # Who came back, or was understood meanwhile, begins anew.
        kept = {
            n: at for n, at in self._untold_due.items() if n in off and (n in numbers or at > now + UNDERSTOOD_SECONDS)
        }
        due = [number for number in numbers if now >= kept.setdefault(number, now + UNDERSTOOD_SECONDS)]
        self._untold_due = kept | dict.fromkeys(due, now + UNTOLD_SECONDS)
        if due:
            self.miss(due)

    def miss(self, numbers: Collection[int]) -> None:
        """These disks were, or may have been, written unseen."""
        self._keeper.change(lambda state: state.with_missed(numbers))

    def note_left(self, left: Mapping[int, Stamp | None]) -> None:
        """Images of machines that are off, as they are now, hold nothing but what is in the stream so far."""
        if left:
            now = time.monotonic_ns()
            self._keeper.change(lambda state: state.with_left(left, now))

    def attach(self, machines: Sequence[Machine], attaching: Attaching) -> None:
        """See to it that every disk of a running machine has its mirror."""
        state = self._keeper.state
        # What is not there any more, or in another size, can't be attached; it is named, and its machine not attested.
        changed = {change.number for change in disk_changes(state, machines)}
        if missing := set(self._tapping.missing(state, machines)) - changed:
            self._take_back(missing, attaching)
        self._returning.attached(self._reachable, {m.name for m in machines if m.name not in self._reachable})

    def _take_back(self, missing: Collection[int], attaching: Attaching) -> None:
        """Attach. Disks that were not written since their machine left in order have missed nothing."""
        before = self._keeper.state.sync
        # Facts of now: a definition may have been changed while its machine was off.
        machines = attaching.machines_now()
        held = self._returning.returning(self._keeper.state, machines, missing)
        # Written down first: whoever comes after a crash here must know that these disks missed writes.
        recorded = set(attaching.recording(self._keeper.state, machines)) & set(missing)
        self.miss(set(missing) - recorded)
        self._keeper.change(lambda state: state.with_recorded(recorded))
        failed = self._tapping.attach_all(self._keeper.state, machines, missing, attaching.place)
        attached = [machine for machine in machines if machine.name not in failed]
        clean = self._returning.clean(self._keeper.state, attached, held)
        self._note_clean({number: held[number] for number in clean}, before if len(clean) == len(missing) else "")
        if len(clean) < len(missing):
            # Only now: guests don't wait before they write. What it read meanwhile is read again, and comes later in
            # the stream; it can't count as done, its name was forgotten with the disks that missed writes.
            attaching.end_pass()
        for failure in failed.values():
            raise failure

    def _note_clean(self, held: Mapping[int, int], sync: str) -> None:
        """These disks came back before they were written. Where none did otherwise, a pass goes on."""
        if held:
            log.info("%s: disks %s are back, not written since", self._keeper.state.spec.name, sorted(held))
            self._keeper.change(lambda state: msgspec.structs.replace(state.with_clean(held), sync=sync))

    def note_held(self, newest: Mapping[str, Any] | None, *, reading: bool) -> None:
        """What the newest durable checkpoint of this epoch says of disks that had left, and of the newest pass."""
        if newest is None:
            return
        state = before = self._keeper.state
        state = state.with_held(int(newest["number"]), int(newest.get("monotonic_ns") or 0))
        if state.sync and not reading and not any(disk.pass_needed for disk in state.disks):
            state = msgspec.structs.replace(state, sync="")
        if state is not before:
            self._keeper.change(lambda now: state if now is before else now)

    def _keep(self, **changes: Any) -> None:
        self._keeper.change(lambda state: msgspec.structs.replace(state, **changes))
