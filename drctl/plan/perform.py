"""Does one step: hands it to the script runner, a health check, a person, or the recovery site."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from drctl.plan.engine import Outcome
from drctl.plan.execute import Result
from drctl.plan.guest import run_in_guest
from drctl.plan.output import tame_line
from drctl.plan.plan import Check, CheckKind, Manual, Mode, Script, Where
from drctl.plan.probe import Checked, Probe, probe_agent, probe_console, probe_http, probe_tcp, repeat
from drctl.plan.readdress import readdress
from drctl.plan.script import Ran, run_script
from drctl.plan.step import MachineOrder, Readdress, Recovery, Step, StepKind


class RecoverySite(Protocol):
    """What a run needs of the appliances. Every act is idempotent: given again, it finds that it is done.

    All block, and raise DrctlError. Facts that they return go to the step's record."""

    def recover(self, order: Recovery, cancelled: Event) -> Mapping[str, Any]: ...

    def boot(self, group: str, order: MachineOrder, cancelled: Event) -> Mapping[str, Any]:
        """Switch it on (without staged boot: wait until it runs). Raises StepFailed when it can't."""
        ...

    def hold(self, group: str) -> Mapping[str, Any]: ...

    def clean_up(self, group: str) -> Mapping[str, Any]: ...

    def consoles(self, group: str) -> Sequence[Mapping[str, Any]]:
        """What the screens or consoles of a group's recovered machines show now. Never raises DrctlError."""
        ...

    def undo(self, group: str) -> Mapping[str, Any]: ...

    def agent(self, group: str, machine: str, sent: dict[str, Any]) -> Any:
        """One command to a guest's agent, and what it returned."""
        ...

    def cards(self, group: str, machine: str) -> Sequence[str]:
        """The MAC addresses of a machine's network cards as it was recovered, in the order of its definition."""
        ...

    def console(self, group: str, machine: str) -> str:
        """What a machine's console has said since it was switched on."""
        ...


class Answer(StrEnum):
    """What a person said to a manual step; NOBODY: there is no terminal."""

    DONE = "done"
    FAILED = "failed"
    LATE = "late"
    NOBODY = "nobody"


#: (what to do, time limit in seconds, given up) → what was said. Never waits where there is no terminal.
Ask = Callable[[str, float, Event], Answer]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Of one run: what scripts are told, where they run, and how often each step was begun before."""

    run: str
    plan: str
    mode: Mode
    directory: Path
    checkpoint: str = ""
    attempts: Mapping[str, int] = field(default_factory=dict)


class Performer:
    """Does steps, from several threads at once. Keeps no state."""

    def __init__(self, site: RecoverySite, ask: Ask, surroundings: Surroundings) -> None:
        self._site = site
        self._ask = ask
        self._surroundings = surroundings

    def __call__(self, step: Step, cancelled: Event) -> Result:
        """Do it. Raises DrctlError, which is a failed step."""
        action = step.action
        if isinstance(action, Script):
            return self._script(step, action, cancelled)
        if isinstance(action, Manual):
            return self._manual(action, cancelled)
        if isinstance(action, Check):
            return self._check(step, action, cancelled)
        if isinstance(action, Recovery):
            return Result(Outcome.DONE, self._site.recover(action, cancelled))
        if isinstance(action, MachineOrder):
            return Result(Outcome.DONE, self._site.boot(step.group, action, cancelled))
        if isinstance(action, Readdress):
            return self._readdress(step, action, cancelled)
        acts = {
            StepKind.HOLD: self._site.hold,
            StepKind.CLEAN_UP: self._clean_up,
            StepKind.UNDO: self._site.undo,
        }
        return Result(Outcome.DONE, acts[step.kind](step.group))

    def _clean_up(self, group: str) -> Mapping[str, Any]:
        """Its machines' screens are looked at first: also of those that failed, and so that nobody waits for it."""
        consoles = list(self._site.consoles(group))
        return {**self._site.clean_up(group), **({"consoles": consoles} if consoles else {})}

    def environment(self, step: Step) -> dict[str, str]:
        """What scripts and commands are told, beside their own environment."""
        around = self._surroundings
        return {
            "DRCTL_RUN": around.run,
            "DRCTL_PLAN": around.plan,
            "DRCTL_MODE": around.mode.value,
            "DRCTL_CHECKPOINT": around.checkpoint,
            "DRCTL_STEP": step.id,
            "DRCTL_STAGE": step.stage,
            "DRCTL_GROUP": step.group,
            "DRCTL_VM": step.machine,
            "DRCTL_ATTEMPT": str(around.attempts.get(step.id, 0) + 1),
        }

    def _script(self, step: Step, script: Script, cancelled: Event) -> Result:
        machine = script.machine or step.machine
        ran = self._run(step, script.run, script.where, machine, script.time_limit, cancelled)
        facts: dict[str, Any] = {"output": ran.output}
        if ran.code is not None:
            facts["code"] = ran.code
        if ran.reason:
            facts["reason"] = ran.reason
        return Result(Outcome.DONE if ran.done else Outcome.FAILED, facts)

    def _run(self, step: Step, run: tuple[str, ...], where: Where, machine: str, limit: float, cancelled: Event) -> Ran:
        environment = self.environment(step)
        if where is Where.OPERATOR:
            return run_script(
                run,
                environment=environment,
                directory=self._surroundings.directory,
                time_limit=limit,
                cancelled=cancelled,
            )
        return run_in_guest(
            lambda sent: self._site.agent(step.group, machine, sent),
            run,
            environment=environment,
            time_limit=limit,
            cancelled=cancelled,
            monotonic=time.monotonic,
        )

    def _readdress(self, step: Step, order: Readdress, cancelled: Event) -> Result:
        done = readdress(
            lambda sent: self._site.agent(step.group, step.machine, sent),
            self._site.cards(step.group, step.machine),
            order.addresses,
            time_limit=step.time_limit,
            cancelled=cancelled,
            monotonic=time.monotonic,
        )
        facts: dict[str, Any] = {"output": done.output}
        facts["reason" if done.reason else "seen"] = done.reason or done.seen
        return Result(Outcome.FAILED if done.reason else Outcome.DONE, facts)

    def _manual(self, manual: Manual, cancelled: Event) -> Result:
        answer = self._ask(manual.text, manual.time_limit, cancelled)
        if answer is Answer.DONE:
            return Result(Outcome.DONE, {"answer": answer.value})
        if answer is Answer.NOBODY and manual.skippable:
            return Result(Outcome.DONE, {"answer": "passed over: nobody can be asked"})
        reasons = {
            Answer.NOBODY: "nobody can be asked: there is no terminal (skippable = true would pass it over)",
            Answer.LATE: "nobody confirmed it in time",
        }
        return Result(Outcome.FAILED, {"reason": reasons.get(answer, "somebody said that it failed")})

    def _check(self, step: Step, check: Check, cancelled: Event) -> Result:
        found = self._checked(step, check, cancelled)
        facts: dict[str, Any] = {"attempts": found.attempts}
        facts["seen" if found.passed else "reason"] = tame_line(found.seen)
        return Result(Outcome.DONE if found.passed else Outcome.FAILED, facts)

    def _checked(self, step: Step, check: Check, cancelled: Event) -> Checked:
        return repeat(
            lambda: self._probe(step, check, cancelled),
            retries=check.retries,
            interval=check.interval,
            cancelled=cancelled,
        )

    def _probe(self, step: Step, check: Check, cancelled: Event) -> Probe:
        test = self._surroundings.mode is Mode.TEST
        match check.kind:
            case CheckKind.TCP:
                return probe_tcp((test and check.test_host) or check.host, check.port, check.timeout)
            case CheckKind.HTTP:
                url = (test and check.test_url) or check.url
                return probe_http(
                    url, status=check.status, text=check.text, insecure=check.insecure, timeout=check.timeout
                )
            case CheckKind.COMMAND:
                ran = self._run(step, check.run, check.where, step.machine, check.timeout, cancelled)
                last = next((line for line in reversed(ran.output.splitlines()) if line.strip()), "")
                return Probe(ran.done, ": ".join(part for part in (ran.reason or "exited with 0", last) if part))
            case CheckKind.GUEST_AGENT:
                return probe_agent(lambda: self._site.agent(step.group, step.machine, {"execute": "guest-ping"}))
            case CheckKind.CONSOLE:
                return probe_console(lambda: self._site.console(step.group, step.machine), check.text)
