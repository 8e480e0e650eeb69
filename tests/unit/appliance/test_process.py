"""Children are known by pid and start time, outlive their supervisor, and may not spin."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drctl.appliance.process import CALM_STARTS, Child, Processes, alive, start_time_of
from drctl.errors import StepFailed


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    for name in ("pids", "logs"):
        (tmp_path / name).mkdir()
    made = Processes(tmp_path / "pids", tmp_path / "logs")
    yield made
    for popen in made._started.values():
        popen.wait(10)


def _sleeper(processes: Processes, name: str = "web") -> Child:
    return processes.spawn(name, "http.server", ["0", "--bind", "127.0.0.1"])


def test_a_new_supervisor_adopts_what_runs(processes: Processes, tmp_path: Path) -> None:
    child = _sleeper(processes)
    try:
        adopted, started = Processes(tmp_path / "pids", tmp_path / "logs").ensure("web", "http.server", [])
        assert (adopted, started) == (child, False)
    finally:
        processes.end("web", force=True)
    assert not alive(child)


def test_a_reused_pid_is_nobody_of_ours(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "pids" / "web.json").write_text(json.dumps({"pid": os.getpid(), "start_time": 1}))
    assert processes.find("web") is None
    processes.end("web")  # must not touch this very process


def test_a_killed_child_is_started_anew(processes: Processes) -> None:
    child = _sleeper(processes)
    os.kill(child.pid, signal.SIGKILL)
    while processes.find("web"):
        time.sleep(0.01)
    try:
        fresh, started = processes.ensure("web", "http.server", ["0", "--bind", "127.0.0.1"])
        assert started
        assert fresh.pid != child.pid
    finally:
        processes.end("web", force=True)


def test_a_stopped_child_is_replaced_after_a_while(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    child = _sleeper(processes)
    os.kill(child.pid, signal.SIGSTOP)
    try:
        assert processes.ensure("web", "http.server", ["0", "--bind", "127.0.0.1"]) == (child, False)
        monkeypatch.setattr("drctl.appliance.process.STOPPED_SECONDS", 0.1)
        for _ in range(20):
            time.sleep(0.1)
            fresh, started = processes.ensure("web", "http.server", ["0", "--bind", "127.0.0.1"])
            if started:
                break
        assert started
        assert not alive(child)
        assert fresh.pid != child.pid
    finally:
        processes.end("web", force=True)


def test_a_child_that_keeps_ending_is_left_alone_for_a_while(processes: Processes) -> None:
    for _ in range(CALM_STARTS):
        processes.ensure("web", "no_such_module", [])
        while processes.find("web"):
            time.sleep(0.01)
    with pytest.raises(StepFailed, match="web keeps ending"):
        processes.ensure("web", "no_such_module", [])


def test_a_zombie_is_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert start_time_of(pid) is None
    os.waitpid(pid, 0)


def test_a_program_that_makes_no_socket_has_not_started(processes: Processes, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"did not start|ended at once"):
        processes.run("export", ["true"], ready=tmp_path / "never.sock")
