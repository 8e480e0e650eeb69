"""What recovered machines are asked: their agents what plans need, their serial ports what they wrote."""

from __future__ import annotations

import pytest

from drctl.appliance.recovery.guest import CONSOLE_LIMIT, RecoveredGuests
from drctl.appliance.recovery.state import (
    MachinePhase,
    RecoveredMachine,
    RecoveryFiles,
    RecoveryKind,
    RecoveryRecord,
)
from drctl.errors import NotFound, Refused, WrongPhase

DOMAIN = "<domain><name>{name}</name><devices>{devices}</devices></domain>"


class Host:
    """Answers as a hypervisor would; `asked` is what was asked of agents."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.devices = ""

    def agent(self, name, sent, *, timeout_seconds):
        self.asked.append((name, sent))
        return {"pid": 7}

    def live_definition(self, name):
        return DOMAIN.format(name=name, devices=self.devices)


@pytest.fixture
def guests(tmp_path):
    files = RecoveryFiles(tmp_path / "recoveries")
    machines = [
        RecoveredMachine("db", "db-test-r1", "u1", [], MachinePhase.RUNNING),
        RecoveredMachine("web", "web-test-r1", "u2", [], MachinePhase.FAILED),
    ]
    files.save(RecoveryRecord("r1", RecoveryKind.TEST, "shop", "latest", 1, 1.0, machines))
    host = Host()
    made = RecoveredGuests(host, files)
    made.host = host
    return made


def of(machine="db", **more):
    return {"recovery": "r1", "machine": machine, **more}


def test_the_agent_is_that_of_the_copy(guests):
    command = {"execute": "guest-exec", "arguments": {"path": "/bin/true"}}
    assert guests.agent(of(command=command), print) == {"return": {"pid": 7}}
    assert guests.host.asked == [("db-test-r1", command)]


@pytest.mark.parametrize("command", [{"execute": "guest-set-user-password"}, {"execute": "guest-shutdown"}, {}])
def test_what_no_plan_needs_is_refused(guests, command):
    with pytest.raises(Refused):
        guests.agent(of(command=command), print)
    assert guests.host.asked == []


def test_a_machine_that_does_not_run_or_is_not_there(guests):
    ping = {"execute": "guest-ping"}
    with pytest.raises(WrongPhase):
        guests.agent(of("web", command=ping), print)
    with pytest.raises(NotFound):
        guests.agent(of("mail", command=ping), print)
    with pytest.raises(NotFound):
        guests.console({"recovery": "r9", "machine": "db"}, print)


@pytest.mark.parametrize(
    "devices",
    [
        '<serial type="file"><source path="{path}"/></serial>',
        '<serial type="pty"><source path="/dev/pts/3"/><log file="{path}"/></serial>',
        '<serial type="pty"/><console type="file"><source path="{path}"/></console>',
    ],
)
def test_a_console_is_the_end_of_the_file_that_its_port_writes(guests, tmp_path, devices):
    path = tmp_path / "serial"
    guests.host.devices = devices.format(path=path)
    path.write_bytes(b"x" * CONSOLE_LIMIT + b"\xff login:")
    told = guests.console(of(), print)
    assert (told["text"].endswith("� login:"), told["bytes"]) == (True, CONSOLE_LIMIT + 8)
    assert len(told["text"]) == CONSOLE_LIMIT


def test_a_port_that_is_written_nowhere_says_what_to_do(guests, tmp_path):
    for devices in ('<serial type="pty"/>', f'<serial type="file"><source path="{tmp_path}/none"/></serial>', ""):
        guests.host.devices = devices
        with pytest.raises(NotFound) as caught:
            guests.console(of(), print)
        assert "<log file" in caught.value.hint
