"""What vim-cmd prints: structs, arrays, references; and the faults among them. Pure.

hostd escapes nothing: a string may hold quotes and line ends. A string ends at a quote that ends its line and is
followed by what may follow a value at this depth; nothing is guessed beyond that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from drctl.errors import UnsupportedFormat

Value = "str | int | bool | None | Struct | list[Value]"

_FAULT = re.compile(r"^\((?:vim|vmodl)\.fault\.\w+\) \{", re.MULTILINE)
_FIELD = re.compile(r"( *)(\w+) = ")
_OPEN = re.compile(r"\(([\w.]+)\) (\{|\[|null|\[\])")
DEPTH = 40


@dataclass(frozen=True)
class Struct:
    """`(kind) { … }`. A null or a reference is a plain value of its owner."""

    kind: str
    fields: Mapping[str, object]

    def find(self, path: str) -> object:
        """`config.vmPathName`. Raises UnsupportedFormat when it is not there."""
        at: object = self
        for name in path.split("."):
            if not isinstance(at, Struct) or name not in at.fields:
                raise UnsupportedFormat(f"{self.kind} has no {path}")
            at = at.fields[name]
        return at

    def text(self, path: str) -> str:
        """A string field. Raises UnsupportedFormat."""
        found = self.find(path)
        if not isinstance(found, str):
            raise UnsupportedFormat(f"{self.kind}.{path} is no text")
        return found


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that hostd answered with; `message` is its own words."""

    kind: str
    message: str
    name: str = ""


def fault(text: str) -> Fault | None:
    """The fault in a command's output: an exit code alone proves nothing."""
    match = _FAULT.search(text)
    if match is None:
        return None
    block = text[match.start() :].partition("\n}")[0]
    message = re.search(r'^ *msg = "(.*)",? ?$', block, re.MULTILINE | re.DOTALL)
    name = re.search(r'^ *name = "(.*)",? ?$', block, re.MULTILINE)
    kind = match[0].removeprefix("(").split(")")[0]
    return Fault(kind, message[1] if message else "", name[1] if name else "")


def parse(text: str) -> object:
    """The first value in a command's output; a title line may stand before it. Raises UnsupportedFormat."""
    match = re.search(r"^\([\w.]+\) (?:\{|\[)", text, re.MULTILINE)
    if match is None:
        raise UnsupportedFormat("no struct in what vim-cmd printed")
    reader = _Reader(text[match.start() :])
    value = reader.value(0)
    reader.finish()
    return value


def struct(text: str, kind: str) -> Struct:
    """As parse, but a struct of this kind. Raises UnsupportedFormat."""
    found = parse(text)
    if not isinstance(found, Struct) or found.kind != kind:
        raise UnsupportedFormat(f"vim-cmd did not print a {kind}")
    return found


class _Reader:
    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._row = 0
        self._rest = self._lines[0]

    def finish(self) -> None:
        if self._rest.strip() or any(line.strip() for line in self._lines[self._row + 1 :]):
            raise self._odd()

    def value(self, depth: int) -> object:
        if depth > DEPTH:
            raise UnsupportedFormat(f"a struct nested deeper than {DEPTH}")
        if match := _OPEN.match(self._rest):
            self._rest = self._rest[match.end() :]
            if match[2] == "{":
                return Struct(match[1], dict(self._fields(depth + 1)))
            if match[2] == "[" and not self._rest.startswith("]"):
                return list(self._items(depth + 1))
            self._rest = self._rest.removeprefix("]")
            return None if match[2] == "null" else []
        if self._rest.startswith('"'):
            return self._string(depth)
        return self._word()

    def _word(self) -> object:
        match = re.match(r"'([^']*)'|(<unset>)|(true|false)\b|(-?\d+(?:\.\d+)?)", self._rest)
        if match is None:
            raise self._odd()
        self._rest = self._rest[match.end() :]
        if match[1] is not None:
            return match[1]
        if match[2]:
            return None
        if match[3]:
            return match[3] == "true"
        return float(match[4]) if "." in match[4] else int(match[4])

    def _string(self, depth: int) -> str:
        parts = [self._rest[1:]]
        while not self._ends(parts[-1], depth):
            self._row += 1
            if self._row >= len(self._lines):
                raise UnsupportedFormat("a text in vim-cmd's output has no end")
            parts.append(self._lines[self._row])
        last = parts[-1].rstrip(" ")
        self._rest = "," if last.endswith(",") else ""
        parts[-1] = last.removesuffix(",").removesuffix('"')
        return "\n".join(parts)

    def _ends(self, line: str, depth: int) -> bool:
        """Whether a text ends with this line: by its quote, and by what stands in the next."""
        found = re.search(r'"(,?) ?$', line)
        if found is None:
            return False
        following = self._lines[self._row + 1] if self._row + 1 < len(self._lines) else ""
        pad = "   " * depth
        if found[1]:
            return bool(re.match(rf"{pad}(?:\w+ = |\(|\"|'|-?\d|<unset>|(?:true|false),? ?$)", following))
        return bool(re.match(rf"{pad[3:]}[}}\]]", following)) or not following

    def _fields(self, depth: int) -> Iterator[tuple[str, object]]:
        seen: set[str] = set()
        while not self._closes("}", depth):
            match = _FIELD.match(self._rest)
            if match is None or len(match[1]) != 3 * depth or match[2] in seen:
                raise self._odd()
            seen.add(match[2])
            self._rest = self._rest[match.end() :]
            yield match[2], self.value(depth)
            self._comma()

    def _items(self, depth: int) -> Iterator[object]:
        while not self._closes("]", depth):
            self._rest = self._rest.removeprefix("   " * depth)
            yield self.value(depth)
            self._comma()

    def _comma(self) -> None:
        """A comma, or none: none stands after the last field, nor before a fault's `msg`."""
        if self._rest.strip(", "):
            raise self._odd()

    def _closes(self, bracket: str, depth: int) -> bool:
        if self._rest.strip(", "):
            raise self._odd()
        self._row += 1
        if self._row >= len(self._lines):
            raise UnsupportedFormat("a struct in vim-cmd's output has no end")
        self._rest = self._lines[self._row]
        if self._rest.startswith("   " * (depth - 1) + bracket):
            self._rest = self._rest[3 * (depth - 1) + 1 :]
            return True
        return False

    def _odd(self) -> UnsupportedFormat:
        return UnsupportedFormat(f"vim-cmd's output is not understood at {self._rest[:60]!r}")
