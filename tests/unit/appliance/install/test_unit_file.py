"""The service's unit: its order among libvirt's units, and what keeps guests' processes alive."""

from __future__ import annotations

import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from drctl.appliance.install.settings import system_file

VALUES = {"home": "/var/lib/drctl", "run": "/run/drctl", "user": "drctl", "version": "/opt/drctl/v", "run_mode": "0710"}


def _unit() -> ConfigParser:
    parser = ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(system_file("drctl-appliance.service", **VALUES))
    return parser


def test_guests_are_shut_down_before_it_and_libvirt_ends_after_it() -> None:
    """systemd stops in the reverse of the order in which it starts."""
    unit = _unit()["Unit"]
    assert "libvirt-guests.service" in unit["Before"].split()
    after = unit["After"].split()
    assert {"libvirtd.service", "virtqemud.service", "libvirtd.socket", "network-online.target"} <= set(after)
    assert not set(after) & set(unit["Before"].split())
    # Never what would end it with libvirt, or keep it from starting without it.
    assert not {"Requires", "BindsTo", "PartOf", "Requisite"} & set(unit)


def test_taps_outlive_it() -> None:
    service = _unit()["Service"]
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["Type"] == "notify"
    assert "@" not in system_file("drctl-appliance.service", **VALUES).replace("@SERVICE@", "")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_finds_nothing_wrong_and_no_cycle(tmp_path: Path) -> None:
    """With libvirt's units as Debian 12 has their order (libvirt-guests after libvirtd and virt-guest-shutdown)."""
    text = system_file("drctl-appliance.service", **VALUES).replace("/opt/drctl/v/bin/python", "/bin/true")
    (tmp_path / "drctl-appliance.service").write_text(text)
    others = {
        "libvirtd.service": "After=network.target dbus.service\nBefore=libvirt-guests.service",
        "libvirt-guests.service": "After=network.target libvirtd.service virt-guest-shutdown.target\n"
        "Requires=virt-guest-shutdown.target",
    }
    for name, order in others.items():
        (tmp_path / name).write_text(f"[Unit]\nDescription={name}\n{order}\n[Service]\nExecStart=/bin/true\n")
    (tmp_path / "virt-guest-shutdown.target").write_text("[Unit]\nDescription=shutdown\n")
    units = [str(tmp_path / name) for name in ("drctl-appliance.service", *others)]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True, text=True, timeout=60, env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}, check=False,
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if "drctl-appliance" in line or "cycle" in line]
    assert told == []
