"""Collects what metrics.py renders from the roles of one appliance; answers `appliance.metrics`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.control import Progress
from drctl.appliance.metrics import render
from drctl.appliance.metrics_file import MetricsFile
from drctl.errors import DrctlError

log = logging.getLogger(__name__)


class Role(Protocol):
    def names(self) -> Sequence[str]: ...

    def status(self, name: str) -> dict[str, Any]: ...


class MetricsService:
    """`path`: where the file is written; empty: nowhere."""

    def __init__(self, info: Callable[[], dict[str, Any]], source: Role, recovery: Role, path: str) -> None:
        self._info = info
        self._source = source
        self._recovery = recovery
        self._file = MetricsFile(Path(path), self.text) if path else None

    def start(self) -> None:
        if self._file is not None:
            self._file.start()

    def stop(self) -> None:
        if self._file is not None:
            self._file.stop()

    def text(self) -> str:
        """The exposition now. One group that can't be told must not hide the others: it has no samples."""
        return render(self._info(), _all(self._source), _all(self._recovery), time.time())

    def answer(self, params: dict[str, Any], progress: Progress) -> dict[str, str]:
        """`appliance.metrics`."""
        del params, progress
        return {"text": self.text()}


def _all(role: Role) -> list[dict[str, Any]]:
    found = []
    for name in role.names():
        try:
            found.append(role.status(name))
        except DrctlError as exc:
            log.warning("metrics of %s: %s", name, exc.message)
    return found
