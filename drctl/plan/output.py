"""What scripts and consoles said, made safe: bounded, and nothing in it that a terminal takes for a command. Pure."""

from __future__ import annotations

import re

#: Kept of the beginning and of the end of an output; what is between is counted.
HEAD = 16 * 1024
TAIL = 48 * 1024
#: C0 but tab and line feed, DEL, C1; marks that turn the direction of text (CVE-2021-42574); line separators.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


class Capture:
    """Takes output as it comes, and keeps its beginning and its end. Invariant: holds at most HEAD + 2 * TAIL bytes."""

    def __init__(self, head: int = HEAD, tail: int = TAIL) -> None:
        self.total = 0
        self._head_limit = head
        self._tail_limit = tail
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_limit - len(self._head)
        self._head += data[:room]
        self._tail += data[room:][-self._tail_limit :]
        if len(self._tail) > 2 * self._tail_limit:
            del self._tail[: -self._tail_limit]

    def text(self) -> str:
        """The output as `tame` text, with a line that says how much was left out."""
        tail = self._tail[-self._tail_limit :]
        cut = self.total - len(self._head) - len(tail)
        if not cut:
            return tame(bytes(self._head + tail))
        return f"{tame(bytes(self._head))}\n[… {cut} bytes left out …]\n{tame(bytes(tail))}"


def tame(data: bytes | str) -> str:
    """Text that can be printed anywhere: invalid UTF-8 and control characters are spelled out, e.g. `\\x1b`."""
    text = data.decode("utf-8", "backslashreplace") if isinstance(data, bytes) else data
    return _UNSAFE.sub(_spell, text.replace("\r\n", "\n"))


def tame_line(data: bytes | str, limit: int = 200) -> str:
    """The same as one line of at most `limit` characters."""
    line = " ".join(tame(data).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
