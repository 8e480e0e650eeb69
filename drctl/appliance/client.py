"""The client of an appliance's control socket: one blocking call at a time. Knows no event loop."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

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


class Stream(Protocol):
    """A connection to a control socket. `ended` says why it hung up without an answer; both may raise OSError."""

    def sendall(self, data: bytes) -> None: ...

    def readline(self, limit: int) -> bytes: ...

    def ended(self) -> DrctlError: ...


class Dialer(Protocol):
    """Opens streams to one appliance. Raises DrctlError."""

    address: str

    def open(self, timeout: float) -> AbstractContextManager[Stream]: ...


class UnixSocket:
    """A control socket of this machine."""

    def __init__(self, path: str) -> None:
        self.address = f"unix:{path}"
        self._path = path

    @contextmanager
    def open(self, timeout: float) -> Iterator[Stream]:
        """A stream to the socket. Raises ApplianceUnreachable."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(timeout)
                sock.connect(self._path)
                with sock.makefile("rb") as lines:
                    yield _UnixStream(self.address, sock, lines.readline)
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


class _UnixStream:
    def __init__(self, address: str, sock: socket.socket, readline: Callable[[int], bytes]) -> None:
        self._address = address
        self.sendall = sock.sendall
        self.readline = readline

    def ended(self) -> DrctlError:
        message = f"the appliance at {self._address.partition(':')[2]} hung up without an answer"
        return ApplianceUnreachable(message, address=self._address)


class Client:
    """Calls methods of one appliance. Each call is a connection of its own, so calls may run in parallel."""

    def __init__(self, address: str | Dialer, timeout: float = 10.0) -> None:
        self._dialer = _local(address) if isinstance(address, str) else address
        self.address = self._dialer.address
        self._timeout = timeout

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Any:
        """The method's result. Raises the appliance's own error, or ApplianceUnreachable; over SSH the Shell's too."""
        request = json.dumps({"method": method, "params": params or {}, "id": 1}).encode() + b"\n"
        with self._dialer.open(timeout or self._timeout) as stream:
            try:
                stream.sendall(request)
                return self._reply(stream, on_progress)
            except TimeoutError as exc:
                message = f"no appliance answers at {self.address.partition(':')[2]}: timed out"
                hint = "is it running? see: drctl appliance list"
                raise ApplianceUnreachable(message, hint=hint, address=self.address) from exc

    def _reply(self, stream: Stream, on_progress: Progress | None) -> Any:
        while line := stream.readline(MAX_LINE):
            reply = json.loads(line)
            if "progress" in reply:
                if on_progress:
                    on_progress(reply["progress"])
            elif "error" in reply:
                raise error_from(reply["error"])
            else:
                return reply.get("result")
        raise stream.ended()


def _local(address: str) -> UnixSocket:
    scheme, _, path = address.partition(":")
    if scheme != "unix" or not path:
        raise ConfigInvalid("drctl.toml", 0, "control", f"{address!r} is not unix:PATH")
    return UnixSocket(path)
