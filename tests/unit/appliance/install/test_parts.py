"""The parts of an installation each by itself: preflight, agent, bundle, files, the notifier."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pwd
import socket
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from drctl.appliance.install import bundle as bundles
from drctl.appliance.install.agent import Agent, answer, serve
from drctl.appliance.install.bundle import Bundle, Wheel, load_bundle
from drctl.appliance.install.preflight import Facts, demand, judge
from drctl.appliance.install.settings import render, system_file
from drctl.appliance.notify import Notifier
from drctl.errors import (
    HostUnfit,
    IntegrityError,
    NotFound,
    OutOfSpace,
    PreconditionFailed,
    PrivilegeMissing,
    UnsupportedFormat,
)
from tests.unit.appliance.install.host import PLACE, World

ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- preflight ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"root": "no sudo: a password is required"}, PrivilegeMissing, "a password is required"),
        ({"libvirt": ""}, HostUnfit, "there is no libvirt"),
        ({"libvirt": "8.0.0"}, HostUnfit, "libvirt is 8.0.0"),
        ({"qemu": "6.2.0"}, HostUnfit, "QEMU is 6.2.0"),
        ({"qemu_img": ""}, HostUnfit, "no qemu-img"),
        ({"systemd": ""}, HostUnfit, "systemd"),
        ({"machine": "aarch64"}, HostUnfit, "its processor is aarch64"),
        ({"listening": "yes", "active": "inactive"}, PreconditionFailed, "port 7077 is taken"),
        ({"libvirt": "", "root": "no there is no sudo"}, PreconditionFailed, "there is no libvirt"),
    ],
)
def test_what_stands_in_the_way(world: World, changes: dict[str, str], error: type, words: str) -> None:
    findings = judge("a1", world.facts(**changes), PLACE, world.bundle)
    with pytest.raises(error, match=words) as caught:
        demand(findings)
    assert "nothing was changed" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("pythons", "words"),
    [
        ((), "Python is none"),
        ((("3.9", "/usr/bin/python3"),), "Python is 3.9"),
        (
            (("3.9", "/usr/bin/python3"), ("3.12", "/usr/bin/python3.12")),
            "Python is 3.9, 3.12, the wheels are for 3.11",
        ),
    ],
)
def test_a_wrong_python(world: World, pythons: tuple[tuple[str, str], ...], words: str) -> None:
    facts = world.facts()
    findings = judge("a1", Facts(facts.values, pythons, facts.space), PLACE, world.bundle)
    with pytest.raises(HostUnfit, match=words):
        demand(findings)


def test_too_little_space_names_the_directory(world: World) -> None:
    facts = world.facts()
    findings = judge("a1", Facts(facts.values, facts.pythons, facts.space | {PLACE.home: 1024}), PLACE, world.bundle)
    with pytest.raises(OutOfSpace, match=r"/var/lib/drctl has 1.0 KiB free, 512.0 MiB are needed"):
        demand(findings)


def test_a_good_host_and_its_firewall(world: World) -> None:
    assert judge("a1", world.facts(), PLACE, world.bundle) == []
    assert judge("a1", world.facts(listening="yes", active="active"), PLACE, world.bundle) == []
    findings = judge("a1", world.facts(firewall="firewalld"), PLACE, world.bundle)
    demand(findings)
    assert "--add-port=7077/tcp" in findings[0].hint


# -- agent -------------------------------------------------------------------------------------------------------------


def test_files_are_changed_once(tmp_path: Path) -> None:
    agent = Agent(io.BytesIO(), tmp_path)
    assert agent.file("/etc/x/y", "text", 0o640, ME)
    assert not agent.file("/etc/x/y", "text", 0o640, ME)
    assert agent.file("/etc/x/y", "text", 0o600, ME)
    assert agent.file("/etc/x/y", "other", 0o600, ME)
    assert ((tmp_path / "etc/x/y").read_text(), (tmp_path / "etc/x/y").stat().st_mode & 0o777) == ("other", 0o600)
    assert agent.link("/cur", "a")
    assert agent.link("/cur", "b")
    assert not agent.link("/cur", "b")
    assert agent.target("/cur") == "b"
    assert agent.remove("/etc/x")
    assert not agent.remove("/etc/x")
    assert agent.remove("/cur")
    assert os.listdir(tmp_path) == ["etc"]


def test_a_part_of_somebody_elses_file(tmp_path: Path) -> None:
    agent = Agent(io.BytesIO(), tmp_path)
    place = tmp_path / "rules"
    place.write_text("theirs\n")
    assert agent.block("/rules", "drctl", "ours\n")
    assert not agent.block("/rules", "drctl", "ours\n")
    assert agent.block("/rules", "drctl", "ours, newer\n")
    assert place.read_text() == "theirs\n# drctl begin\nours, newer\n# drctl end\n"
    place.write_text(place.read_text() + "theirs too\n")
    assert agent.block("/rules", "drctl", "")
    assert place.read_text() == "theirs\ntheirs too\n"
    assert agent.block("/new", "drctl", "ours\n")
    assert agent.block("/new", "drctl", "")
    assert not (tmp_path / "new").exists()


def test_what_arrives_is_checked(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    digest = hashlib.sha256(data).hexdigest()
    agent = Agent(io.BytesIO(data), tmp_path)
    assert not agent.have("/w", digest)
    assert agent.put("/w", len(data), digest)
    assert agent.have("/w", digest)
    damaged = Agent(io.BytesIO(data[:-1] + b"!next"), tmp_path)
    reply = answer(damaged, {"op": "put", "path": "/v", "size": len(data), "sha256": digest})
    assert reply["error"] == "damaged"
    assert os.listdir(tmp_path) == ["w"]
    assert damaged._source.read() == b"next"


def test_one_installer_at_a_time(tmp_path: Path) -> None:
    first, second = Agent(io.BytesIO(), tmp_path), Agent(io.BytesIO(), tmp_path)
    assert first.lock("/run/lock", "anna at desk")
    reply = answer(second, {"op": "lock", "path": "/run/lock", "who": "bob"})
    assert (reply["error"], "anna at desk, since" in reply["message"]) == ("locked", True)
    assert first._lock is not None
    os.close(first._lock)
    assert second.lock("/run/lock", "bob")
    assert second._lock is not None
    os.close(second._lock)


def test_programs_and_their_ends(tmp_path: Path) -> None:
    agent = Agent(io.BytesIO(), tmp_path)
    assert agent.run(["sh", "-c", "cat; echo no >&2; exit 3"], stdin="é") == {"code": 3, "out": "é", "err": "no\n"}
    assert answer(agent, {"op": "run", "argv": ["sleep", "9"], "timeout": 0.05})["error"] == "failed"
    assert answer(agent, {"op": "run", "argv": ["/nowhere"]})["message"] == "/nowhere: No such file or directory"
    requests = b'{"op": "names", "path": "/"}\n{"op": "read", "path": "/none"}\n'
    sink = io.BytesIO()
    before = os.umask(0o022)
    assert serve(io.BytesIO(requests), sink) == 0
    os.umask(before)
    assert [json.loads(line) for line in sink.getvalue().splitlines()][1] == {"result": None}


def test_the_agent_needs_nothing_but_python() -> None:
    """Its text is run by the host's own Python: whatever it imports has to be there."""
    import ast

    from drctl.appliance.install import agent

    tree = ast.parse(Path(agent.__file__).read_text())
    names = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    names |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)


# -- bundle ------------------------------------------------------------------------------------------------------------


def repack(directory: Path, name: str) -> Path:
    directory.mkdir(exist_ok=True)
    return bundles._repack(metadata.distribution(name), directory)


def test_a_distribution_is_put_back_into_a_wheel(tmp_path: Path) -> None:
    wheel = repack(tmp_path / "one", "tomlkit")
    assert wheel.name == f"tomlkit-{metadata.version('tomlkit')}-py3-none-any.whl"
    assert wheel.read_bytes() == repack(tmp_path / "two", "tomlkit").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [record] = [name for name in names if name.endswith(".dist-info/RECORD")]
        listed = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
    assert listed == set(names) - {record}
    assert "tomlkit/__init__.py" in names
    assert not [name for name in names if name.endswith((".pyc", "INSTALLER"))]


def test_our_own_wheel_has_the_package_as_it_is_here(tmp_path: Path) -> None:
    with zipfile.ZipFile(repack(tmp_path, "drctl")) as archive:
        names = set(archive.namelist())
        [points] = [name for name in names if name.endswith("entry_points.txt")]
        assert b"drctl.cli.app:main" in archive.read(points)
    assert {"drctl/appliance/install/files/preflight.sh", "drctl/appliance/daemon.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pth", "direct_url.json"))]


def test_what_drctl_requires_is_all_there() -> None:
    names = {bundles._normal(found.metadata["Name"]) for found in bundles._closure(["drctl", "pip"])}
    assert {"drctl", "pip", "numpy", "paramiko", "cffi", "libvirt-python"} <= names
    assert not {"pytest", "ruff", "mypy"} & names


def test_a_bundle_is_checked_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_bundle(tmp_path)
    (tmp_path / "x-1-py3-none-any.whl").write_bytes(b"data")
    row = {"name": "x-1-py3-none-any.whl", "size": 4, "sha256": hashlib.sha256(b"data").hexdigest()}
    listing = {"format": 1, "version": "1", "python": "3.11", "machine": "x86_64", "wheels": [row]}
    (tmp_path / "bundle.json").write_text(json.dumps(listing))
    assert load_bundle(tmp_path) == Bundle(tmp_path, "1", "3.11", "x86_64", (Wheel(**row),))
    (tmp_path / "x-1-py3-none-any.whl").write_bytes(b"dat4")
    with pytest.raises(IntegrityError, match="is not the file"):
        load_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text(json.dumps(listing | {"format": 2}))
    with pytest.raises(UnsupportedFormat):
        load_bundle(tmp_path)


def test_wheels_of_another_python(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in (
        "numpy-2.0-cp313-cp313-manylinux_2_28_aarch64.whl",
        "cryptography-50-cp311-abi3-manylinux_2_34_aarch64.whl",
        "a-1-py3-none-any.whl",
    ):
        (given / name).write_bytes(b"")
    (tmp_path / "out").mkdir()
    assert bundles._copy(given, tmp_path / "out") == ("3.13", "aarch64")
    with pytest.raises(NotFound, match="wheel"):
        bundles._copy(tmp_path / "out" / "none", tmp_path / "out")


# -- files -------------------------------------------------------------------------------------------------------------


def test_toml_is_written_as_it_is_read() -> None:
    import tomllib

    values = {"a": 'é "x" \\ \n', "n": 3, "b": True, "peer": [{"x": "1"}, {"x": "2"}]}
    assert tomllib.loads(render(values)) == values


def test_system_files_have_no_places_left() -> None:
    unit = system_file("drctl-appliance.service", home="/h", run="/r", user="u", version="/v", run_mode="0710")
    assert "@" not in unit
    for line in ("KillMode=process", "RuntimeDirectoryPreserve=yes", "LimitMEMLOCK=infinity", "Type=notify", "User=u"):
        assert f"{line}\n" in unit
    assert "@" not in system_file("apparmor", home="/h", run="/r")


def test_systemd_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(1)
        environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_PID": "1", "OTHER": "x"}
        notifier = Notifier(environment)
        assert environment == {"OTHER": "x"}
        notifier.ready("up")
        notifier.alive()
        notifier.alive()  # too soon to be told again
        notifier.stopping()
        assert [sock.recv(100) for _ in range(3)] == [b"READY=1\nSTATUS=up", b"WATCHDOG=1", b"STOPPING=1"]
    notifier.alive()  # nobody listens any more: no error
    Notifier({}).ready("nobody")
