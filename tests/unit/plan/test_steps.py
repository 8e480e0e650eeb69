"""What steps do to the world: scripts, health checks, commands in guests; and what becomes of what they say."""

from __future__ import annotations

import base64
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import HypervisorRefused
from drctl.plan import script
from drctl.plan.guest import run_in_guest
from drctl.plan.output import Capture, tame, tame_line
from drctl.plan.probe import Probe, probe_agent, probe_console, probe_http, probe_tcp, repeat
from drctl.plan.script import Ran, run_script


def ran(tmp_path: Path, code: str, *, limit: float = 10.0, cancelled: Event | None = None) -> Ran:
    return run_script(
        ["/bin/sh", "-c", code],
        environment={"DRCTL_VM": "db '1'"},
        directory=tmp_path,
        time_limit=limit,
        cancelled=cancelled,
    )


def test_output_environment_directory_and_code(tmp_path: Path) -> None:
    assert ran(tmp_path, 'echo "$DRCTL_VM"; echo oops >&2; pwd').output == f"db '1'\noops\n{tmp_path}\n"
    good, bad, killed = ran(tmp_path, ":"), ran(tmp_path, "exit 7"), ran(tmp_path, "kill -9 $$")
    assert (good.code, good.reason, good.done) == (0, "", True)
    assert (bad.code, bad.reason, bad.done) == (7, "exited with 7", False)
    assert (killed.code, killed.reason) == (-9, "ended by signal 9")


def test_no_shell_is_in_between(tmp_path: Path) -> None:
    found = run_script(["/bin/echo", "$HOME; ls", "a b"], environment={}, directory=tmp_path, time_limit=5)
    assert found.output == "$HOME; ls a b\n"


def test_what_can_not_be_started_says_why(tmp_path: Path) -> None:
    found = run_script(["/no/such"], environment={}, directory=tmp_path, time_limit=5)
    assert (found.code, found.reason) == (None, "can't be started: /no/such: No such file or directory")


def test_it_can_not_wait_for_an_answer(tmp_path: Path) -> None:
    assert ran(tmp_path, "read answer; echo got $?").output == "got 1\n"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_at_the_time_limit_the_whole_group_is_ended(tmp_path: Path) -> None:
    found = ran(tmp_path, "sleep 60 & echo $!; wait", limit=0.3)
    assert found.reason == "time limit of 0.3 s"
    assert found.seconds < 5
    pid = int(found.output)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_one_that_ignores_the_first_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "MERCY", 0.2)
    found = ran(tmp_path, "trap '' TERM; while :; do sleep 0.05; done", limit=0.2)
    assert (found.code, found.reason) == (-9, "time limit of 0.2 s")


def test_it_can_be_given_up(tmp_path: Path) -> None:
    cancelled = Event()
    threading.Timer(0.2, cancelled.set).start()
    found = ran(tmp_path, "sleep 60", cancelled=cancelled)
    assert (found.reason, found.code) == ("given up", -15)


def test_a_child_that_holds_the_output_open_holds_nobody(tmp_path: Path) -> None:
    found = ran(tmp_path, "setsid sleep 3 & echo done")
    assert (found.output, found.reason) == ("done\n", "")
    assert found.seconds < 2.5


def test_closed_output_is_no_end(tmp_path: Path) -> None:
    assert ran(tmp_path, "exec >&- 2>&-; sleep 0.1; exit 3").reason == "exited with 3"


def test_megabytes_of_output_are_cut(tmp_path: Path) -> None:
    code = "print('first'); print('x' * 5_000_000); print('last')"
    found = run_script([sys.executable, "-c", code], environment={}, directory=tmp_path, time_limit=30)
    assert found.output.startswith("first\nxxx")
    assert found.output.endswith("xxx\nlast\n")
    assert f"[… {5_000_012 - 64 * 1024} bytes left out …]" in found.output
    assert len(found.output) < 70_000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=12))
def test_a_capture_keeps_both_ends_however_it_comes(parts: list[bytes]) -> None:
    capture = Capture(head=8, tail=16)
    for part in parts:
        capture.add(part)
    whole = b"".join(parts)
    if len(whole) <= 24:
        assert capture.text() == tame(whole)
    else:
        assert capture.text() == f"{tame(whole[:8])}\n[… {len(whole) - 24} bytes left out …]\n{tame(whole[-16:])}"


@given(st.binary(max_size=200))
def test_tame_text_can_be_printed_anywhere(data: bytes) -> None:
    assert all(letter in "\n\t" or (letter >= " " and not "\x7f" <= letter <= "\x9f") for letter in tame(data))


def test_escapes_are_spelled() -> None:
    assert tame(b"\x1b[2J\x1b]0;title\x07 \xff \xc2\x9b31m a\r\nb\rc\n") == (
        "\\x1b[2J\\x1b]0;title\\x07 \\xff \\x9b31m a\nb\\x0dc\n"
    )
    assert tame("user\u202etxt.exe\u2066") == "user\\u202etxt.exe\\u2066"
    assert tame_line("a\n  b\x00" + "c" * 300, 10) == "a b\\x00cc…"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
                time.sleep(0.05)
            return
        self.send_response(503 if self.path == "/bad" else 200, "Sorry\x1b[2J" if self.path == "/bad" else None)
        self.end_headers()
        self.wfile.write(b"all is well" + self.path.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def port():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def get(url: str, *, status: int = 200, text: str = "", timeout: float = 5.0) -> Probe:
    return probe_http(url, status=status, text=text, insecure=False, timeout=timeout)


def test_tcp(port: int, closed_port: int) -> None:
    assert probe_tcp("127.0.0.1", port, 5).passed
    refused = probe_tcp("127.0.0.1", closed_port, 5)
    assert (refused.passed, refused.seen) == (False, f"127.0.0.1:{closed_port}: Connection refused")


def test_http(port: int, closed_port: int) -> None:
    base = f"http://127.0.0.1:{port}"
    assert get(f"{base}/ok?x=1", text="well/ok?x=1") == Probe(True, "answers 200")
    assert get(f"{base}/ok", text="ill") == Probe(False, "answers 200, but without 'ill'")
    assert get(f"{base}/bad") == Probe(False, "answers 503 Sorry\\x1b[2J, not 200")
    assert get(f"{base}/bad", status=503).passed
    assert get(f"http://127.0.0.1:{closed_port}/").seen == "Connection refused"
    assert not get(f"https://127.0.0.1:{port}/").passed


def test_an_answer_byte_by_byte_is_late(port: int) -> None:
    before = time.monotonic()
    assert get(f"http://127.0.0.1:{port}/slow", text="never", timeout=0.4) == Probe(False, "no answer in time")
    assert time.monotonic() - before < 3


def test_console_and_agent() -> None:
    assert probe_console(lambda: "boot\nlogin: ", "login:").passed
    seen = probe_console(lambda: "boot\nKernel \x1b[31mpanic\n\n", "login:").seen
    assert seen == "no 'login:' yet; its last line: Kernel \\x1b[31mpanic"

    def refuse() -> str:
        raise HypervisorRefused("agent is not connected")

    assert probe_console(refuse, "x") == Probe(False, "agent is not connected")
    assert probe_agent(refuse) == Probe(False, "agent is not connected")
    assert probe_agent(dict).passed


def test_attempts_until_one_passes() -> None:
    results = iter([False, False, True, False])
    found = repeat(lambda: Probe(next(results), "x"), retries=5, interval=0.0, cancelled=Event())
    assert (found.passed, found.attempts) == (True, 3)
    never = repeat(lambda: Probe(False, "no"), retries=2, interval=0.0, cancelled=Event())
    assert (never.passed, never.seen, never.attempts) == (False, "no", 3)


def test_attempts_end_when_they_are_given_up() -> None:
    cancelled = Event()
    threading.Timer(0.1, cancelled.set).start()
    before = time.monotonic()
    found = repeat(lambda: Probe(False, "no"), retries=10, interval=60.0, cancelled=cancelled)
    assert (found.passed, found.seen, found.attempts) == (False, "given up; no", 1)
    assert time.monotonic() - before < 5


class FakeAgent:
    def __init__(self, *answers: object) -> None:
        self.sent: list[dict] = []
        self._answers = list(answers)

    def __call__(self, sent: dict) -> object:
        self.sent.append(sent)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def in_guest(agent: FakeAgent, *, limit: float = 10.0, cancelled: Event | None = None) -> Ran:
    times = iter(range(10_000))
    return run_in_guest(
        agent,
        ["/bin/reindex", "--all"],
        environment={"DRCTL_RUN": "r"},
        time_limit=limit,
        cancelled=cancelled or Event(),
        monotonic=lambda: float(next(times)),
    )


def test_a_command_in_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drctl.plan.guest._LOOK", 0.0)
    said = base64.b64encode(b"done\x1b[0m\n").decode()
    agent = FakeAgent({"pid": 7}, {"exited": False}, {"exited": True, "exitcode": 3, "out-data": said})
    found = in_guest(agent)
    assert (found.code, found.reason, found.output) == (3, "exited with 3", "done\\x1b[0m\n")
    assert agent.sent[0]["arguments"] == {
        "path": "/bin/reindex",
        "arg": ["--all"],
        "env": ["DRCTL_RUN=r"],
        "capture-output": True,
    }
    assert agent.sent[2] == {"execute": "guest-exec-status", "arguments": {"pid": 7}}


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([{"pid": 7}, {"exited": False}], "time limit of 10 s; it may go on in the guest as process 7"),
        ([HypervisorRefused("no agent")], "no agent"),
        ([{"pid": 7}, HypervisorRefused("guest is gone")], "guest is gone"),
        ([None], "the guest agent's answer makes no sense"),
        ([{"pid": 7}, []], "the guest agent's answer makes no sense"),
        ([{"pid": 7}, {"exited": True, "signal": 11}], "ended by signal 11"),
    ],
)
def test_a_guest_that_does_not_do_it(answers: list[object], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drctl.plan.guest._LOOK", 0.0)
    assert reason in in_guest(FakeAgent(*answers)).reason
