"""What the link knows of the groups' sources: the receiver is asked whether a stream stands, and when it last spoke."""

from __future__ import annotations

import time
from pathlib import Path

from drctl.appliance.client import Client
from drctl.appliance.recovery.ports import Heard
from drctl.errors import DrctlError

#: Short: a failover waits for it, and a receiver that does not answer tells nothing anyway.
ASK_SECONDS = 2.0


class ReceiverSources:
    """Asks the receiver of this host on its control socket. May be called from any thread."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def heard(self, group: str) -> Heard | None:
        try:
            told = Client(f"unix:{self._socket}").call("status", timeout=ASK_SECONDS)["groups"].get(group) or {}
        except DrctlError:
            return None
        heard_ns = told.get("heard_wall_ns")
        seconds = max(0.0, (time.time_ns() - heard_ns) / 1e9) if heard_ns else None
        return Heard(bool(told.get("connected")), seconds)
