"""A TOML file as a table that knows the line of every key, and refuses what it does not know. Knows no key's meaning.

Python's tomllib says nothing about places, so a scanner (`key_lines`) finds them in the text that tomllib accepted."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from drctl.errors import ConfigInvalid
from drctl.model.duration import format_duration, parse_duration
from drctl.model.extent import MiB, format_bytes, parse_bytes
from drctl.toml.lines import MAXIMUM_DEPTH, KeyPath, TooDeep, key_lines

Value = TypeVar("Value")
#: Largest file that is read. A plan of 1,500 machines with three checks each has 0.5 MiB.
MAXIMUM_SIZE = 4 * MiB
#: A key of more parts than any of ours, before tomllib's time (which grows with the square of them) is spent on it.
_DEEP_KEY = re.compile(
    rf"""^[ \t\[]*(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{MAXIMUM_DEPTH}}}""", re.MULTILINE
)
_BARE = re.compile(r"[\w-]+")
_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)")
_KINDS = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "a table",
}


class _Required:
    """The default of a key that must be there."""


REQUIRED: Any = _Required()


def read_toml(path: Path) -> Table:
    """The file's top table. Raises ConfigInvalid (unreadable, too large, not UTF-8, not TOML)."""
    try:
        with path.open("rb") as file:
            data = file.read(MAXIMUM_SIZE + 1)
        if len(data) > MAXIMUM_SIZE:
            raise ConfigInvalid(str(path), 0, "", f"is larger than {format_bytes(MAXIMUM_SIZE)}", hint="split it")
        text = data.decode("utf-8").replace("\r\n", "\n")
    except OSError as exc:
        raise ConfigInvalid(str(path), 0, "", f"can't be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigInvalid(str(path), 0, "", "is not UTF-8 text") from exc
    return parse_toml(text, str(path))


def parse_toml(text: str, file: str) -> Table:
    """The top table of `text`; `file` is the name that errors give. Raises ConfigInvalid."""
    if deep := _DEEP_KEY.search(text):
        raise _too_deep(file, text.count("\n", 0, deep.start()) + 1)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        place = _PLACE.search(str(exc))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        raise ConfigInvalid(file, line, "", f"not TOML: {_PLACE.sub('', str(exc))}") from exc
    except RecursionError:
        raise _too_deep(file, 0) from None
    try:
        return Table(file, data, key_lines(text), ())
    except TooDeep as exc:
        raise _too_deep(file, exc.line) from None


def _too_deep(file: str, line: int) -> ConfigInvalid:
    return ConfigInvalid(file, line, "", f"tables or arrays are nested deeper than {MAXIMUM_DEPTH}")


class Table:
    """One table of a file. Each method reads one key; `finish` refuses the keys that nobody read.

    Invariant: every error names file, line and the key's full path."""

    def __init__(self, file: str, data: dict[str, Any], lines: dict[KeyPath, int], path: KeyPath) -> None:
        self.file = file
        self._data = data
        self._lines = lines
        self._path = path
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def peek(self, key: str) -> Any:
        """The value as it is, read or not; None when absent. The key is not marked as known."""
        return self._data.get(key)

    def line(self, key: str = "") -> int:
        """The line of `key`, else of the table itself, else of the nearest table around it."""
        path: KeyPath = (*self._path, key) if key else self._path
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 0)

    def error(self, key: str, problem: str, *, hint: str = "") -> ConfigInvalid:
        """The error that says what is wrong with `key`."""
        return ConfigInvalid(self.file, self.line(key), self._spell(key), problem, hint=hint)

    def finish(self) -> None:
        """Refuse keys that were not asked for; names the most similar one that exists."""
        for key in self._data:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, 1, 0.6)
                hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(set(self._known)))}"
                raise self.error(key, "unknown key", hint=hint)

    def text(self, key: str, default: Any = REQUIRED, *, pattern: str = "", example: str = "") -> str:
        """A string; with `pattern`, one that matches it whole (`example` says what would)."""
        value: str = self._typed(key, str, default)
        if key in self._data and pattern and not re.fullmatch(pattern, value):
            raise self.error(key, f"{value!r} is not allowed", hint=f"write e.g. {example}" if example else "")
        return value

    def choice(self, key: str, choices: Iterable[str], default: Any = REQUIRED) -> str:
        """One of `choices`."""
        value: str = self._typed(key, str, default)
        allowed = [str(choice) for choice in choices]
        if key in self._data and value not in allowed:
            near = difflib.get_close_matches(value, allowed, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else ""
            raise self.error(key, f"{value!r} is not one of {', '.join(allowed)}", hint=hint)
        return value

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        """true or false."""
        value: bool = self._typed(key, bool, default)
        return value

    def integer(self, key: str, default: Any = REQUIRED, *, minimum: int = 0) -> int:
        """A whole number, at least `minimum`."""
        value: int = self._typed(key, int, default)
        if value < minimum:
            raise self.error(key, f"{value} is below {minimum}")
        return value

    def duration(
        self, key: str, default: Any = REQUIRED, *, minimum: float = 0, maximum: float = float("inf")
    ) -> float:
        """Seconds, written as `"5s"`."""
        value: float = self._parsed(key, parse_duration, default)
        if key not in self._data:
            return value
        if not minimum <= value <= maximum:
            upper = "" if maximum == float("inf") else f", at most {format_duration(maximum)}"
            raise self.error(
                key, f"{format_duration(value)} is out of range", hint=f"at least {format_duration(minimum)}{upper}"
            )
        return value

    def size(self, key: str, default: Any = REQUIRED, *, minimum: int = 0) -> int:
        """Bytes, written as `"64 GiB"`."""
        value: int = self._parsed(key, parse_bytes, default)
        if key in self._data and value < minimum:
            raise self.error(key, f"{format_bytes(value)} is too small", hint=f"at least {format_bytes(minimum)}")
        return value

    def strings(self, key: str, default: Any = REQUIRED, *, unique: bool = True) -> tuple[str, ...]:
        """An array of strings, none twice unless they need not be `unique`."""
        values = self._typed(key, list, default)
        for value in values:
            if not isinstance(value, str):
                raise self.error(key, f"holds {_kind(value)}", hint='write an array of strings, e.g. ["db", "web"]')
        if unique and len(set(values)) < len(values):
            twice = next(value for place, value in enumerate(values) if value in set(values[:place]))
            raise self.error(key, f"names {twice!r} twice")
        return tuple(values)

    def mapping(self, key: str) -> tuple[tuple[str, str], ...]:
        """A table of strings; empty when absent."""
        if key not in self:
            self._known.append(key)
            return ()
        inner = self.table(key)
        return tuple((name, inner.text(name)) for name in inner._data)

    def table(self, key: str) -> Table:
        """The table `key`; an empty one when absent."""
        return Table(self.file, self._typed(key, dict, {}), self._lines, (*self._path, key))

    def tables(self, key: str) -> list[Table]:
        """An array of tables; empty when absent."""
        rows = self._typed(key, list, [])
        if any(not isinstance(row, dict) for row in rows):
            raise self.error(key, "must be an array of tables", hint=f"write [[{key}]] above each")
        return [Table(self.file, row, self._lines, (*self._path, key, index)) for index, row in enumerate(rows)]

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        if key not in self._data:
            return self._default(key, default)
        self._known.append(key)
        value = self._data[key]
        if type(value) is not kind:
            raise self.error(key, f"is {_kind(value)}, must be {_KINDS[kind]}")
        return value

    def _default(self, key: str, default: Any) -> Any:
        self._known.append(key)
        if default is REQUIRED:
            raise self.error("", f"{key} is missing" if self._path else f"key {key!r} is missing")
        return default

    def _parsed(self, key: str, parse: Callable[[str], Any], default: Any) -> Any:
        if key not in self._data:
            return self._default(key, default)
        self._known.append(key)
        value = self._data[key]
        try:
            return parse(str(value) if type(value) in (int, float) else self._typed(key, str, REQUIRED))
        except ValueError as exc:
            raise self.error(key, str(exc)) from exc

    def _spell(self, key: str) -> str:
        parts: list[str] = []
        for part in (*self._path, key) if key else self._path:
            if isinstance(part, int):
                parts[-1] += f"[{part}]"
            else:
                parts.append(part if _BARE.fullmatch(part) else repr(part))  # no escape reaches a terminal
        return ".".join(parts)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)
