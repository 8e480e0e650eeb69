"""Tests, failovers and commits of the groups replicated to this host: the control methods, and what guards them.

Each recovery is worked on by one operation at a time; the methods block, so call them from a thread of the caller's
own. Errors of single machines are in the result (`exit_code` 3), errors that concern all are raised."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from drctl.appliance.recovery_commit import localize
from drctl.appliance.recovery_end import take_down
from drctl.appliance.recovery_forecast import forecast, scratch_limit
from drctl.appliance.recovery_guard import Background, Guard
from drctl.appliance.recovery_ports import Progress, Recoverable, Tools
from drctl.appliance.recovery_state import (
    LIVE,
    MachinePhase,
    RecoveryFiles,
    RecoveryKind,
    RecoveryPhase,
    RecoveryRecord,
)
from drctl.appliance.recovery_steps import PARALLEL, Steps, plan_machine
from drctl.errors import DrctlError, Interrupted, Locked, NotFound, Refused, WrongPhase
from drctl.model.checkpoint import Checkpoint, resolve

#: Records of ended tests are kept this long, so that `test list` can still say why one ended.
KEEP_ENDED_SECONDS = 7 * 86400

log = logging.getLogger(__name__)


def in_thread(name: str, action: Callable[[], None]) -> None:
    threading.Thread(target=action, name=name, daemon=True).start()


@dataclass(slots=True)
class _Work:
    """A live recovery in this process. `lock` is held by the operation that works on it."""

    steps: Steps
    guard: Guard
    lock: threading.Lock = field(default_factory=threading.Lock)
    ending: bool = False

    @property
    def record(self) -> RecoveryRecord:
        return self.steps.recovery


class Recovery:
    """The recoveries of one appliance. Methods may be called from any thread; `supervise` from one.

    `boot` identifies the host's boot (/proc/sys/kernel/random/boot_id)."""

    def __init__(
        self,
        tools: Tools,
        files: RecoveryFiles,
        boot: str,
        *,
        background: Background = in_thread,
        parallel: int = PARALLEL,
    ) -> None:
        self._tools = tools
        self._files = files
        self._boot = boot
        self._background = background
        self._parallel = parallel
        self._lock = threading.Lock()
        self._live: dict[str, _Work] = {}
        self._closing = False

    # -- tests ---------------------------------------------------------------------------------------------------

    def test_start(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Boot a group's machines (or some of them) at a checkpoint, cut off, while replication goes on."""
        chosen, source = self._resolve(params)
        record = self._record(RecoveryKind.TEST, chosen, source, params)
        record.scratch_limit = scratch_limit(self._tools, int(params.get("scratch_limit") or 0))
        record.times["chosen"] = record.times["ordered"]
        work = self._adopt(record)
        with self._holding(work):
            work.steps.save()
            try:
                self._start(work, progress)
            except DrctlError:
                if not self._closing and not work.ending:
                    self._take_down(work, "its start failed")
                raise
        return record.as_dict()

    def test_list(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        """The live tests, and those that have ended for a reason of their own."""
        del progress
        group = str(params.get("group") or "")
        records = [r for r in self._records() if r.test and group in ("", r.group)]
        return [r.as_dict() for r in records if r.phase in LIVE or r.reason]

    def test_stop(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Remove all of a test; one that has ended already is no error."""
        del progress
        record = self._files.load(str(params["id"]))
        if not record.test:
            raise WrongPhase(f"{record.id} is a failover of {record.group}, not a test")
        work = self._live.get(record.id)
        if work is None:
            return {"id": record.id, "removed": False}
        self._end(work, "")
        return {"id": record.id, "removed": True}

    # -- failover ------------------------------------------------------------------------------------------------

    def failover_plan(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """What a failover would do, without doing any of it."""
        del progress
        chosen, source = self._resolve(params)
        generation = self._tools.stores.generation(str(params["group"])) + 1
        record = self._record(RecoveryKind.FAILOVER, chosen, source, params, generation)
        return forecast(self._tools, record, chosen, source)

    def failover_run(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Let the group reign here and boot it; called again, go on with what is not done or has failed."""
        group = str(params["group"])
        work = self._failover_of(group)
        if work is None:
            work = self._adopt(self._new_failover(params))
        if work.record.phase is RecoveryPhase.RUNNING and not work.record.failed():
            return work.record.as_dict()
        with self._holding(work):
            work.steps.save()
            self._start(work, progress)
        return work.record.as_dict()

    def _new_failover(self, params: dict[str, Any]) -> RecoveryRecord:
        group = str(params["group"])
        generation = self._tools.stores.generation(group)
        for record in self._records():
            final = record.phase is RecoveryPhase.COMMITTED and record.generation == generation
            if not record.test and record.group == group and final:
                raise WrongPhase(f"{group} was failed over to this host and committed already ({record.id})")
        reason = str(params.get("source_is_down") or "")
        if not reason or params.get("confirmed") not in (True, group):
            raise Refused(
                f"a failover of {group} needs the reason why its source is down, and the typed name of the group",
                hint=f"drctl failover {group} --source-is-down REASON",
            )
        chosen, source = self._resolve(params)
        record = self._record(RecoveryKind.FAILOVER, chosen, source, params, generation + 1)
        record.source_is_down = reason
        return record

    def commit(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Localize the disks of a failed-over group until it needs no view any more."""
        group = str(params["group"])
        work = self._failover_of(group)
        if work is None:
            done = [r for r in self._records() if r.group == group and r.phase is RecoveryPhase.COMMITTED]
            if not done:
                raise WrongPhase(f"{group} is not failed over to this host", hint=f"see: drctl status {group}")
            return max(done, key=lambda r: r.times.get("committed", 0.0)).as_dict()
        if work.record.phase is RecoveryPhase.STARTING:
            raise WrongPhase(f"the failover of {group} is not done yet", hint=f"drctl failover {group}")
        with self._holding(work):
            localize(self._tools, work.steps, progress)
        self._forget(work)
        return work.record.as_dict()

    # -- for the supervisor --------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Take over what an earlier supervisor left: adopt, go on, or take down. Call once, before `supervise`."""
        now = self._tools.clock.time()
        for record in self._records():
            if record.phase is RecoveryPhase.ENDED and now - record.times.get("ended", now) > KEEP_ENDED_SECONDS:
                self._files.remove(record.id)
            elif record.phase in LIVE:
                self._resume(self._adopt(record))

    def _resume(self, work: _Work) -> None:
        record = work.record
        restarted = record.boot != self._boot
        if record.phase is RecoveryPhase.STOPPING:
            self._in_background(work, lambda: self._take_down(work, record.reason))
        elif record.test and restarted:
            self._in_background(work, lambda: self._take_down(work, "the host was restarted"))
        elif record.phase is RecoveryPhase.COMMITTING:
            self._in_background(work, lambda: self._recommit(work, restarted))
        elif record.phase is RecoveryPhase.STARTING or restarted:
            self._in_background(work, lambda: self._restart(work))

    def supervise(self) -> None:
        """One look at every live recovery, see recovery_guard. Call it each 250 ms."""
        for work in list(self._live.values()):
            if work.ending or not work.record.guarded:
                continue
            reason = work.guard.look()
            if reason:
                log.error("test %s ends: %s", work.record.id, reason)
                work.ending = True
                self._background(f"end-{work.record.id}", partial(self._try_end, work, reason))

    def close(self) -> None:
        """Let operations end at their next step; a later supervisor goes on with them."""
        self._closing = True
        for work in list(self._live.values()):
            work.steps.cancelled.set()
        self._tools.views.close()

    def recoveries(self, group: str) -> list[dict[str, Any]]:
        """The live and committed recoveries of a group, for its status."""
        return [r.as_dict() for r in self._records() if r.group == group and r.phase is not RecoveryPhase.ENDED]

    # -- inside --------------------------------------------------------------------------------------------------

    def _resolve(self, params: dict[str, Any]) -> tuple[Checkpoint, Recoverable]:
        group, selector = str(params["group"]), str(params.get("checkpoint") or "latest")
        stores = self._tools.stores
        try:
            chosen = resolve(selector, stores.checkpoints(group), self._tools.clock.time())
        except ValueError as exc:
            raise Refused(str(exc)) from exc
        return chosen, stores.recoverable(group, chosen.number)

    def _record(
        self,
        kind: RecoveryKind,
        chosen: Checkpoint,
        source: Recoverable,
        params: dict[str, Any],
        generation: int = 0,
    ) -> RecoveryRecord:
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
            boot=self._boot,
            times={"ordered": self._tools.clock.time()},
        )
        record.choose(chosen)
        record.machines = [plan_machine(self._tools, record, known[name]) for name in wanted]
        return record

    def _adopt(self, record: RecoveryRecord) -> _Work:
        steps = Steps(self._tools, self._files, record)
        work = _Work(steps, Guard(self._tools, steps, self._background))
        with self._lock:
            return self._live.setdefault(record.id, work)

    def _forget(self, work: _Work) -> None:
        with self._lock:
            self._live.pop(work.record.id, None)

    @contextmanager
    def _holding(self, work: _Work) -> Iterator[None]:
        """Work on it alone; another operation at it is no reason to wait, but to say so."""
        if not work.lock.acquire(blocking=False):
            raise Locked(f"{work.record.group}: another operation works on {work.record.id}", hint="see: drctl status")
        try:
            yield
        finally:
            work.lock.release()

    def _start(self, work: _Work, progress: Progress) -> None:
        work.record.boot = self._boot
        work.steps.progress = progress
        work.steps.start(parallel=self._parallel)

    def _restart(self, work: _Work) -> None:
        """Go on with a start; after the host's restart its machines are all to be started again."""
        if work.record.boot != self._boot:
            for machine in work.record.machines:
                machine.phase = MachinePhase.PLANNED
        self._start(work, lambda _: None)

    def _recommit(self, work: _Work, restarted: bool) -> None:
        if restarted:
            self._restart(work)
        if work.record.needs_view:
            self._tools.views.ensure(work.record)
        localize(self._tools, work.steps, lambda _: None)
        self._forget(work)

    def _end(self, work: _Work, reason: str) -> None:
        work.ending = True
        work.steps.cancelled.set()
        with work.lock:
            self._take_down(work, reason)

    def _try_end(self, work: _Work, reason: str) -> None:
        try:
            self._end(work, reason)
        except DrctlError as exc:
            log.warning("%s: %s", work.record.id, exc.message)

    def _take_down(self, work: _Work, reason: str) -> None:
        if work.record.phase is RecoveryPhase.ENDED:
            return
        work.record.reason = reason
        take_down(self._tools, work.steps)
        self._forget(work)

    def _in_background(self, work: _Work, action: Callable[[], None]) -> None:
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

        self._background(f"resume-{work.record.id}", run)

    def _failover_of(self, group: str) -> _Work | None:
        works = [w for w in self._live.values() if not w.record.test and w.record.group == group]
        return works[0] if works else None

    def _records(self) -> list[RecoveryRecord]:
        """Every recovery, live ones as they are now; an unreadable file is reported and left alone."""
        records = []
        for name in self._files.names():
            if work := self._live.get(name):
                records.append(work.record)
                continue
            try:
                records.append(self._files.load(name))
            except DrctlError as exc:
                log.warning("%s", exc.message)
        return sorted(records, key=lambda r: r.times.get("ordered", 0.0))
