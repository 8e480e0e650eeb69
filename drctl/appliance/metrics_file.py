"""The file that node_exporter's textfile collector reads: written whole, or not at all, every few seconds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from drctl.errors import DrctlError

#: A scrape is rarely more often; each costs a look at every store.
WRITE_SECONDS = 15.0

log = logging.getLogger(__name__)


class MetricsFile:
    """Writes `text()` to a path until stopped. Trouble with it is logged once, and is nobody else's."""

    def __init__(self, path: Path, text: Callable[[], str]) -> None:
        self._path = path
        self._text = text
        self._stopped = threading.Event()
        self._problem = ""

    def start(self) -> None:
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.write()
            self._stopped.wait(WRITE_SECONDS)

    def write(self) -> None:
        """Once. The collector reads `*.prom` alone: the name that is written to has another ending."""
        fresh = self._path.with_name(f".{self._path.name}.new")
        try:
            fresh.write_text(self._text())
            fresh.chmod(0o644)  # the collector is another user
            fresh.replace(self._path)
        except (OSError, DrctlError) as exc:
            if str(exc) != self._problem:
                log.warning("metrics: %s", exc)
            self._problem = str(exc)
        else:
            self._problem = ""
