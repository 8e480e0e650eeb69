"""The boot guard: who starts a protected guest after the host's boot, and who may not run any more.

Libvirt's autostart of protected guests is off (guest_notes.py). After a boot the appliance asks the other site whether
the group still reigns here, and starts those guests then; a group's policy says what holds when there is no answer.
The guests of a superseded group are named in `home/guard/`, where libvirt's hook (libvirt_hook.py) finds them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from drctl.appliance.source.group_state import Desired, GroupState
from drctl.appliance.source.guest_notes import wanted
from drctl.appliance.source.image_stamp import RUNNING
from drctl.errors import DrctlError
from drctl.model.group import BootPolicy
from drctl.model.machine import MachineState
from drctl.model.phase import Phase
from drctl.replication.reign import Answer, Reign

#: Between two questions to the other site. After a power cut of both, it may be minutes until it answers.
ASK_SECONDS = 2.0
#: A peer that has been silent for so long since our start counts as unreachable for `allow` and `deny`; a network that
#: comes up a little later than we do must not decide which site runs a group.
GRACE_SECONDS = 20.0

log = logging.getLogger(__name__)


class Duty(StrEnum):
    """What has become of a boot's duty to start a group's guests."""

    NONE = "none"
    ASKING = "asking"
    WAITING = "waiting"
    STARTED = "started"
    ALLOWED = "allowed"
    DENIED = "denied"
    REFUSED = "refused"


class Step(StrEnum):
    """What to do about an answer."""

    START = "start"
    START_UNASKED = "start-unasked"
    REFUSE = "refuse"
    GIVE_UP = "give-up"
    ASK_AGAIN = "ask-again"


def decide(policy: str, answer: Answer, silent_seconds: float) -> Step:
    """The rule. `silent_seconds`: how long the other site has not answered, since the first question."""
    if answer.reign is Reign.HERE:
        return Step.START
    if answer.reign is Reign.ELSEWHERE:
        return Step.REFUSE
    if policy == BootPolicy.WAIT or silent_seconds < GRACE_SECONDS:
        return Step.ASK_AGAIN
    return Step.START_UNASKED if policy == BootPolicy.ALLOW else Step.GIVE_UP


class GuestHost(Protocol):
    def state(self, name: str) -> MachineState: ...

    def start(self, name: str) -> None: ...


class Guarded(Protocol):
    """What the guard needs of a protection."""

    @property
    def state(self) -> GroupState: ...

    def superseded(self, reason: str) -> None: ...


class BootMarks:
    """Which groups have had their boot, in a directory that a boot empties (`run/boots`)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def done(self, group: str) -> bool:
        return (self._directory / group).exists()

    def set(self, group: str) -> None:
        (self._directory / group).touch()


@dataclass(slots=True)
class BootGuard:
    """One group's boot. `run` blocks until the duty is done or `stopped`; `ask` asks the other site, and may block."""

    group: Guarded
    host: GuestHost
    marks: BootMarks
    ask: Callable[[GroupState], Answer]
    stopped: threading.Event
    monotonic: Callable[[], float]
    #: Called before guests are started: until then the hook refuses them (undecided).
    decided: Callable[[], None] = lambda: None
    duty: Duty = Duty.ASKING
    reason: str = ""
    failed: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        name = self.group.state.spec.name
        begun = self.monotonic()
        self.duty = Duty.ASKING
        while not self.stopped.is_set():
            state = self.group.state
            if state.desired is Desired.STOPPED or not state.guests:
                self._conclude(Duty.REFUSED if state.phase is Phase.FAILED_OVER else Duty.NONE, state.reason)
                return
            answer = self.ask(state)
            step = decide(state.spec.boot_without_peer, answer, self.monotonic() - begun)
            if step is not Step.ASK_AGAIN:
                self._act(step, answer, state)
                return
            self._wait(f"{answer.reason}; boot_without_peer = {state.spec.boot_without_peer}", name)
            self.stopped.wait(ASK_SECONDS)

    def _wait(self, reason: str, name: str) -> None:
        if reason != self.reason:
            log.warning("%s: its guests are not started yet: %s", name, reason)
        self.duty, self.reason = Duty.WAITING, reason

    def _act(self, step: Step, answer: Answer, state: GroupState) -> None:
        name = state.spec.name
        if step is Step.REFUSE:
            log.error("%s: its guests are NOT started: %s", name, answer.reason)
            self.group.superseded(answer.reason)
            self._conclude(Duty.REFUSED, answer.reason)
        elif step is Step.GIVE_UP:
            log.error("%s: its guests are not started (boot_without_peer = deny): %s", name, answer.reason)
            self._conclude(Duty.DENIED, answer.reason)
        else:
            asked = step is Step.START
            if not asked:
                log.warning("%s: its guests are started unasked (boot_without_peer = allow): %s", name, answer.reason)
            self.duty = Duty.STARTED if asked else Duty.ALLOWED
            self.decided()
            self._start(wanted(state))
            done = Duty.STARTED if wanted(state) else Duty.NONE
            self._conclude(done if asked else Duty.ALLOWED, "" if asked else answer.reason)

    def _start(self, names: list[str]) -> None:
        """One guest that does not start must not keep the others down."""
        for name in names:
            try:
                if self.host.state(name) not in RUNNING:
                    self.host.start(name)
                    log.info("%s: started at the host's boot", name)
            except DrctlError as exc:
                log.error("%s: not started: %s", name, exc.message)
                self.failed[name] = exc.message

    def _conclude(self, duty: Duty, reason: str) -> None:
        self.duty = duty
        self.reason = "; ".join(filter(None, [reason, *(f"{n}: {why}" for n, why in self.failed.items())]))
        self.marks.set(self.group.state.spec.name)

    def told(self) -> dict[str, object]:
        """For the status."""
        return {"state": self.duty.value, "reason": self.reason, "autostart": wanted(self.group.state)}


class GuardFiles:
    """`home/guard/UUID`: a guest that may not be started here, and why. Only what changes is written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def has(self, key: str) -> bool:
        return (self._directory / key).exists()

    def sync(self, refused: Mapping[str, str]) -> None:
        """Make the directory say this: UUID (or a name, where that is all that is known) → reason in one line."""
        present = {path.name: path for path in self._directory.iterdir() if not path.name.startswith(".")}
        for key, path in present.items():
            if key not in refused:
                path.unlink(missing_ok=True)
        for key, reason in refused.items():
            path = self._directory / key
            text = reason.replace("\n", " ") + "\n"
            if key not in present or path.read_text() != text:
                fresh = self._directory / f".{key}.new"
                fresh.write_text(text)
                fresh.replace(path)


def undecided(boots: Iterable[BootGuard]) -> dict[str, str]:
    """What the files shall say of guests that the host's boot would start before the other site has answered.

    Who removes a file by hand starts the guest on their own word: it is not written again."""
    return {
        note.uuid or note.name: (
            f"drctl: {note.name} of group {guard.group.state.spec.name} may not be started yet: its other site has not "
            "said since the host's boot whether the group still reigns here. When it is certain that it does not run "
            "there, remove this file"
        )
        for guard in boots
        if guard.duty in (Duty.ASKING, Duty.WAITING) and guard.group.state.desired is not Desired.STOPPED
        for note in guard.group.state.guests
    }


def refusals(states: list[GroupState]) -> dict[str, str]:
    """What the files shall say, for groups that are superseded here."""
    return {
        note.uuid or note.name: (
            f"drctl: {note.name} of group {state.spec.name} may not run here: generation {state.generation} is "
            f"superseded, the group reigns at {state.spec.recovery}"
        )
        for state in states
        for note in state.guests
    }
