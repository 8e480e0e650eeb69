"""No secret leaves by the side doors: core dumps, argument lists, environments of children, logs, TOML."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drctl.cli.config import load_config
from drctl.errors import ConfigInvalid
from drctl.replication import identity
from drctl.store.group_store import GroupStore

UUID = "11111111-1111-4111-8111-111111111111"
PASSPHRASE = "correct-horse-battery"
#: Each makes a process hold a private key or what opens one.
HOLDERS = {
    "receiver, boot guard's peer": "identity.server_context(Path(sys.argv[1]) / 'tls')",
    "shipper, boot guard": "identity.client_context(Path(sys.argv[1]) / 'tls')",
    "renewal": f"identity.make_request(Path(sys.argv[1]) / 'new', '{UUID}')",
    "init": "identity.create_ca(Path(sys.argv[1]) / 'other')",
    "install": "identity.check_ca(Path(sys.argv[1]) / 'ca')",
    "passphrase": "identity.read_passphrase(Path(sys.argv[1]) / 'pass')",
}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    identity.create_ca(tmp_path / "ca")
    identity.issue(tmp_path / "ca", UUID, tmp_path / "tls")
    (tmp_path / "pass").write_text(PASSPHRASE + "\n")
    return tmp_path


@pytest.mark.parametrize("act", HOLDERS.values(), ids=list(HOLDERS))
def test_who_holds_a_key_makes_no_core_dump(world: Path, act: str) -> None:
    """Before the key there may be one (else this would prove nothing), afterwards not, neither as a file nor by pipe."""
    code = (
        "import os, resource, sys\nfrom pathlib import Path\nfrom drctl.replication import identity\n"
        "from drctl.store.secrecy import memory_is_secret\n"
        f"before = memory_is_secret()\n{act}\n"
        "print(before, memory_is_secret(), *resource.getrlimit(resource.RLIMIT_CORE), flush=True)\n"
        "os.abort()\n"
    )
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    done = subprocess.run(
        [sys.executable, "-c", code, str(world)],
        capture_output=True,
        text=True,
        cwd=world,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (hard, hard)),
    )
    assert done.stdout == "False True 0 0\n", done.stderr
    assert done.returncode == -signal.SIGABRT
    assert not list(world.glob("core*"))


def test_the_receivers_process_holds_to_it_and_shows_no_secret(world: Path) -> None:
    """The real process: its limits, its argument list, its environment, its log."""
    GroupStore.create(world / "store" / "web", "web", 1, ()).close()
    config = {"listen": "127.0.0.1:0", "tls": str(world / "tls"), "store": str(world / "store")}
    (world / "receiver.json").write_text(json.dumps(config | {"control": str(world / "r"), "maintenance": False}))
    with (world / "log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "drctl.replication.receiver", str(world / "receiver.json")], stderr=log, stdout=log
        )
    try:
        deadline = time.monotonic() + 30
        while not (world / "r").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        proc = Path(f"/proc/{child.pid}")
        limits = proc.joinpath("limits").read_text()
        assert re.search(r"Max core file size\s+0\s+0", limits), limits
        shown = proc.joinpath("cmdline").read_bytes()
        if os.getuid() == 0:
            shown += proc.joinpath("environ").read_bytes()
        assert_no_key(shown.decode(errors="replace"), world)
    finally:
        child.terminate()
        child.wait(20)
    assert_no_key((world / "log").read_text(), world)


def assert_no_key(text: str, world: Path) -> None:
    for path in (world / "ca" / "ca-key.pem", world / "tls" / "key.pem"):
        body = "".join(path.read_text().splitlines()[1:-1])
        assert body[:32] not in text.replace("\n", "")
    assert "PRIVATE KEY" not in text
    assert PASSPHRASE not in text


def test_a_passphrase_is_in_no_log_and_no_error(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    identity.create_ca(world / "sealed", PASSPHRASE.encode())
    request = identity.make_request(world / "tls2", UUID)
    with pytest.raises(Exception, match=r"can't be read") as caught:
        identity.sign_request(world / "sealed", request, UUID, passphrase=(PASSPHRASE + "x").encode())
    said = f"{caught.value} {getattr(caught.value, 'hint', '')} {caplog.text}"
    assert PASSPHRASE not in said
    assert "PRIVATE KEY" not in said


@pytest.mark.parametrize("key", ["passphrase", "ca_passphrase", "password", "ssh_password", "key", "token"])
def test_a_secret_in_drctl_toml_is_refused_and_not_repeated(tmp_path: Path, key: str) -> None:
    text = '[[site]]\nname = "alpha"\n[[host]]\nname = "a1"\nsite = "alpha"\nssh = "root@a1"\nlink = "a1:7077"\n'
    (tmp_path / "drctl.toml").write_text(text + f'{key} = "{PASSPHRASE}"\n')
    with pytest.raises(ConfigInvalid) as caught:
        load_config(tmp_path / "drctl.toml")
    assert PASSPHRASE not in f"{caught.value} {caught.value.hint}"


def test_no_option_of_the_command_line_takes_a_secret_itself() -> None:
    """What is secret is named as a file: an argument list is open to everybody on the machine."""
    from drctl.cli.app import COMMANDS, load

    found: list[str] = []

    def look(name: str, command: object) -> None:
        for verb, inner in getattr(command, "commands", {}).items():
            look(f"{name} {verb}", inner)
        for param in getattr(command, "params", []):
            names = [f"{name} {option}" for option in param.opts if re.search(r"pass|secret|token|key\b", option)]
            found.extend(option for option in names if not option.endswith("-file"))

    for name in COMMANDS:
        look(name, load(name))
    assert found == []
