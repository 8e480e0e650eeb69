"""One run of a program of the host: its words, where it speaks, and the frames that this goes into."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.esxsim.daemon import Hostd


@dataclass
class Call:
    """A program. `out` and `err` raise BrokenPipeError when nobody listens any more, which ends the program."""

    host: Hostd
    name: str
    cwd: str
    words: list[str]
    connection: socket.socket | None = None
    said: list[tuple[int, str]] = field(default_factory=list)

    def out(self, text: str) -> None:
        self._send(1, text)

    def err(self, text: str) -> None:
        self._send(2, text)

    def _send(self, kind: int, text: str) -> None:
        self.said.append((kind, text))
        if self.connection is not None and text:
            data = text.encode("utf-8", "surrogateescape")
            self.connection.sendall(struct.pack("=BI", kind, len(data)) + data)

    def end(self, code: int) -> None:
        if self.connection is not None:
            self.connection.sendall(struct.pack("=BII", 0, 4, code))
