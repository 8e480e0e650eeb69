"""From the ring to the spill, when the link can't carry what the guests write; and back into the stream from there.

The tap knows nothing of it: what is in the spill counts as released, so the ring has room again. The stream's records
are those of the spill and then those of the ring, in one sequence without a gap; the receiver can't tell them apart.
The spill has its own thread, so a slow disk holds up neither the link nor anything that a guest waits for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Any

from drctl.errors import DrctlError, IntegrityError, OutOfSpace
from drctl.replication import framing
from drctl.replication.framing import Stamp
from drctl.replication.mark_notes import MarkNotes, Note, Restored, restore
from drctl.replication.progress import Needs, Progress
from drctl.replication.ring_port import RingPort
from drctl.replication.shipper_config import ShipperConfig
from drctl.store.ring_reader import Batch, Descriptors
from drctl.store.spill import CHUNK, KEY_BYTES, Chunk, Spill, SpillIdentity
from drctl.wire.frame import Parts

#: The ring's fill at which records begin to move, and down to which they do. The tap drops at 1, and returns at 0.5.
ABOVE, DOWN_TO = 0.7, 0.4
#: How often the ring is looked at (seconds) while it is nearly empty, and above that fill.
LOOK, CLOSE_LOOK = 0.1, 0.02
NEARLY_EMPTY = 0.3
#: Records of one chunk at most: they have a table entry each.
RECORDS = 4096
#: What frames need beside a chunk's payload, at most.
OVERHEAD = CHUNK // 4
#: After the disk refused it is tried again (seconds).
AGAIN = 10.0
#: A mark's number that is above all.
_NO_MARK = 1 << 62

log = logging.getLogger(__name__)


class SpillState(StrEnum):
    """OFF: none is configured. EMPTY: all is in the ring. HOLDING: it has records. FULL: it takes no more for now.
    FAILED: its disk refuses; what does not fit the ring goes into the tap's dirty map."""

    OFF = "off"
    EMPTY = "empty"
    HOLDING = "holding"
    FULL = "full"
    FAILED = "failed"


class Overflow:
    """One ring's spill. Owned by the event loop, but for `frames`, which worker threads call."""

    def __init__(self, config: ShipperConfig, ring: RingPort) -> None:
        """Finds what an earlier process has left. Raises OSError."""
        self._ring = ring
        self._stamp = Stamp(ring.generation, ring.epoch)
        self._thread = ThreadPoolExecutor(1, "spill")
        self._spill = _open(config, ring)
        self._notes = MarkNotes()
        self._moving = self._full = self._writing = False
        self._again = 0.0
        self._error = ""
        self._damaged = 0
        #: First records of batches that somebody reads in the ring's own memory: their room may not be used again.
        self._lent: list[int] = []
        #: Told of the records that move (verification.py).
        self.watch: Callable[[Descriptors], None] = lambda _: None
        self._restored = self._adopt()
        #: The record before the first that is here.
        self.start = self._spill.floor if self._spill is not None and not self._spill.empty else ring.released
        self._progress = Progress(ring.epoch, self.start, 0)

    def attach(self, progress: Progress) -> None:
        """This is the stream's core; it begins at `start`, with what an earlier process knew of its marks."""
        self._progress = progress
        if self._restored.whole:
            progress.restored(self._restored.marks, self._restored.last_number)

    def _adopt(self) -> Restored:
        """Let the spill fit the ring. What neither has is lost; that the receiver lacks it its position will show."""
        spill, ring = self._spill, self._ring
        if spill is None:
            return Restored()
        if spill.upto > ring.published:
            log.warning("the spill holds more than was ever written; removed")
            spill.remove()
            return Restored()
        if not spill.empty and spill.upto < ring.released:
            log.warning("records up to %d are neither in the spill nor in the ring", ring.released)
            spill.release(spill.upto, 0)
        if not spill.empty:
            log.info("the spill holds records %d to %d", spill.floor + 1, spill.upto)
        return restore(spill.notes)

    # what others ask

    @property
    def waiting(self) -> int:
        """Bytes in the spill that the receiver has not acknowledged."""
        return self._spill.waiting if self._spill is not None else 0

    def told(self) -> dict[str, Any]:
        """For the status."""
        spill = self._spill
        return {
            "size": spill.limit if spill is not None else 0,
            "used": spill.used if spill is not None else 0,
            "waiting": self.waiting,
            "state": self._state().value,
            "error": self._error,
        }

    def _state(self) -> SpillState:
        spill = self._spill
        if spill is None or (not spill.limit and spill.empty):
            return SpillState.OFF
        if self._error:
            return SpillState.FAILED
        if self._full:
            return SpillState.FULL
        return SpillState.EMPTY if spill.empty else SpillState.HOLDING

    # into the stream

    def chunk_after(self, sequence: int) -> Chunk | None:
        """Where the record after `sequence` is; None: in the ring."""
        return self._spill.chunk_after(sequence) if self._spill is not None else None

    def frames(self, chunk: Chunk, after: int, upto: int) -> list[Parts]:
        """The frames of a chunk's records after `after` and up to `upto`. In any thread. Raises IntegrityError; then
        `lost` is to be asked once the connection is gone."""
        assert self._spill is not None
        try:
            data = memoryview(self._spill.read(chunk))
            return framing.frames_between(data, after, upto, f"the spill's records {chunk.first} to {chunk.last}")
        except IntegrityError:
            self._damaged = max(self._damaged, chunk.last)
            raise

    def lost(self) -> int:
        """Up to which record the spill can't be read, and was given up; 0: all is well. The next connection shows the
        receiver's lack of them, and a pass is ordered."""
        upto, self._damaged = self._damaged, 0
        if upto:
            log.error("records up to %d can't be read in the spill: the disks have to be compared", upto)
            self._progress.lose(upto)
            self.settle()
        return upto

    def lend(self, batch: Batch, taken: asyncio.Future[Any]) -> None:
        """A batch is read in the ring's memory until `taken` is done."""
        self._lent.append(batch.first)
        taken.add_done_callback(lambda _: self._lent.remove(batch.first))

    def settle(self) -> None:
        """Give back the room of what the receiver has, or the spill."""
        progress, spill, ring = self._progress, self._spill, self._ring
        upto = progress.released
        if spill is not None:
            pending = progress.marks.pending
            oldest = 0 if not progress.connected else pending[0].number if pending else _NO_MARK
            spill.release(upto, oldest, writing=self._writing)
            upto = max(upto, spill.upto)
            if not spill.used:
                self._notes.forget()
        ring.release(min(upto, ring.published, min(self._lent, default=upto + 1) - 1))

    # out of the ring

    async def run(self) -> None:
        """For ever: move what the ring has too much of, and note the marks that wait."""
        while True:
            await asyncio.sleep(LOOK if self._ring.fill() < NEARLY_EMPTY else CLOSE_LOOK)
            self.settle()
            if self._spill is None or not self._spill.limit or time.monotonic() < self._again:
                continue
            try:
                await self._note(self._spill)
                while self._wanted(self._spill):
                    await self._move(self._spill)
                self._error = ""
            except (DrctlError, OSError) as exc:
                self._refused(exc)

    def _refused(self, exc: DrctlError | OSError) -> None:
        text = exc.message if isinstance(exc, DrctlError) else str(exc)
        if text != self._error:
            log.warning("no spilling for now: %s", text)
        self._error, self._again = text, time.monotonic() + AGAIN

    def _wanted(self, spill: Spill) -> bool:
        """Whether the next records should move now."""
        fill = self._ring.fill()
        self._moving = fill > (DOWN_TO if self._moving else ABOVE)
        self._full = self._moving and not spill.fits(CHUNK + OVERHEAD)
        return self._moving and not self._full and self._after(spill) < self._ring.published

    def _after(self, spill: Spill) -> int:
        return max(spill.upto, self._progress.released)

    async def _move(self, spill: Spill) -> None:
        """One chunk, of the oldest records that are not in the spill."""
        batch = self._ring.batch(self._after(spill), self._ring.published, CHUNK, RECORDS)
        if batch is None:
            return
        self.watch(batch.descriptors)
        chunk = await self._at_work(batch, lambda: self._write(spill, batch))
        if chunk.last > self._progress.released:
            spill.added(chunk)
        self.settle()

    def _write(self, spill: Spill, batch: Batch) -> Chunk:
        batch.verify()
        return spill.write(framing.frames_of_batch(self._stamp, batch), batch.first, batch.last)

    async def _at_work(self, batch: Batch | None, work: Callable[[], Any]) -> Any:
        """What `work` returns in the spill's thread. The batch that it reads stays in the ring as long as it runs."""
        self._writing = True
        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, work)
            if batch is not None:
                self.lend(batch, running)
            return await running
        finally:
            self._writing = False

    async def _note(self, spill: Spill) -> None:
        """Keep what a successor must know of the marks that wait for the link."""
        progress = self._progress
        if progress.needs not in (Needs.NOTHING, Needs.UNKNOWN):
            await self._void(spill)
        elif progress.needs is Needs.NOTHING and (not progress.connected or not spill.empty):
            await self._write_notes(spill, self._notes.due(progress.marks))

    async def _void(self, spill: Spill) -> None:
        """The other side lacks something: marks of before are no points in time any more. Where that can't be written
        down, nothing of before may be found by a successor."""
        try:
            await self._write_notes(spill, self._notes.void())
        except (OutOfSpace, OSError):
            self._damaged = max(self._damaged, spill.upto)
            spill.remove()
            raise

    async def _write_notes(self, spill: Spill, notes: list[Note]) -> None:
        def write() -> None:
            for note in notes:
                spill.note(int(note["number"]), note)

        if notes:
            await self._at_work(None, write)


def _open(config: ShipperConfig, ring: RingPort) -> Spill | None:
    if not config.spill:
        return None
    key = _key(Path(config.spill_key))
    identity = SpillIdentity(ring.generation, ring.epoch, key)
    return Spill(Path(config.spill), identity, config.spill_size, ring.beat)


def _key(path: Path) -> bytes:
    """The key beside the ring; a new one where there is none, and then an older spill can't be read any more."""
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        key = b""
    if len(key) != KEY_BYTES:
        key = secrets.token_bytes(KEY_BYTES)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(key)
    return key
