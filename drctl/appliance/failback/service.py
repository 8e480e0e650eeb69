"""Control methods of a failback at the site that the group comes back to, where its old disks lie.

What is begun goes on without its caller, and after a restart. `failback_reign` has the other site's half."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.failback.ports import Deps
from drctl.appliance.failback.record import Failback, FailbackFiles, FailbackPhase
from drctl.appliance.failback.seal import Finding, Sealing, let_go
from drctl.appliance.recovery.images import free_at
from drctl.appliance.recovery.store import GroupStores
from drctl.appliance.replica.seed_files import disks_by_name
from drctl.appliance.source.definition import machines_of
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.guest_reader import GuestReader
from drctl.appliance.source.handover_record import HandoverFiles
from drctl.appliance.source.image_stamp import RUNNING
from drctl.errors import DrctlError, Interrupted, Locked, NotFound, PreconditionFailed, Refused
from drctl.model.extent import format_bytes
from drctl.model.group import GroupDisk, GroupSpec
from drctl.model.machine import MachineState
from drctl.model.phase import Phase
from drctl.store.group_info import read_info
from drctl.store.group_store import GroupStore

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]
#: A caller that hears nothing for so long hears at least that the work goes on.
TELL_SECONDS = 1.0
#: A source that has just heard that it is superseded needs a moment to let go of its disks.
DETACH_SECONDS = 10.0
#: Between two looks for what has been kept long enough.
SWEEP_SECONDS = 60.0


class FailbackService:
    """Methods may be called from any thread; `look` from one."""

    def __init__(self, home: Home, deps: Deps) -> None:
        self._home = home
        self._deps = deps
        self._stores = GroupStores(home.store)
        self._files = FailbackFiles(home.path / "failbacks")
        self._handovers = HandoverFiles(home.path / "handovers")
        self._running: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._due = 0.0

    # -- the old disks ---------------------------------------------------------------------------------------

    def disks(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, disks} → what lies here of them, how it would be used, and what stands in the way."""
        del progress
        name = str(params.get("group"))
        self._await_detached(name)
        record = self._files.load(name)
        finding = Finding(self._deps.host, self._home.store / name)
        finding.look(list(disks_by_name(params).values()))
        return {
            "group": name,
            "generation": self._generation(name),
            "failback": record.as_dict() if record else None,
            "old": [msgspec.to_builtins(disk) for disk in finding.old],
            "left_out": [msgspec.to_builtins(one) for one in finding.left_out],
            "machines": finding.machines,
            "needed": finding.room_needed(),
            "free": free_at(self._home.store),
            "definition_version": self._definition_version(name),
            "reasons": self._why_not_here(name, finding),
        }

    def _known(self, name: str) -> GroupState | None:
        return self._deps.sources.state(name) if name in self._deps.sources.names() else None

    def _await_detached(self, name: str) -> None:
        end = time.monotonic() + DETACH_SECONDS
        while (known := self._known(name)) is not None and known.phase is Phase.FAILED_OVER and known.epoch:
            if time.monotonic() > end:
                return
            time.sleep(0.1)

    def _generation(self, name: str) -> int:
        """The highest that this site knows of the group; 0 when it knows nothing of it."""
        known = self._known(name)
        root = self._home.store / name
        stored = read_info(root).generation if (root / "group.json").exists() else 0
        return max(known.generation if known else 0, stored)

    def _definition_version(self, name: str) -> int:
        if not (self._home.store / name / "group.json").exists():
            return 0
        with self._stores.open(name) as store:
            return int((store.definition() or {}).get("version") or 0)

    def _why_not_here(self, name: str, finding: Finding) -> list[str]:
        reasons = []
        known = self._known(name)
        if known is not None and known.phase is not Phase.FAILED_OVER:
            reasons.append(f"this site has not heard yet that {name} reigns at the other one: it is {known.phase} here")
        elif known is not None and known.epoch:
            reasons.append("its old disks are not detached yet")
        reasons += [f"{one} is {state}" for one in finding.machines if (state := self._state(one)) in RUNNING]
        if (needed := finding.room_needed()) > (free := free_at(self._home.store)):
            reasons.append(f"the old disks need {format_bytes(needed)} in the store, {format_bytes(free)} are free")
        return reasons

    def _state(self, name: str) -> MachineState:
        try:
            return self._deps.host.state(name)
        except NotFound:
            return MachineState.SHUT_OFF

    def prepare(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, generation, disks, number, spec} → the record: seal the old disks, take streams of `generation`.

        `number`: the checkpoints of the group go on above it. Given again it goes on, or tells what is done. Raises
        PreconditionFailed, Refused; OutOfSpace and what else a step meets: then it may be given again."""
        name, generation = str(params.get("group")), int(params["generation"])
        self._await_end(name, progress)
        record = self._files.load(name)
        if record is not None and record.phase is FailbackPhase.SEALING:
            record.generation = max(record.generation, generation)
        elif record is None or record.generation < generation:
            record = self._new_record(name, generation, params, record)
            self._files.save(record)
        return self._follow(self._begin(name, record, params), progress)

    def _new_record(self, name: str, generation: int, params: dict[str, Any], earlier: Failback | None) -> Failback:
        disks = list(disks_by_name(params).values())
        finding = Finding(self._deps.host, self._home.store / name)
        finding.look(disks)
        if reasons := self._why_not_here(name, finding):
            raise PreconditionFailed(f"{name} can't come back now: {'; '.join(reasons)}", group=name)
        if generation <= self._generation(name):
            raise Refused(f"generation {generation} is not above {self._generation(name)}, which {name} had here")
        self._handovers.remove(name)
        return Failback(
            group=name,
            phase=FailbackPhase.SEALING,
            generation=generation,
            epoch=uuid.uuid4().hex,
            number=int(params.get("number") or 0) + 1,
            wall_ns=self._moment(name, finding),
            disks=disks,
            old=finding.old,
            left_out=finding.left_out,
            machines=finding.machines,
            definition=self._definition(name, finding, disks, params),
            holds=list(earlier.holds) if earlier else [],
            leftovers=[path for path in finding.files() if self._is_ours(name, path)],
        )

    def _is_ours(self, name: str, path: str) -> bool:
        return Path(path).parent == self._home.path / "images" / name

    def _moment(self, name: str, finding: Finding) -> int:
        """When the old disks were written last; not before what the store has already."""
        newest = None
        if (self._home.store / name / "group.json").exists():
            with self._stores.open(name) as store:
                newest = store.newest()
        return max(finding.wall_ns, int(newest.time * 1e9) + 1_000_000 if newest else 0)

    def _definition(
        self, name: str, finding: Finding, disks: Sequence[GroupDisk], params: dict[str, Any]
    ) -> dict[str, Any]:
        """What is sealed with the old disks: the machines as they are defined here. The group is as it comes back: what
        was a network's name at the other site is none here, so a network keeps its own."""
        sealed = {disk.name for disk in finding.old}
        return {
            "version": self._definition_version(name),
            "spec": dict(params["spec"]),
            "machines": machines_of(self._deps.host, finding.machines, GuestReader(self._deps.host)),
            "disks": [asdict(disk) for disk in disks if disk.name in sealed],
            "source_site": self._home.config.site,
            "source_host": self._home.config.host,
        }

    # -- working ------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on with what an earlier supervisor left half done. Call it once."""
        for name in self._files.names():
            with suppress(DrctlError):
                record = self._files.load(name)
                if record is not None and record.phase is FailbackPhase.SEALING:
                    self._begin(name, record, {})

    def close(self) -> None:
        """Let what is under way end at its next step; a later supervisor goes on with it."""
        self._stopped.set()

    def _await_end(self, name: str, progress: Progress) -> None:
        """Of what a new supervisor, or another caller, is doing of it already."""
        while (running := self._running.get(name)) is not None and running.is_alive():
            progress({"step": "waiting", "time": time.time()})
            running.join(TELL_SECONDS)

    def _begin(self, name: str, record: Failback, params: dict[str, Any]) -> queue.Queue[Any]:
        """Do it in a thread of its own; the queue tells of it: reports, then the record or an error. Raises Locked."""
        told: queue.Queue[Any] = queue.Queue()
        with self._lock:
            if (running := self._running.get(name)) is not None and running.is_alive():
                raise Locked(f"old disks of {name} are being sealed at this moment", hint=f"see: drctl status {name}")
            thread = threading.Thread(
                target=self._work, args=(record, params, told), name=f"failback-{name}", daemon=True
            )
            self._running[name] = thread
            thread.start()
        return told

    def _work(self, record: Failback, params: dict[str, Any], told: queue.Queue[Any]) -> None:
        name = record.group
        try:
            tools = (self._deps.host, self._deps.held, self._deps.exports.serve)
            sealing = Sealing(self._home.store / name, self._files, record, tools, self._stopped.is_set)
            sealing.progress = told.put
            self._deps.expiry.forget(name)
            known = self._known(name)
            spec = known.spec if known else msgspec.convert(record.definition["spec"], GroupSpec)
            sealing.run(known.generation if known else record.generation - 1, spec.retention, time.time())
            told.put(record)
        except DrctlError as exc:
            if not isinstance(exc, Interrupted):
                log.warning("%s: %s", name, exc.message)
            record.reason = exc.message
            told.put(exc)
        except Exception as exc:  # whoever follows it must hear of its end
            told.put(DrctlError(f"unexpected {type(exc).__name__}: {exc}", hint="see the appliance's log"))
            raise

    def _follow(self, told: queue.Queue[Any], progress: Progress) -> dict[str, Any]:
        """Pass on what it tells, until its end. When the caller is gone the work goes on."""
        while True:
            try:
                report = told.get(timeout=TELL_SECONDS)
            except queue.Empty:
                progress({"step": "waiting", "time": time.time()})
                continue
            if isinstance(report, Failback):
                return report.as_dict()
            if isinstance(report, DrctlError):
                raise report
            progress(report)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def told(self, group: str) -> dict[str, Any] | None:
        """For the group's status here."""
        record = self._files.load(group)
        return record.as_dict() if record is not None else None

    def look(self) -> None:
        """What has been kept long enough goes; old images that the store holds go when it has gone beyond them. Call it
        often."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + SWEEP_SECONDS
        for name in self._files.names():
            try:
                record = self._files.load(name)
                if record is not None and record.phase is FailbackPhase.OPEN:
                    self._sweep(record)
            except DrctlError as exc:
                log.warning("failback of %s: %s", name, exc.message)

    def _sweep(self, record: Failback) -> None:
        root = self._home.store / record.group
        if not (root / "group.json").exists():
            self._files.remove(record.group)
            return
        changed = let_go(root, record, time.time())
        if record.leftovers and self._gone_beyond(root, record):
            for path in record.leftovers:
                Path(path).unlink(missing_ok=True)
                log.info(
                    "%s: %s is removed: the store holds it as checkpoint #%d", record.group, path, record.checkpoint
                )
            record.leftovers, changed = [], True
        if changed:
            self._files.save(record)

    def _gone_beyond(self, root: Path, record: Failback) -> bool:
        with closing(GroupStore.open(root)) as store:
            newest = store.newest()
        return newest is not None and newest.number > record.number
