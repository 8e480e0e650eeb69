"""`host`, `vm` and `doctor` over a simulated ESX host, beside a libvirt host that is away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from drctl.cli.app import run
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, EsxSim

if reason := simulator.lacking():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def sim() -> Iterator[EsxSim]:
    one = EsxSim("7.0U3").start()
    one.add_vm("web", (8 * MIB, 16 * MIB), on=True)
    one.add_vm("db", folder="db 2", on=True, scsi0_0__mode="independent-persistent")
    one.add_vm("old").invalid = True
    one.run("vim-cmd", "vmsvc/snapshot.create", "1", "before patch", "", "0", "0")
    yield one
    one.close()


@pytest.fixture
def place(sim: EsxSim, tmp_path: Path) -> Path:
    return configure(sim, tmp_path)


def configure(sim: EsxSim, place: Path, **changes: str) -> Path:
    login = sim.login()
    keys = {"ssh": f"{login.user}@127.0.0.1:{sim.port}", "ssh_identity": login.identity} | changes
    keys = {"ssh_known_hosts": login.known_hosts} | keys
    lines = "\n".join(f'{key} = "{value}"' for key, value in keys.items())
    (place / "drctl.toml").write_text(
        f'[[site]]\nname = "alpha"\n[[host]]\nname = "esx1"\nsite = "alpha"\nkind = "esx"\n{lines}\n'
    )
    return place


def test_hosts(sim: EsxSim, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["host", "list", "--config", str(place)]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:4] == ["esx1", "alpha", "esx", "none"]
    assert run(["host", "show", "esx1", "--output", "json", "--config", str(place)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["host_kind"] == "esx"
    assert told["versions"] == {"hypervisor": "VMware ESXi 7.0.3 Update 3 build-21930508"}
    assert told["space"]["datastore1"]["total"] == 1 << 36


def test_machines(sim: EsxSim, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["vm", "list", "--output", "json", "--config", str(place)]) == 0
    db, web = json.loads(capsys.readouterr().out)["machines"]
    assert (web["machine"], web["state"], web["host"], web["protected"]) == ("web", "running", "esx1", False)
    assert [disk["size"] for disk in web["disks"]] == [8 * MIB, 16 * MIB]
    assert web["disks"][0]["refusal"] == "no appliance serves its host"
    assert db["disks"][0]["refusal"].startswith("its mode is independent-persistent")
    assert run(["vm", "show", "db", "--config", str(place)]) == 0
    assert "independent-persistent" in capsys.readouterr().out


def test_doctor(sim: EsxSim, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--output", "json", "--config", str(place)]) == 3
    told = {one["subject"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert told["esx1: machine 3"]["severity"] == "warning"
    assert told["esx1: web"]["message"] == "it has snapshots"
    assert "independent-persistent" in told["esx1: db.scsi0:0"]["message"]


def test_what_needs_an_appliance_does_not_ask_the_host(sim: EsxSim, place: Path) -> None:
    before = len(sim.hostd.commands)
    assert run(["status", "--config", str(place)]) == 0
    assert len(sim.hostd.commands) == before


@pytest.mark.parametrize(
    ("identity", "words"), [("stranger", "the login was refused"), ("none", "the login was refused")]
)
def test_a_login_that_is_refused(
    sim: EsxSim, tmp_path: Path, capsys: pytest.CaptureFixture[str], identity: str, words: str
) -> None:
    place = configure(sim, tmp_path, ssh_identity=str(simulator.parts() / identity))
    assert run(["vm", "list", "--config", str(place)]) == 3
    assert words in capsys.readouterr().err


def test_what_is_about_appliances_leaves_the_host_alone(
    sim: EsxSim, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(sim.hostd.commands)
    assert run(["appliance", "uninstall", "esx1", "--yes", "--config", str(place)]) == 42
    assert "no certificate authority" in capsys.readouterr().err
    assert run(["certificate", "list", "--config", str(place)]) == 0
    assert run(["appliance", "list", "--config", str(place)]) == 0
    assert len(sim.hostd.commands) == before
