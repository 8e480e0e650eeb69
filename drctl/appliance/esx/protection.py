"""The protection of one group on an ESX host: a snapshot cycle each interval, one checkpoint per cycle.

Level-triggered as that of libvirt's groups: what is recorded, what is there and what is wanted are compared at each
look, and what is missing is done. A lost connection, a killed appliance and a user who removed our snapshots are one
case."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.esx.cycles import Cycles
from drctl.appliance.esx.definition import EsxDefinition
from drctl.appliance.esx.guests import EsxGuests
from drctl.appliance.esx.orders import Orders, answer, wait_for
from drctl.appliance.esx.record import CycleFile
from drctl.appliance.esx.reign import ReignAsker
from drctl.appliance.esx.sink import Stream, StreamSink
from drctl.appliance.process import Processes
from drctl.appliance.source.disk_changes import taken_up
from drctl.appliance.source.group_state import Desired, GroupFiles, GroupState
from drctl.appliance.source.shipper_link import ShipperLink
from drctl.appliance.source.strays import Strays
from drctl.appliance.source.tappable import check_machines
from drctl.appliance.source.worker import Worker
from drctl.errors import DrctlError, Interrupted, WrongPhase
from drctl.hypervisor.esx import domain
from drctl.hypervisor.esx.cycle import DiskKey
from drctl.hypervisor.esx.inventory import EsxMachine
from drctl.model.machine import Machine
from drctl.model.phase import Event, Phase, advance

log = logging.getLogger(__name__)

#: Between two looks: at the shipper's report, which costs the ESX host nothing.
LOOK_SECONDS = 0.25
#: After a cycle that failed, doubled each time, never longer than the interval.
AGAIN_SECONDS = 5.0


class EsxProtection:
    """One thread per group. Public methods may be called from any thread."""

    def __init__(self, home: Home, files: GroupFiles, group: str, guests: EsxGuests, processes: Processes) -> None:
        self._home = home
        self._files = files
        self._state = files.load(group)
        self._guests = guests
        self.worker = Worker(home, group, processes)
        self.shipper = ShipperLink(home, self._state, self.worker, clock=False)
        self._reign = ReignAsker(home)
        self.strays = Strays(guests, home.store)
        self.cycles = Cycles(group, guests, CycleFile(home.groups, group))
        self._definition = EsxDefinition(home, group, guests)
        self._sink: StreamSink | None = None
        self._seen: list[EsxMachine] = []
        self._orders = Orders()
        self._due = 0.0
        self._again = AGAIN_SECONDS
        self._take_up = False
        #: Nothing of ours is left on the host, or what is wanted to stay.
        self._left = False
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
        """As they were last looked at."""
        return [domain.machine(one) for one in self._seen]

    @property
    def left(self) -> bool:
        """Whether all is as a stopped or paused group wants it."""
        return self._left and not self._state.epoch

    def run(self) -> None:
        self._thread = threading.Thread(target=self._loop, name=f"protect-{self._state.spec.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking. The shipper goes on; a cycle that is under way is gone on with by whoever comes next."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(10)

    def wake(self) -> None:
        self._wake.set()

    def want(self, desired: Desired) -> None:
        """Raises WrongPhase, PreconditionFailed, NotFound; then nothing has changed."""
        if desired is Desired.PROTECTED:
            check_machines(self._guests, self._state.spec.machines)
        with self._lock:
            name, phase = self._state.spec.name, self._state.phase
            if desired is Desired.PROTECTED:
                event = Event.RESUME if phase in (Phase.PAUSED, Phase.BROKEN) else Event.START
            else:
                event = Event.PAUSE if desired is Desired.PAUSED else Event.STOP
            if desired is not Desired.PROTECTED or self._state.desired is not desired:
                self._keep(phase=advance(name, phase, event), desired=desired, reason="")
            self._due, self._left = 0.0, False
        self.wake()

    def take_up(self) -> None:
        """Let the group be about the disks that its machines have now."""
        self._take_up = True
        self.wake()

    def changed_spec(self) -> None:
        with self._lock:
            self._state = msgspec.structs.replace(self._state, spec=self._files.load(self._state.spec.name).spec)
            self._due = min(self._due, time.monotonic() + self._state.spec.checkpoint_interval)
        self.wake()

    def change(self, change: Callable[[GroupState], GroupState]) -> None:
        """Let a rollback make another state of it; durable when this returns."""
        with self._lock:
            self._state = change(self._state)
            self._keep()
            self._due, self._left = 0.0, False
        self.wake()

    def attest(self) -> str:
        """Whether what was marked just now is a point in time: "" or why not."""
        if self._state.desired is not Desired.PROTECTED:
            return f"the group is {self._state.phase}"
        return self._sink.attest() if self._sink is not None else "no snapshot cycle has run yet"

    def checkpoint(self, tags: Sequence[str], told: Callable[[], None]) -> dict[str, Any]:
        """A cycle now, and the checkpoint that it becomes. Raises what the cycle failed with."""
        order = self._orders.give(tags)
        self.wake()
        return wait_for(order, told, lambda: self._state.reason)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self._look()
            except Interrupted as exc:
                log.info("%s: %s", self._state.spec.name, exc.message)
            except DrctlError as exc:
                self._failed(exc)
            except Exception as exc:  # the supervisor's edge: one group's bug must not end the protection of others
                log.exception("%s: look failed", self._state.spec.name)
                self._say(f"unexpected {type(exc).__name__}: {exc}")
                self._wake.wait(AGAIN_SECONDS)
            self._wake.wait(LOOK_SECONDS)
        self._close_sink()

    def _look(self) -> None:
        if self._state.desired is Desired.PROTECTED:
            self._protect()
            return
        if self._state.phase is Phase.FAILED_OVER:
            self.strays.look(self._state)
        if not self.left:
            self._withdraw()
        elif self._state.desired is Desired.PAUSED:
            self._watch_space()

    def _protect(self) -> None:
        due = bool(self._orders) or time.monotonic() >= self._due
        if self._sink is None or self._take_up or (due and self._streams_changed()):
            self._begin_stream()
        self.shipper.ensure(self._state)
        report = self.shipper.report()
        if report is not None and report.superseded:
            self._superseded(report.reason)
        elif report is None or report.wants == "unknown":
            # No snapshot is taken for a link that is away; those that are there must not fill the datastore.
            self._say(report.reason if report else "the shipper has not reported yet")
            self._watch_space()
        elif reason := self._reign.superseded(self._state):
            self._superseded(reason)
        elif due:
            self._cycle()
        else:
            self._watch_space()

    def _superseded(self, reason: str) -> None:
        with self._lock:
            reason = f"superseded: {self._state.spec.recovery} says: {reason}"
            self._keep(phase=Phase.FAILED_OVER, reason=reason, desired=Desired.STOPPED)
            self._left = False
        log.error("%s: %s", self._state.spec.name, reason)

    def _watch_space(self) -> None:
        if not self._seen:
            self._look_at_machines()
        self.cycles.watch_space([one.vmx for one in self._seen])

    # -- the stream -------------------------------------------------------------------------------------------------

    def _look_at_machines(self) -> list[EsxMachine]:
        """The machines as they are. Raises NotFound, HostUnreachable."""
        self._guests.inventory(0.0)
        self._seen = [self._guests.find(name) for name in self._state.spec.machines]
        return self._seen

    def _streams_changed(self) -> bool:
        """Whether the ring, or where the machines lie, is not what the stream was begun for."""
        if not self.worker.adopt_ring(self._state) or self._sink is None:
            return True
        return self._numbers(self._look_at_machines()) != self._sink.disks

    def _begin_stream(self) -> None:
        """Go on with the ring that is there, or begin a new epoch, with the disks that are known or are taken up."""
        self._close_sink()
        machines = self._look_at_machines()
        every = self._take_up or not self._state.disks
        state = taken_up(self._state, self.machines, every=every) or self._state
        if not self.worker.adopt_ring(state):
            epoch, before = self.worker.new_ring(state), self._state
            phase = advance(state.spec.name, before.phase, Event.RING_LOST) if before.epoch else before.phase
            with self._lock:
                self._state = self._state.with_disks_of(state)
                self._keep(epoch=epoch, phase=phase, sync="")
            self.worker.adopt_ring(self._state)
        self._take_up = False
        self._definition.refresh(self._state)
        self.shipper.configure(self._state)
        names = {disk.number: disk.name for disk in self._state.disks}
        exports = self._home.run / "exports" / f"{self._state.spec.name}.sock"
        stream = Stream(self.worker, self.shipper, self._numbers(machines), names, exports)
        self._sink = StreamSink(stream, self.cycles.record, self._give_up)

    def _numbers(self, machines: Sequence[EsxMachine]) -> Mapping[DiskKey, int]:
        """The stream's disks by machine and device, of those that are there."""
        known = {(disk.machine, disk.target): disk.number for disk in self._state.disks}
        found = {}
        for machine in machines:
            for ours, theirs in zip(machine.disks, domain.machine(machine).disks, strict=True):
                if not theirs.refusal and (machine.name, theirs.target) in known:
                    found[machine.vmx, ours.disk.target] = known[machine.name, theirs.target]
        return found

    def _give_up(self) -> str:
        """Why the cycle that is under way is to be given up; it will be gone on with. Raises OutOfSpace."""
        if self._stopping:
            return "the appliance ends"
        if self._state.desired is not Desired.PROTECTED:
            return f"the group is {self._state.phase}"
        self._watch_space()
        return ""

    # -- cycles -----------------------------------------------------------------------------------------------------

    def _cycle(self) -> None:
        """One cycle, or the rest of one that was broken off; and those who ordered it are told."""
        assert self._sink is not None
        begun = time.monotonic()
        # None that was given after the cycle's snapshots were taken.
        orders = [] if self.cycles.is_underway() else self._orders.take()
        self._sink.tags = tuple(dict.fromkeys(tag for order in orders for tag in order.tags))
        try:
            if self._definition.refresh(self._state):
                self.shipper.new_definition()
            self.cycles.run(self._sink, [one.vmx for one in self._seen])
            self._succeeded(begun)
        except BaseException:
            self._orders.put_back(orders)  # whoever takes the error up tells them
            raise
        answer(orders, self._sink.checkpoint)

    def _succeeded(self, begun: float) -> None:
        assert self._sink is not None
        slower = self.cycles.news.slower
        self._due, self._again = begun + slower * self._state.spec.checkpoint_interval, AGAIN_SECONDS
        group = self._state.spec.name
        with self._lock:
            if self._state.phase in (Phase.SYNCING, Phase.CATCHING_UP):
                self._keep(phase=advance(group, self._state.phase, Event.SYNCED), reason="")
        added = ", ".join(f"{device} of {path}" for path, device in sorted(self._sink.unknown))
        if added:
            self._say(f"{added}: added and not protected; drctl replicate start {group} takes that up")
        else:
            self._say(f"a machine stood still for too long: cycles are {slower} intervals apart" if slower > 1 else "")

    def _failed(self, exc: DrctlError) -> None:
        """A look broke off: it is done again in a while, and who waits for a checkpoint is told."""
        self._say(exc.message)
        if self._state.desired is Desired.PROTECTED:
            self._put_off()
        else:
            self._wake.wait(AGAIN_SECONDS)
        self._orders.refuse(exc)

    def _put_off(self) -> None:
        interval = self._state.spec.checkpoint_interval
        # A replica that is lost is made anew at once; but not over and over.
        at_once = self._sink is not None and self._sink.lost and self._again == AGAIN_SECONDS
        self._due = time.monotonic() + (0.0 if at_once else min(self._again, interval))
        self._again *= 2
        with self._lock:
            if self._state.phase is Phase.LIVE:
                self._keep(phase=advance(self._state.spec.name, Phase.LIVE, Event.ORDER_LOST))

    # -- leaving ----------------------------------------------------------------------------------------------------

    def _withdraw(self) -> None:
        """End the stream. Of a paused group the newest snapshot stays, so that the resume reads only what was written
        since; of any other none of ours does."""
        desired = self._state.desired
        self._orders.refuse(WrongPhase(f"{self._state.spec.name} is {self._state.phase}; no checkpoint is made"))
        self._close_sink()
        if self._state.epoch:
            self.worker.remove()
            self._keep(epoch="")
        if self.cycles.record.exists:
            if desired is Desired.PAUSED:
                self.cycles.pause()
            else:
                self.cycles.stop()
        self._left = self._state.desired is desired
        self._say("")

    def _close_sink(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None

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
