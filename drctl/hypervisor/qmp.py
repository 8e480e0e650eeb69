"""QMP: one command to a QEMU monitor and its answer, over a unix socket, and how a refusal becomes an error.

`Monitor` is what the mirror needs of a QEMU: a callable that takes a whole command (`{"execute": …, "arguments": …}`)
and gives what QEMU returned. libvirt's passthrough is one, `QmpSocket` is another: for a QEMU or a
`qemu-storage-daemon` without libvirt, as in tests and benchmarks.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Self

from drctl.errors import DrctlError, HostUnreachable, HypervisorRefused

#: Raises HypervisorRefused with field `qmp_class` when QEMU answered an error, HostUnreachable when nobody answers.
Monitor = Callable[[dict[str, Any]], Any]

#: Longest answer taken from a monitor: query-named-block-nodes of a machine with 90 disks is below 1 MiB.
_ANSWER_LIMIT = 64 * 1024 * 1024
#: Newest events kept for a test to look at; a mirror at a dead target can send thousands.
_EVENTS_KEPT = 256


def command(execute: str, /, **arguments: Any) -> dict[str, Any]:
    """A QMP command; `_` in the name of an argument stands for `-`."""
    body: dict[str, Any] = {"execute": execute}
    if arguments:
        body["arguments"] = {key.rstrip("_").replace("_", "-"): value for key, value in arguments.items()}
    return body


def unpack(sent: Mapping[str, Any], answer: Mapping[str, Any]) -> Any:
    """What QEMU returned. Raises HypervisorRefused with QEMU's own words, its class in the field `qmp_class`."""
    if "error" not in answer:
        return answer.get("return")
    error = answer["error"]
    raise HypervisorRefused(
        f"QEMU refused {sent.get('execute')}: {error.get('desc', 'no reason given')}",
        command=sent.get("execute"),
        qmp_class=error.get("class", "GenericError"),
    )


def qmp_class(error: DrctlError) -> str:
    """QEMU's class of a refusal (`DeviceNotFound`, `GenericError`…), empty when the error is not QEMU's."""
    return str(error.fields.get("qmp_class", ""))


class QmpSocket:
    """A monitor on a unix socket. One command at a time, from any thread. Events are kept apart (the newest 256).

    After HostUnreachable the connection is spent: make a new one."""

    def __init__(self, path: str, *, timeout_seconds: float = 30.0) -> None:
        self.path = path
        self.events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._buffer = b""
        self._sent = 0
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_seconds)
        try:
            self._socket.connect(path)
        except OSError as exc:
            self._socket.close()
            raise HostUnreachable(f"no QEMU monitor at {path}: {exc.strerror or exc}", path=path) from exc
        try:
            # QEMU may send what a client before us did not wait for, ahead of the greeting.
            while "QMP" not in self._receive():
                pass
            self(command("qmp_capabilities"))
        except DrctlError:
            self._socket.close()
            raise

    def __call__(self, sent: dict[str, Any]) -> Any:
        """Send one command and wait for its answer."""
        with self._lock:
            self._sent += 1
            self._send({**sent, "id": self._sent})
            while not self._answers(answer := self._receive()):
                if "event" in answer:
                    self.events.append(answer)
        return unpack(sent, answer)

    def _answers(self, message: dict[str, Any]) -> bool:
        """Whether it is the answer to the newest command. An error without an id is, too: QEMU could not read it."""
        return message.get("id", self._sent if "error" in message else None) == self._sent

    def _send(self, sent: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(sent).encode() + b"\n")
        except OSError as exc:
            raise self._lost(exc) from exc

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            try:
                chunk = self._socket.recv(1 << 16)
            except OSError as exc:
                raise self._lost(exc) from exc
            if not chunk or len(self._buffer) > _ANSWER_LIMIT:
                raise self._lost(None)
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            answer = json.loads(line)
        except ValueError as exc:
            raise HostUnreachable(f"the monitor at {self.path} does not speak QMP", path=self.path) from exc
        if not isinstance(answer, dict):
            raise HostUnreachable(f"the monitor at {self.path} does not speak QMP", path=self.path)
        return answer

    def _lost(self, exc: OSError | None) -> HostUnreachable:
        why = "it closed the connection" if exc is None else str(exc)
        return HostUnreachable(f"lost the QEMU monitor at {self.path}: {why}", path=self.path)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
