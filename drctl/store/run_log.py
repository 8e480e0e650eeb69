"""The log of one run: append-only JSON lines, each durable before the step that it tells of, chained by hashes.

A line is one JSON object with `n` (from 1), `time` (seconds since the epoch), `previous` (SHA-256 of the line before in
hex; zeroes in the first) and the event's own fields, and ends with a line feed. A last line without one was torn by a
crash: the next writer cuts it off. Anything else that does not fit is damage, and told. Knows no event's meaning."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from drctl.errors import AlreadyExists, IntegrityError, Locked, NotFound, OutOfSpace
from drctl.store import atomic

GENESIS = "0" * 64
#: Longest line. Scripts' output is cut long before (plan/output.py).
MAXIMUM_LINE = 4 * 1024 * 1024
SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class Verification:
    """What a look at every line found. `broken` is the number of the first bad line (0: none), `problem` what it is.

    `head` is the hash of the last good line: who keeps it elsewhere can tell a log that was rewritten as a whole."""

    lines: int
    head: str
    broken: int = 0
    problem: str = ""
    torn_bytes: int = 0

    @property
    def sound(self) -> bool:
        return not self.broken


def run_path(directory: Path, run: str) -> Path:
    return directory / f"{run}{SUFFIX}"


def list_runs(directory: Path) -> list[str]:
    """Names of the runs that have a log there, in order of name (which begins with the time)."""
    try:
        return sorted(path.name.removesuffix(SUFFIX) for path in directory.iterdir() if path.name.endswith(SUFFIX))
    except FileNotFoundError:
        return []


def read_run(path: Path) -> tuple[list[dict[str, Any]], Verification]:
    """The events of a log up to the first line that is broken, and what was found. Raises NotFound."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound("run", path.name.removesuffix(SUFFIX), known=list_runs(path.parent)) from None
    return parse_run(data)


def parse_run(data: bytes) -> tuple[list[dict[str, Any]], Verification]:
    """The same of a log's bytes, wherever they are from."""
    events: list[dict[str, Any]] = []
    head, at = GENESIS, 0
    while (end := data.find(b"\n", at)) >= 0:
        line = data[at:end]
        event = _decode(line, len(events) + 1, head)
        if isinstance(event, str):
            return events, Verification(len(events), head, len(events) + 1, event)
        events.append(event)
        head, at = _digest(line), end + 1
    return events, Verification(len(events), head, torn_bytes=len(data) - at)


def _decode(line: bytes, number: int, head: str) -> dict[str, Any] | str:
    """The event of a line, or what is wrong with it."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(event, dict):
        return "it is no JSON object"
    if event.get("previous") != head:
        return "it does not follow the line before it: one of the two was changed, or lines are missing"
    if event.get("n") != number:
        return f"it is numbered {event.get('n')!r}"
    return event


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def head_at(data: bytes, lines: int) -> str:
    """The hash of a log's line of that number; GENESIS for 0, "" when it has fewer lines."""
    whole = data.split(b"\n")[:-1]
    if not 0 <= lines <= len(whole):
        return ""
    return _digest(whole[lines - 1]) if lines else GENESIS


def encode_event(whole: Mapping[str, Any]) -> bytes:
    """The line of an event that has its number, time and predecessor."""
    return json.dumps(whole, ensure_ascii=True, separators=(",", ":")).encode()


class RunLog:
    """One run's log, open for appending. Invariant: one writer at a time (flock); what `append` returned from is
    durable. After OutOfSpace nothing more can be appended: the line may be there in part."""

    def __init__(self, path: Path, file: int, count: int, head: str) -> None:
        self.path = path
        self.head = head
        self.count = count
        self._file = file
        self._size = os.fstat(file).st_size
        self._failed = False

    @classmethod
    def create(cls, path: Path) -> RunLog:
        """A new log. Raises AlreadyExists, OutOfSpace."""
        with atomic.space_errors(path):
            atomic.make_directory(path.parent)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                raise AlreadyExists(f"{path} is there already") from None
            _lock(file, path)
            atomic.sync_directory(path.parent)
        return cls(path, file, 0, GENESIS)

    @classmethod
    def open(cls, path: Path) -> tuple[RunLog, list[dict[str, Any]]]:
        """A log to go on with, and its events; a torn last line is cut off.

        Raises NotFound, Locked when its run goes on somewhere, IntegrityError when it is damaged."""
        if not path.exists():
            raise NotFound("run", path.name.removesuffix(SUFFIX), known=list_runs(path.parent))
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(file, path)
            events, found = read_run(path)
            _check(path, found)
            if found.torn_bytes:
                os.ftruncate(file, os.fstat(file).st_size - found.torn_bytes)
                os.fsync(file)
        except BaseException:
            os.close(file)
            raise
        return cls(path, file, found.lines, found.head), events

    def append(self, event: Mapping[str, Any], time: float) -> dict[str, Any]:
        """Write an event, durably, and return it as it was written. Raises OutOfSpace."""
        if self._failed:
            raise OutOfSpace(f"{self.path}: an earlier event could not be written", path=self.path)
        whole = {"n": self.count + 1, "time": time, "previous": self.head, **event}
        line = encode_event(whole)
        if len(line) > MAXIMUM_LINE:
            raise ValueError(f"an event of {len(line)} bytes")
        self._write([line])
        return whole

    def extend(self, lines: Sequence[bytes]) -> None:
        """Add lines that another log of the same run has, durably, all or (after a crash) the first of them.

        Raises IntegrityError when one does not follow; nothing is written then."""
        count, head = self.count, self.head
        for line in lines:
            wrong = _decode(line, count + 1, head)
            if isinstance(wrong, str):
                raise IntegrityError(f"{self.path}: line {count + 1} is not taken: {wrong}")
            count, head = count + 1, _digest(line)
        if lines:
            self._write(lines)

    def _write(self, lines: Sequence[bytes]) -> None:
        try:
            with atomic.space_errors(self.path):
                buffers = [part for line in lines for part in (line, b"\n")]
                self._size = atomic.write_at(self._file, buffers, self._size)
                atomic.sync_data(self._file)
        except BaseException:
            self._failed = True
            raise
        self.count += len(lines)
        self.head = _digest(lines[-1])

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(path: Path, found: Verification) -> None:
    if not found.sound:
        raise IntegrityError(f"{path}: line {found.broken}: {found.problem}", hint="see: drctl run verify")


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        name = path.name.removesuffix(SUFFIX)
        raise Locked(f"run {name} goes on: another drctl writes {path}", path=path) from None
