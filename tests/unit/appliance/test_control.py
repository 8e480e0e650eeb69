"""The control socket: a caller who hangs up is no bug of the method that it called."""

import errno
import json
import logging
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drctl.appliance import control
from drctl.appliance.control import ControlServer, Progress


def test_a_caller_who_hangs_up_ends_the_method_without_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left, ended = threading.Event(), threading.Event()

    def slow(_params: dict[str, Any], progress: Progress) -> None:
        left.wait(10)
        try:
            for turn in range(1000):
                progress({"turn": turn, "filler": "x" * 4096})
        finally:
            ended.set()

    server = ControlServer(tmp_path / "c", {"slow": slow})
    server.start()
    with caplog.at_level(logging.DEBUG):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(tmp_path / "c"))
            caller.sendall(json.dumps({"method": "slow", "id": 1}).encode() + b"\n")
        left.set()
        assert ended.wait(10)
    server.stop()
    assert not [record for record in caplog.records if record.exc_info]


# -- whatever is sent ---------------------------------------------------------------------------------------------------


class Caller:
    """One connection to a server, and what it says until it hangs up."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))

    def say(self, data: bytes) -> bytes:
        try:
            self.socket.sendall(data)
            self.socket.shutdown(socket.SHUT_WR)
            heard = b""
            while more := self.socket.recv(65536):
                heard += more
        except OSError:
            return b""
        finally:
            self.socket.close()
        return heard


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    made = ControlServer(tmp_path / "c", {"echo": lambda params, _: params, "deep": lambda params, _: params["x"]["y"]})
    made.start()
    yield made
    made.stop()


NONSENSE = [
    b"\n",
    b"[]\n",
    b"5\n",
    b"null\n",
    b'"x"\n',
    b"{}\n",
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b'{"method": ["a"], "params": 7}\n',
    b'{"method": "echo", "params": [1]}\n',
    b'{"method": "deep", "params": {"x": 3}}\n',
    b'{"method": "echo", "id": {"a": [1e400]}}\n',
    b'{"method": "echo"',
    b"x" * (control.MAX_REQUEST + 10),
]


def test_nonsense_ends_its_own_connection_alone(
    server: ControlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    chooser = random.Random(3)
    before = threading.active_count()
    for data in NONSENSE + [chooser.randbytes(chooser.randrange(1, 2000)) for _ in range(100)]:
        Caller(tmp_path / "c").say(data)
        assert json.loads(Caller(tmp_path / "c").say(b'{"method": "echo", "params": {"a": 1}}\n'))["result"] == {"a": 1}
    assert died == []
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def _readable(peer: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(peer, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def test_a_crowd_is_told_and_the_next_one_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_CALLERS", 20)
    server = ControlServer(tmp_path / "c", {"echo": lambda params, _: params})
    server.start()
    crowd = [Caller(tmp_path / "c") for _ in range(40)]
    told = [caller for caller in crowd if _readable(caller.socket, 0.3 if caller is crowd[20] else 0.02)]
    assert len(told) == 20
    assert json.loads(told[0].socket.recv(4096))["error"]["error"] == "refused"
    for caller in crowd:
        caller.socket.close()
    deadline = time.monotonic() + 10
    while not (heard := Caller(tmp_path / "c").say(b'{"method": "echo", "params": {"a": 1}}\n')) or b"refused" in heard:
        assert time.monotonic() < deadline
    assert json.loads(heard)["result"] == {"a": 1}
    server.stop()


def test_a_listener_without_descriptors_goes_on_when_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ControlServer(tmp_path / "c", {"echo": lambda params, _: params})
    monkeypatch.setattr(control, "_PAUSE_SECONDS", 0.01)
    failures = [OSError(errno.EMFILE, "Too many open files")] * 3

    class Short(socket.socket):
        def accept(self) -> Any:
            if failures:
                raise failures.pop()
            return super().accept()

    monkeypatch.setattr(control.socket, "socket", Short)
    server.start()
    monkeypatch.undo()
    assert b"result" in Caller(tmp_path / "c").say(b'{"method": "echo"}\n')
    assert failures == []
    server.stop()
