"""The recoveries that this process works on, and what every operation on one has in common. Knows no kind of recovery.

Each recovery is worked on by one operation at a time; who comes second is told so."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from drctl.appliance.recovery.guard import Background, Guard
from drctl.appliance.recovery.ports import Progress, Recoverable, Tools
from drctl.appliance.recovery.state import (
    MachineChange,
    MachinePhase,
    RecoveryFiles,
    RecoveryKind,
    RecoveryPhase,
    RecoveryRecord,
)
from drctl.appliance.recovery.steps import PARALLEL, Steps, plan_machine
from drctl.errors import DrctlError, Interrupted, Locked, NotFound, Refused, WrongPhase
from drctl.model.checkpoint import Checkpoint

#: How long machines that are to boot wait for those that are booting.
BOOT_WAIT_SECONDS = 600.0

log = logging.getLogger(__name__)


def in_thread(name: str, action: Callable[[], None]) -> None:
    threading.Thread(target=action, name=name, daemon=True).start()


@dataclass(slots=True)
class Work:
    """A live recovery in this process. `lock` is held by the operation that works on it."""

    steps: Steps
    guard: Guard
    lock: threading.Lock = field(default_factory=threading.Lock)
    ending: bool = False
    #: Machines that were told to boot and that nobody has begun to bring up yet.
    wanted: set[str] = field(default_factory=set)
    #: When what the appliance does by itself may be tried again after it failed; monotonic seconds.
    retry_at: float = 0.0

    @property
    def record(self) -> RecoveryRecord:
        return self.steps.recovery


class Works:
    """Live recoveries by id, and the files of all. Methods may be called from any thread."""

    def __init__(
        self,
        tools: Tools,
        files: RecoveryFiles,
        boot: str,
        *,
        background: Background = in_thread,
        parallel: int = PARALLEL,
    ) -> None:
        self.tools = tools
        self.files = files
        self.boot = boot
        self.background = background
        self.closing = False
        self._parallel = parallel
        self._lock = threading.Lock()
        self._live: dict[str, Work] = {}

    def live(self) -> list[Work]:
        return list(self._live.values())

    def get(self, identity: str) -> Work | None:
        return self._live.get(identity)

    def of_group(self, group: str) -> Work | None:
        """The live recovery that lets the group reign here."""
        return next((w for w in self.live() if not w.record.test and w.record.group == group), None)

    def adopt(self, record: RecoveryRecord) -> Work:
        steps = Steps(self.tools, self.files, record)
        work = Work(steps, Guard(self.tools, steps, self.background))
        with self._lock:
            return self._live.setdefault(record.id, work)

    def forget(self, work: Work) -> None:
        with self._lock:
            self._live.pop(work.record.id, None)

    def close(self) -> None:
        self.closing = True
        for work in self.live():
            work.steps.cancelled.set()

    def records(self) -> list[RecoveryRecord]:
        """Every recovery, live ones as they are now; an unreadable file is reported and left alone."""
        records = []
        for name in self.files.names():
            if work := self._live.get(name):
                records.append(work.record)
                continue
            try:
                records.append(self.files.load(name))
            except DrctlError as exc:
                log.warning("%s", exc.message)
        return sorted(records, key=lambda r: r.times.get("ordered", 0.0))

    def told(self, record: RecoveryRecord) -> dict[str, Any]:
        """The recovery as docs/internals.md describes it, the time left told by this host's clock."""
        data = record.as_dict()
        if record.auto is not None:
            left = None if record.auto.cancelled else max(0.0, record.auto.due - self.tools.clock.time())
            data["auto"]["seconds_left"] = left
        return data

    # -- new ones -----------------------------------------------------------------------------------------------------

    def resolve(self, params: dict[str, Any]) -> tuple[Checkpoint, Recoverable]:
        """The checkpoint that is asked for, and what can be recovered of it. Raises NotFound, Refused."""
        group, selector = str(params["group"]), str(params.get("checkpoint") or "latest")
        try:
            chosen = self.tools.stores.choose(group, selector, self.tools.clock.time())
        except ValueError as exc:
            raise Refused(str(exc)) from exc
        return chosen, self.tools.stores.recoverable(group, chosen.number)

    def new_record(
        self,
        kind: RecoveryKind,
        found: tuple[Checkpoint, Recoverable],
        params: dict[str, Any],
        generation: int = 0,
    ) -> RecoveryRecord:
        """A record of what is going to be done; nothing is written yet. Raises NotFound for an unknown machine."""
        chosen, source = found
        wanted = list(params.get("machines") or [machine.name for machine in source.machines])
        known = {machine.name: machine for machine in source.machines}
        for name in wanted:
            if name not in known:
                raise NotFound("machine", name, known=sorted(known))
        record = RecoveryRecord(
            id=secrets.token_hex(3),
            kind=kind,
            group=str(params["group"]),
            selector=str(params.get("checkpoint") or "latest"),
            checkpoint=chosen.number,
            checkpoint_time=chosen.time,
            machines=[],
            generation=generation,
            boot=self.boot,
            times={"ordered": self.tools.clock.time()},
        )
        record.choose(chosen)
        record.changes = _changes(params, known)
        record.machines = [plan_machine(self.tools, record, known[name]) for name in wanted]
        record.held = list(wanted) if params.get("staged") else []
        return record

    # -- working on one -----------------------------------------------------------------------------------------------

    @contextmanager
    def holding(self, work: Work) -> Iterator[None]:
        """Work on it alone; another operation at it is no reason to wait, but to say so."""
        if not work.lock.acquire(blocking=False):
            raise Locked(f"{work.record.group}: another operation works on {work.record.id}", hint="see: drctl status")
        try:
            yield
        finally:
            work.lock.release()

    def start(self, work: Work, progress: Progress) -> None:
        work.record.boot = self.boot
        work.steps.progress = progress
        work.steps.start(parallel=self._parallel)

    def boot_machines(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Switch on machines of a live recovery that are held; those that run are left alone.

        Waits for others who do the same: all that were told to boot meanwhile come up together. Raises NotFound,
        WrongPhase, Locked."""
        work = self.get(str(params["recovery"]))
        if work is None:
            raise NotFound("recovery", str(params["recovery"]), hint="see: drctl status")
        names = [str(name) for name in params.get("machines") or []]
        known = [machine.name for machine in work.record.machines]
        for name in names:
            if name not in known:
                raise NotFound("machine", name, known=known)
        with self._lock:
            work.wanted |= set(names)
        if not work.lock.acquire(timeout=BOOT_WAIT_SECONDS):
            raise Locked(f"{work.record.group}: another operation works on {work.record.id}", hint="see: drctl status")
        try:
            self._boot_wanted(work, progress)
        finally:
            work.lock.release()
        return self.told(work.record)

    def _boot_wanted(self, work: Work, progress: Progress) -> None:
        """The lock is held. A record that says `starting` is gone on with by a later supervisor."""
        record = work.record
        if record.phase not in (RecoveryPhase.STARTING, RecoveryPhase.RUNNING):
            raise WrongPhase(f"{record.id} is {record.state()}: nothing of it is booted any more")
        with self._lock:
            wanted, work.wanted = work.wanted, set()
        up = {machine.name for machine in record.machines if machine.phase is MachinePhase.RUNNING}
        if not wanted - up:
            return
        record.held = [name for name in record.held if name not in wanted]
        record.phase = RecoveryPhase.STARTING
        work.steps.save()
        work.steps.progress = progress
        work.steps.start(parallel=self._parallel, only=wanted)

    def restart(self, work: Work) -> None:
        """Go on with a start; after the host's restart its machines are all to be started again."""
        if work.record.boot != self.boot:
            for machine in work.record.machines:
                machine.phase = MachinePhase.PLANNED
        self.start(work, lambda _: None)

    def do_in_background(self, work: Work, name: str, action: Callable[[], None]) -> None:
        """Do it in a thread, alone; what goes wrong is written into the record."""

        def run() -> None:
            try:
                with work.lock:
                    action()
            except Interrupted:
                log.info("%s: interrupted, a later supervisor goes on", work.record.id)
            except DrctlError as exc:
                work.record.reason = exc.message
                work.steps.save()
                log.warning("%s: %s", work.record.id, exc.message)

        self.background(f"{name}-{work.record.id}", run)


def _changes(params: dict[str, Any], known: Collection[str]) -> dict[str, MachineChange]:
    """What `changes` of an order says, by machine. Raises NotFound, Refused."""
    try:
        changes = msgspec.convert(params.get("changes") or {}, dict[str, MachineChange], strict=True)
    except msgspec.ValidationError as exc:
        raise Refused(f"changes: {exc}") from exc
    for name in changes:
        if name not in known:
            raise NotFound("machine", name, known=sorted(known))
    return changes
