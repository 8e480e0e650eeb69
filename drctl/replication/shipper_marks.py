"""The clock and the witnesses of a shipper: cuts marks in time, has them attested, asks for the order to be proven."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

from drctl.errors import ApplianceUnreachable, DrctlError, Refused, WrongPhase
from drctl.replication.control import ControlClient
from drctl.replication.marks import Mark
from drctl.replication.progress import Needs
from drctl.replication.shipper_state import ShipperState, status

ATTEST_TIMEOUT = 5.0
#: Asking again while the supervisor restarts: a yes then still covers the marks of meanwhile.
RETRY = 0.5
ORDER_EVERY = 1.0
#: Before a mark is tried again for the first time.
AGAIN = 0.25
REPORT_EVERY = 1.0
#: Changes within this time make one report.
REPORT_GATHER = 0.1

log = logging.getLogger(__name__)


class MarkCutter:
    """Owns the moments at which marks are cut."""

    def __init__(self, state: ShipperState) -> None:
        self._state = state
        #: The newest mark that the clock cut, and whether it could not cut the one that was due.
        self._newest: Mark | None = None
        self._owed = False

    async def run(self) -> None:
        """A mark each interval, counted from the start so that it does not drift. One that could not be cut, or was
        refused, is tried again before the next is due, at growing distances: a short fault costs no interval."""
        interval = self._state.config.interval
        loop = asyncio.get_running_loop()
        due, again = loop.time() + interval, AGAIN
        while True:
            await asyncio.sleep(max(0.0, min(due - loop.time(), again)))
            if loop.time() >= due:
                due += interval * max(1, -(-(loop.time() - due) // interval))
            elif not self._failed():
                again = AGAIN
                continue
            else:
                again = min(2 * again, interval)
            if not self._state.finished:
                self._cut()

    def _failed(self) -> bool:
        return self._owed or (self._newest is not None and bool(self._newest.failure))

    def _cut(self) -> None:
        try:
            self._newest = self.cut("crash-consistent", ())
            self._owed = False
            self._state.no_mark_because = ""
        except WrongPhase as exc:
            self._owed = True
            if exc.message != self._state.no_mark_because:
                self._state.no_mark_because = exc.message
                self._state.changed.set()

    def cut(self, kind: str, tags: Sequence[str], taken_ns: int = 0) -> Mark:
        """A mark now; of the state at `taken_ns` (wall clock) where that was taken before it was read. Raises
        WrongPhase with the reason why it can't be."""
        state = self._state
        view = state.ring.look()
        mark = state.progress.plan_mark(view, taken_ns or time.time_ns(), time.monotonic_ns(), kind, tags)
        if mark is None:
            raise WrongPhase("too many marks wait for the link; no other is cut")
        state.attest.set()
        state.wake.set()
        return mark

    async def cut_and_wait(self, kind: str, tags: Sequence[str], timeout: float, taken_ns: int = 0) -> Mark:
        """A mark as soon as one can be cut, and its fate: proven and durable.

        Raises WrongPhase (none could be cut in time), Refused (not attested) or ApplianceUnreachable (not durable in
        time; it may still become a checkpoint)."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        mark = await self._when_possible(kind, tags, end, taken_ns)
        future: asyncio.Future[Mark] = loop.create_future()
        self._state.waiting[mark.number] = future
        try:
            async with asyncio.timeout_at(end):
                settled = await future
        except TimeoutError as exc:
            raise ApplianceUnreachable(f"checkpoint #{mark.number} was not durable within {timeout:.0f} s") from exc
        finally:
            self._state.waiting.pop(mark.number, None)
        if settled.failure:
            raise Refused(f"mark #{mark.number} is not a checkpoint: {settled.failure}")
        return settled

    async def _when_possible(self, kind: str, tags: Sequence[str], end: float, taken_ns: int) -> Mark:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return self.cut(kind, tags, taken_ns)
            except WrongPhase:
                if loop.time() >= end:
                    raise
            await asyncio.sleep(0.05)


class Witness:
    """Talks to the supervisor: attestation, order, reports."""

    def __init__(self, state: ShipperState) -> None:
        self._state = state
        path = state.config.supervisor
        self._attests = ControlClient(path)
        self._reports = ControlClient(path)

    async def attest(self) -> None:
        """For ever: have the newest mark attested; a yes covers the older ones."""
        state = self._state
        told = ""
        while True:
            mark = state.progress.marks.to_attest()
            if mark is None:
                state.attest.clear()
                await state.attest.wait()
                continue
            try:
                params = {"group": state.config.group, "number": mark.number}
                answer = await self._attests.call("shipper.attest", params, ATTEST_TIMEOUT)
            except (ApplianceUnreachable, Refused) as exc:
                if exc.message != told:  # else a supervisor that is away for an hour makes 7,200 lines
                    log.info("no mark can be attested: %s", exc)
                told = exc.message
                await asyncio.sleep(RETRY)
                continue
            told = ""
            state.progress.attested(mark.number, _reason(answer), state.ring.look())
            state.settle()
            state.wake.set()

    async def order(self) -> None:
        """For ever: ask to have the order proven while that is what is missing."""
        state = self._state
        client = ControlClient(state.config.supervisor)
        while True:
            await asyncio.sleep(ORDER_EVERY)
            progress = state.progress
            progress.look(state.ring.look())
            if progress.needs is Needs.UNKNOWN or not progress.order_wanted:
                continue
            with contextlib.suppress(DrctlError):
                await client.call("shipper.order", {"group": state.config.group}, 30.0)

    async def report(self) -> None:
        """For ever: tell the supervisor, each second and when something changed."""
        state = self._state
        while True:
            with contextlib.suppress(DrctlError):
                await self._reports.call("shipper.report", status(state), 2.0)
            await asyncio.sleep(REPORT_GATHER)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY - REPORT_GATHER):
                    await state.changed.wait()
            state.changed.clear()


def _reason(answer: Any) -> str:
    """Why not; empty for a yes. What can't be understood is a no."""
    if isinstance(answer, dict) and answer.get("ok") is True:
        return ""
    reason = answer.get("reason") if isinstance(answer, dict) else None
    return str(reason or "the supervisor did not attest it")
