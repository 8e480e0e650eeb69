"""The receiver's process: `python -m drctl.replication.receiver CONFIG.json`. Streams in, journals out.

One listening port for all groups of a recovery host; one thread per group for its store. It dies without harm: what was
acknowledged is durable, what was not is sent again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from drctl.errors import DrctlError, SetupFailed
from drctl.replication import control, heap, reign
from drctl.replication.group_writer import GroupWriter, open_writer
from drctl.replication.link import Connection, Listener
from drctl.replication.maintenance_child import MaintenanceChild
from drctl.replication.receiver_session import ReceiverSession, hear_hello, refuse
from drctl.replication.tasks import TaskGroup

#: How often it is looked whether data flows.
REST_EVERY = 1.0
#: Between two lines of the log about connections that were turned away.
TELL_EVERY = 0.2

log = logging.getLogger(__name__)


class ReceiverConfig(msgspec.Struct, frozen=True):
    """`listen`: ADDRESS:PORT; `tls`, `store` (directory of all groups' stores), `control` (our socket): paths.

    `maintenance`: merge and promote in the background, by the groups' retention."""

    listen: str
    tls: str
    store: str
    control: str
    software: str = ""
    maintenance: bool = True


def load_config(path: Path) -> ReceiverConfig:
    """Raises SetupFailed when the file is not what it should be."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReceiverConfig)
    except (OSError, msgspec.DecodeError) as exc:
        raise SetupFailed(f"{path}: {exc}") from exc


class Receiver:
    """All groups that are replicated to this host. `run` returns after SIGTERM or `stop`."""

    def __init__(self, config: ReceiverConfig) -> None:
        """Raises SetupFailed: the port, our certificate."""
        self._config = config
        self._store = Path(config.store)
        self._writers: dict[str, GroupWriter] = {}
        self._sessions: dict[str, tuple[ReceiverSession, asyncio.Task[None]]] = {}
        self._errors: dict[str, dict[str, Any]] = {}
        #: When each group's source last spoke, wall clock in ns: a failover wants to know.
        self._heard: dict[str, int] = {}
        self._rejected: deque[dict[str, Any]] = deque(maxlen=50)
        self._rejections = 0
        self._told_at, self._untold = -TELL_EVERY, 0
        self._stopping = asyncio.Event()
        self._maintenance = MaintenanceChild(self._store)
        self.listener = Listener(config.listen, Path(config.tls), self._serve, self._reject)
        self.listener.bind()

    async def run(self) -> None:
        """Serve until stopped."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        server = await control.serve(Path(self._config.control), self._handlers())
        log.info("listening on port %d", self.listener.port)
        async with TaskGroup() as tasks:
            running = [tasks.create_task(self.listener.run()), tasks.create_task(self._rest())]
            if self._config.maintenance:
                running.append(tasks.create_task(self._maintenance.run()))
            await self._stopping.wait()
            for task in running:
                task.cancel()
        server.close()
        for writer in self._writers.values():
            await writer.close()

    async def _rest(self) -> None:
        rest = heap.Rest()
        while True:
            await asyncio.sleep(REST_EVERY)
            rest.look(sum(session.received_bytes for session, _ in self._sessions.values()), time.monotonic())

    # connections

    async def _serve(self, connection: Connection) -> None:
        try:
            hello = await hear_hello(connection)
            writer = self._writer(hello.group)
            if hello.ask:
                await reign.answer(connection, hello, writer.root, self._config.software)
                return
        except DrctlError as exc:
            await refuse(connection, exc)
            raise
        session = ReceiverSession(connection, hello, writer)
        await self._replace(hello.group, session)
        log.info("%s: %s connected, epoch %s", hello.group, hello.host, hello.epoch)
        try:
            await session.run()
        except DrctlError as exc:
            self._errors[hello.group] = {**exc.as_dict(), "wall_ns": time.time_ns()}
            log.warning("%s: %s", hello.group, exc)
        finally:
            self._heard[hello.group] = session.heard_wall_ns
            if self._sessions.get(hello.group, (None,))[0] is session:
                del self._sessions[hello.group]

    async def _replace(self, group: str, session: ReceiverSession) -> None:
        """End an older connection of the group: the source has only one, so that one is dead."""
        old = self._sessions.get(group)
        task = asyncio.current_task()
        assert task is not None
        self._sessions[group] = (session, task)
        self._errors.pop(group, None)
        if old is not None:
            old[1].cancel()
            await asyncio.wait([old[1]], timeout=2)

    def _writer(self, group: str) -> GroupWriter:
        if group not in self._writers:
            self._writers[group] = open_writer(self._store, group, self._config.software)
        return self._writers[group]

    def _reject(self, address: str, exc: DrctlError) -> None:
        self._rejections += 1
        self._rejected.append({**exc.as_dict(), "address": address, "wall_ns": time.time_ns()})
        now = time.monotonic()
        if now - self._told_at < TELL_EVERY:
            self._untold += 1  # a crowd must not fill the disk with its log
            return
        more = f" (and {self._untold} more)" if self._untold else ""
        self._told_at, self._untold = now, 0
        log.warning("rejected %s: %s%s", address, exc, more)

    # control

    def _handlers(self) -> dict[str, control.Handler]:
        return {
            "status": self._status,
            "group.release": self._release,
            "group.accept": self._accept,
            "stop": self._stop,
        }

    async def _status(self, _params: dict[str, Any]) -> Any:
        """→ {port, rejections, rejected [newest errors], groups {NAME: …}}."""
        names = {path.parent.name for path in _stores(self._store)} | set(self._writers)
        return {
            "port": self.listener.port,
            "wall_ns": time.time_ns(),
            "rejections": self._rejections,
            "rejected": list(self._rejected),
            "groups": {name: self._group(name) for name in sorted(names)},
        }

    def _group(self, name: str) -> dict[str, Any]:
        writer = self._writers.get(name)
        told: dict[str, Any] = {
            "connected": name in self._sessions,
            "released": writer.released if writer else False,
            "heard_wall_ns": self._sessions[name][0].heard_wall_ns if name in self._sessions else self._heard.get(name),
            "error": self._errors.get(name),
            "maintenance": self._maintenance.status(name),
            "journal_bytes": writer.journal_bytes() if writer else None,
        }
        if name in self._sessions:
            session = self._sessions[name][0]
            told |= {
                "host": session.hello.host,
                "generation": session.hello.generation,
                "epoch": session.hello.epoch,
                "software": session.hello.software,
                "since_wall_ns": session.since_wall_ns,
                "sequence": session.sequence,
                "mark": session.mark,
                "sync": {"id": "", "disk": 0, "offset": 0} | (msgspec.to_builtins(session.sync) or {}),
                "received_bytes": session.received_bytes,
                "acknowledgements": session.acknowledgements,
            }
        return told

    async def _release(self, params: dict[str, Any]) -> Any:
        """{group}: end its connection and close its store; no stream is taken until group.accept."""
        group = str(params["group"])
        writer = self._writer(group)
        writer.released = True
        if (old := self._sessions.get(group)) is not None:
            old[1].cancel()
            await asyncio.wait([old[1]], timeout=5)
        self._maintenance.hold(group)
        await writer.release()
        return {"group": group}

    async def _accept(self, params: dict[str, Any]) -> Any:
        """{group}: take streams again; a store that is gone is forgotten."""
        group = str(params["group"])
        self._maintenance.let_go(group)
        if (writer := self._writers.pop(group, None)) is not None:
            await writer.close()
        return {"group": group}

    async def _stop(self, _params: dict[str, Any]) -> Any:
        self._stopping.set()
        return {}


def _stores(directory: Path) -> list[Path]:
    return list(directory.glob("*/group.json"))


async def _run(config: ReceiverConfig) -> None:
    await Receiver(config).run()


def main(arguments: list[str]) -> int:
    """Exit code: 0 after SIGTERM, else the error's."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s receiver %(levelname)s %(message)s")
    if len(arguments) != 1:
        log.error("usage: python -m drctl.replication.receiver CONFIG.json")
        return 2
    try:
        heap.settle()
        uvloop.run(_run(load_config(Path(arguments[0]))))
    except DrctlError as exc:
        log.error("%s", exc)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
