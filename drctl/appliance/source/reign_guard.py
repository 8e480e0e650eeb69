"""What a host does about reigns: boots its groups' guests after having asked, and keeps what libvirt's hook reads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from drctl.appliance.config import Home
from drctl.appliance.source.boot_guard import BootGuard, BootMarks, Duty, GuardFiles, GuestHost, refusals, undecided
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.protection import Protection
from drctl.appliance.source.strays import superseded_here
from drctl.errors import NotFound
from drctl.replication.reign import ANY_GENERATION, Answer, Question, Reign, ask

#: After something unforeseen.
RETRY_SECONDS = 5.0
#: What comes after us at the host's boot (libvirt-guests) waits so long for the first answers.
FIRST_ANSWER_SECONDS = 10.0

log = logging.getLogger(__name__)


class ReignGuard:
    """One of an appliance. `sync` is called by the supervisor and by a failover's thread."""

    def __init__(self, home: Home, host: GuestHost) -> None:
        self._home = home
        self._host = host
        self.marks = BootMarks(home.run / "boots")
        self._files = GuardFiles(home.path / "guard")
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._lifted: set[str] = set()
        self._states: Sequence[GroupState] = ()
        self._said: dict[str, str] | None = None
        self._boots: list[BootGuard] = []
        #: Guests whose file somebody removed: to be started on their own word.
        self._released: set[str] = set()

    def boot(self, protection: Protection) -> None:
        """Start the group's guests if the host was booted since they were last looked after; in a thread of its own."""
        name = protection.state.spec.name
        if self.marks.done(name):
            return
        guard = BootGuard(protection, self._host, self.marks, self.ask, self._stopped, time.monotonic, self._decided)
        protection.boot = guard
        self._boots.append(guard)
        threading.Thread(target=self._run, args=(guard,), name=f"boot-{name}", daemon=True).start()

    def await_first_answers(self) -> None:
        """Until each group's other site was asked once since the host's boot, for some seconds at most."""
        deadline = time.monotonic() + FIRST_ANSWER_SECONDS
        while any(guard.duty is Duty.ASKING for guard in self._boots) and time.monotonic() < deadline:
            if self._stopped.wait(0.05):
                return

    def _undecided(self) -> dict[str, str]:
        asked = undecided(self._boots)
        self._released |= {key for key in asked if key in (self._said or {}) and not self._files.has(key)}
        return {key: text for key, text in asked.items() if key not in self._released}

    def _decided(self) -> None:
        """Its guests may be started, or are refused by what the group's state says."""
        self.sync(self._states)

    def _run(self, guard: BootGuard) -> None:
        """Until the duty is done: guests that nobody starts are an outage, whatever went wrong."""
        while not self._stopped.is_set():
            try:
                guard.run()
            except Exception as exc:  # the edge: a bug must neither start guests nor keep them down for ever
                log.exception("%s: its guests are not started yet", guard.group.state.spec.name)
                guard.duty, guard.reason = Duty.WAITING, f"unexpected {type(exc).__name__}: {exc}"
                self._stopped.wait(RETRY_SECONDS)
            else:
                return

    def who_reigns(self, state: GroupState) -> Answer:
        """Ask where the group reigns, and under which generation, whatever we know of it. Blocks for some seconds."""
        return self.ask(msgspec.structs.replace(state, generation=ANY_GENERATION))

    def ask(self, state: GroupState) -> Answer:
        config = self._home.config
        try:
            peer = self._home.peer(state.spec.recovery)
        except NotFound as exc:
            return Answer(Reign.UNKNOWN, exc.message)
        question = Question(state.spec.name, config.host, state.generation, config.uuid, peer.link, peer.uuid)
        return ask(question, self._home.tls)

    def sync(self, states: Sequence[GroupState]) -> None:
        """Write down which guests may not be started here."""
        with self._lock:
            self._states = states
            here = [s for s in states if s.spec.name not in self._lifted and superseded_here(s, self._home.store)]
            wanted = self._undecided() | refusals(here)
            if wanted != self._said:
                self._files.sync(wanted)
                self._said = wanted

    @contextmanager
    def lifted(self, group: str) -> Iterator[None]:
        """Refuse none of the group's guests meanwhile; afterwards what its store says decides."""
        self._lifted.add(group)
        self.sync(self._states)
        try:
            yield
        finally:
            self._lifted.discard(group)

    def close(self) -> None:
        self._stopped.set()
