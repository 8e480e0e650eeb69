"""What systemd is told of the service: ready, alive, ending (sd_notify(3)). Nothing is told where nobody listens."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

#: The service's WatchdogSec is 30 s: ten of these may be missed before systemd ends the process.
ALIVE_SECONDS = 3.0


class Notifier:
    """Sends datagrams to NOTIFY_SOCKET, which it takes out of the environment: children must not speak for us."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        path = environment.pop("NOTIFY_SOCKET", "")
        environment.pop("WATCHDOG_PID", None)
        environment.pop("WATCHDOG_USEC", None)
        # A leading @ is an address in the abstract namespace.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._told = float("-inf")

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The main loop turns; call it often."""
        now = time.monotonic()
        if now - self._told >= ALIVE_SECONDS:
            self._told = now
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto(text.encode(), self._address)
        except OSError:
            return  # systemd is being restarted; the next one is soon
