"""Tests of the groups replicated to this host, and the care for every recovery: what guards it, what goes on with it.

Each recovery is worked on by one operation at a time; the methods block, so call them from a thread of the caller's
own. Errors of single machines are in the result (`exit_code` 3), errors that concern all are raised."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from drctl.appliance.control import Handler
from drctl.appliance.recovery.end import take_down
from drctl.appliance.recovery.fit import FitService
from drctl.appliance.recovery.forecast import scratch_limit
from drctl.appliance.recovery.guard import Background
from drctl.appliance.recovery.guest import RecoveredGuests
from drctl.appliance.recovery.ports import Progress, Tools
from drctl.appliance.recovery.reign import Reigns
from drctl.appliance.recovery.state import LIVE, RecoveryFiles, RecoveryKind, RecoveryPhase
from drctl.appliance.recovery.steps import PARALLEL
from drctl.appliance.recovery.works import Work, Works, in_thread
from drctl.errors import DrctlError, WrongPhase

#: Records of ended tests are kept this long, so that `test list` can still say why one ended.
KEEP_ENDED_SECONDS = 7 * 86400
#: Between two looks for records whose time is over.
SWEEP_SECONDS = 3600.0
#: Of a test's label so much is kept.
LONGEST_LABEL = 200

log = logging.getLogger(__name__)


class Recovery:
    """The recoveries of one appliance. Methods may be called from any thread; `supervise` from one.

    `reigns` has the methods of failover, switchover, commit and rollback, `guests` those that ask machines,
    `fit` those that tell what would come of machines here. `boot` identifies the host's boot
    (/proc/sys/kernel/random/boot_id)."""

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
        self._works = Works(tools, files, boot, background=background, parallel=parallel)
        self.reigns = Reigns(self._works)
        self.fit = FitService(tools)
        self.guests = RecoveredGuests(tools.hypervisor, files)
        self._swept = tools.clock.monotonic()

    def handlers(self) -> dict[str, Handler]:
        """The methods of recoveries, for an appliance's control socket."""
        reigns = self.reigns
        return {
            "test.start": self.test_start,
            "test.list": self.test_list,
            "test.stop": self.test_stop,
            "recovery.boot": self.boot,
            "recovery.agent": self.guests.agent,
            "recovery.console": self.guests.console,
            "failover.plan": reigns.plan,
            "failover.run": reigns.failover,
            "failover.hold": reigns.cancel_auto,
            "switchover.run": reigns.switchover,
            "rollback.plan": reigns.rollback_plan,
            "rollback": reigns.rollback,
            "commit": reigns.commit,
        }

    # -- tests ---------------------------------------------------------------------------------------------------

    def test_start(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Boot a group's machines (or some of them) at a checkpoint, cut off, while replication goes on.

        A live test of the group that has the same `label` is returned as it is: the order was given before."""
        label = str(params.get("label") or "")[:LONGEST_LABEL]
        for earlier in self._works.records() if label else []:
            if earlier.test and (earlier.group, earlier.label) == (params["group"], label) and earlier.phase in LIVE:
                return self._works.told(earlier)
        record = self._works.new_record(RecoveryKind.TEST, self._works.resolve(params), params)
        record.label = label
        record.scratch_limit = scratch_limit(self._tools, int(params.get("scratch_limit") or 0))
        record.times["chosen"] = record.times["ordered"]
        work = self._works.adopt(record)
        with self._works.holding(work):
            work.steps.save()
            try:
                self._works.start(work, progress)
            except DrctlError:
                if not self._works.closing and not work.ending:
                    self._take_down(work, "its start failed")
                raise
        return self._works.told(record)

    def boot(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Switch on machines of a test, failover or switchover that were held back, see Works.boot_machines."""
        return self._works.boot_machines(params, progress)

    def test_list(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        """The live tests, and those that have ended for a reason of their own."""
        del progress
        group = str(params.get("group") or "")
        records = [r for r in self._works.records() if r.test and group in ("", r.group)]
        return [self._works.told(r) for r in records if r.phase in LIVE or r.reason]

    def test_stop(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Remove all of a test; one that has ended already is no error."""
        del progress
        record = self._files.load(str(params["id"]))
        if not record.test:
            raise WrongPhase(
                f"{record.id} is a {record.kind} of {record.group}, not a test", hint=f"drctl rollback {record.group}"
            )
        work = self._works.get(record.id)
        if work is None:
            return {"id": record.id, "removed": False}
        self._end(work, "")
        return {"id": record.id, "removed": True}

    # -- for the supervisor --------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Take over what an earlier supervisor left: adopt, go on, or take down. Call once, before `supervise`."""
        for record in self._works.records():
            if record.phase in LIVE:
                self._resume(self._works.adopt(record))
        self._sweep()

    def _resume(self, work: Work) -> None:
        record = work.record
        if not record.test:
            self.reigns.resume(work)
        elif record.phase is RecoveryPhase.STOPPING:
            self._works.do_in_background(work, "resume", lambda: self._take_down(work, record.reason))
        elif record.boot != self._works.boot:
            self._works.do_in_background(work, "resume", lambda: self._take_down(work, "the host was restarted"))
        elif record.phase is RecoveryPhase.STARTING:
            self._works.do_in_background(work, "resume", lambda: self._works.restart(work))

    def _sweep(self) -> None:
        """Records, and what they kept, whose time is over."""
        self._swept = self._tools.clock.monotonic()
        now = self._tools.clock.time()
        for record in self._works.records():
            if record.phase is RecoveryPhase.ROLLED_BACK:
                self.reigns.expire(record)
            elif record.phase is RecoveryPhase.ENDED and now - record.times.get("ended", now) > KEEP_ENDED_SECONDS:
                self._files.remove(record.id)

    def supervise(self) -> None:
        """One look at every live recovery, see recovery_guard. Call it each 250 ms."""
        for work in self._works.live():
            if work.ending or not work.record.guarded:
                continue
            reason = work.guard.look()
            if reason:
                log.error("test %s ends: %s", work.record.id, reason)
                work.ending = True
                self._works.background(f"end-{work.record.id}", partial(self._try_end, work, reason))
        self.reigns.look()
        if self._tools.clock.monotonic() - self._swept > SWEEP_SECONDS:
            self._sweep()

    def close(self) -> None:
        """Let operations end at their next step; a later supervisor goes on with them."""
        self._works.close()
        self._tools.views.close()

    def recoveries(self, group: str) -> list[dict[str, Any]]:
        """The live, committed and rolled-back recoveries of a group, for its status."""
        return [
            self._works.told(r)
            for r in self._works.records()
            if r.group == group and r.phase is not RecoveryPhase.ENDED
        ]

    # -- inside --------------------------------------------------------------------------------------------------

    def _end(self, work: Work, reason: str) -> None:
        work.ending = True
        work.steps.cancelled.set()
        with work.lock:
            self._take_down(work, reason)

    def _try_end(self, work: Work, reason: str) -> None:
        try:
            self._end(work, reason)
        except DrctlError as exc:
            log.warning("%s: %s", work.record.id, exc.message)

    def _take_down(self, work: Work, reason: str) -> None:
        if work.record.phase is RecoveryPhase.ENDED:
            return
        work.record.reason = reason
        take_down(self._tools, work.steps)
        self._works.forget(work)
