"""The lab's smaller parts: processes, lab.json, the archive, the guests' definition, the configuration."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from drctl.errors import IntegrityError, NotFound, PreconditionFailed, StepFailed
from drctl.lab import build, configuration, lab, layout, process, worker
from drctl.lab.domain import DiskFile, GuestDefinition, domain_xml
from drctl.lab.initramfs import Entry, cpio
from drctl.lab.layout import Guest, Layout, Options, State
from drctl.lab.observer import Observer
from drctl.lab.process import Process
from drctl.lab.protocol import is_command


def state(run: Path) -> State:
    made = State("ab" * 16, str(run), "somebody", "tcg", Options())
    made.guests = [Guest("web-1", "u1"), Guest("web-2", "u2")]
    made.links = {"alpha": 1001, "beta": 1002}
    return made


def test_a_spawned_process_is_known_and_stopped(tmp_path):
    made = process.spawn("sleeper", ["/bin/sleep", "60"], {}, tmp_path / "log")
    assert process.alive(made)
    assert os.getsid(made.pid) == made.pid
    assert process.stop([made]) == []
    assert not process.alive(made)


def test_a_process_that_ignores_the_polite_signal_is_killed(tmp_path):
    script = "import signal,time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    made = process.spawn("stubborn", [sys.executable, "-c", script], {}, tmp_path / "log")
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    begun = time.monotonic()
    assert process.stop([made], patience=0.3) == []
    assert time.monotonic() - begun >= 0.3


def test_another_process_with_a_reused_pid_is_never_signalled():
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        try:
            start = process.start_time(other.pid)
            assert start is not None
            stale = Process("stale", other.pid, start - 1)
            assert not process.alive(stale)
            assert process.stop([stale]) == []
            assert other.poll() is None
        finally:
            other.kill()


def test_state_survives_saving(tmp_path):
    made = state(tmp_path / "run")
    made.remember(Process("alpha/libvirtd", 1, 2))
    made.remember(Process("alpha/libvirtd", 3, 4))
    layout.save(tmp_path, made)
    assert layout.load(tmp_path) == made
    assert made.process("alpha/libvirtd") == Process("alpha/libvirtd", 3, 4)
    assert layout.load(tmp_path / "nothing") is None


def test_a_torn_lab_json_is_refused(tmp_path):
    layout.state_path(tmp_path).write_text('{"lab": ')
    with pytest.raises(IntegrityError, match=r"lab\.json"):
        layout.load(tmp_path)


def test_the_longest_socket_of_a_site_fits_into_a_unix_address():
    """libvirt names a domain's directory `domain-ID-` and at most 20 characters of its name."""
    site = Layout(Path("/x" * 200), Path("/tmp/drl-12345678")).site("alpha")
    channel = site.config / "libvirt/qemu/channel/target" / f"domain-9999-{'n' * 20}" / "org.qemu.guest_agent.0"
    for path in (channel, site.socket, site.control):
        assert len(os.fsencode(path)) <= 107, path


def test_cpio_is_what_the_kernel_wants(tmp_path):
    made = cpio([Entry("etc", stat.S_IFDIR | 0o755), Entry("etc/a", stat.S_IFREG | 0o644, b"hello")])
    assert made[:6] == b"070701"
    assert len(made) % 4 == 0
    done = subprocess.run(["/bin/busybox", "cpio", "-id"], input=made, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "etc/a").read_bytes() == b"hello"


def test_the_definition_names_nothing_that_belongs_to_a_host_but_its_disks():
    disks = (DiskFile("vda", "/d/a&b.raw", "raw", "none"), DiskFile("vdb", "/d/b.raw", "raw", "none"))
    root = ET.fromstring(domain_xml(GuestDefinition("web-1", "u", 200, "tcg", disks, "/d/serial.log")))
    assert root.get("type") == "qemu"
    assert root.find("cpu").get("mode") == "maximum"
    assert [disk.get("file") for disk in root.iter("source") if disk.get("file")] == ["/d/a&b.raw", "/d/b.raw"]
    assert all(channel.find("source") is None for channel in root.iter("channel"))
    assert not list(root.iter("interface"))
    scsi = ET.fromstring(domain_xml(GuestDefinition("web-1", "u", 200, "tcg", disks, "/s", "scsi", iothread=True)))
    assert {target.get("bus") for target in scsi.iterfind("devices/disk/target")} == {"scsi"}
    assert scsi.find("devices/controller[@type='scsi']/driver").get("iothread") == "1"
    assert scsi.findtext("iothreads") == "1"
    blk = ET.fromstring(domain_xml(GuestDefinition("web-1", "u", 200, "tcg", disks, "/s", iothread=True)))
    assert {driver.get("iothread") for driver in blk.iterfind("devices/disk/driver")} == {"1"}
    assert blk.find("devices/controller[@type='scsi']") is None
    kvm = ET.fromstring(domain_xml(GuestDefinition("web-1", "u", 200, "kvm", disks, "/s")))
    assert (kvm.get("type"), kvm.find("cpu").get("mode")) == ("kvm", "host-passthrough")


def test_the_configuration_names_both_sites_and_leaves_the_operators_edits_alone(tmp_path):
    places = Layout(tmp_path, tmp_path / "run")
    configuration.write(places, state(tmp_path / "run"))
    config = tomllib.loads((tmp_path / "drctl.toml").read_text())
    assert [site["name"] for site in config["site"]] == ["alpha", "beta"]
    assert config["host"][1]["link"] == "127.0.0.1:1002"
    assert config["host"][0]["control"].startswith("unix:")
    group = tomllib.loads((tmp_path / "groups" / "web.toml").read_text())
    assert (group["source"], group["recovery"], group["machines"]) == ("alpha", "beta", ["web-1", "web-2"])
    appliance = tomllib.loads((tmp_path / "beta" / "home" / "appliance.toml").read_text())
    assert [(peer["site"], peer["link"]) for peer in appliance["peer"]] == [("alpha", "127.0.0.1:1001")]
    other = tomllib.loads((tmp_path / "alpha" / "home" / "appliance.toml").read_text())
    assert appliance["peer"][0]["uuid"] == other["uuid"]
    (tmp_path / "drctl.toml").write_text("# mine\n")
    configuration.write(places, state(tmp_path / "run"))
    assert (tmp_path / "drctl.toml").read_text() == "# mine\n"


def test_up_refuses_a_directory_that_holds_something_else(tmp_path):
    (tmp_path / "letter").write_text("x")
    with pytest.raises(PreconditionFailed, match="letter"):
        build.build(tmp_path, Options(), lambda _: None)
    assert (tmp_path / "letter").exists()


def test_status_of_nothing(tmp_path):
    assert lab.status(tmp_path / "none").running is False
    with pytest.raises(NotFound):
        Observer(tmp_path / "none")


def test_down_never_removes_a_directory_that_is_no_lab(tmp_path):
    (tmp_path / "letter").write_text("x")
    lab.down(tmp_path)
    assert (tmp_path / "letter").exists()


def test_only_known_commands_reach_a_guest():
    assert all(map(is_command, ("stop", "go", "corrupt", "power off", "reboot", "rate 20", "rate max")))
    assert not any(map(is_command, ("rate 0", "rate", "token web-1 0 1 aa", "halt", "", "stop\nreboot", "rate 5\nx")))


def test_an_error_of_the_lab_user_keeps_its_class_and_hint():
    error = worker.error_from(StepFailed("x failed", hint="do y").as_dict())
    assert isinstance(error, StepFailed)
    assert (str(error), error.hint) == ("x failed", "do y")
    refused = worker.error_from(NotFound("lab", "z").as_dict())
    assert isinstance(refused, NotFound)
