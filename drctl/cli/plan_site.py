"""The recovery sites of a plan's groups, as its run sees them: tests by `test.start` and `test.stop`.

An appliance boots a group as a whole, so a machine's step waits until it runs. Used from several threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, side
from drctl.cli.recovery import RUN_TIMEOUT
from drctl.errors import DrctlError, PreconditionFailed, StepFailed
from drctl.model.site import Host
from drctl.plan.plan import Mode
from drctl.plan.step import MachineOrder, Recovery

#: Between two looks at a machine that does not run yet.
_LOOK = 0.5
#: States of a test of which nothing is left.
_GONE = ("stopped",)


class DrillSite:
    """Implements plan.perform.RecoverySite for mode test. Its tests carry the run's name as their label, so that they
    are known again. Invariant: stops no test that this run did not start."""

    def __init__(self, context: Context, groups: Sequence[str], run: str) -> None:
        self._context = context
        self._run = run
        self._hosts: dict[str, Host] = {name: side(context, name, "recovery") for name in groups}
        self._before: dict[str, frozenset[str]] = {}
        self._tests: dict[str, str] = {}

    def recover(self, order: Recovery, cancelled: threading.Event) -> Mapping[str, Any]:
        """Boot copies of the group's machines. Raises DrctlError; StepFailed when none of them runs."""
        del cancelled  # the appliance takes down by itself what it could not start
        if order.mode is not Mode.TEST:
            raise PreconditionFailed(f"mode {order.mode} is not carried out by this version")
        group, host = order.group, self._hosts[order.group]
        self._before[group] = frozenset(str(one["id"]) for one in self._list(group))
        wanted = [machine.name for machine in order.machines if machine.boot]
        everything = len(wanted) == len(order.machines)
        result = self._context.call(
            host,
            "test.start",
            group=group,
            checkpoint=order.checkpoint,
            machines=[] if everything else wanted,
            label=self._run,
            timeout=RUN_TIMEOUT,
        )
        self._tests[group] = str(result["id"])
        if result.get("state") == "failed":
            reasons = [str(one["reason"]) for one in result.get("machines") or () if one.get("reason")]
            raise StepFailed(f"no copy of {group} runs: {(reasons or [result.get('reason') or 'unknown'])[0]}")
        checkpoint = result.get("checkpoint") or {}
        return {
            "recovery": self._tests[group],
            "checkpoint": checkpoint.get("number"),
            "checkpoint_time": checkpoint.get("time"),
        }

    def boot(self, group: str, order: MachineOrder, cancelled: threading.Event) -> Mapping[str, Any]:
        """Wait until the machine runs. Raises StepFailed when it failed."""
        while True:
            machine = self._machine(group, order.name)
            state = machine.get("state")
            if state == "running":
                return {"notes": machine["notes"]} if machine.get("notes") else {}
            if state == "failed":
                raise StepFailed(str(machine.get("reason") or f"{order.name} does not run"))
            if cancelled.wait(_LOOK):
                raise StepFailed(f"given up; {order.name} is {state}")

    def hold(self, group: str) -> Mapping[str, Any]:
        raise PreconditionFailed(f"{group}: a test is not rolled back by itself")

    def undo(self, group: str) -> Mapping[str, Any]:
        return self.clean_up(group)

    def clean_up(self, group: str) -> Mapping[str, Any]:
        """Remove the group's copies. Raises DrctlError; StepFailed when it is not known which test is ours."""
        tests = self._list(group)
        own = [str(one["id"]) for one in tests if self._is_ours(group, one)]
        if not own:
            self._check_strays(group, tests)
        for identity in own:
            self._context.call(self._hosts[group], "test.stop", id=identity, timeout=RUN_TIMEOUT)
        return {"removed": own}

    def agent(self, group: str, machine: str, sent: dict[str, Any]) -> Any:
        raise StepFailed(f"{machine}: the appliance gives no access to its guest agent yet")

    def console(self, group: str, machine: str) -> str:
        raise StepFailed(f"{machine}: the appliance gives no access to its console yet")

    def standing(self) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
        """The groups of which copies stand, and the machines (group, name) that run. Raises DrctlError."""
        groups: set[str] = set()
        up: set[tuple[str, str]] = set()
        for group in self._hosts:
            for test in self._list(group):
                if self._is_ours(group, test):
                    self._tests[group] = str(test["id"])
                    groups.add(group)
                    machines = test.get("machines") or ()
                    up |= {(group, str(one["name"])) for one in machines if one.get("state") == "running"}
        return frozenset(groups), frozenset(up)

    def _is_ours(self, group: str, test: Mapping[str, Any]) -> bool:
        """Told by its label, or, where the appliance keeps none, by the id that starting it returned."""
        known = test.get("label") == self._run or str(test["id"]) == self._tests.get(group)
        return known and test.get("state") not in _GONE

    def _check_strays(self, group: str, tests: Sequence[Mapping[str, Any]]) -> None:
        """With an appliance that keeps no labels, a start without an answer: a test that came since may be ours."""
        before = self._before.get(group)
        if before is None or group in self._tests:
            return
        new = sorted(str(one["id"]) for one in tests if "label" not in one and str(one["id"]) not in before)
        if new:
            raise StepFailed(
                f"test {', '.join(new)} of {group} may be what this run started: it got no answer",
                hint=f"drctl test list {group}, then drctl test stop {new[0]}",
            )

    def _list(self, group: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._context.call(
            self._hosts[group], "test.list", group=group, timeout=4 * READ_TIMEOUT
        )
        return found

    def _machine(self, group: str, name: str) -> Mapping[str, Any]:
        try:
            tests = self._list(group)
        except DrctlError as exc:
            return {"state": f"unknown: {exc.message}"}
        test = next((one for one in tests if self._is_ours(group, one)), None)
        if test is None:
            return {"state": "failed", "reason": f"the test {self._tests.get(group, '')} of {group} is gone"}
        machines: list[dict[str, Any]] = test.get("machines") or []
        found = next((one for one in machines if one["name"] == name), None)
        return found or {"state": "failed", "reason": f"{name} is not in test {test['id']}"}
