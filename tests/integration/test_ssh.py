"""Control over a real OpenSSH: what arrives, what is refused, and what each refusal says and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drctl.appliance.client import Client
from drctl.appliance.control import ControlServer
from drctl.appliance.remote_socket import RemoteSocket
from drctl.cli.app import run
from drctl.errors import (
    ApplianceUnreachable,
    HostKeyRejected,
    HostUnreachable,
    LoginRefused,
    OutOfSpace,
    PrivilegeMissing,
)
from drctl.hypervisor.shell import need_root
from tests.cli.appliance import FakeAppliance
from tests.integration import ssh_rig
from tests.integration.ssh_rig import HostRig

VENV = Path(sys.executable).parents[1]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no bug of ours."""
    monkeypatch.setattr("drctl.cli.inventory.READ_TIMEOUT", 30.0)


@pytest.fixture(scope="module")
def host() -> Iterator[HostRig]:
    rig = ssh_rig.start()
    (rig.share / "drctl").mkdir()
    (rig.share / "drctl/current").symlink_to(VENV)
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def appliance(host: HostRig) -> Iterator[FakeAppliance]:
    """It answers at a socket of the host; only root may speak to it."""
    fake = FakeAppliance("a1", "alpha")
    fake.replies["appliance.history"] = lambda params, progress: [progress({"step": n}) for n in range(3)] and params
    fake.replies["group.remove"] = OutOfSpace("no room", hint="make some", free=3)
    methods = ["appliance.info", "appliance.history", "group.list", "group.remove", "machine.list"]
    server = ControlServer(
        host.share / "control.sock",
        {name: lambda p, g, name=name: fake.call(name, p, on_progress=g) for name in methods},
    )
    server.start()
    yield fake
    server.stop()


def client(host: HostRig, user: str = "root", **changes: object) -> Client:
    shell = host.shell(user, **changes)
    return Client(RemoteSocket(shell, str(host.share / "control.sock"), str(host.share / "drctl")), timeout=60)


def config(host: HostRig, **changes: str) -> Path:
    place = host.share / "config"
    place.mkdir(exist_ok=True)
    keys = {
        "ssh": f"root@127.0.0.1:{host.port}",
        "ssh_identity": "../id",
        "ssh_known_hosts": "../known_hosts",
        "control": f"unix:{host.share}/control.sock",
        "prefix": f"{host.share}/drctl",
    } | changes
    lines = "\n".join(f'{key} = "{value}"' for key, value in keys.items())
    (place / "drctl.toml").write_text(f'[[site]]\nname = "alpha"\n[[host]]\nname = "a1"\nsite = "alpha"\n{lines}\n')
    return place


def test_a_result_progress_and_an_error_come_through(host: HostRig, appliance: FakeAppliance) -> None:
    seen: list[object] = []
    caller = client(host)
    assert caller.call("appliance.history", {"x": "é" * 100_000}, on_progress=seen.append) == {"x": "é" * 100_000}
    assert seen == [{"step": 0}, {"step": 1}, {"step": 2}]
    with pytest.raises(OutOfSpace) as caught:
        caller.call("group.remove")
    assert (caught.value.hint, caught.value.fields) == ("make some", {"free": "3"})


def test_one_connection_carries_many_calls_at_once(host: HostRig, appliance: FakeAppliance) -> None:
    before = (host.share / "sshd.log").read_text().count("Accepted publickey")
    caller = client(host)
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: caller.call("appliance.info"), range(24)))
    assert {answer["host"] for answer in answers} == {"a1"}
    assert (host.share / "sshd.log").read_text().count("Accepted publickey") == before + 1


def test_the_command_line_over_ssh(host: HostRig, appliance: FakeAppliance, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["host", "list", "--output", "json", "--config", str(config(host))]) == 0
    assert json.loads(capsys.readouterr().out)["hosts"][0]["appliance"] == "running"
    assert run(["status", "--config", str(config(host))]) == 0


def test_a_connection_that_was_lost_is_made_anew(host: HostRig, appliance: FakeAppliance) -> None:
    shell = host.shell()
    caller = Client(RemoteSocket(shell, str(host.share / "control.sock"), str(host.share / "drctl")))
    caller.call("appliance.info")
    shell.close()
    assert caller.call("appliance.info")["host"] == "a1"


def test_a_host_that_is_not_known(host: HostRig, tmp_path: Path) -> None:
    (tmp_path / "known").write_text("")
    with pytest.raises(HostKeyRejected, match="is not in known_hosts: ssh-ed25519 SHA256:") as caught:
        client(host, known_hosts=str(tmp_path / "known")).call("appliance.info")
    printed = subprocess.run(
        ["ssh-keygen", "-lf", host.share / "host_key.pub"], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    assert printed in str(caught.value)


def test_a_host_with_another_key(host: HostRig, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    (tmp_path / "known").write_text(f"[127.0.0.1]:{host.port} {(tmp_path / 'other.pub').read_text()}")
    with pytest.raises(HostKeyRejected, match="is not the one in known_hosts"):
        client(host, known_hosts=str(tmp_path / "known")).call("appliance.info")


def test_a_revoked_key(host: HostRig, tmp_path: Path) -> None:
    known = host.known_hosts.read_text()
    (tmp_path / "known").write_text(f"{known}@revoked {known}")
    with pytest.raises(HostKeyRejected, match="@revoked"):
        client(host, known_hosts=str(tmp_path / "known")).call("appliance.info")


def test_a_hashed_known_hosts_is_read(host: HostRig, appliance: FakeAppliance, tmp_path: Path) -> None:
    (tmp_path / "known").write_text(host.known_hosts.read_text())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", tmp_path / "known"], check=True, capture_output=True)
    assert "127.0.0.1" not in (tmp_path / "known").read_text()
    assert client(host, known_hosts=str(tmp_path / "known")).call("appliance.info")["host"] == "a1"


def test_a_key_that_the_host_does_not_take(host: HostRig, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    with pytest.raises(LoginRefused, match="Authentication failed"):
        client(host, identity=str(tmp_path / "other")).call("appliance.info")
    with pytest.raises(LoginRefused, match="No such file"):
        client(host, identity=str(tmp_path / "absent")).call("appliance.info")


def test_a_key_with_a_passphrase(host: HostRig, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "locked"], check=True)
    with pytest.raises(LoginRefused) as caught:
        client(host, identity=str(tmp_path / "locked")).call("appliance.info")
    assert "agent" in caught.value.hint


def test_a_login_that_may_not_become_root(host: HostRig, appliance: FakeAppliance) -> None:
    with pytest.raises(PrivilegeMissing, match="sudo"):
        client(host, "ops").call("appliance.info")
    with pytest.raises(PrivilegeMissing, match="may not become root"):
        need_root(host.shell("ops"))
    assert need_root(host.shell()) == []


def test_no_appliance_there(host: HostRig) -> None:
    shell = host.shell()
    with pytest.raises(ApplianceUnreachable, match="no appliance is installed there"):
        Client(RemoteSocket(shell, "/run/drctl/control.sock", "/opt/nothing")).call("appliance.info")
    with pytest.raises(ApplianceUnreachable, match=r"no appliance answers at /run/drctl/control.sock: No such file"):
        Client(RemoteSocket(shell, "/run/drctl/control.sock", str(host.share / "drctl"))).call("appliance.info")


def test_a_host_that_is_away(host: HostRig) -> None:
    with pytest.raises(HostUnreachable, match="Connection refused"):
        client(host, port=1).call("appliance.info")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"ssh_known_hosts": "../nothing"}, 23, "is not in known_hosts"),
        ({"ssh_identity": "../host_key"}, 24, "the login was refused"),
        ({"ssh": "ops@127.0.0.1:{port}"}, 25, "is not open to this login"),
        ({"prefix": "/opt/nothing"}, 22, "no appliance is installed there"),
        ({"ssh": "root@127.0.0.1:1"}, 20, "Connection refused"),
    ],
)
def test_each_refusal_has_its_exit_code(
    host: HostRig, appliance: FakeAppliance, capsys: pytest.CaptureFixture[str], changes: dict[str, str], code: int, words: str
) -> None:  # fmt: skip
    place = config(host, **{key: value.format(port=host.port) for key, value in changes.items()})
    assert run(["replicate", "stop", "web", "--yes", "--config", str(place)]) == code
    assert words in capsys.readouterr().err
