"""The supervisor's side of the receiver: its configuration, its start."""

from __future__ import annotations

import json

from drctl import __version__
from drctl.appliance.config import Home
from drctl.appliance.process import Processes


class ReceiverLink:
    """The one receiver of this host. It runs whenever the host has a link address."""

    def __init__(self, home: Home, processes: Processes) -> None:
        self._home = home
        self._processes = processes
        self._path = home.run / "receiver.json"

    def ensure(self) -> None:
        """Start it if it is not running."""
        config = self._home.config
        if not config.link or not (self._home.tls / "cert.pem").exists():
            return
        if not self._path.exists():
            self._path.write_text(
                json.dumps(
                    {
                        "listen": config.link,
                        "appliance": config.uuid,
                        "tls": str(self._home.tls),
                        "store": str(self._home.store),
                        "control": str(self._home.run / "receiver.sock"),
                        "supervisor": str(self._home.control),
                        "software": __version__,
                    },
                    indent=1,
                )
            )
        self._processes.ensure("receiver", "drctl.replication.receiver", [str(self._path)])
