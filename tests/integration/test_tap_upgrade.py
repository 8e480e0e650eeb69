"""After an upgrade the new supervisor's worker lets the tap hand over; whatever fails, the group has one tap."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drctl.appliance.config import ApplianceToml, Home
from drctl.appliance.process import Processes, alive, start_time_of
from drctl.appliance.source import worker as workers
from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.appliance.source.worker import Worker
from drctl.model.group import GroupSpec
from drctl.replication.tap_handover import handover_path
from drctl.wire.ring import Word
from tests.integration.tap_rig import MiB, Writer, until

STATE = GroupState(
    GroupSpec("web", "alpha", "beta", ("vm",), ring_size=4 * MiB), disks=(DiskState(10, "vm", "vda", 64 * MiB),)
)


class Host:
    """An appliance's directories, and workers of supervisors that come one after the other."""

    def __init__(self, path: Path) -> None:
        config = ApplianceToml("alpha", "a1", "test:///default", "127.0.0.1:0", "u", run=str(path / "run"))
        self.home = Home(path, config)
        self.home.make_directories()
        self.writer = Writer()
        self.earlier: list[Processes] = []
        self.worker = self.supervisor()
        self.state = STATE

    def supervisor(self) -> Worker:
        self.processes = Processes(self.home.run / "pids", self.home.logs)
        self.earlier.append(self.processes)
        return Worker(self.home, "web", self.processes)

    def begin(self) -> None:
        """Protected by the version before, with a client."""
        epoch = self.worker.new_ring(STATE)
        self.state = GroupState(STATE.spec, epoch=epoch, disks=STATE.disks)
        assert self.worker.ensure_tap()
        assert self.writer.enter(self.worker.socket_path, "vm.vda").refusal == ""
        assert self.writer.write(0, bytes(512)) == 0

    def upgraded(self) -> Worker:
        """The worker of the next supervisor."""
        self.worker = self.supervisor()
        assert self.worker.adopt_ring(self.state)
        return self.worker

    def order(self) -> tuple[int, int]:
        return self.worker.order_stamp(), self.worker.connection(10)

    def close(self) -> None:
        self.writer.socket.close()
        self.worker.end_tap()
        self.worker._close_ring()
        for processes in self.earlier:  # in reality they were processes, and what they started is init's now
            for popen in processes._started.values():
                popen.wait(10)

    def log(self) -> str:
        return (self.home.logs / "tap-web.log").read_text()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Its tap was started by another installation: the same, seen under another path."""
    with tempfile.TemporaryDirectory(prefix="drctl-tap-", dir="/dev/shm") as directory:
        other = Path(directory) / "older"
        other.symlink_to(sys.prefix)
        made = Host(Path(directory) / "home")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(other / "bin/python"))
            made.begin()
        yield made
        made.close()


def test_the_tap_is_replaced_and_its_client_goes_on(host: Host) -> None:
    order, before = host.order(), host.worker.tap_pid()
    worker = host.upgraded()
    assert not worker.ensure_tap(), "it was not started: it goes on"
    assert worker.tap_pid() not in (0, before)
    assert worker.ring.words[Word.TAP_PID] == worker.tap_pid()
    assert host.order() == order
    assert host.writer.write(512, bytes(512)) == 0
    until(lambda: start_time_of(before) is None)
    assert not list((host.home.run / "pids").glob("*heir*"))
    pid = worker.tap_pid()
    assert not worker.ensure_tap()
    assert not host.upgraded().ensure_tap()
    assert host.worker.tap_pid() == pid, "of this version: nothing to do"


def test_one_that_knows_no_handover_is_left_alone(host: Host) -> None:
    handover_path(host.worker.ring_path).unlink()
    order, before = host.order(), host.worker.tap_pid()
    assert not host.upgraded().ensure_tap()
    assert (host.order(), host.worker.tap_pid()) == (order, before)


def test_when_the_new_one_does_not_come_up_the_old_one_goes_on(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order, before = host.order(), host.worker.tap_pid()
    worker = host.upgraded()
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(broken))
        assert not worker.ensure_tap()
        assert not worker.ensure_tap(), "not tried again at each look"
    assert (host.order(), worker.tap_pid()) == (order, before)
    assert host.log().count("broken") == 1
    assert host.writer.write(512, bytes(512)) == 0
    assert worker._handover_due - time.monotonic() <= workers.HANDOVER_SECONDS
    worker._handover_due = 0.0
    assert not worker.ensure_tap()
    assert (host.order(), worker.tap_pid() == before) == (order, False)


def test_a_stopped_successor_is_killed_and_the_old_one_goes_on(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    order, before = host.order(), host.worker.tap_pid()
    worker = host.upgraded()
    monkeypatch.setattr(worker, "_serves", lambda pid: os.kill(pid, signal.SIGSTOP) or False)
    original = Processes.succeed
    monkeypatch.setattr(Processes, "succeed", lambda *a, **k: original(*a, **k, timeout_seconds=0.5))
    assert not worker.ensure_tap()
    assert (host.order(), worker.tap_pid()) == (order, before)
    assert host.writer.write(512, bytes(512)) == 0


def test_a_supervisor_that_dies_in_between_leaves_one_tap(host: Host) -> None:
    """The successor has the ring, but its pid file is not yet that of the tap."""
    order, before = host.order(), host.worker.tap_pid()
    worker = host.upgraded()
    assert not worker.ensure_tap()
    pids = host.home.run / "pids"
    written = pids / "tap-web.json"
    heir = json.loads(written.read_text())
    (pids / "tap-web.heir.json").write_text(json.dumps(heir))
    written.write_text(json.dumps({"pid": before, "start_time": 1, "command": []}))
    assert not host.upgraded().ensure_tap()
    assert host.worker.tap_pid() == heir["pid"]
    assert host.order() == order
    assert host.writer.write(512, bytes(512)) == 0


def test_a_successor_that_dies_afterwards_is_a_dead_tap(host: Host) -> None:
    stamp, _ = host.order()
    worker = host.upgraded()
    assert not worker.ensure_tap()
    child = host.processes.find("tap-web")
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: not alive(child))
    time.sleep(0.01)
    assert worker.ensure_tap()
    assert host.order()[0] > stamp
    again = Writer()
    assert again.enter(worker.socket_path, "vm.vda").refusal == ""
    again.socket.close()
