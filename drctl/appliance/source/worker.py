"""The worker of one group on this host: its ring, its tap, its shipper. Knows no hypervisor.

The tap outlives everything else: it is never ended while a mirror may write to it, but by the watchdog."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from drctl.appliance.config import Home
from drctl.appliance.process import Processes
from drctl.appliance.source.group_state import GroupState
from drctl.errors import IntegrityError, StepFailed
from drctl.model.identity import StreamIdentity
from drctl.replication.tap_handover import handover_path
from drctl.store.ring import Ring, exports_path, write_exports
from drctl.wire.ring import DESCRIPTOR_SIZE, DiskWord, Word

log = logging.getLogger(__name__)

#: A ring of small writes needs a descriptor for each 4 KiB; twice as many, so that 2 KiB writes fill it evenly too.
BYTES_PER_SLOT = 2048
#: A tap whose heartbeat is older is not believed (it beats at least every 100 ms).
FRESH_SECONDS = 1.0
#: A tap of another version that did not hand over is left alone for so long, and longer each time: it serves as well
#: as before, and on a busy machine the next try may do.
HANDOVER_SECONDS = 5.0
HANDOVER_LONGEST = 300.0
_PAGE = 4096
_TAP = "drctl.replication.tap"


class Worker:
    """Ring, tap and shipper of one group. Also the ring as `tapping.RingState` sees it."""

    def __init__(self, home: Home, group: str, processes: Processes) -> None:
        self._home = home
        self._group = group
        self._processes = processes
        self._ring: Ring | None = None
        self._handover_due = 0.0
        self._handover_pause = 0.0
        run = home.run
        self.ring_path = run / "rings" / f"{group}.ring"
        self.socket_path = run / "taps" / f"{group}.sock"
        self.bell_path = run / "taps" / f"{group}.bell"
        self.shipper_socket = run / "shippers" / f"{group}.sock"
        #: What the ring can't hold, on disk; and its key, which ends with the ring.
        self.spill_path = home.path / "spill" / group
        self.spill_key_path = run / "rings" / f"{group}.spill-key"
        self._tap_name = f"tap-{group}"
        self._sink_name = f"sink-{group}"
        self.shipper_name = f"shipper-{group}"

    # -- ring -------------------------------------------------------------------------------------------------------

    def adopt_ring(self, state: GroupState) -> bool:
        """Open the ring of this epoch if it is there and whole. False: there is none, a new epoch must begin."""
        if self._ring is not None and self._ring.epoch == state.epoch and self.ring_path.exists():
            return True
        self._close_ring()
        if not state.epoch or not self.ring_path.exists():
            return False
        try:
            ring = Ring.open(self.ring_path)
        except (IntegrityError, OSError) as exc:
            log.warning("%s: the ring can't be adopted: %s", self._group, exc)
            return False
        wanted = {disk.number: disk.size for disk in state.disks}
        if ring.epoch != state.epoch or ring.generation != state.generation or ring.disks != wanted:
            ring.close()
            return False
        self._ring = ring
        return True

    def new_ring(self, state: GroupState) -> str:
        """Begin a new epoch: a new ring in place of an older one. Returns the epoch. Raises OutOfSpace."""
        self._close_ring()
        self._processes.end(self.shipper_name)
        self._processes.end(self._tap_name)
        Ring.remove(self.ring_path)
        self._remove_spill()
        epoch = uuid.uuid4().hex
        identity = StreamIdentity(self._group, self._home.config.host, state.generation, epoch)
        disks = {disk.number: disk.size for disk in state.disks}
        capacity = max(state.spec.ring_size // _PAGE * _PAGE, _PAGE)
        self._ring = Ring.create(self.ring_path, identity, disks, capacity, max(capacity // BYTES_PER_SLOT, 64))
        write_exports(exports_path(self.ring_path), {disk.name: (disk.number, disk.size) for disk in state.disks})
        return epoch

    def amend_ring(self, state: GroupState) -> None:
        """Let the ring of this epoch be about the state's disks. The tap is restarted for it: mirrors come back by
        themselves, and order has to be proven again. Raises OutOfSpace, IntegrityError."""
        self._close_ring()
        self._processes.end(self.shipper_name)
        self._processes.end(self._tap_name)
        Ring.amend(self.ring_path, {disk.number: disk.size for disk in state.disks})
        write_exports(exports_path(self.ring_path), {disk.name: (disk.number, disk.size) for disk in state.disks})

    def _close_ring(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    @property
    def ring(self) -> Ring:
        if self._ring is None:
            raise StepFailed(f"{self._group} has no ring")
        return self._ring

    def order_stamp(self) -> int:
        return self.ring.words[Word.ORDER_STAMP]

    def published(self) -> int:
        return self.ring.words[Word.PUBLISHED]

    def connection(self, number: int) -> int:
        return self.ring.disk_word(number, DiskWord.CONNECTION)

    def beating(self) -> bool:
        age = time.monotonic_ns() - self.ring.words[Word.HEARTBEAT]
        return age < FRESH_SECONDS * 1e9

    def tap_runs(self) -> bool:
        return self._processes.find(self._tap_name) is not None

    def dropping(self) -> bool:
        return bool(self.ring.words[Word.DROPPING])

    def ordered(self) -> bool:
        words = self.ring.words
        return words[Word.ORDERED_STAMP] == words[Word.ORDER_STAMP]

    def losses(self) -> int:
        return self.ring.words[Word.LOSSES]

    def lossless(self) -> bool:
        """Since order was proven nothing was lost but connections that said goodbye (departure.Ends)."""
        words = self.ring.words
        return words[Word.LOSSES] == words[Word.ORDERED_LOSSES]

    def proven_once(self) -> bool:
        """Order was proven in this epoch (tapping.RingState)."""
        return self.ring.words[Word.ORDERED_STAMP] != 0

    def ended(self, number: int) -> int:
        return self.ring.disk_word(number, DiskWord.ENDED)

    def written(self, number: int) -> int:
        return self.ring.disk_word(number, DiskWord.WRITTEN)

    def prove(self, stamp: int, sequence: int, losses: int) -> None:
        # The stamp last: whoever sees it must see what belongs to it.
        self.ring.words[Word.ORDERED_LOSSES] = losses
        self.ring.words[Word.ORDERED_SEQUENCE] = sequence
        self.ring.words[Word.ORDERED_STAMP] = stamp

    def usage(self) -> tuple[int, int]:
        """(bytes of the ring, bytes in use by records that the other side has not acknowledged)."""
        ring = self.ring
        size = ring.data_capacity + ring.slots * DESCRIPTOR_SIZE
        records = ring.words[Word.PUBLISHED] - ring.words[Word.RELEASED]
        if records == 0:
            return size, 0
        return size, min(size, records * size // ring.slots if records else 0)

    # -- tap --------------------------------------------------------------------------------------------------------

    def ensure_tap(self) -> bool:
        """Start the tap if it is not running; True when it had to be started. It is ready when this returns.

        One that another version started hands everything over to one of ours, which no guest notices."""
        if not self.bell_path.exists():
            os.mkfifo(self.bell_path, 0o600)
        self._processes.end(self._sink_name)
        self._processes.settle(self._tap_name, self._serves)
        arguments = [str(self.ring_path), str(self.socket_path), str(self.bell_path)]
        child, started = self._processes.ensure(self._tap_name, _TAP, arguments)
        if started:
            self._wait_for(lambda: self._serves(child.pid), self._tap_name)
        elif self._processes.foreign(child):
            self._renew_tap(arguments)
        return started

    def _serves(self, pid: int) -> bool:
        """Whether the tap with that pid has the ring."""
        return self.beating() and self.ring.words[Word.TAP_PID] == pid

    def _renew_tap(self, arguments: list[str]) -> None:
        """Let a tap of this version take over from the one that runs. If it does not come up, the other goes on."""
        now = time.monotonic()
        if now < self._handover_due or not handover_path(self.ring_path).exists():
            return
        self._handover_pause = min(max(2 * self._handover_pause, HANDOVER_SECONDS), HANDOVER_LONGEST)
        self._handover_due = now + self._handover_pause
        try:
            done = self._processes.succeed(self._tap_name, _TAP, ["--heir", *arguments], self._serves)
        except StepFailed as exc:
            log.warning("%s: %s", self._group, exc.message)
            return
        if done:
            self._handover_pause = 0.0
            log.info("%s: a tap of this version has taken over (%d)", self._group, self.tap_pid())
        else:
            log.warning("%s: the tap of another version did not hand over, and goes on; see its log", self._group)

    def start_sink(self) -> None:
        """Put a sink in the tap's place, so that a mirror can be detached. What it takes is lost: it says so, since
        the tap's connections are gone and no mark can be proven any more."""
        self._processes.end(self._tap_name, force=True)
        exports = str(exports_path(self.ring_path))
        self._processes.ensure(self._sink_name, "drctl.replication.tap", ["--sink", exports, str(self.socket_path)])
        self._wait_for(self.socket_path.exists, self._sink_name)

    def end_tap(self) -> None:
        """End tap and sink. Only when no mirror is attached any more."""
        self._processes.end(self._sink_name)
        self._processes.end(self._tap_name)

    def tap_pid(self) -> int:
        child = self._processes.find(self._tap_name)
        return child.pid if child else 0

    # -- shipper ----------------------------------------------------------------------------------------------------

    def ensure_shipper(self, config: Path) -> bool:
        """Start the shipper if it is not running; True when it had to be started.

        It yields to the tap and the guests: behind by some milliseconds is what the ring is for. The watchdog kills one
        that has stopped beating."""
        _, started = self._processes.ensure(self.shipper_name, "drctl.replication.shipper", [str(config)], nice=5)
        return started

    def end_shipper(self) -> None:
        self._processes.end(self.shipper_name)

    def shipper_pid(self) -> int:
        child = self._processes.find(self.shipper_name)
        return child.pid if child else 0

    def remove(self) -> None:
        """End all and forget the ring."""
        self.end_shipper()
        self.end_tap()
        self._close_ring()
        Ring.remove(self.ring_path)
        self._remove_spill()
        for path in (self.bell_path, self.socket_path, self.shipper_socket):
            with suppress(FileNotFoundError):
                path.unlink()

    def _remove_spill(self) -> None:
        """Without its ring a spill is a piece of a stream of which nothing goes on."""
        self.spill_key_path.unlink(missing_ok=True)
        shutil.rmtree(self.spill_path, ignore_errors=True)

    def _wait_for(self, reached: Callable[[], bool], child: str, timeout_seconds: float = 5.0) -> None:
        """Raises StepFailed, at once when the child ends: whoever waits here is the one to start it again."""
        deadline = time.monotonic() + timeout_seconds
        while not reached():
            ended = self._processes.find(child) is None
            if ended or time.monotonic() > deadline:
                raise StepFailed(
                    f"{child} {'ended at once' if ended else f'did not start within {timeout_seconds:.0f} s'}",
                    hint=f"see {self._home.logs}/{child}.log",
                )
            time.sleep(0.01)
