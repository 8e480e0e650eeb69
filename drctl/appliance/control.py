"""The control socket: JSON lines in, JSON lines out, one thread per connection. Knows no method's meaning."""

from __future__ import annotations

import errno
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from drctl.errors import DrctlError, NotFound, OutOfSpace, PreconditionFailed, ProtocolViolation, Refused

Progress = Callable[[dict[str, Any]], None]
Handler = Callable[[dict[str, Any], Progress], Any]
#: A request carries at most a group with its machines; more is a mistake or an attack.
MAX_REQUEST = 4 * 1024 * 1024
#: Callers at a time; each has a thread, each shipper is one. One more is told so: all groups of a host with commands
#: and monitoring are far below.
MAX_CALLERS = 512
#: After the listener could not take a caller (no descriptors left, most likely).
_PAUSE_SECONDS = 0.2

log = logging.getLogger(__name__)


class _ClientGone(Exception):
    """Nobody waits for the answer any more. It ends the method at its next report of progress; that is no bug of it."""


class ControlServer:
    """Serves `handlers` (method name → function) on a unix socket of mode 0600."""

    def __init__(self, path: Path, handlers: dict[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._listener: socket.socket | None = None
        self._stopped = False
        self._places = threading.BoundedSemaphore(MAX_CALLERS)

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self._path))
        self._path.chmod(0o600)
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="control", daemon=True).start()

    def stop(self) -> None:
        self._stopped = True
        if self._listener is not None:
            self._listener.close()
            self._path.unlink(missing_ok=True)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as exc:
                if self._stopped or exc.errno in (errno.EBADF, errno.EINVAL):
                    return
                log.warning("control: %s", exc)
                time.sleep(_PAUSE_SECONDS)
                continue
            self._welcome(connection)

    def _welcome(self, connection: socket.socket) -> None:
        if not self._places.acquire(blocking=False):
            with suppress(OSError), connection:
                connection.setblocking(False)
                connection.send(json.dumps({"id": None, "error": _crowd().as_dict()}).encode() + b"\n")
            return
        try:
            threading.Thread(target=self._serve, args=(connection,), name="control-call", daemon=True).start()
        except RuntimeError as exc:  # the system has no thread left
            log.warning("control: %s", exc)
            self._places.release()
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._converse(connection)
        finally:
            self._places.release()

    def _converse(self, connection: socket.socket) -> None:
        # Closing flushes what nobody takes any more: that, too, may fail.
        try:
            with connection, connection.makefile("rwb") as stream:
                while line := stream.readline(MAX_REQUEST):
                    self._answer(line, stream)
        except (_ClientGone, OSError, ValueError) as exc:
            log.debug("control connection ended: %s", exc)

    def _answer(self, line: bytes, stream: Any) -> None:
        request = _request(line)
        identity = request.get("id")

        def send(**fields: Any) -> None:
            try:
                stream.write(json.dumps({"id": identity, **fields}).encode() + b"\n")
                stream.flush()
            except OSError as exc:
                raise _ClientGone(str(exc)) from exc

        try:
            result = self._call(request, lambda progress: send(progress=progress))
        except DrctlError as exc:
            send(error=exc.as_dict())
        except _ClientGone:
            raise
        except OSError as exc:
            log.exception("control method %s", request.get("method"))
            send(error=_of_the_system(exc).as_dict())
        except Exception as exc:  # the edge: a bug in one method must not end the service
            log.exception("control method %s", request.get("method"))
            send(error=DrctlError(f"unexpected {type(exc).__name__}: {exc}", hint="see the appliance's log").as_dict())
        else:
            send(result=result)

    def _call(self, request: dict[str, Any], progress: Progress) -> Any:
        method = str(request.get("method"))
        handler = self._handlers.get(method)
        if handler is None:
            raise NotFound("method", method, hint="the appliance and the command line are of different versions")
        params = request.get("params") or {}
        if not isinstance(params, dict):
            raise ProtocolViolation("the request's params are no object")
        return handler(params, progress)


def _request(line: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no request: there is nobody to answer then."""
    try:
        request = json.loads(line)
    except RecursionError as exc:
        raise ValueError("a request nested too deeply") from exc
    if not isinstance(request, dict):
        raise ValueError("a request that is no object")  # noqa: TRY004 - as any other malformed request
    return request


def _crowd() -> DrctlError:
    return Refused(f"the appliance has {MAX_CALLERS} callers already", hint="try again; see who they are: ss -x")


def _of_the_system(error: OSError) -> DrctlError:
    """What the operating system refused, as an error that an operator can act on."""
    place = f"{error.filename}: " if error.filename else ""
    text = f"{place}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(text, hint="free space there; nothing that was kept is lost")
    return PreconditionFailed(text, hint="mend it there (owner, mode, mount), then give the command again")
