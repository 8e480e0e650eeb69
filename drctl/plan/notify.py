"""Tells a command of the operator's that something has changed: DRCTL_* in its environment, JSON on its stdin.

Whoever tells never waits for it, and whatever the command does harms nobody: it has a time limit, and what it could
not be told is dropped and said."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drctl.model.hook import Hook
from drctl.plan.output import tame_line
from drctl.plan.script import run_script

#: Of the JSON on stdin.
FORMAT = 1
#: Events that wait for a slow command; more are dropped.
WAITING = 100
#: Characters of a value in the environment; stdin has the whole.
LONGEST = 4096


class Notifications:
    """Runs the hook for one event after the other, in a thread of its own. `complain` is told what went wrong."""

    def __init__(self, hook: Hook, complain: Callable[[str], None]) -> None:
        self._hook = hook
        self._complain = complain
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(WAITING)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def tell(self, event: str, facts: Mapping[str, Any]) -> None:
        """Returns at once. Facts that are words, numbers or true/false are in the environment, too."""
        if not self._hook.command:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait({"event": event, **facts})
        except queue.Full:
            self._complain(f"notify: {event} is not told: {WAITING} others wait for {self._hook.command[0]}")

    def close(self) -> None:
        """Wait for what was told, one time limit long at most; what runs then is ended."""
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._ended.set()
        self._thread.join(self._hook.time_limit)
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._ended.is_set():
            facts = self._queue.get()
            if facts is None:
                return
            self._call(facts)

    def _call(self, facts: Mapping[str, Any]) -> None:
        ran = run_script(
            self._hook.command,
            environment=environment(facts),
            directory=Path(self._hook.directory),
            time_limit=self._hook.time_limit,
            cancelled=self._ended,
            stdin=json.dumps({"format": FORMAT, **facts}, default=str).encode() + b"\n",
        )
        if not ran.done:
            said = f": {tame_line(ran.output)}" if ran.output.strip() else ""
            self._complain(f"notify: {self._hook.command[0]}: {ran.reason}{said}")


def environment(facts: Mapping[str, Any]) -> dict[str, str]:
    """`DRCTL_EVENT`, `DRCTL_GROUP`, …: what of the facts is text or a number, long texts cut.

    Zero bytes, which no environment can hold, are spelled out."""
    return {
        f"DRCTL_{key.upper()}": _word(value) for key, value in facts.items() if isinstance(value, (str, int, float))
    }


def _word(value: str | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)[:LONGEST].replace("\0", "\\x00")
