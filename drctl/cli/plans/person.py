"""Somebody at the terminal who does a plan's manual steps. Never waits where there is none."""

from __future__ import annotations

import select
import sys
import threading
import time

from drctl.cli.render import Screen
from drctl.plan.output import tame
from drctl.plan.perform import Answer

_LOOK = 0.2


class Person:
    """Is asked one thing at a time, also when several steps want something."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._turn = threading.Lock()

    def ask(self, text: str, time_limit: float, cancelled: threading.Event) -> Answer:
        """What was said; LATE at the time limit or when it is given up."""
        if not self._screen.interactive:
            return Answer.NOBODY
        deadline = time.monotonic() + time_limit
        while not self._turn.acquire(timeout=_LOOK):
            if cancelled.is_set() or time.monotonic() >= deadline:
                return Answer.LATE
        try:
            self._screen.say(f"to do: {tame(text)}\n  y when it is done, n when it can't be:")
            return self._answer(deadline, cancelled)
        finally:
            self._turn.release()

    def _answer(self, deadline: float, cancelled: threading.Event) -> Answer:
        while time.monotonic() < deadline and not cancelled.is_set():
            if not _readable():
                continue
            line = sys.stdin.readline()
            word = line.strip().lower()
            if word in ("y", "yes"):
                return Answer.DONE
            if word in ("n", "no") or not line:
                return Answer.FAILED
        return Answer.LATE


def _readable() -> bool:
    """Whether a line can be read, after a short wait. What is no file has all its lines at once."""
    try:
        return bool(select.select([sys.stdin], [], [], _LOOK)[0])
    except (OSError, ValueError, TypeError):
        return True
