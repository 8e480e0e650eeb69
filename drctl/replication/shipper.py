"""The shipper's process: `python -m drctl.replication.shipper CONFIG.json`. From the ring to the other site.

It dies without harm: what was acknowledged lies in the ring, what the receiver has is asked at the next HELLO.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from drctl.errors import (
    CertificateRejected,
    DrctlError,
    IntegrityError,
    Refused,
    WrongPhase,
)
from drctl.replication import control, heap, link
from drctl.replication.disk_connection import Export
from drctl.replication.framing import Stamp
from drctl.replication.marks import Mark
from drctl.replication.overflow import Overflow
from drctl.replication.priority import Priority
from drctl.replication.progress import Progress
from drctl.replication.reader import Pace, Peer, Reader
from drctl.replication.ring_port import LONGEST_WAIT, RingPort
from drctl.replication.shipper_config import ShipperConfig, load_config
from drctl.replication.shipper_marks import MarkCutter, Witness
from drctl.replication.shipper_state import Definition, LinkState, ShipperState, status
from drctl.replication.shipper_stream import StreamSender
from drctl.replication.shipper_sync import VERIFY, SyncJob
from drctl.replication.tasks import TaskGroup
from drctl.replication.throttle import Throttle
from drctl.replication.verification import Order

FIRST_BACKOFF = 0.2
LONGEST_BACKOFF = 5.0
#: After a refusal: it will not change by itself in a second, and a person reads the receiver's log.
REFUSED_BACKOFF = 5.0
MARK_TIMEOUT = 30.0
#: Compression is what costs; a second worker lets one batch be framed while the other is.
WORKERS = 2

log = logging.getLogger(__name__)


class Shipper:
    """All tasks of one shipper. `run` returns after SIGTERM or `stop`."""

    def __init__(self, config: ShipperConfig) -> None:
        """Opens the ring and the definition. Raises SetupFailed, UnsupportedFormat, IntegrityError."""
        ring = RingPort(Path(config.ring), Path(config.bell))
        definition = Definition(Path(config.definition))
        definition.load()
        overflow = Overflow(config, ring)
        progress = Progress(ring.epoch, overflow.start, definition.version)
        overflow.attach(progress)
        progress.look(ring.look())
        throttle = Throttle(config)
        stamp = Stamp(ring.generation, ring.epoch)
        self.state = ShipperState(config, ring, overflow, progress, definition, stamp, throttle)
        self._cutter = MarkCutter(self.state)
        self._witness = Witness(self.state)
        peer = Peer(
            self.state.exchange, lambda: progress.cursor, throttle.room, lambda: throttle.behind(self.state.backlog())
        )
        reader = Reader(ring, peer, self.state.moved, self.state.wake.set, Pace(config.read_limit))
        self._pace = reader.pace
        self._sync = SyncJob(self.state, reader)
        self._workers = ThreadPoolExecutor(WORKERS, "framing")
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until stopped."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        self.state.ring.attach(self.state.wake)
        server = await control.serve(Path(self.state.config.control), self._handlers())
        async with TaskGroup() as tasks:
            parts = [self._keep_link(), self._beat(), self.state.overflow.run()]
            if self.state.config.clock:
                parts.append(self._cutter.run())
            if self.state.config.supervisor:
                parts += [self._witness.attest(), self._witness.order(), self._witness.report()]
            running = [tasks.create_task(part) for part in parts]
            await self._stopping.wait()
            self._sync.stop()
            for task in running:
                task.cancel()
        server.close()
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def _beat(self) -> None:
        rest, priority = heap.Rest(), Priority()
        due = time.monotonic()
        while True:
            self.state.ring.beat()
            now = time.monotonic()
            rest.look(self.state.link.sent_bytes, now)
            priority.look(now, self.state.ring.fill(), self.state.progress.marks.oldest_age(now), now - due)
            due = now + LONGEST_WAIT
            self._limits()
            if self.state.definition.refresh():
                self._definition_changed()
            await asyncio.sleep(LONGEST_WAIT)

    def _limits(self) -> None:
        before = self.state.throttle.told()
        self.state.throttle.refresh()
        if self.state.throttle.told() != before:
            self.state.wake.set()
            self.state.changed.set()

    def _definition_changed(self) -> None:
        self.state.progress.definition_version = self.state.definition.version
        self.state.wake.set()

    # the link

    async def _keep_link(self) -> None:
        backoff = FIRST_BACKOFF
        # Not for ever: where a link breaks in the moment in which this task is cancelled, its TaskGroup raises the
        # link's error and the cancellation is lost.
        while not self._stopping.is_set():
            connections = self.state.link.connections
            try:
                await self._one_connection()
            except DrctlError as exc:
                slow = self._link_lost(exc)
                if self._stopping.is_set():
                    return
                backoff = FIRST_BACKOFF if self.state.link.connections > connections else backoff
                await asyncio.sleep(REFUSED_BACKOFF if slow else backoff)
                backoff = min(2 * backoff, LONGEST_BACKOFF)

    async def _one_connection(self) -> None:
        config = self.state.config
        connection = await link.dial(config.peer, Path(config.tls), config.peer_appliance)
        try:
            sender = StreamSender(self.state, connection, self._workers)
            await sender.run(self._link_stands)
        finally:
            connection.abort()

    def _link_stands(self) -> None:
        self.state.link.change(LinkState.CONNECTED)
        self.state.changed.set()
        log.info("connected to %s", self.state.config.peer)

    def _link_lost(self, exc: DrctlError) -> bool:
        """Note why; True when trying again soon is of no use."""
        match exc:
            case CertificateRejected():
                kind = LinkState.REJECTED
            case Refused() | WrongPhase() | IntegrityError():
                kind = LinkState.REFUSED
            case _:
                kind = LinkState.CONNECTING
        if self.state.link.error is None or self.state.link.error["message"] != exc.message:
            log.warning("link: %s", exc)
        self.state.link.change(kind, exc)
        self.state.changed.set()
        if self.state.overflow.lost():
            return False
        return kind is not LinkState.CONNECTING

    # control

    def _handlers(self) -> dict[str, control.Handler]:
        return {
            "status": self._status,
            "mark": self._mark,
            "drain": self._drain,
            "undrain": self._undrain,
            "sync.start": self._sync_start,
            "sync.cancel": self._sync_cancel,
            "limit": self._limit,
            "definition": self._definition,
            "stop": self._stop,
        }

    async def _status(self, _params: dict[str, Any]) -> Any:
        return status(self.state)

    async def _mark(self, params: dict[str, Any]) -> Any:
        """{kind, tags, timeout, taken_ns} → {number, kind, sequence, wall_ns, time, tags}, once proven and durable."""
        kind = str(params.get("kind") or "crash-consistent")
        timeout = float(params.get("timeout") or MARK_TIMEOUT)
        taken_ns = int(params.get("taken_ns") or 0)
        return self._told(await self._cutter.cut_and_wait(kind, _tags(params), timeout, taken_ns))

    async def _drain(self, params: dict[str, Any]) -> Any:
        """{tags, timeout}: the final mark: all that was written before is in it, and no other follows."""
        self.state.finished = True
        timeout = float(params.get("timeout") or MARK_TIMEOUT)
        try:
            return self._told(await self._cutter.cut_and_wait("final", _tags(params), timeout))
        except DrctlError:
            self.state.finished = False
            raise

    async def _undrain(self, _params: dict[str, Any]) -> Any:
        """The switchover was called off: marks are cut by the clock again."""
        self.state.finished = False
        return {}

    def _told(self, mark: Mark) -> dict[str, Any]:
        return {
            "number": mark.number,
            "kind": mark.kind,
            "sequence": mark.sequence,
            "wall_ns": mark.wall_ns,
            "time": (mark.wall_ns + self.state.clock.offset_ns) / 1e9,
            "tags": list(mark.tags),
        }

    async def _sync_start(self, params: dict[str, Any]) -> Any:
        """{mode, disks {number: {socket, export}}, id, equal [number]} → {mode}; progress is told in the status.

        Mode `verify`: {share, rate, seed, confirm, repair} besides."""
        exports = {
            int(number): Export(str(disk["socket"]), str(disk["export"]), str(disk.get("extents") or ""))
            for number, disk in params["disks"].items()
        }
        if params["mode"] == VERIFY:
            wanted = {name: params[name] for name in ("share", "rate", "seed", "confirm") if name in params}
            self._sync.verify(exports, msgspec.convert(wanted, Order), repair=bool(params.get("repair")))
            return {"mode": VERIFY}
        equal = [int(number) for number in params.get("equal") or ()]
        self._sync.start(str(params["mode"]), exports, str(params.get("id") or ""), equal)
        return {"mode": params["mode"]}

    async def _sync_cancel(self, _params: dict[str, Any]) -> Any:
        self._sync.stop()
        return {}

    async def _limit(self, params: dict[str, Any]) -> Any:
        """{read_limit}: bytes a second for the reader, 0: none."""
        self._pace.limit = int(params["read_limit"])
        return {"read_limit": self._pace.limit}

    async def _definition(self, _params: dict[str, Any]) -> Any:
        """Read the definition file anew and send it when its version rose."""
        self.state.definition.load()
        self._definition_changed()
        return {"version": self.state.definition.version}

    async def _stop(self, _params: dict[str, Any]) -> Any:
        self._stopping.set()
        return {}


def _tags(params: dict[str, Any]) -> tuple[str, ...]:
    tags = params.get("tags") or []
    return tuple(str(tag) for tag in tags)


async def _run(config: ShipperConfig) -> None:
    await Shipper(config).run()


def main(arguments: list[str]) -> int:
    """Exit code: 0 after SIGTERM, else the error's."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s shipper %(levelname)s %(message)s")
    if len(arguments) != 1:
        log.error("usage: python -m drctl.replication.shipper CONFIG.json")
        return 2
    try:
        with contextlib.suppress(KeyboardInterrupt):
            heap.settle()
            uvloop.run(_run(load_config(Path(arguments[0]))))
    except DrctlError as exc:
        log.error("%s", exc)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
