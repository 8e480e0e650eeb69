"""What libvirt-guests would do to protected guests, as its files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from drctl.appliance.libvirt_guests import findings, settings

SYSTEM = "qemu:///system"
PROGRAM = 'URIS="default"\nON_BOOT="start"\nON_SHUTDOWN="suspend"\nSHUTDOWN_TIMEOUT=300\ntest -f "$x" && . "$x"\n'


def _host(root: Path, *, enabled: bool = True, default: str | None = None) -> Path:
    program = root / "usr/libexec/libvirt-guests.sh"
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    if enabled:
        (wants / "libvirt-guests.service").symlink_to("/lib/systemd/system/libvirt-guests.service")
    if default is not None:
        (root / "etc/default").mkdir()
        (root / "etc/default/libvirt-guests").write_text(default)
    return root


def test_suspend_is_warned_of_and_the_distributions_file_counts(tmp_path: Path) -> None:
    [(severity, message, hint)] = findings(SYSTEM, _host(tmp_path))
    assert (severity, "ON_SHUTDOWN=suspend" in message, "ON_SHUTDOWN=shutdown" in hint) == ("warning", True, True)


@pytest.mark.parametrize("line", ["ON_SHUTDOWN=shutdown", 'ON_SHUTDOWN="shutdown"  # ours', " ON_SHUTDOWN='shutdown'"])
def test_shutdown_is_as_it_should_be(tmp_path: Path, line: str) -> None:
    root = _host(tmp_path, default=f"#ON_SHUTDOWN=suspend\n{line}\nPARALLEL_SHUTDOWN=10\n")
    assert settings(root)["ON_SHUTDOWN"] == "shutdown"
    assert findings(SYSTEM, root) == []


def test_a_comment_sets_nothing(tmp_path: Path) -> None:
    assert findings(SYSTEM, _host(tmp_path, default="# ON_SHUTDOWN=shutdown\n"))


def test_where_it_is_not_enabled_that_is_told(tmp_path: Path) -> None:
    [(severity, message, _)] = findings(SYSTEM, _host(tmp_path, enabled=False))
    assert (severity, "is not enabled" in message) == ("info", True)
    assert settings(tmp_path) == {}


def test_a_session_is_not_its_business(tmp_path: Path) -> None:
    assert findings("qemu:///session", _host(tmp_path)) == []
