"""A group's store in the supervisor's own hands for a while: its receiver lets go of it, and takes it up again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from drctl.appliance.client import Client
from drctl.errors import ApplianceUnreachable, DrctlError

#: Longest that the receiver's answer is waited for: it ends a connection and closes a store.
_SECONDS = 20.0
#: The same at the supervisor's start, which must not wait for a receiver that hangs.
_LOOK_SECONDS = 3.0


class HeldStores:
    """Asks the receiver of this host on its control socket. May be called from any thread."""

    def __init__(self, socket: Path) -> None:
        self._client = Client(f"unix:{socket}")

    @contextmanager
    def held(self, group: str) -> Iterator[None]:
        """Nobody else writes to the group's store meanwhile. A receiver that is not there holds nothing."""
        with suppress(ApplianceUnreachable):
            self._client.call("group.release", {"group": group}, timeout=_SECONDS)
        try:
            yield
        finally:
            self.let_go(group)

    def let_go(self, group: str) -> None:
        """The receiver takes the group's stream again. A new receiver does so by itself."""
        with suppress(ApplianceUnreachable):
            self._client.call("group.accept", {"group": group}, timeout=_SECONDS)

    def forgotten(self) -> None:
        """Let go of what an earlier supervisor held when it ended. Call it once, before anything is held."""
        with suppress(DrctlError):
            groups = self._client.call("status", timeout=_LOOK_SECONDS)["groups"]
            for name in [name for name, told in groups.items() if told["released"]]:
                self.let_go(name)
