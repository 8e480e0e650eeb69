"""The recovery sites of a plan's groups, as its run sees them: what every mode has in common, and tests.

An appliance that can't boot in stages boots a group as a whole: then a machine's step waits until it runs. Used from
several threads."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, in_parallel, side
from drctl.cli.recovery import RUN_TIMEOUT
from drctl.errors import DrctlError, PreconditionFailed, StepFailed
from drctl.model.site import Host
from drctl.plan.inventory import Ending
from drctl.plan.plan import Mac
from drctl.plan.step import MachineOrder, Recovery

#: Between two looks at a machine that does not run yet.
_LOOK = 0.5
#: One question to a machine's agent (its own limit is 5 s), or a console's text.
ASK_TIMEOUT = 15.0
#: A screen is there or not; cleaning up waits for it.
SCREEN_TIMEOUT = 5.0
#: Pictures and texts of one group's machines, in characters: below the record's longest line.
PICTURES = 2 * 1024 * 1024
#: States of a test of which nothing is left.
_GONE = ("stopped",)


class GroupSite(ABC):
    """What a run needs of the recovery sites (plan.perform.RecoverySite), where a mode makes no difference."""

    @property
    def ways(self) -> Sequence[str]:
        """What is said at the end of a run about how to go on, line by line."""
        return ()

    @abstractmethod
    def recover(self, order: Recovery, cancelled: threading.Event) -> Mapping[str, Any]:
        """Boot the group's machines. Raises DrctlError; StepFailed when none of them runs."""

    @abstractmethod
    def hold(self, group: str) -> Mapping[str, Any]: ...

    @abstractmethod
    def undo(self, group: str) -> Mapping[str, Any]: ...

    @abstractmethod
    def clean_up(self, group: str) -> Mapping[str, Any]: ...

    @abstractmethod
    def standing(self, ending: Ending | None = None) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
        """The groups that are recovered by this run, and the machines (group, name) that run. Raises DrctlError.

        While the run is undone (`ending`): all of which anything is left to be undone."""

    @abstractmethod
    def machine(self, group: str, name: str) -> Mapping[str, Any]:
        """A machine of the group's recovery as its appliance tells it, and whether it is `held` back; its `state` says
        where it can't be told. Never raises DrctlError."""

    def boot(self, group: str, order: MachineOrder, cancelled: threading.Event) -> Mapping[str, Any]:
        """Switch it on where it is held back, and wait until it runs. Raises StepFailed when it failed."""
        while True:
            machine = self.machine(group, order.name)
            if machine.get("held"):
                told = self.ask(group, "recovery.boot", machines=[order.name], timeout=RUN_TIMEOUT)
                machine = machine_of(told, order.name) or machine
            state = machine.get("state")
            if state == "running":
                return {"notes": machine["notes"]} if machine.get("notes") else {}
            if state == "failed":
                raise StepFailed(str(machine.get("reason") or f"{order.name} does not run"))
            if cancelled.wait(_LOOK):
                raise StepFailed(f"given up; {order.name} is {state}")

    @abstractmethod
    def ask(self, group: str, method: str, *, timeout: float = ASK_TIMEOUT, **params: Any) -> Any:
        """One method of the recovery site about the group's recovery by this run. Raises DrctlError."""

    def agent(self, group: str, machine: str, sent: dict[str, Any]) -> Any:
        return self.ask(group, "recovery.agent", machine=machine, command=sent)["return"]

    def cards(self, group: str, machine: str) -> Sequence[str]:
        return [str(card["mac"]) for card in self.machine(group, machine).get("cards") or ()]

    def consoles(self, group: str) -> Sequence[Mapping[str, Any]]:
        """Of machines that run, and of those that failed why; as many as fit into one line of the record."""
        try:
            names = self.recovered(group)
        except DrctlError as exc:
            return [{"group": group, "machine": "", "reason": exc.message}]
        rows, left = in_parallel(lambda name: self._screen(group, name), names), PICTURES
        for row in rows:
            left -= len(row.get("png", "")) + len(row.get("text", ""))
            if left < 0:
                row |= {"png": "", "text": "", "reason": "left out: the record would grow too large"}
        return rows

    @abstractmethod
    def recovered(self, group: str) -> list[str]:
        """The machines of the group's recovery by this run. Raises DrctlError."""

    def _screen(self, group: str, name: str) -> dict[str, Any]:
        try:
            told = self.ask(group, "recovery.screen", machine=name, timeout=SCREEN_TIMEOUT)
        except DrctlError as exc:
            return {"group": group, "machine": name, "reason": exc.message}
        words = {key: str(told[key]) for key in ("png", "text", "reason") if told.get(key)}
        return {"group": group, "machine": name, **words}

    def console(self, group: str, machine: str) -> str:
        return str(self.ask(group, "recovery.console", machine=machine)["text"])


def recovered_facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the record keeps of a recovery. Raises StepFailed when none of its machines runs."""
    if result.get("state") == "failed":
        reasons = [str(one["reason"]) for one in result.get("machines") or () if one.get("reason")]
        reason = (reasons or [result.get("reason") or "unknown"])[0]
        raise StepFailed(f"no machine of {result.get('group')} runs: {reason}")
    checkpoint = result.get("checkpoint") or {}
    return {
        "recovery": str(result["id"]),
        "checkpoint": checkpoint.get("number"),
        "checkpoint_time": checkpoint.get("time"),
        "started": result.get("started"),
        "rto_seconds": result.get("rto_seconds"),
    }


def machine_of(recovery: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A machine of a recovery, and whether it is held back; None when it is not in it."""
    machines: list[dict[str, Any]] = recovery.get("machines") or []
    found = next((one for one in machines if one["name"] == name), None)
    return None if found is None else {**found, "held": name in (recovery.get("held") or ())}


def changes_of(order: Recovery) -> dict[str, dict[str, Any]]:
    """By machine what the plan wants of it alone, as appliances take it."""
    return {machine.name: _change_of(machine) for machine in order.machines if machine.changed and machine.boot}


def _change_of(machine: MachineOrder) -> dict[str, Any]:
    change: dict[str, Any] = {
        "memory": machine.memory,
        "vcpus": machine.vcpus,
        "new_macs": machine.mac is Mac.NEW,
        "networks": dict(machine.networks),
    }
    if machine.re_ip is not None:
        change |= {"re_ip": machine.re_ip.value, "addresses": [asdict(card) for card in machine.addresses]}
    return change


class DrillSite(GroupSite):
    """Mode test, by `test.start` and `test.stop`. Its tests carry the run's name as their label, so that they are known
    again. Invariant: stops no test that this run did not start."""

    def __init__(self, context: Context, groups: Sequence[str], run: str) -> None:
        self._context = context
        self._run = run
        self._hosts: dict[str, Host] = {name: side(context, name, "recovery") for name in groups}
        self._before: dict[str, frozenset[str]] = {}
        self._tests: dict[str, str] = {}

    def recover(self, order: Recovery, cancelled: threading.Event) -> Mapping[str, Any]:
        del cancelled  # the appliance takes down by itself what it could not start
        group, host = order.group, self._hosts[order.group]
        self._before[group] = frozenset(str(one["id"]) for one in self._list(group))
        wanted = [machine.name for machine in order.machines if machine.boot]
        if not wanted:  # an appliance would take no names for all
            return {"recovered": "nothing: no machine of it is to boot"}
        everything = len(wanted) == len(order.machines)
        result = self._context.call(
            host,
            "test.start",
            group=group,
            checkpoint=order.checkpoint,
            machines=[] if everything else wanted,
            label=self._run,
            changes=changes_of(order),
            staged=order.staged,
            timeout=RUN_TIMEOUT,
        )
        self._tests[group] = str(result["id"])
        return recovered_facts(result)

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

    def standing(self, ending: Ending | None = None) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
        """The groups of which copies stand, and the machines (group, name) that run. Raises DrctlError."""
        del ending
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

    def machine(self, group: str, name: str) -> Mapping[str, Any]:
        try:
            tests = self._list(group)
        except DrctlError as exc:
            return {"state": f"unknown: {exc.message}"}
        test = next((one for one in tests if self._is_ours(group, one)), None)
        if test is None:
            return {"state": "failed", "reason": f"the test {self._tests.get(group, '')} of {group} is gone"}
        return machine_of(test, name) or {"state": "failed", "reason": f"{name} is not in test {test['id']}"}

    def recovered(self, group: str) -> list[str]:
        found = [test for test in self._list(group) if self._is_ours(group, test)]
        return [str(one["name"]) for test in found for one in test.get("machines") or ()]

    def ask(self, group: str, method: str, *, timeout: float = ASK_TIMEOUT, **params: Any) -> Any:
        recovery = self._tests.get(group, "")
        return self._context.call(self._hosts[group], method, recovery=recovery, timeout=timeout, **params)

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
