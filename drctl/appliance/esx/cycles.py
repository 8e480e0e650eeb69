"""The cycles of one group: carried out, ended, and let go when a datastore fills up. What is told of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from drctl.appliance.esx.guests import STATE_SECONDS, EsxGuests
from drctl.appliance.esx.record import CycleFile
from drctl.appliance.esx.sink import StreamSink
from drctl.errors import OutOfSpace, StepFailed
from drctl.hypervisor.esx import cycle, guard
from drctl.hypervisor.esx.cycle import DiskKey
from drctl.hypervisor.esx.frozen import FrozenDisk
from drctl.hypervisor.esx.source import Parts, Sink, Source
from drctl.hypervisor.esx.stun import Stuns
from drctl.model.extent import Extent

log = logging.getLogger(__name__)

#: How often the datastores are looked at while snapshots of ours are there.
SPACE_SECONDS = 60.0
#: A machine may stand still for so long, for one snapshot; beyond it cycles are less often, by at most that factor.
STUN_SECONDS, SLOWEST = 5.0, 16
#: Remarks that are kept for the status.
REMARKS = 20


@dataclass(slots=True)
class CycleNews:
    """What is told of the newest cycle. `seconds` is how long it took, `shipped` its bytes of grains; `stun` how long
    (seconds) a machine stood still for it at most, where its log tells, and `slower` how many intervals are between
    cycles for that."""

    running: bool = False
    began: float = 0.0
    seconds: float | None = None
    shipped: int = 0
    stun: float | None = None
    slower: int = 1
    remarks: list[str] = field(default_factory=list)


class _Nowhere:
    """The sink of a source that only removes snapshots."""

    def begin(self, number: int, identity: str) -> None:
        raise AssertionError(number)

    def whole(self, disks: Mapping[DiskKey, FrozenDisk]) -> None:
        raise AssertionError(disks)

    def write(self, disk: DiskKey, offset: int, data: bytes | memoryview) -> None:
        raise AssertionError(disk)

    def zero(self, disk: DiskKey, extent: Extent) -> None:
        raise AssertionError(disk)

    def commit(self, number: int, taken: float) -> None:
        raise AssertionError(number)


class Cycles:
    """One thread uses it, but `news` may be read by any. `wanted` are paths of .vmx."""

    def __init__(self, group: str, guests: EsxGuests, record: CycleFile) -> None:
        self._group = group
        self._guests = guests
        self.record = record
        self.news = CycleNews()
        self._stuns = Stuns()
        self._space_due = 0.0

    def run(self, sink: StreamSink, wanted: Sequence[str]) -> None:
        """One cycle, or the rest of one that was broken off. Raises what it failed with: the next goes on from there.

        Raises OutOfSpace when a datastore is nearly full; then no snapshot of ours is left."""
        self.news = CycleNews(running=True, began=time.time(), slower=self.news.slower, remarks=self.news.remarks)
        source, began = self._source(sink), time.monotonic()
        try:
            source.run(wanted)
            self._note_stuns(source, wanted)
        except StepFailed:
            if sink.lost:
                self.record.save(cycle.distrusted(self.record.load()))
            raise
        except OutOfSpace:
            self._let_go()
            raise
        finally:
            for remark in source.remarks:
                log.info("%s: %s", self._group, remark)
            self.news.seconds, self.news.shipped = time.monotonic() - began, sink.sent_bytes
            self.news.remarks = [*self.news.remarks, *source.remarks][-REMARKS:]
            self.news.running = False

    def _note_stuns(self, source: Source, wanted: Sequence[str]) -> None:
        """Machines that stood still for too long are left more in peace, until they do no more."""
        machines = [one for one in (source.inventory.machines if source.inventory else ()) if one.vmx in wanted]
        found = self._stuns.look(self._guests.host.session, machines)
        if not found:
            return
        name, self.news.stun = max(found.items(), key=lambda pair: pair[1])
        if self.news.stun > STUN_SECONDS:
            self.news.slower = min(2 * self.news.slower, SLOWEST)
            source.remarks.append(
                f"{name} stood still for {self.news.stun:.1f} s: cycles are {self.news.slower} intervals apart"
            )
        else:
            self.news.slower = max(1, self.news.slower // 2)

    def is_underway(self) -> bool:
        """Whether a cycle was begun and is not at the recovery site yet."""
        return self.record.load().pending is not None

    def stop(self) -> None:
        """No snapshot of the group's is left on the host."""
        self._source(_Nowhere()).stop()

    def pause(self) -> None:
        """The newest snapshot that is at the recovery site stays: the resume reads what was written since."""
        self._source(_Nowhere()).abandon()

    def watch_space(self, wanted: Sequence[str]) -> None:
        """Redo logs of snapshots that stay grow. Raises OutOfSpace when there is no room left for that; but for a cycle
        that is under way, and ends by it, they are gone then."""
        now = time.monotonic()
        if now < self._space_due:
            return
        self._space_due = now + SPACE_SECONDS
        state = self.record.load()
        if state.baseline is None and state.pending is None:
            return
        try:
            for store in guard.stores_of(self._guests.inventory(STATE_SECONDS), wanted):
                guard.demand_space(store)
        except OutOfSpace:
            if not self.news.running:
                self._let_go()
            raise

    def _let_go(self) -> None:
        """The machines must not stop for our snapshots. The next cycle compares all."""
        log.error("%s: snapshots of ours are removed, so that the datastore does not fill up", self._group)
        self.stop()

    def _source(self, sink: Sink) -> Source:
        host = self._guests
        return Source(Parts(host.host, host.snapshots, host.disks, guard.demand_fit), self.record, sink)
