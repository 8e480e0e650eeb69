"""What illustrates a run's report: a screen, else a console's text, else why there is neither."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from drctl.appliance.recovery.run_pictures import TEXT, RunPictures
from drctl.appliance.recovery.state import MachinePhase, RecoveredMachine, RecoveryFiles, RecoveryKind, RecoveryRecord
from drctl.errors import HypervisorRefused, NotFound, WrongPhase

BLACK = b"P6\n4 4\n255\n" + bytes(48)


class Host:
    def __init__(self, log: Path) -> None:
        self.screen = BLACK
        self.log = log

    def screenshot(self, name):
        if not self.screen:
            raise HypervisorRefused(f"{name}: libvirt refused: no device found with alias video0")
        return self.screen

    def live_definition(self, name):
        serial = f"<serial type='file'><source path='{self.log}'/></serial>"
        return f"<domain><name>{name}</name><devices>{serial}</devices></domain>"


@pytest.fixture
def pictures(tmp_path):
    machines = [
        RecoveredMachine("db", "db-test-r1", "u1", [], MachinePhase.RUNNING),
        RecoveredMachine("web", "web-test-r1", "u2", [], MachinePhase.FAILED),
    ]
    record = RecoveryRecord("r1", RecoveryKind.TEST, "shop", "latest", 1, 1.0, machines)
    RecoveryFiles(tmp_path / "recoveries").save(record)
    made = RunPictures(Host(tmp_path / "serial"), tmp_path, lambda: 100_000.0)
    made.host = made._host
    return made


def ask(pictures, machine="db"):
    return pictures.screen({"recovery": "r1", "machine": machine}, print)


def test_a_screen_is_a_png(pictures):
    assert base64.b64decode(ask(pictures)["png"]).startswith(b"\x89PNG")


@pytest.mark.parametrize("screen", [b"", b"no picture"])
def test_without_a_display_it_is_the_consoles_end(pictures, screen):
    pictures.host.screen = screen
    pictures.host.log.write_text("x" * TEXT + "login:")
    told = ask(pictures)
    assert (told["png"], len(told["text"]), told["text"][-6:]) == ("", TEXT, "login:")


def test_without_either_it_says_why(pictures):
    pictures.host.screen = b""
    told = ask(pictures)
    assert (told["text"], "video0" in told["reason"], "no serial port" in told["reason"]) == ("", True, True)


def test_a_machine_that_does_not_run_has_none(pictures):
    with pytest.raises(WrongPhase):
        ask(pictures, "web")
    with pytest.raises(NotFound):
        ask(pictures, "mail")
