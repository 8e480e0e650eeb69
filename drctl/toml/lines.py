"""Finds the line of every key in TOML text that is known to be valid. Knows no values.

A path is the keys from the top, with the index of a row where an array of tables is passed:
`[[host]]` twice, then `uri = …` is `("host", 1, "uri")`."""

from __future__ import annotations

import re

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n,]|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'',
    re.DOTALL,
)
_ESCAPE = re.compile(r'\\(["\\])')
#: Longest path of a key. No file of ours goes deeper than 8; Python's own recursion ends at some hundreds.
MAXIMUM_DEPTH = 64


class TooDeep(Exception):
    """A key's path is longer than MAXIMUM_DEPTH; `line` says where."""

    def __init__(self, line: int) -> None:
        super().__init__(f"line {line}: deeper than {MAXIMUM_DEPTH} levels")
        self.line = line


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of every table header and key. `text` must be valid TOML. Raises TooDeep."""
    return _Scanner(text).scan()


class _Scanner:
    """Walks the text once. Invariant: `_at` is behind what has been understood."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._counted = (0, 1)  # up to where lines were counted, and the line there
        self._lines: dict[KeyPath, int] = {}
        self._rows: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self._skip(_BLANK)
        while self._at < len(self._text):
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)
        return self._lines

    def _header(self) -> KeyPath:
        array = self._text.startswith("[[", self._at)
        self._at += 2 if array else 1
        line = self._line()
        *outer, last = self._key()
        path: KeyPath = ()
        for part in outer:
            self._lines.setdefault((*path, part), line)
            path = self._enter((*path, part))
        path = (*path, last)
        if array:
            self._lines.setdefault(path, line)
            self._rows[path] = self._rows.get(path, -1) + 1
            path = self._enter(path)
        self._lines[path] = line
        self._at = self._text.index("]", self._at) + (2 if array else 1)
        return path

    def _enter(self, path: KeyPath) -> KeyPath:
        return (*path, self._rows[path]) if path in self._rows else path

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        path = table
        for part in self._key():
            path = (*path, part)
            self._lines.setdefault(path, line)
        self._at = self._text.index("=", self._at) + 1
        self._skip(_BLANK)
        self._value(path)

    def _key(self) -> list[str]:
        parts: list[str] = []
        while True:
            self._skip(_BLANK)
            if self._peek() in "\"'":
                quoted = self._take(_STRING)
                parts.append(_ESCAPE.sub(r"\1", quoted[1:-1]) if quoted[0] == '"' else quoted[1:-1])
            else:
                parts.append(self._take(_BARE))
            self._skip(_BLANK)
            if self._peek() != ".":
                return parts
            self._check_depth(len(parts))
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        self._check_depth(len(path))
        first = self._peek()
        if first in "\"'":
            self._take(_STRING)
        elif first in "[{":
            self._at += 1
            self._inside(path, "]" if first == "[" else "}")
        else:
            self._skip(_SCALAR)

    def _inside(self, path: KeyPath, end: str) -> None:
        index = 0
        self._skip(_BLANK)
        while self._peek() != end:
            if end == "}":
                self._pair(path)
            else:
                self._lines[(*path, index)] = self._line()
                self._value((*path, index))
                index += 1
            self._skip(_BLANK)
        self._at += 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _check_depth(self, depth: int) -> None:
        if depth > MAXIMUM_DEPTH:
            raise TooDeep(self._line())

    def _line(self) -> int:
        offset, line = self._counted
        self._counted = self._at, line + self._text.count("\n", offset, self._at)
        return self._counted[1]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        self._take(pattern)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise AssertionError(f"not valid TOML at offset {self._at}")
        self._at = match.end()
        return match[0]
