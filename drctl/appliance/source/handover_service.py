"""Control methods of a switchover's source half, and of taking a group back. The work goes on when its caller is gone.

What a handover acts through is the group's Protection, see source/handover.py for the steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from drctl.appliance.config import Home
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.handover import Handing, HandoverHost, Progress, WallTimer, begin, why_not
from drctl.appliance.source.handover_record import FinalMark, Handover, HandoverFiles, HandoverPhase
from drctl.appliance.source.handover_state import handed_over, taken_back
from drctl.appliance.source.image_stamp import Stamp, image_stamp
from drctl.appliance.source.protection import Protection
from drctl.errors import ApplianceUnreachable, DrctlError, Locked, NotFound, Refused, StepFailed
from drctl.model.phase import Phase
from drctl.replication.reign import Answer, Reign

log = logging.getLogger(__name__)

#: A caller that hears nothing for so long hears at least that the work goes on; one that is gone is noticed by it.
TELL_SECONDS = 1.0
#: How often the other side is asked whether it has given a group back by itself.
ASK_SECONDS = 5.0

#: What the thread of a handover tells who follows it.
Told = queue.Queue[dict[str, Any] | DrctlError | Handover]


class ProtectedGroup:
    """A Protection as a handover sees it."""

    def __init__(self, protection: Protection, host: Any) -> None:
        self._protection = protection
        self._host = host

    @property
    def phase(self) -> Phase:
        return self._protection.state.phase

    @property
    def generation(self) -> int:
        return self._protection.state.generation

    @property
    def epoch(self) -> str:
        return self._protection.state.epoch

    def machines(self) -> list[str]:
        return list(self._protection.state.spec.machines)

    def why_not_ready(self) -> list[str]:
        protection = self._protection
        if not protection.state.epoch:
            return ["nothing is attached"]
        reasons = []
        report = protection.shipper.report()
        if report is None:
            reasons.append("the shipper has not reported yet")
        elif report.wants != "nothing":
            reasons.append(report.reason or f"a pass is needed first ({report.wants})")
        with suppress(StepFailed):
            if protection.worker.dropping():
                reasons.append("the ring was full, and dropped blocks are not there yet")
            elif not protection.worker.ordered():
                reasons.append("the order of writes is not proven")
        if why := protection.attest():
            reasons.append(why)
        return reasons

    def drain(self, timeout_seconds: float) -> FinalMark:
        # A guest's last words to its firmware and its TPM belong to its last checkpoint.
        if self._protection.definition.refresh(self._protection.state, force=True):
            self._protection.shipper.call("definition")
        order = {"tags": [], "timeout": timeout_seconds}
        told = self._protection.shipper.call("drain", order, timeout_seconds=timeout_seconds + 5)
        return FinalMark(int(told["number"]), float(told["time"]), int(told["sequence"]), self._protection.state.epoch)

    def undrain(self) -> None:
        if self._protection.state.epoch:
            with suppress(ApplianceUnreachable):
                self._protection.shipper.call("undrain")

    def published(self) -> int:
        return self._protection.worker.published()

    def stamps(self) -> Mapping[str, Stamp | None]:
        found = {}
        for name in self.machines():
            for disk in self._host.machine(name).disks:
                found[f"{name}.{disk.target}"] = image_stamp(disk.source)
        return found

    def give_away(self, reason: str) -> None:
        self._protection.change(lambda state: handed_over(state, reason))

    def take_back(self, generation: int, clean: Mapping[str, Stamp]) -> None:
        self._protection.change(lambda state: taken_back(state, generation, clean))


class HandoverService:
    """The handovers of this host's groups. Methods may be called from any thread.

    `find` gives a group's protection or raises NotFound; `unguarded` makes what keeps superseded guests from starting
    look at the groups anew; `asking` asks the other side who reigns, whatever generation that is."""

    def __init__(
        self,
        home: Home,
        host: HandoverHost,
        find: Callable[[str], Protection],
        unguarded: Callable[[], None],
        asking: Callable[[GroupState], Answer],
    ) -> None:
        self._files = HandoverFiles(home.path / "handovers")
        self._host = host
        self._find = find
        self._unguarded = unguarded
        self._asking = asking
        self._due = 0.0
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def resume(self, groups: list[str]) -> None:
        """Go on with what an earlier supervisor left half done. Call once, before `look`."""
        for name in groups:
            with suppress(DrctlError):
                record = self._files.load(name)
                if record is not None and record.phase is not HandoverPhase.HANDED_OVER:
                    self._begin(name, self._go_on)

    def look(self) -> None:
        """Take back what the recovery side gave back with nobody there to say so, by the clock. Call it often."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + ASK_SECONDS
        for name in self._files.names():
            with suppress(DrctlError):
                record = self._files.load(name)
                if record is not None and record.phase is HandoverPhase.HANDED_OVER:
                    self._begin(name, self._ask)

    def told(self, group: str) -> dict[str, Any] | None:
        """For the group's status: the handover that is under way or done."""
        record = self._files.load(group)
        return record.as_dict() if record is not None else None

    # -- methods ----------------------------------------------------------------------------------------------------

    def plan(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Whether the group could be handed over now, and what of it is done already."""
        del progress
        name = str(params.get("group"))
        group = self._group(name)
        record = self._files.load(name)
        return {
            "group": name,
            "generation": group.generation,
            "phase": group.phase.value,
            "handover": record.as_dict() if record is not None else None,
            "reasons": [] if record is not None else why_not(group, self._host),
        }

    def run(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Stop the machines, make the final mark, leave. Given again it goes on, or tells what is done."""
        name = str(params.get("group"))
        self._find(name)
        return self._follow(self._begin(name, partial(self._hand_over, params)), progress).as_dict()

    def undo(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Let the group reign here again. `generation`: what the recovery side takes streams of now; without it a
        handover is called off that has not come to its final mark yet. Nothing is done when the group reigns here."""
        name, generation = str(params.get("group")), int(params.get("generation") or 0)
        group = self._group(name)
        record = self._follow(self._begin(name, partial(self._undo, generation), wait=True), progress)
        return {
            "group": name,
            "phase": group.phase.value,
            "generation": group.generation,
            "started": list(record.machines),
        }

    # -- inside -----------------------------------------------------------------------------------------------------

    def _group(self, name: str) -> ProtectedGroup:
        return ProtectedGroup(self._find(name), self._host)

    def _handing(self, name: str, record: Handover) -> Handing:
        return Handing(self._group(name), self._host, self._files, record, WallTimer())

    # Each of these works in a thread of its own, with the group's lock held: what it reads stays true meanwhile.

    def _hand_over(self, params: dict[str, Any], name: str, tell: Progress) -> Handover:
        record = begin(self._group(name), self._host, self._files, name, params)
        if record.phase is not HandoverPhase.HANDED_OVER:
            handing = self._handing(name, record)
            handing.progress = tell
            handing.hand_over()
        return record

    def _go_on(self, name: str, tell: Progress) -> Handover:
        """What a new supervisor goes on with."""
        record = self._files.load(name)
        if record is None:
            raise NotFound("handover", name)
        handing = self._handing(name, record)
        handing.progress = tell
        if record.phase is HandoverPhase.TAKING_BACK:
            handing.take_back(record.generation, self._unguarded)
        else:
            handing.hand_over()
        return record

    def _undo(self, generation: int, name: str, tell: Progress) -> Handover:
        group, record = self._group(name), self._files.load(name)
        if record is None:
            # Without a handover the machines were not stopped by us, so they are not started by us.
            record = Handover(name, HandoverPhase.HANDED_OVER, group.generation + 1, [])
            if group.phase is not Phase.FAILED_OVER:
                return record
        handing = self._handing(name, record)
        handing.progress = tell
        if record.phase is HandoverPhase.STOPPING:
            handing.call_off()
        elif generation <= group.generation and record.phase is not HandoverPhase.TAKING_BACK:
            raise Refused(
                f"{name} was handed over: it comes back under a generation above {group.generation}, which the "
                "recovery side has to take first",
                hint=f"drctl rollback {name}",
            )
        else:
            handing.take_back(generation, self._unguarded)
        return record

    def _ask(self, name: str, tell: Progress) -> Handover:
        """The other side has given the group back when it takes streams of a generation above the one it was given."""
        del tell
        record = self._files.load(name)
        if record is None:
            raise NotFound("handover", name)
        answer = self._asking(self._find(name).state)
        if answer.reign is Reign.HERE and answer.generation > record.generation:
            log.warning("%s was given back at generation %d; its machines are started here", name, answer.generation)
            self._handing(name, record).take_back(answer.generation, self._unguarded)
        return record

    def _begin(self, name: str, work: Callable[[str, Progress], Handover], *, wait: bool = False) -> Told:
        """Do it in a thread of its own, alone; the queue tells of it: reports, then the record or an error.

        Raises Locked when another works on it, unless it shall `wait`."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        if not wait and not lock.acquire(blocking=False):
            raise Locked(f"{name} is being handed over or taken back at this moment", hint=f"see: drctl status {name}")
        told: Told = queue.Queue()

        def run() -> None:
            if wait:
                lock.acquire()
            try:
                told.put(work(name, told.put))
            except DrctlError as exc:
                log.warning("%s: %s", name, exc.message)
                told.put(exc)
            except Exception as exc:  # whoever follows it must hear of its end
                told.put(DrctlError(f"unexpected {type(exc).__name__}: {exc}", hint="see the appliance's log"))
                raise
            finally:
                lock.release()

        threading.Thread(target=run, name=f"handover-{name}", daemon=True).start()
        return told

    def _follow(self, told: Told, progress: Progress) -> Handover:
        """Pass on what it tells, until its end. Raises its error; when the caller is gone the work goes on."""
        while True:
            try:
                report = told.get(timeout=TELL_SECONDS)
            except queue.Empty:
                progress({"step": "waiting", "time": time.time()})
                continue
            if isinstance(report, Handover):
                return report
            if isinstance(report, DrctlError):
                raise report
            progress(report)
