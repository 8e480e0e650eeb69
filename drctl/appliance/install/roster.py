"""Who is who: each host's appliance by UUID, beside the project's CA. Keep it under version control with drctl.toml."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from drctl.errors import IntegrityError, PreconditionFailed
from drctl.model.site import Host
from drctl.replication.identity import PASSPHRASE, check_ca, read_passphrase, sign_request
from drctl.store import atomic

FILE = "appliances.json"


class Roster:
    """The CA's directory, and the UUIDs given out. A UUID, once given, stays the host's.

    Raises PreconditionFailed without a CA, SetupFailed when its key can't be used."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        if not (directory / "ca-key.pem").is_file():
            raise PreconditionFailed(
                f"{directory} has no certificate authority",
                hint="drctl init DIR makes one; its key must be here to install",
            )
        check_ca(directory, _passphrase())  # told before any host is changed

    @property
    def ca(self) -> bytes:
        """The CA's certificate, PEM."""
        return (self._directory / "ca.pem").read_bytes()

    def assign(self, hosts: Iterable[Host]) -> dict[str, str]:
        """The UUID of each host's appliance, by the host's name; new ones for those that have none."""
        with atomic.lock(self._directory / f"{FILE}.lock"):
            known = self._read()
            new = {host.name: str(uuid.uuid4()) for host in hosts if host.name not in known}
            if new:
                atomic.write_json(self._directory / FILE, known | new)
            return known | new

    def known(self) -> dict[str, str]:
        """The UUIDs given out, by the host's name."""
        return self._read()

    def sign(self, request: str, appliance: str) -> str:
        """A certificate for a host's own request. Raises CertificateRejected, SetupFailed (the key's passphrase)."""
        return sign_request(self._directory, request.encode(), appliance, passphrase=_passphrase()).decode()

    def _read(self) -> dict[str, str]:
        known = atomic.read_json(self._directory / FILE) or {}
        if not isinstance(known, dict):
            raise IntegrityError(f"{self._directory / FILE} is not a JSON object")
        return known


def _passphrase() -> bytes | None:
    """What the operator's environment names a file for. Raises SetupFailed when there is none in it."""
    file = os.environ.get(PASSPHRASE)
    return read_passphrase(Path(file)) if file else None
