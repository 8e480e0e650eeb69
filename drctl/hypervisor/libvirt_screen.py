"""A machine's screen as libvirt shows it (virDomainScreenshot)."""

from __future__ import annotations

from drctl.errors import HypervisorRefused
from drctl.hypervisor.libvirt_connection import Connection

_CHUNK = 256 * 1024
#: 64 million pixels.
_LIMIT = 200 * 1024 * 1024


def take_screenshot(connection: Connection, name: str) -> bytes:
    """The first screen of a running machine, PPM or PNG. Raises HypervisorRefused when it has no display."""
    with connection.translated(name):
        host = connection.get()
        stream = host.newStream()
        host.lookupByName(name).screenshot(stream, 0)
        parts, size = [], 0
        while data := stream.recv(_CHUNK):
            parts.append(data)
            size += len(data)
            if size > _LIMIT:
                raise HypervisorRefused(f"{name}: its screen's picture is larger than {_LIMIT} bytes", machine=name)
        stream.finish()
    return b"".join(parts)
