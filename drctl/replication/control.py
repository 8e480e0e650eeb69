"""The small control sockets of shipper and receiver, and the calls to the supervisor: JSON lines, asyncio.

Request `{"method", "params", "id"}`, reply `{"id", "result"}` or `{"id", "error": {…}}` (docs/internals.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from drctl.errors import ApplianceUnreachable, DrctlError, NotFound, Refused

Handler = Callable[[dict[str, Any]], Awaitable[Any]]
#: A definition with its files is the largest request.
MAX_LINE = 4 * 1024 * 1024

log = logging.getLogger(__name__)


async def serve(path: Path, handlers: dict[str, Handler]) -> asyncio.Server:
    """Listen on a unix socket of mode 0600. A request that fails is answered with its error."""
    _unlink(path)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                writer.write(await _answer(line, handlers))
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(connected, str(path), limit=MAX_LINE)
    _protect(path)
    return server


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _protect(path: Path) -> None:
    path.chmod(0o600)


async def _answer(line: bytes, handlers: dict[str, Handler]) -> bytes:
    identity: Any = None
    try:
        request = msgspec.json.decode(line)
        identity = request.get("id")
        handler = _handler(str(request.get("method")), handlers)
        answer = {"id": identity, "result": await handler(request.get("params") or {})}
    except DrctlError as exc:
        answer = {"id": identity, "error": exc.as_dict()}
    except Exception as exc:  # the edge: a bad request must not end the process
        log.exception("control request")
        answer = {"id": identity, "error": DrctlError(f"unexpected {type(exc).__name__}: {exc}").as_dict()}
    return msgspec.json.encode(answer) + b"\n"


def _handler(method: str, handlers: dict[str, Handler]) -> Handler:
    if (handler := handlers.get(method)) is None:
        raise NotFound("method", method, known=sorted(handlers))
    return handler


class ControlClient:
    """One persistent connection to a control socket, made anew when it broke. One call at a time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._id = 0

    async def call(self, method: str, params: dict[str, Any], timeout: float = 5.0) -> Any:
        """The result. Raises ApplianceUnreachable, or Refused with the other side's message."""
        async with self._lock:
            try:
                async with asyncio.timeout(timeout):
                    return await self._exchange(method, params)
            except (OSError, EOFError, TimeoutError, ValueError, msgspec.DecodeError) as exc:
                self.close()
                raise ApplianceUnreachable(f"{self._path}: {method}: {exc or type(exc).__name__}") from exc
            except asyncio.CancelledError:
                self.close()  # an answer that nobody waits for must not be taken for the next one
                raise

    async def _exchange(self, method: str, params: dict[str, Any]) -> Any:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path, limit=MAX_LINE)
        reader, writer = self._streams
        self._id += 1
        writer.write(msgspec.json.encode({"method": method, "params": params, "id": self._id}) + b"\n")
        await writer.drain()
        while line := await reader.readline():
            reply = msgspec.json.decode(line)
            if reply.get("id") != self._id or "progress" in reply:
                continue
            if (error := reply.get("error")) is not None:
                raise Refused(str(error.get("message", error)), hint=str(error.get("hint", "")))
            return reply.get("result")
        raise EOFError("closed")

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
