"""How a tap gives everything it holds to its successor: sockets with all that is on its way in them, and the ring.

The successor is ready, its ring mapped, before it asks; so guests' writes wait for some messages on a unix socket and
not for a program's start. One of the two has it all at any moment:

    successor  {format}                              it asks
    tap        {format, connections, …}, descriptors, bytes    reads nothing more, touches the ring no more
    successor  {ready}                               it could go on: nothing of it is needed any more
    tap        one byte                              from here on it is the successor's

Whatever fails before that byte, the tap goes on and the successor ends; what fails after it is a tap's death.
A message is its length (4 bytes, big endian) and JSON.
"""

from __future__ import annotations

import array
import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drctl.errors import IntegrityError, StepFailed, UnsupportedFormat
from drctl.replication.tap_connection import listen
from drctl.replication.tap_recorder import say
from drctl.wire import nbd

FORMAT = 1
#: The successor asks as soon as it is connected.
ASK_SECONDS = 0.02
#: How long guests wait at most for a successor that does not say that it is ready: under the watchdog's patience.
READY_SECONDS = 0.09
#: A tap that is busy looks at its sockets each few milliseconds; one that is stopped is the watchdog's business.
PATIENCE_SECONDS = 3.0
_LONGEST_MESSAGE = 1 << 20
#: Descriptors per message; the kernel's limit (SCM_MAX_FD) is 253.
_BATCH = 64


def handover_path(ring: Path) -> Path:
    """Where the tap of this ring listens for its successor; in a directory for its own user alone."""
    return ring.with_suffix(".heir")


@dataclass(frozen=True, slots=True)
class Live:
    """A client in an export, as its connection stands: what was received and makes no whole request yet, and replies
    that its socket did not take. `lost`: its end is noted in the ring already."""

    export: nbd.Export
    socket: socket.socket
    lost: bool
    unread: bytes
    unsent: bytes

    def told(self) -> dict[str, Any]:
        """For the successor: what it must know to go on, and what it must offer as well."""
        return {
            "export": self.export._asdict(),
            "lost": self.lost,
            "unread": len(self.unread),
            "unsent": len(self.unsent),
        }


@dataclass(frozen=True, slots=True)
class Estate:
    """All that a tap holds. `ring` is the descriptor that has the ring's lock."""

    listener: socket.socket
    ring: int
    live: Sequence[Live]


class Offer:
    """The tap's end: listens for a successor. Only one comes, and only when there is another version."""

    def __init__(self, path: Path) -> None:
        self._listener = listen(path, private=True)

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> socket.socket | None:
        """The successor that asks; None when there is none any more, or one of another format."""
        try:
            asking, _ = self._listener.accept()
        except OSError:
            return None
        try:
            asking.settimeout(ASK_SECONDS)
            known = _receive(asking).get("format")
            if known == FORMAT:
                return asking
            say(f"a successor of another format ({known}) was turned away")
        except (OSError, ValueError) as exc:
            say(f"a successor that does not ask: {exc}")
        asking.close()
        return None

    def close(self) -> None:
        self._listener.close()


def give(asking: socket.socket, estate: Estate) -> bool:
    """Give it all to the successor; False when it did not take it: then everything is as it was before."""
    begun = time.monotonic_ns()
    try:
        asking.settimeout(READY_SECONDS)
        _send(asking, {"format": FORMAT, "since_ns": begun, "connections": [live.told() for live in estate.live]})
        _send_descriptors(
            asking, [estate.listener.fileno(), estate.ring, *(live.socket.fileno() for live in estate.live)]
        )
        for live in estate.live:
            asking.sendall(live.unread)
            asking.sendall(live.unsent)
        answer = _receive(asking)
        if answer.get("ready"):
            asking.sendall(b"\0")
            return True
        say(f"the successor refuses: {answer.get('problem')}")
    except (OSError, ValueError) as exc:
        say(f"the successor did not take over: {exc or type(exc).__name__}")
    return False


class Succession:
    """The successor's end. `estate` is ours once `accede` has returned; until then nothing of it may be used."""

    def __init__(self, path: Path) -> None:
        self._tap = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._tap.settimeout(PATIENCE_SECONDS)
        self._since_ns = 0
        try:
            self._tap.connect(str(path))
        except OSError as exc:
            raise StepFailed(f"{path}: no tap hands over there: {exc.strerror}") from exc

    def receive(self) -> Estate:
        """What the tap holds. Raises StepFailed, UnsupportedFormat."""
        try:
            _send(self._tap, {"format": FORMAT})
            told = _receive(self._tap)
            if told.get("format") != FORMAT:
                raise UnsupportedFormat(f"a tap that hands over in format {told.get('format')}, not {FORMAT}")
            self._since_ns = int(told["since_ns"])
            connections = told["connections"]
            descriptors = _receive_descriptors(self._tap, 2 + len(connections))
            live = [
                Live(
                    nbd.Export(**one["export"]),
                    socket.socket(fileno=descriptor),
                    bool(one["lost"]),
                    _exactly(self._tap, one["unread"]),
                    _exactly(self._tap, one["unsent"]),
                )
                for one, descriptor in zip(connections, descriptors[2:], strict=True)
            ]
            return Estate(socket.socket(fileno=descriptors[0]), descriptors[1], live)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise StepFailed(f"the tap did not hand over: {exc}") from exc

    def refuse(self, problem: str) -> None:
        """Say why it can't be taken: the tap goes on."""
        with suppress(OSError):
            _send(self._tap, {"problem": problem})
            self._tap.close()

    def accede(self) -> float:
        """Take over; for how many seconds nobody took writes. Raises StepFailed: then it is the tap's again."""
        try:
            _send(self._tap, {"ready": True})
            if not self._tap.recv(1):
                raise StepFailed("the tap has taken it back")
        except OSError as exc:
            raise StepFailed(f"the tap has taken it back: {exc}") from exc
        self._tap.close()
        return (time.monotonic_ns() - self._since_ns) / 1e9


def matching(live: Live, exports: dict[str, nbd.Export]) -> nbd.Export:
    """Our own export for a connection. Raises IntegrityError when we would offer another than its client agreed to."""
    own = exports.get(live.export.name)
    if own != live.export:
        raise IntegrityError(f"export {live.export.name}: its client agreed to {live.export}, ours is {own}")
    return own


def _send(target: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    target.sendall(len(body).to_bytes(4, "big") + body)


def _receive(source: socket.socket) -> dict[str, Any]:
    """Raises OSError when the other end is gone, ValueError for what is no message."""
    length = int.from_bytes(_exactly(source, 4), "big")
    if length > _LONGEST_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    message = json.loads(_exactly(source, length))
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")  # noqa: TRY004 - as any other malformed message
    return message


def _exactly(source: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = source.recv_into(view)
        if not got:
            raise ConnectionResetError("the other end has gone")
        view = view[got:]
    return bytes(data)


def _send_descriptors(target: socket.socket, descriptors: Sequence[int]) -> None:
    for first in range(0, len(descriptors), _BATCH):
        socket.send_fds(target, [b"\0"], descriptors[first : first + _BATCH])


def _receive_descriptors(source: socket.socket, count: int) -> list[int]:
    """Exactly `count`; each batch came with one byte."""
    found: list[int] = []
    room = socket.CMSG_SPACE(_BATCH * array.array("i").itemsize)
    while len(found) < count:
        data, ancillary, _, _ = source.recvmsg(1, room)
        if not data:
            raise ConnectionResetError("the tap has gone")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                batch = array.array("i")
                batch.frombytes(payload[: len(payload) - len(payload) % batch.itemsize])
                found += batch
    if len(found) != count:
        raise ValueError(f"{len(found)} descriptors came, {count} were told of")
    return found
