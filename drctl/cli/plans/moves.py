"""Switchover and failover of a plan's groups: looked at before, carried out group by group, undone.

The same halves as of the commands for one group (switchover.py, failover.py, rollback.py), under a lease per group."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from drctl.cli import recovery, render, rollback, switchover
from drctl.cli.context import Context
from drctl.cli.failover import Forecast
from drctl.cli.inventory import READ_TIMEOUT, Inventory, side, take_inventory
from drctl.cli.leased import lease
from drctl.cli.plans.site import ASK_TIMEOUT, GroupSite, changes_of, machine_of, recovered_facts
from drctl.errors import DrctlError, StepFailed
from drctl.model.site import Host
from drctl.plan.inventory import Ending
from drctl.plan.plan import Mode
from drctl.plan.step import Options, Recovery


@dataclass(frozen=True, slots=True)
class Outlook:
    """What moving one group would come to. `checkpoint` is what is to be ordered; `problem` what forbids it.

    `standing`: the group runs at its recovery site already."""

    group: str
    checkpoint: str = ""
    loss: float | None = None
    problem: DrctlError | None = None
    standing: bool = False


class MoveSite(GroupSite):
    """A switchover or failover of each group. Keeps nothing that a new one could not find out from the appliances."""

    def __init__(self, context: Context, groups: Sequence[str], options: Options) -> None:
        self._inventory = take_inventory(context)
        self._context = context
        self._options = options
        self._hosts: dict[str, Host] = {name: side(context, name, "recovery", self._inventory) for name in groups}
        self._contexts = dict.fromkeys(groups, context)
        #: By group the checkpoint that was shown to the operator.
        self.chosen: dict[str, str] = {}
        #: Groups that had been moved before the run began: it does not undo what it did not do.
        self.before: frozenset[str] = frozenset()
        #: Groups that are known to be at their recovery sites.
        self._there: set[str] = set()

    @property
    def ways(self) -> list[str]:
        """Of each group that was moved, how to go on with it."""
        return [
            f"when the service is healthy: drctl commit {name}; to undo it: drctl rollback {name}"
            for name in self._hosts
            if name in self._there
        ]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else changes any of the groups meanwhile. Raises Locked."""
        with ExitStack() as stack:
            for name in sorted(self._hosts):  # in one order, so that two runs can't wait for each other
                token = stack.enter_context(lease(self._context, name, "plan run", self._inventory))
                self._contexts[name] = self._context.under(token)
            try:
                yield
            finally:
                self._contexts = dict.fromkeys(self._hosts, self._context)

    def look(self) -> list[Outlook]:
        """What each group's move would do, said as its command says it. Never raises for one of them."""
        found = [self._outlook(name) for name in self._hosts]
        self.before = frozenset(one.group for one in found if one.standing)
        return found

    def _outlook(self, group: str) -> Outlook:
        try:
            if self._standing(group) is not None:
                host = self._hosts[group]
                self._context.screen.say(f"{group} runs at {host.site}/{host.name} already")
                return Outlook(group, standing=True)
            return self.forecast(group)
        except DrctlError as exc:
            return Outlook(group, problem=exc)

    @abstractmethod
    def forecast(self, group: str) -> Outlook:
        """Raises DrctlError."""

    @abstractmethod
    def move(self, order: Recovery) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the recovery, further facts). Given again, it goes on. Raises DrctlError."""

    def recover(self, order: Recovery, cancelled: threading.Event) -> Mapping[str, Any]:
        del cancelled  # what an appliance has begun it goes on with
        if (standing := self._standing(order.group)) is not None:
            self._there.add(order.group)
            return recovered_facts(standing)
        result, facts = self.move(order)
        self._there.add(order.group)
        return {**facts, **recovered_facts(result)}

    def hold(self, group: str) -> Mapping[str, Any]:
        """Call off what the recovery site would do by itself."""
        result = self.context_of(group).call(self._hosts[group], "failover.hold", group=group, timeout=60)
        return {"by_itself": recovery.by_itself(result)}

    def undo(self, group: str) -> Mapping[str, Any]:
        if group in self.before:
            return {"undone": "nothing: it had been moved before this run began"}
        done = rollback.undo(self.context_of(group), group)
        if not done:
            return {"undone": "nothing: it was not moved"}
        return {"generation": done.get("generation"), "kept_until": done.get("kept_until")}

    def clean_up(self, group: str) -> Mapping[str, Any]:
        raise StepFailed(f"{group}: only a test is cleaned up")

    def standing(self, ending: Ending | None = None) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
        groups: set[str] = set()
        up: set[tuple[str, str]] = set()
        for name in self._hosts:
            found = self._standing(name)
            if found is not None:
                self._there.add(name)
                up |= {(name, str(one["name"])) for one in found["machines"] if one.get("state") == "running"}
            # Of one that is to be undone nobody needs to know how far it came: undoing looks for itself.
            if found is not None or ending is Ending.UNDO:
                groups.add(name)
        return frozenset(groups), frozenset(up)

    def gone(self, done: frozenset[str]) -> list[str]:
        """Groups that were moved by steps that are `done`, and are not at their recovery sites any more: somebody, or
        the clock, has rolled them back since. Raises DrctlError."""
        moved = [name for name in self._hosts if f"group:{name}/recover" in done]
        return [name for name in moved if recovery.reigning(self._status(name)) is None]

    def machine(self, group: str, name: str) -> Mapping[str, Any]:
        try:
            found = recovery.reigning(self._status(group))
        except DrctlError as exc:
            return {"state": f"unknown: {exc.message}"}
        if found is None:
            return {"state": "failed", "reason": f"{group} is not at its recovery site any more"}
        lacking = {"state": "failed", "reason": f"{name} is not in {found['kind']} {found['id']}"}
        return machine_of(found, name) or lacking

    def recovered(self, group: str) -> list[str]:
        found = recovery.reigning(self._status(group))
        return [str(one["name"]) for one in (found or {}).get("machines") or ()]

    def ask(self, group: str, method: str, *, timeout: float = ASK_TIMEOUT, **params: Any) -> Any:
        found = recovery.reigning(self._status(group))
        identity = str(found["id"]) if found else ""
        context = self.context_of(group)
        return context.call(self._hosts[group], method, recovery=identity, timeout=timeout, **params)

    def context_of(self, group: str) -> Context:
        """Its calls carry the group's lease."""
        return self._contexts[group]

    def host(self, group: str) -> Host:
        return self._hosts[group]

    @property
    def options(self) -> Options:
        return self._options

    def _standing(self, group: str) -> dict[str, Any] | None:
        """The group's recovery when it stands: there is nothing to be done but to boot machines that are held back."""
        status = self._status(group)
        found = recovery.reigning(status)
        return found if found is not None and found.get("state") == "staged" else recovery.standing(status)

    def _status(self, group: str) -> dict[str, Any]:
        status: dict[str, Any] = self._context.call(
            self._hosts[group], "group.status", group=group, role="recovery", timeout=4 * READ_TIMEOUT
        )
        return status


def _particulars(order: Recovery) -> dict[str, Any]:
    """What the order says of machines one by one."""
    return {"changes": changes_of(order), "staged": order.staged}


def _auto(order: Recovery) -> dict[str, Any] | None:
    if order.settlement is None:
        return None
    return {"action": order.settlement.value, "after_seconds": order.settle_after}


class SwitchoverSite(MoveSite):
    """Both sites are needed: the source shuts its machines down, the recovery site boots them."""

    def forecast(self, group: str) -> Outlook:
        source = side(self._context, group, "source", self._inventory)
        plan = switchover.look(self._context, source, self.host(group), group)
        for line in switchover.steps_of(plan, source, self.host(group)):
            self._context.screen.say(f"  {group}: {line}")
        return Outlook(group, "final", 0.0)

    def move(self, order: Recovery) -> tuple[dict[str, Any], dict[str, Any]]:
        context, group = self.context_of(order.group), order.group
        source = side(context, group, "source")
        limits = {"on_timeout": self.options.on_timeout.value, "shutdown_seconds": self.options.shutdown_seconds}
        result, final = switchover.carry_out(
            context, source, self.host(group), group, limits | {"auto": _auto(order), **_particulars(order)}
        )
        return result, {"loss_seconds": 0.0, "final": final.get("number")}


class FailoverSite(MoveSite):
    """The recovery site alone is needed. What the source is said to be is looked at again right before each group."""

    def forecast(self, group: str) -> Outlook:
        forecast = self._forecast(group, self._options.checkpoint, self._inventory)
        forecast.say()
        self.chosen[group] = forecast.chosen
        outlook = Outlook(group, forecast.chosen, forecast.plan.get("loss_seconds"))
        try:
            forecast.check(self._options.source_is_down)
        except DrctlError as exc:
            return Outlook(group, outlook.checkpoint, outlook.loss, exc)
        return outlook

    def move(self, order: Recovery) -> tuple[dict[str, Any], dict[str, Any]]:
        group = order.group
        reason = self._options.source_is_down
        forecast = self._forecast(group, self.chosen.get(group) or order.checkpoint, take_inventory(self._context))
        forecast.check(reason)
        fenced = forecast.fence(reason)
        result = forecast.boot({"auto": _auto(order), **_particulars(order), **fenced})
        told = {"loss_seconds": forecast.plan.get("loss_seconds"), "source": forecast.seen["words"], **fenced}
        return result, {key: value for key, value in told.items() if value != ""}

    def _forecast(self, group: str, checkpoint: str, inventory: Inventory) -> Forecast:
        return Forecast.made(self.context_of(group), inventory, self.host(group), group, checkpoint)


def move_site(context: Context, groups: Sequence[str], mode: Mode, options: Options) -> MoveSite:
    """The site for that mode. Raises NotFound, ApplianceUnreachable."""
    kind = SwitchoverSite if mode is Mode.SWITCHOVER else FailoverSite
    return kind(context, groups, options)


def spell(outlook: Outlook) -> str:
    """One group's outlook in a line."""
    if outlook.standing:
        return f"{outlook.group}: runs at its recovery site already"
    if outlook.problem is not None:
        return f"{outlook.group}: {outlook.problem.message}"
    return f"{outlook.group}: checkpoint {outlook.checkpoint}, loss {render.duration(outlook.loss)}"
