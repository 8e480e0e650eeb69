"""The sync job of a shipper: the pass that the supervisor ordered, then rounds over dropped blocks until none is left.

The maps are cleared only after their blocks are durable at the other side, so a killed shipper loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from uuid import uuid4

from drctl.errors import DrctlError, WrongPhase
from drctl.model.extent import Extent
from drctl.replication.disk_connection import Export
from drctl.replication.progress import Needs
from drctl.replication.reader import Extents, Reader
from drctl.replication.shipper_state import ShipperState
from drctl.replication.survey import Survey
from drctl.replication.sync_progress import Sync
from drctl.replication.verification import Order, Stream, Verification, WriteWatch

#: How often the maps and the tap's answer are looked at.
LOOK_EVERY = 0.05
#: A round that found nothing because the tap still drops is not repeated faster than this.
ROUND_PAUSE = 0.5

#: Modes of sync.start that send nothing (but for a repair).
SURVEY = "survey"
VERIFY = "verify"
_LOOKING = (SURVEY, VERIFY)
#: Longest that a connection may take to be made anew (seconds).
RECONNECT = 10.0
#: How often its findings are told.
SURVEY_EVERY = 0.5

log = logging.getLogger(__name__)


class SyncJob:
    """One order of the supervisor. Modes: `initial`, `full`, `dirty`, and `clean` (the disks are known to be equal);
    `survey` finds out what `full` would send, `verify` what is wrong (verification.py), and repairs it on order.

    A full pass may be about some disks only: when the receiver needs nothing, or when the others are `equal`, that is
    known to be the same there."""

    def __init__(self, state: ShipperState, reader: Reader) -> None:
        self._state = state
        self._reader = reader
        self._task: asyncio.Task[None] | None = None

    def verify(self, exports: dict[int, Export], order: Order, *, repair: bool) -> None:
        """Begin to verify in the background. Raises WrongPhase."""
        self._demand_free(exports)
        self._state.verdict = None
        self._begin(self._run(VERIFY, exports, "", self._verify(exports, order, repair=repair)))

    def start(self, mode: str, exports: dict[int, Export], identity: str = "", equal: Collection[int] = ()) -> None:
        """Begin in the background, or go on with the pass of that identity where the receiver has it durable.

        Raises WrongPhase while one runs or the receiver's needs are not known."""
        self._demand_free(exports)
        progress, sizes = self._state.progress, self._state.ring.disks
        told = {*exports, *(equal if progress.needs is Needs.FULL else ())}
        if progress.needs is not Needs.NOTHING and mode not in ("clean", *_LOOKING) and told != set(sizes):
            raise WrongPhase(f"the receiver needs all disks, {sorted(sizes)}, not {sorted(told)} alone")
        looking = self._survey(exports) if mode == SURVEY else None
        self._begin(self._run(mode, exports, identity or uuid4().hex, looking))

    def _demand_free(self, exports: dict[int, Export]) -> None:
        if self._task is not None and not self._task.done():
            raise WrongPhase("a sync is running already", hint="see the shipper's status")
        if self._state.progress.needs is Needs.UNKNOWN:
            raise WrongPhase("the receiver was not reached yet, so it is not known what it needs")
        if unknown := sorted(set(exports) - set(self._state.ring.disks)):
            raise WrongPhase(f"the ring has no disks {unknown}")

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        self._state.sync_job = "running"
        self._state.sync_error = ""
        self._task = asyncio.get_running_loop().create_task(work)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(
        self, mode: str, exports: dict[int, Export], identity: str, looking: Coroutine[None, None, None] | None = None
    ) -> None:
        state = self._state
        try:
            if looking is not None:
                await self._known()
                await looking
                state.sync_job = "surveyed"
                return
            if mode != Needs.DIRTY:
                await self._main(mode, exports, identity)
            if set(exports) == set(state.ring.disks):
                await self._drop_rounds(exports)
            state.sync_job = "done"
        except asyncio.CancelledError:
            state.progress.cancel_sync()
            state.sync_job = "stopped"
        except DrctlError as exc:
            log.warning("sync: %s", exc)
            state.progress.cancel_sync()
            state.sync_job, state.sync_error = "failed", str(exc)
        finally:
            if state.sync_job == "running":  # a bug, told by asyncio in the log; nobody may wait for it for ever
                state.progress.cancel_sync()
                state.sync_job, state.sync_error = "failed", "it ended unexpectedly; see the shipper's log"
            state.changed.set()
            state.wake.set()

    async def _known(self) -> None:
        """A connection that was made before the first sync knows of nothing to compare with: make another."""
        exchange = self._reader.peer.exchange
        if self._state.progress.needs is not Needs.NOTHING or not exchange.connected or exchange.key:
            return
        exchange.hang_up()
        end = time.monotonic() + RECONNECT
        while not exchange.key and time.monotonic() < end:  # noqa: ASYNC110 - another task makes the connection
            await asyncio.sleep(LOOK_EVERY)

    async def _survey(self, exports: dict[int, Export]) -> None:
        """Find out what a pass would send; marks go on."""
        survey = Survey(self._reader.peer.exchange, self._reader.pace, self._reader.hashers)
        sizes = {number: size for number, size in self._state.ring.disks.items() if number in exports}

        def tell() -> None:
            self._state.survey = survey.findings

        await self._told(survey.run(exports, sizes), tell)

    async def _told(self, work: Coroutine[None, None, object], tell: Callable[[], None]) -> None:
        """Do it, and tell of it now and then."""
        running = asyncio.ensure_future(work)
        try:
            while not running.done():
                await asyncio.wait([running], timeout=SURVEY_EVERY)
                tell()
                self._state.changed.set()
            await running
        finally:
            running.cancel()

    async def _verify(self, exports: dict[int, Export], order: Order, *, repair: bool) -> None:
        """Find out what is wrong at the other side; marks go on, but for the moment of a repair."""
        state, progress, ring = self._state, self._state.progress, self._state.ring

        def watch(wanted: WriteWatch | None) -> None:
            state.watch = wanted
            state.overflow.watch = wanted.note if wanted is not None else lambda _: None

        def tell() -> None:
            state.verdict = verification.verdict

        def unfit() -> str:
            return progress.no_mark_because() if progress.connected else "the link broke"

        stream = Stream(state.exchange, ring.look, lambda: progress.cursor, lambda: progress.released, unfit, watch)
        verification = Verification(stream, order, self._reader.hashers)
        sizes = {number: size for number, size in ring.disks.items() if number in exports}
        await self._told(verification.run(exports, sizes), tell)
        wrong = verification.verdict.wrong
        if not wrong or not repair:
            return

        def extents(disk: int) -> Iterator[Extent]:
            return (Extent(offset, length) for number, offset, length in sorted(wrong) if number == disk)

        touched = {number: sizes[number] for number, _, _ in wrong}
        await self._pass(Sync(uuid4().hex, "dirty", touched, sum(each[2] for each in wrong)), exports, extents)
        await self._told(verification.recheck(exports, sizes), tell)

    async def _main(self, mode: str, exports: dict[int, Export], identity: str) -> None:
        needs = self._state.progress.needs
        if mode == "clean":
            await self._pass(Sync(identity, "full", {}), exports, None)
        elif needs is not Needs.NOTHING or mode == Needs.FULL:
            # An initial sync can only be what the receiver asked for; else it is a full pass through the journal.
            real = "initial" if needs is Needs.INITIAL else "full"
            sizes = {number: size for number, size in self._state.ring.disks.items() if number in exports}
            await self._pass(Sync(identity, real, sizes, _total(sizes, exports)), exports, None)

    async def _pass(self, wanted: Sync, exports: dict[int, Export], extents: Extents | None) -> None:
        self._state.progress.look(self._state.ring.look())
        sync = self._state.progress.start_sync(wanted)
        self._state.wake.set()
        self._state.changed.set()
        await self._reader.run(sync, exports, extents)

    # dropped blocks

    async def _drop_rounds(self, exports: dict[int, Export]) -> None:
        """Until both maps are empty and nothing is dropped any more."""
        state = self._state
        while True:
            await self._tap_answered()
            await self._read_inactive(exports)
            state.progress.look(state.ring.look())
            if not state.progress.dirty_outstanding:
                return
            dropped = state.ring.look().dropped
            state.ring.request_drain()
            await self._tap_answered()
            await self._read_inactive(exports)
            state.progress.drained(dropped)
            state.progress.look(state.ring.look())
            if state.progress.dirty_outstanding:
                await asyncio.sleep(ROUND_PAUSE)

    async def _tap_answered(self) -> None:
        while self._state.ring.drain_pending:  # noqa: ASYNC110 - another process answers, by a word in memory
            await asyncio.sleep(LOOK_EVERY)

    async def _read_inactive(self, exports: dict[int, Export]) -> None:
        """Read what the maps that are ours note, make it durable, clear them."""
        ring = self._state.ring
        sizes = {disk: size for disk, size in ring.disks.items() if any(True for _ in ring.dirty_extents(disk))}
        if not sizes:
            return
        if missing := sorted(set(sizes) - set(exports)):
            raise WrongPhase(f"disks {missing} have dropped blocks but no export to read them from")
        total = sum(extent.length for disk in sizes for extent in ring.dirty_extents(disk))
        await self._pass(Sync(uuid4().hex, "dirty", sizes, total), exports, ring.dirty_extents)
        ring.clear_inactive()


def _total(sizes: Mapping[int, int], exports: Mapping[int, Export]) -> int:
    """Bytes that a pass goes over: of some disks parts only."""
    ranges = {number: exports[number].ranges() for number in sizes}
    return sum(
        sizes[number] if parts is None else sum(part.length for part in parts) for number, parts in ranges.items()
    )
