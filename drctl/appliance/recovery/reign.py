"""Failover, switchover, commit and rollback: what lets a group reign at this host, makes that final, or undoes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from drctl.appliance.recovery.commit import localize
from drctl.appliance.recovery.forecast import forecast
from drctl.appliance.recovery.ports import Progress
from drctl.appliance.recovery.rollback import discarded, remove_kept, roll_back
from drctl.appliance.recovery.state import (
    Auto,
    RecoveryKind,
    RecoveryPhase,
    RecoveryRecord,
)
from drctl.appliance.recovery.works import Work, Works
from drctl.errors import DrctlError, Refused, SourceAlive, WrongPhase
from drctl.model.checkpoint import Checkpoint, CheckpointKind
from drctl.model.move import Settlement

#: The overlays of what was rolled back are kept this long.
KEEP_ROLLED_BACK_SECONDS = 7 * 86400.0
#: What the appliance does by itself and could not do is tried again after this time.
RETRY_SECONDS = 30.0

log = logging.getLogger(__name__)


def _quietly(report: dict[str, Any]) -> None:
    """Nobody follows the work."""
    del report


class Reigns:
    """The control methods that decide where a group reigns. May be called from any thread; `look` from one."""

    def __init__(self, works: Works) -> None:
        self._works = works
        self._tools = works.tools

    # -- beginning --------------------------------------------------------------------------------------------------

    def plan(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """What a failover would do, without doing any of it."""
        del progress
        found = self._works.resolve(params)
        generation = self._tools.stores.generation(str(params["group"])) + 1
        record = self._works.new_record(RecoveryKind.FAILOVER, found, params, generation)
        return forecast(self._tools, record, *found)

    def failover(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Let the group reign here and boot it; called again, go on with what is not done or has failed."""
        return self._run(params, progress, self._new_failover)

    def switchover(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The same at the final checkpoint of a source that has stopped its machines and handed over."""
        return self._run(params, progress, self._new_switchover)

    def _run(
        self, params: dict[str, Any], progress: Progress, make: Callable[[dict[str, Any]], RecoveryRecord]
    ) -> dict[str, Any]:
        work = self._works.of_group(str(params["group"]))
        if work is None:
            record = make(params)
            record.auto = self._auto_from(params)
            work = self._works.adopt(record)
        if work.record.phase is RecoveryPhase.ROLLING_BACK:
            group = work.record.group
            raise WrongPhase(f"{group} is being rolled back", hint=f"drctl rollback {group} goes on with it")
        staged = bool(params.get("staged"))
        if work.record.phase is RecoveryPhase.RUNNING and not work.record.failed() and (staged or not work.record.held):
            return self._works.told(work.record)
        with self._works.holding(work):
            if not staged:
                work.record.held = []
            work.steps.save()
            self._works.start(work, progress)
        return self._works.told(work.record)

    def _demand_not_committed(self, group: str, generation: int) -> None:
        for record in self._works.records():
            final = record.phase is RecoveryPhase.COMMITTED and record.generation == generation
            if not record.test and record.group == group and final:
                raise WrongPhase(f"{group} was failed over to this host and committed already ({record.id})")

    def _new_failover(self, params: dict[str, Any]) -> RecoveryRecord:
        group = str(params["group"])
        generation = self._tools.stores.generation(group)
        self._demand_not_committed(group, generation)
        reason = str(params.get("source_is_down") or "")
        if not reason:
            self._demand_silent_source(group)
        if not reason or params.get("confirmed") not in (True, group):
            raise Refused(
                f"a failover of {group} needs the reason why its source is down, and the typed name of the group",
                hint=f"drctl failover {group} --source-is-down REASON",
            )
        record = self._works.new_record(RecoveryKind.FAILOVER, self._works.resolve(params), params, generation + 1)
        record.source_is_down = reason
        return record

    def _demand_silent_source(self, group: str) -> None:
        """Raises SourceAlive while the group's stream stands: nobody who sends is gone."""
        heard = self._tools.sources.heard(group)
        if heard is not None and heard.connected:
            raise SourceAlive(
                f"the source of {group} is alive: its stream stands at this moment",
                hint=f"a planned move without loss: drctl switchover {group}",
                group=group,
            )

    def _new_switchover(self, params: dict[str, Any]) -> RecoveryRecord:
        group, generation = str(params["group"]), int(params["generation"])
        here = self._tools.stores.generation(group)
        self._demand_not_committed(group, here)
        if generation != here + 1:
            raise WrongPhase(
                f"{group} was handed over to generation {generation}, but this site is at generation {here}",
                hint=f"give it back to the source: drctl rollback {group}",
                group=group,
            )
        number = int(params["number"])
        chosen, source = self._works.resolve({"group": group, "checkpoint": "latest"})
        self._demand_final(group, chosen, number, str(params["epoch"]))
        order = params | {"checkpoint": f"#{number}", "machines": []}
        return self._works.new_record(RecoveryKind.SWITCHOVER, (chosen, source), order, generation)

    def _demand_final(self, group: str, chosen: Checkpoint, number: int, epoch: str) -> None:
        """Raises Refused unless the newest checkpoint is the one that the source ended with: only then is loss zero."""
        if (chosen.number, chosen.epoch, chosen.kind) != (number, epoch, CheckpointKind.FINAL):
            raise Refused(
                f"the newest checkpoint of {group} here, #{chosen.number}, is not the final one, #{number}, that the "
                "source ended with",
                hint=f"start the source again: drctl rollback {group}",
                group=group,
            )

    def _auto_from(self, params: dict[str, Any]) -> Auto | None:
        asked = params.get("auto")
        if not asked:
            return None
        seconds = float(asked["after_seconds"])
        if seconds <= 0:
            raise Refused("the time after which to commit or roll back must be more than 0")
        try:
            action = Settlement(str(asked["action"]))
        except ValueError as exc:
            raise Refused(f"{asked['action']!r} is neither commit nor rollback") from exc
        return Auto(action, self._tools.clock.time() + seconds)

    # -- ending -----------------------------------------------------------------------------------------------------

    def commit(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Localize the disks of a failed-over group until it needs no view any more."""
        group = str(params["group"])
        work = self._works.of_group(group)
        if work is None:
            done = [r for r in self._works.records() if r.group == group and r.phase is RecoveryPhase.COMMITTED]
            if not done:
                raise WrongPhase(f"{group} is not failed over to this host", hint=f"see: drctl status {group}")
            return self._works.told(max(done, key=lambda r: r.times.get("committed", 0.0)))
        if work.record.phase is RecoveryPhase.STARTING:
            raise WrongPhase(f"the {work.record.kind} of {group} is not done yet", hint=f"see: drctl status {group}")
        if work.record.phase is RecoveryPhase.ROLLING_BACK:
            raise WrongPhase(f"{group} is being rolled back", hint=f"drctl rollback {group} goes on with it")
        with self._works.holding(work):
            # First of all: whatever comes of it, nothing is rolled back by the clock any more.
            self._cancel_auto(work, "a commit was asked for")
            localize(self._tools, work.steps, progress)
        self._works.forget(work)
        return self._works.told(work.record)

    def rollback_plan(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """What a rollback would discard, and which generation it would leave behind."""
        del progress
        group = str(params["group"])
        record = self._to_roll_back(group, params)
        if record is None:
            generation = max(int(params.get("generation") or 0), self._tools.stores.generation(group))
            return {"group": group, "recovery": None, "generation": generation, "discards": []}
        generation = max(record.given_back, record.generation + 1)
        return {
            "group": group,
            "recovery": self._works.told(record),
            "generation": generation,
            "discards": discarded(self._tools, record),
        }

    def rollback(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Stop the recovered machines, keep what they wrote, take streams of a higher generation again.

        Given again it goes on, or tells what is done. `generation` asks for one at least as high, also where nothing
        was recovered: a switchover that ended between its two halves leaves the source handed over."""
        group = str(params["group"])
        record = self._to_roll_back(group, params)
        if record is not None and record.phase is not RecoveryPhase.ROLLED_BACK:
            record = self._roll_back(group, progress)
        wanted = max(int(params.get("generation") or 0), self._tools.stores.generation(group))
        self._tools.stores.give_back(group, wanted)
        told = self._works.told(record) if record is not None else None
        return {
            "group": group,
            "recovery": told,
            "generation": wanted,
            "kept": discarded(self._tools, record) if record is not None else [],
            "kept_until": record.times["rolled-back"] + KEEP_ROLLED_BACK_SECONDS if record is not None else None,
        }

    def _to_roll_back(self, group: str, params: dict[str, Any]) -> RecoveryRecord | None:
        """The recovery that reigns, or the newest that was rolled back. Raises WrongPhase when there is none, unless a
        generation is asked for, or when a commit was asked for."""
        record = self._newest_reign(group)
        if record is None and not params.get("generation"):
            raise WrongPhase(
                f"{group} is not failed over to this host: there is nothing to roll back",
                hint=f"see: drctl status {group}",
                group=group,
            )
        if record is not None:
            _demand_uncommitted(record)
        return record

    def state(self, group: str) -> str:
        """The state of the recovery by which the group reigns here, or did last; "" when there was none."""
        record = self._newest_reign(group)
        return record.state() if record is not None else ""

    def _newest_reign(self, group: str) -> RecoveryRecord | None:
        """The recovery that reigns here, or reigned last with nothing happening since."""
        work = self._works.of_group(group)
        if work is not None:
            return work.record
        here = self._tools.stores.generation(group)
        found = [r for r in self._works.records() if not r.test and r.group == group]
        newest = found[-1] if found else None
        return newest if newest is not None and max(newest.generation, newest.given_back) >= here else None

    def _roll_back(self, group: str, progress: Progress) -> RecoveryRecord:
        work = self._works.of_group(group)
        assert work is not None
        work.ending = True
        work.steps.cancelled.set()
        try:
            with work.lock:
                _demand_uncommitted(work.record)
                roll_back(self._tools, work.steps, progress)
        finally:
            work.ending = False
        self._works.forget(work)
        return work.record

    # -- by the clock -------------------------------------------------------------------------------------------------

    def cancel_auto(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Whoever says so has looked at the service: nothing is done by the clock any more."""
        del progress
        group = str(params["group"])
        work = self._works.of_group(group)
        if work is None or work.record.auto is None:
            raise WrongPhase(f"nothing is going to be done by itself with {group}", hint=f"see: drctl status {group}")
        with self._works.holding(work):
            self._cancel_auto(work, f"{params.get('by') or 'an operator'} called it off")
        return self._works.told(work.record)

    def _cancel_auto(self, work: Work, reason: str) -> None:
        auto = work.record.auto
        if auto is not None and not auto.cancelled:
            auto.cancelled = reason
            work.steps.save()

    def look(self) -> None:
        """What is due by the clock is begun; what the appliance could not do is tried again. Call it each 250 ms."""
        now, monotonic = self._tools.clock.time(), self._tools.clock.monotonic()
        for work in self._works.live():
            record = work.record
            if record.test or work.ending or work.lock.locked() or monotonic < work.retry_at:
                continue
            if record.phase is RecoveryPhase.ROLLING_BACK:
                self._begin(work, "roll-back", self._strike_rollback)
            elif (auto := record.auto) is not None and not auto.cancelled and now >= auto.due:
                log.warning("%s: %s by the clock", record.group, auto.action)
                strike = self._strike_commit if auto.action is Settlement.COMMIT else self._strike_rollback
                self._begin(work, auto.action.value, strike)

    def _begin(self, work: Work, name: str, action: Callable[[Work], None]) -> None:
        work.retry_at = self._tools.clock.monotonic() + RETRY_SECONDS
        self._works.do_in_background(work, name, lambda: action(work))

    def _strike_commit(self, work: Work) -> None:
        """The lock is held. A commit that fails is tried again, as long as nobody rolls back."""
        if work.record.phase in (RecoveryPhase.RUNNING, RecoveryPhase.COMMITTING):
            localize(self._tools, work.steps, _quietly)
            self._works.forget(work)

    def _strike_rollback(self, work: Work) -> None:
        """The lock is held: whoever called it off before is seen, whoever comes later is too late."""
        record = work.record
        off = record.auto is None or bool(record.auto.cancelled)
        if record.phase is not RecoveryPhase.ROLLING_BACK and (
            off or record.phase not in (RecoveryPhase.STARTING, RecoveryPhase.RUNNING)
        ):
            return
        roll_back(self._tools, work.steps, _quietly)
        self._works.forget(work)

    # -- for a new supervisor -----------------------------------------------------------------------------------------

    def resume(self, work: Work) -> None:
        """Go on with what an earlier supervisor left."""
        record = work.record
        restarted = record.boot != self._works.boot
        if record.phase is RecoveryPhase.ROLLING_BACK:
            self._begin(work, "roll-back", self._strike_rollback)
        elif record.phase is RecoveryPhase.COMMITTING:
            self._works.do_in_background(work, "resume", lambda: self._recommit(work, restarted=restarted))
        elif record.phase is RecoveryPhase.STARTING or restarted:
            self._works.do_in_background(work, "resume", lambda: self._works.restart(work))

    def _recommit(self, work: Work, *, restarted: bool) -> None:
        if restarted:
            self._works.restart(work)
        if work.record.needs_view:
            self._tools.views.ensure(work.record)
        localize(self._tools, work.steps, _quietly)
        self._works.forget(work)

    def expire(self, record: RecoveryRecord) -> None:
        """Forget what was rolled back, and remove what it kept, when its time is over."""
        age = self._tools.clock.time() - record.times.get("rolled-back", self._tools.clock.time())
        if age > KEEP_ROLLED_BACK_SECONDS:
            try:
                remove_kept(self._tools, record)
                self._works.files.remove(record.id)
            except DrctlError as exc:
                log.warning("%s: %s", record.id, exc.message)


def _demand_uncommitted(record: RecoveryRecord) -> None:
    """Raises WrongPhase once a commit was asked for."""
    if record.phase in (RecoveryPhase.COMMITTING, RecoveryPhase.COMMITTED):
        raise WrongPhase(
            f"a commit of {record.group} was asked for already: it can't be rolled back any more",
            hint=f"drctl status {record.group} shows how far it is",
            group=record.group,
        )
