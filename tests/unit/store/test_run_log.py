"""A run's log: durable, chained, cut where it was torn, and its first broken line named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import AlreadyExists, IntegrityError, Locked, NotFound, OutOfSpace
from drctl.store import atomic
from drctl.store.run_log import GENESIS, RunLog, list_runs, read_run, run_path

EVENTS = [
    {"event": "run", "run": "r"},
    {"event": "begin", "step": "a\n\x1b[2J"},
    {"event": "over", "verdict": "passed"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return run_path(tmp_path / "runs", "r")


def written(path: Path) -> bytes:
    with RunLog.create(path) as log:
        for number, event in enumerate(EVENTS):
            log.append(event, 100.0 + number)
    return path.read_bytes()


def test_lines_are_chained_as_anybody_can_check(path: Path) -> None:
    data = written(path)
    previous = GENESIS
    for number, line in enumerate(data.splitlines(), 1):
        event = json.loads(line)
        assert (event["n"], event["time"], event["previous"]) == (number, 99.0 + number, previous)
        assert line.isascii()
        assert b"\x1b" not in line
        previous = hashlib.sha256(line).hexdigest()
    events, found = read_run(path)
    assert [event["event"] for event in events] == ["run", "begin", "over"]
    assert (found.lines, found.head, found.sound, found.torn_bytes) == (3, previous, True, 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_goes_on_where_it_ended(path: Path) -> None:
    written(path)
    log, events = RunLog.open(path)
    with log:
        assert len(events) == 3
        assert log.append({"event": "resumed"}, 200.0)["n"] == 4
    assert read_run(path)[1].sound


def test_torn_at_every_byte_keeps_all_whole_lines(path: Path) -> None:
    data = written(path)
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        events, found = read_run(path)
        assert (len(events), found.sound) == (whole, True)
        log, again = RunLog.open(path)
        with log:
            assert again == events
            log.append({"event": "resumed"}, 1.0)
        assert (read_run(path)[1].lines, read_run(path)[1].torn_bytes) == (whole + 1, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, place: int, change: int) -> None:
    path = tmp_path_factory.mktemp("log") / "r.jsonl"
    data = bytearray(written(path))
    head = read_run(path)[1].head
    place %= len(data) - 1  # the very last line feed is the torn end, which is no damage
    line = data[:place].count(b"\n") + 1
    data[place] ^= change
    path.write_bytes(data)
    found = read_run(path)[1]
    if line < 3:
        assert found.broken in (line, line + 1)
    else:  # nothing follows it: its own form, or the head that was kept elsewhere
        assert found.broken == 3 or found.head != head


@pytest.mark.parametrize("lost", [0, 1])
def test_a_missing_line_is_told(path: Path, lost: int) -> None:
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join(line for number, line in enumerate(lines) if number != lost))
    found = read_run(path)[1]
    assert found.broken == lost + 1
    assert "does not follow" in found.problem
    with pytest.raises(IntegrityError, match=f"line {lost + 1}"):
        RunLog.open(path)


@pytest.mark.parametrize("line", [b"[]", b"nonsense", b"[" * 100_000, b'{"n": 1}', b"\xff"])
def test_what_is_no_event_is_told(path: Path, line: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(line + b"\n")
    assert read_run(path)[1].broken == 1


def test_one_writer(path: Path) -> None:
    with RunLog.create(path):
        with pytest.raises(Locked, match="run r goes on"):
            RunLog.open(path)
        with pytest.raises(AlreadyExists):
            RunLog.create(path)
    RunLog.open(path)[0].close()


def test_absent(path: Path) -> None:
    assert list_runs(path.parent) == []
    for action in (RunLog.open, read_run):
        with pytest.raises(NotFound):
            action(path)
    written(path)
    assert list_runs(path.parent) == ["r"]


def test_a_full_disk_ends_it_and_what_was_written_stays(path: Path) -> None:
    with RunLog.create(path) as log:
        log.append(EVENTS[0], 1.0)

        def full(name: str) -> None:
            if name == "write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        atomic.set_fault(full)
        try:
            with pytest.raises(OutOfSpace):
                log.append(EVENTS[1], 2.0)
        finally:
            atomic.set_fault(None)
        with pytest.raises(OutOfSpace, match="earlier event"):
            log.append(EVENTS[2], 3.0)
    assert read_run(path)[1].sound
