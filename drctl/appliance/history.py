"""`home/history.jsonl`: a line for each changing command that this appliance carried out. Knows no method's meaning."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drctl.appliance.control import Handler, Progress
from drctl.errors import DrctlError

#: Methods that change something because somebody said so; what processes tell each other is not history.
CHANGING = (
    "host.evacuate",
    "host.return",
    "link.put",
    "link.limit",
    "group.put",
    "group.remove",
    "replicate.start",
    "replicate.pause",
    "replicate.resume",
    "replicate.stop",
    "replicate.seed",
    "resync",
    "source.verify",
    "checkpoint.create",
    "checkpoint.tag",
    "checkpoint.serve",
    "test.start",
    "test.stop",
    "failover.run",
    "failover.hold",
    "fence.note",
    "switchover.run",
    "handover.run",
    "handover.undo",
    "rollback",
    "commit",
    "certificate.install",
    "authority.keep",
    "authority.fetch",
    "appliance.note",
    "failback.prepare",
    "failback.protect",
)
#: Methods that change where a group runs: their lines carry a picture of before and after.
PICTURED = ("failover.run", "switchover.run", "handover.run", "handover.undo", "rollback", "commit")
#: What of the parameters a line keeps, besides the group.
DETAILS = (
    "shutdown",
    "recoveries",
    "left",
    "what",
    "changes",
    "repair",
    "site",
    "rate",
    "seconds",
    "checkpoint",
    "kind",
    "tags",
    "remove",
    "machines",
    "source_is_down",
    "source_seen",
    "fence",
    "auto",
    "generation",
    "keep_replica_seconds",
    "id",
)

log = logging.getLogger(__name__)


class History:
    """The file; every line is durable before the command's answer. Methods may be called from any thread."""

    def __init__(self, path: Path, picture: Callable[[str], dict[str, Any] | None] = lambda _: None) -> None:
        self._path = path
        self._picture = picture
        self._lock = threading.Lock()

    def watch(self, handlers: dict[str, Handler]) -> dict[str, Handler]:
        """The handlers, those of changing methods noted with their outcome; and `appliance.history` itself."""
        watched = {
            name: self._noted(name, handler) if name in CHANGING else handler for name, handler in handlers.items()
        }
        return watched | {"appliance.history": self._answer}

    def note(self, method: str, params: dict[str, Any], outcome: str, problem: str = "", **more: Any) -> None:
        """Append one line: what was asked, by whom, and `done` or the error's slug; `more` are fields as they are."""
        detail = ", ".join(f"{key} {_plain(params[key])}" for key in DETAILS if params.get(key))
        spec = params.get("spec")
        entry = {
            "time": time.time(),
            "user": str(params.get("by") or ""),
            "method": method,
            "group": str(params.get("group") or (spec.get("name") if isinstance(spec, dict) else "") or ""),
            "outcome": outcome,
            "detail": "; ".join(part for part in (detail, problem) if part),
            **{key: value for key, value in more.items() if value is not None},
        }
        try:
            with self._lock, self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:  # a full disk must not turn a failover that was done into one that failed
            log.error("history: %s: %s", exc.strerror, json.dumps(entry))

    def entries(self, group: str = "", limit: int = 50) -> list[dict[str, Any]]:
        """The newest `limit` lines (of one group), oldest first. A torn last line is left out."""
        found: deque[dict[str, Any]] = deque(maxlen=max(1, limit))
        if self._path.exists():
            with self._path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    entry = _parse(line)
                    if entry and group in ("", entry.get("group")):
                        found.append(entry)
        return list(found)

    def _answer(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        del progress
        return self.entries(str(params.get("group") or ""), int(params.get("limit") or 50))

    def _noted(self, method: str, handler: Handler) -> Handler:
        def call(params: dict[str, Any], progress: Progress) -> Any:
            before = self._pictured(method, params)
            try:
                result = handler(params, progress)
            except DrctlError as exc:
                after = self._pictured(method, params)
                self.note(method, params, exc.slug, exc.message, before=before, after=after)
                raise
            self.note(method, params, "done", before=before, after=self._pictured(method, params))
            return result

        return call

    def _pictured(self, method: str, params: dict[str, Any]) -> dict[str, Any] | None:
        return self._picture(str(params.get("group") or "")) if method in PICTURED else None


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "time" in entry else None


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return " ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
