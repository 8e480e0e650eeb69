"""The protection of one group on its source host: what is wanted, what is true, and the next step towards it.

Level-triggered: every look compares what is true at QEMU, in the ring and at the shipper with what is wanted, and does
what is missing. Events only make the next look come sooner. So a restarted supervisor, a killed tap, a rebooted guest
and a mirror cancelled by hand are one case."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.process import Processes
from drctl.appliance.source import guest_notes
from drctl.appliance.source.attendance import Attaching, Attendance
from drctl.appliance.source.boot_guard import BootGuard
from drctl.appliance.source.definition import DefinitionFile
from drctl.appliance.source.disk_changes import taken_up
from drctl.appliance.source.group_state import Desired, GroupFiles, GroupState
from drctl.appliance.source.guest_reader import GuestReader
from drctl.appliance.source.host import SourceHost
from drctl.appliance.source.image_stamp import stamps_of_images
from drctl.appliance.source.passes import Passes, Wanted, pass_wanted
from drctl.appliance.source.resync import SurveyOrder
from drctl.appliance.source.returning import Returning
from drctl.appliance.source.seen import Seen
from drctl.appliance.source.shipper_link import Report, ShipperLink
from drctl.appliance.source.strays import Strays
from drctl.appliance.source.tappable import check_machines
from drctl.appliance.source.tapping import Place, Tapping
from drctl.appliance.source.worker import Worker
from drctl.errors import DrctlError
from drctl.model.machine import Machine
from drctl.model.phase import Event, Phase, advance

log = logging.getLogger(__name__)

#: Time between two looks when nothing happens. A fault is noticed within it; a look costs a few monitor commands.
LOOK_SECONDS = 0.25


class Protection:
    """One thread per group that is protected here. Public methods may be called from any thread."""

    def __init__(self, home: Home, files: GroupFiles, group: str, host: SourceHost, processes: Processes) -> None:
        self._home = home
        self._files = files
        self._state = files.load(group)
        self._host = host
        self.worker = Worker(home, group, processes)
        self.tapping = Tapping(host, self.worker)
        self.shipper = ShipperLink(home, self._state, self.worker)
        self.strays = Strays(host, home.store)
        self.boot: BootGuard | None = None  # where the host was booted since the group was last looked after
        self._returning = Returning(host, self.worker)
        self._attendance = Attendance(self, host, self.tapping, self._returning)
        self._passes = Passes(home, group, host, processes)
        place = Place(str(self.worker.socket_path), self.worker.start_sink)
        look, recording = partial(self._look_at_machines, anew=True), self._passes.tracking.recording
        self._attaching = Attaching(place, look, self._end_pass, recording)
        self.survey = SurveyOrder()
        self.definition = DefinitionFile(home, group, host, GuestReader(host))
        self._seen = Seen()
        #: Disks that were added or taken out are to be taken up.
        self._take_up = False
        self._wake = threading.Event()
        self._lock = threading.RLock()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # -- from outside -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> GroupState:
        return self._state

    @property
    def machines(self) -> Sequence[Machine]:
        return self._seen.machines

    def run(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop, name=f"protect-{self._state.spec.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking. Tap, shipper and mirrors go on without us."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(10)

    def wake(self) -> None:
        self._wake.set()

    def happened(self, machine: str, event: str) -> None:
        """An event of the hypervisor."""
        self._returning.happened(machine, event)
        self._wake.set()

    def want(self, desired: Desired) -> None:
        """Raises WrongPhase or PreconditionFailed when it can't be had; then nothing has changed."""
        with self._lock:
            if desired is Desired.PROTECTED:
                check_machines(self._host, self._state.spec.machines)
                event = Event.RESUME if self._state.phase in (Phase.PAUSED, Phase.BROKEN) else Event.START
                if self._state.desired is not Desired.PROTECTED:
                    self._keep(phase=advance(self._state.spec.name, self._state.phase, event), desired=desired)
            elif desired is Desired.PAUSED:
                self._keep(phase=advance(self._state.spec.name, self._state.phase, Event.PAUSE), desired=desired)
            else:
                self._keep(phase=advance(self._state.spec.name, self._state.phase, Event.STOP), desired=desired)
        self.wake()

    def take_up(self) -> None:
        """Let the group be about the disks that its machines have now."""
        self._take_up = True
        self.wake()

    def changed_spec(self) -> None:
        """The group's file was written anew."""
        with self._lock:
            self._state = msgspec.structs.replace(self._state, spec=self._files.load(self._state.spec.name).spec)
            self.shipper.configure(self._state)
        self.wake()

    def go_over(self) -> None:
        """Read all disks and compare them with the other side's. No mark is cut until that is done."""
        self._attendance.miss([disk.number for disk in self._state.disks])
        self.wake()

    def attest(self) -> str:
        """Whether what was marked just now is a true point in time: "" or why not (see Tapping.attest)."""
        state = self._state
        if state.desired is not Desired.PROTECTED:
            return f"the group is {state.phase}"
        return self.tapping.attest(state, self._seen.machines)

    def superseded(self, reason: str) -> None:
        """The other site reigns: this one may neither run nor replicate the group any more."""
        with self._lock:
            if self._state.phase is not Phase.FAILED_OVER:
                reason = f"superseded: {self._state.spec.recovery} says: {reason}"
                self._keep(phase=Phase.FAILED_OVER, reason=reason, desired=Desired.STOPPED)
                log.error("%s: %s", self._state.spec.name, reason)
        self.wake()

    def change(self, change: Callable[[GroupState], GroupState]) -> None:
        """Let a handover make another state of it; durable when this returns."""
        with self._lock:
            self._state = change(self._state)
            self._keep()
        self.wake()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self._look()
            except DrctlError as exc:
                self._looked_in_vain(exc.message)
            except Exception as exc:  # the supervisor's edge: one group's bug must not end the protection of others
                log.exception("%s: look failed", self._state.spec.name)
                self._looked_in_vain(f"unexpected {type(exc).__name__}: {exc}")
            self._wake.wait(LOOK_SECONDS)

    def _look(self) -> None:
        if self._state.desired is Desired.PROTECTED:
            self._protect()
            return
        if self._state.phase is Phase.FAILED_OVER:
            self.strays.look(self._state)
        elif self._state.desired is Desired.STOPPED:
            self.give_back_autostart()
        self._withdraw()

    def _protect(self) -> None:
        self._look_at_machines()
        self._take_autostart()
        if not self.worker.adopt_ring(self._state):
            self._begin_epoch()
        amended = self._amend()
        if self.definition.refresh(self._state, force=amended):
            self.shipper.new_definition()
        if self.worker.ensure_tap():
            self._say("the tap was started")
        self._attendance.note_power(self._seen.machines, reading=self._passes.running)
        self._attendance.attach(self._seen.machines, self._attaching)
        self.shipper.ensure(self._state)
        self._order_and_passes()

    def _amend(self) -> bool:
        """Take up disks that were resized, and on order those that were added or taken out; whether there were any."""
        if self._take_up:
            self._look_at_machines(anew=True)
            check_machines(self._host, self._state.spec.machines)
        amended = taken_up(self._state, self._seen.machines, every=self._take_up)
        if amended is not None:
            self._end_pass()
            self.worker.amend_ring(amended)
            self.change(lambda now: now.with_disks_of(amended))
        self._take_up = False
        return amended is not None and self.worker.adopt_ring(self._state)

    def _look_at_machines(self, *, anew: bool = False) -> list[Machine]:
        """Raises HostUnreachable, or NotFound when a machine of the group is gone."""
        return self._seen.look(self._host, self._state.spec.machines, anew=anew)

    def _take_autostart(self) -> None:
        """Whether a guest starts at the host's boot is decided by the boot guard from now on."""
        with self._lock:
            if (state := guest_notes.noted(self._state, self._seen.machines)) is not self._state:
                self._keep(guests=state.guests)
        self._seen.machines = guest_notes.take(self._host, self._seen.machines)

    def give_back_autostart(self) -> None:
        """Libvirt starts the guests at the host's boot again. Raises HostUnreachable, HypervisorRefused."""
        with self._lock:
            if guest_notes.wanted(self._state):
                self._keep(guests=guest_notes.give_back(self._host, self._state).guests)

    def _begin_epoch(self) -> None:
        """No ring, or not ours: what was in it is lost. What had left before is known to be at the other side."""
        with self._lock:
            first = not self._state.epoch
            state = self._state.with_machines(self._seen.machines)
            epoch = self.worker.new_ring(state)
            disks = state.disks
            if not state.equal:
                disks = tuple(disk.after_epoch() for disk in disks)
            phase = self._state.phase if first else advance(state.spec.name, state.phase, Event.RING_LOST)
            self._state = state
            self._keep(epoch=epoch, disks=disks, phase=phase, sync="")
            self.shipper.configure(self._state)

    def _end_pass(self) -> None:
        self.shipper.cancel_sync()  # before its exports go: it would try to reach them again
        self._passes.end()

    # -- order and passes -------------------------------------------------------------------------------------------

    def _order_and_passes(self) -> None:
        report = self.shipper.report()
        if report is None:
            self._settle("the shipper has not reported yet")
            return
        if report.superseded:
            self.superseded(report.reason)
            return
        if self._passes.running or report.sync_active:
            self._follow_pass(report)
            return
        if self.survey.running:
            self.survey.ended({})
        self._attendance.note_held(self.shipper.newest_of(self._state.epoch), reading=self._passes.running)
        wanted = pass_wanted(report.wants, report.holds, self._state, dropping=self.worker.dropping())
        if wanted.mode:
            self._begin_pass(wanted)
        elif report.wants not in ("nothing", "dirty"):
            self._settle(report.reason or "the other site was not reached yet")
        else:
            if self.survey.wanted:
                self.survey.begin(self._passes, self.shipper, self._state, self._seen.machines)
            self._prove(report.reason)

    def _begin_pass(self, wanted: Wanted) -> None:
        if not self._state.sync:
            if wanted.mode in ("initial", "full"):
                self._attendance.miss(wanted.missed)  # already known, but where the other side has lost what it had
            self._keep(sync=uuid.uuid4().hex)
        self._seen.stamps = stamps_of_images(self._state, self._seen.machines)
        exports = self._passes.begin(wanted.mode, wanted.numbers, self._state, self._seen.machines, wanted.changed)
        try:
            self.shipper.start_sync(wanted.mode, exports, self._state.sync, wanted.equal)
        except DrctlError:
            self._passes.end()
            raise
        self._settle(f"the reader goes over {len(wanted.numbers)} disk(s)" if wanted.numbers else "")

    def _follow_pass(self, report: Report) -> None:
        if report.sync_active:
            self.shipper.end_strange_sync(ours=self._passes.running)
            self._settle(report.reason)
            return
        mode, numbers = self._passes.mode, self._passes.end()
        if self.survey.running:
            self.survey.ended(self.shipper.status)
        whole = report.sync_done and report.sync_id == self._state.sync  # not of another than for what is missing now
        if whole and mode in ("initial", "full", "clean"):
            self._passes.tracking.forget(self._state, self._seen.machines)
            with self._lock:
                self._keep(equal=False, disks=self._state.after_pass(numbers))
            now, before = stamps_of_images(self._state, self._seen.machines), self._seen.stamps
            off = [number for number in numbers if number in now and number in before]
            self._attendance.note_left({n: now[n] if now[n] == before[n] else None for n in off})

    def _prove(self, reason: str) -> None:
        if self.worker.dropping():
            self._settle("the ring was full; dropped blocks are read again")
        elif not self.worker.ordered():
            self._settle(self.tapping.prove(self._state, self._seen.machines))
        elif why := self._seen.unattested(self.attest):
            self._leave_live()
            self._say(why)
        else:
            self._settle(reason)
            self._arrive()

    def _arrive(self) -> None:
        if self._state.phase in (Phase.SYNCING, Phase.CATCHING_UP):
            self._keep(phase=advance(self._state.spec.name, self._state.phase, Event.SYNCED), reason="")

    def _settle(self, reason: str) -> None:
        """Write down why no checkpoint can be made now; leave `live` when order is gone."""
        if not self.worker.ordered():
            self._leave_live()
        self._say(reason)

    def _looked_in_vain(self, reason: str) -> None:
        """A look broke off. Without a tap nothing is live, whatever the last whole look has found."""
        if not self.worker.tap_runs():
            self._leave_live()
        self._say(reason)

    def _leave_live(self) -> None:
        if self._state.phase is Phase.LIVE:
            self._keep(phase=advance(self._state.spec.name, Phase.LIVE, Event.ORDER_LOST))

    # -- leaving ----------------------------------------------------------------------------------------------------

    def _withdraw(self) -> None:
        """Detach everything softly, then end shipper and tap. Nothing to do when all is gone."""
        if not self._state.epoch:
            return
        self._look_at_machines()
        self._passes.end()
        if self.worker.adopt_ring(self._state):
            self.worker.ensure_tap()
            if left := self.tapping.detach(self._state, self._seen.machines, self._attaching.place):
                self._say("; ".join(left))
                return
        self.worker.remove()
        with self._lock:
            disks = tuple(disk.after_epoch() for disk in self._state.disks)
            self._keep(epoch="", disks=disks)

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _keep(self, **changes: Any) -> None:
        with self._lock:
            self._state = msgspec.structs.replace(self._state, **changes)
            self._files.save(self._state)

    def _say(self, reason: str) -> None:
        if reason != self._state.reason and self._state.phase is not Phase.FAILED_OVER:
            if reason:
                log.info("%s: %s", self._state.spec.name, reason)
            self._keep(reason=reason)
