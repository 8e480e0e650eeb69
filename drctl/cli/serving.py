"""A checkpoint served by its recovery site for as long as a command here wants it. Knows no output."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from drctl.cli.context import Context
from drctl.errors import ApplianceUnreachable, DrctlError
from drctl.model.site import Host

#: The appliance says twice a second that it goes on; a store on a busy host takes its time to open.
SILENCE = 60.0


class _Enough(Exception):
    """The command needs it no more: hang up, which ends the service."""


class Served:
    """The service as this command sees it. `facts` is what the appliance told first."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.error: DrctlError | None = None
        self._news = threading.Event()
        self._ended = threading.Event()
        self._enough = False

    def told(self, progress: dict[str, Any]) -> None:
        if self._enough:
            raise _Enough
        if not self.facts:
            self.facts = progress
            self._news.set()

    def call(self, context: Context, host: Host, params: dict[str, Any]) -> None:
        """The call of the appliance, in a thread of its own."""
        try:
            context.call(host, "checkpoint.serve", on_progress=self.told, timeout=SILENCE, **params)
        except _Enough:
            pass
        except DrctlError as exc:
            self.error = exc
        finally:
            self._ended.set()
            self._news.set()

    def begin(self) -> None:
        """Until it is served. Raises the appliance's error."""
        self._news.wait()
        if not self.facts:
            raise self.error or ApplianceUnreachable("the appliance ended the service before it began")

    def wait(self) -> None:
        """Until the appliance ends it. Raises its error."""
        self._ended.wait()
        self.check()

    def check(self) -> None:
        """Raises what ended the service, if something did."""
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """Hang up at the appliance's next word."""
        self._enough = True
        self._ended.wait(5.0)

    def uri(self, name: str) -> str:
        """Where a disk is, as qemu-img, nbdcopy and nbdinfo know it."""
        return f"nbd+unix:///{quote(name)}?socket={quote(self.facts['socket'])}"


@contextmanager
def served(context: Context, host: Host, **params: Any) -> Iterator[Served]:
    """The checkpoint, served while this lasts. Raises the appliance's error."""
    service = Served()
    thread = threading.Thread(target=service.call, args=(context, host, params), name="serve", daemon=True)
    thread.start()
    try:
        service.begin()
        yield service
    finally:
        service.end()
