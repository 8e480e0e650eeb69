"""The client of an appliance's control socket: one blocking call at a time. Knows no event loop."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

from drctl.errors import ApplianceUnreachable, ConfigInvalid, DrctlError

Progress = Callable[[dict[str, Any]], None]
#: A reply carries at most the listing of a journal's checkpoints; this is far above the largest seen.
MAX_LINE = 64 * 1024 * 1024


def error_from(data: dict[str, Any]) -> DrctlError:
    """The error that the appliance raised, rebuilt as the same class."""
    known = {cls.slug: cls for cls in _classes(DrctlError)}
    cls = known.get(str(data.get("error")), DrctlError)
    error = cls.__new__(cls)
    fields = {k: v for k, v in data.items() if k not in ("error", "exit_code", "message", "hint")}
    DrctlError.__init__(error, str(data.get("message", "")), hint=str(data.get("hint", "")), **fields)
    return error


def _classes(root: type[DrctlError]) -> list[type[DrctlError]]:
    return [root, *(cls for child in root.__subclasses__() for cls in _classes(child))]


class Client:
    """Calls methods of one appliance. Each call is a connection of its own, so calls may run in parallel."""

    def __init__(self, address: str, timeout: float = 10.0) -> None:
        scheme, _, path = address.partition(":")
        if scheme != "unix" or not path:
            raise ConfigInvalid("drctl.toml", 0, "control", f"{address!r} is not unix:PATH")
        self.address = address
        self._path = path
        self._timeout = timeout

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Any:
        """The method's result. Raises the appliance's own error, or ApplianceUnreachable."""
        request = json.dumps({"method": method, "params": params or {}, "id": 1}).encode() + b"\n"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(timeout or self._timeout)
                sock.connect(self._path)
                sock.sendall(request)
                with sock.makefile("rb") as lines:
                    return self._reply(lines.readline, on_progress)
        except PermissionError as exc:
            raise ApplianceUnreachable(
                f"the appliance's socket {self._path} is not open to you",
                hint="it is for the user alone whom the appliance runs as: sudo drctl …",
                address=self.address,
            ) from exc
        except OSError as exc:
            raise ApplianceUnreachable(
                f"no appliance answers at {self._path}: {exc.strerror or exc}",
                hint="is it running? see: drctl appliance list",
                address=self.address,
            ) from exc

    def _reply(self, readline: Callable[[int], bytes], on_progress: Progress | None) -> Any:
        while line := readline(MAX_LINE):
            reply = json.loads(line)
            if "progress" in reply:
                if on_progress:
                    on_progress(reply["progress"])
            elif "error" in reply:
                raise error_from(reply["error"])
            else:
                return reply.get("result")
        raise ApplianceUnreachable(f"the appliance at {self._path} hung up without an answer", address=self.address)
