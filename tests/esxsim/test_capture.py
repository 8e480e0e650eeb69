"""`drctl esx capture`: nothing is changed, no name is in it, and a driver that it is replayed to sees the same host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from drctl.cli.app import run
from drctl.hypervisor.esx import capture
from drctl.hypervisor.esx.host import EsxHost
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, Door, EsxSim
from tests.esxsim.replay import Replay
from tests.esxsim.state import PROFILES
from tests.esxsim.test_cli import configure

if reason := simulator.lacking():
    pytest.skip(reason, allow_module_level=True)

SECRETS = ("Payroll", "hunter2", "Müller", "secretstore", "acme", "10.1.2.3", "datacentre")


def populate(sim: EsxSim) -> None:
    sim.add_vm(
        "Payroll [acme] (old)",
        (MIB, MIB),
        store="secretstore",
        on=True,
        annotation="root: hunter2 10.1.2.3\n7      Müller = x",
    )
    sim.add_vm("web", (MIB,), store="secretstore", folder="acme web: x", scsi0_0__mode="independent-persistent")
    sim.add_vm("datacentre", on=True, guestinfo__password="hunter2", ethernet0__networkname="acme lan")
    sim.run("vim-cmd", "vmsvc/snapshot.create", "1", "before acme", "by Müller", "0", "0")
    sim.hostd.networks["acme lan"] = 7


@pytest.fixture(params=list(PROFILES))
def sim(request: pytest.FixtureRequest) -> Iterator[EsxSim]:
    one = EsxSim(request.param, [("datastore1", "VMFS-6"), ("secretstore", "NFS")])
    populate(one)
    yield one
    one.close()


def test_a_replayed_host_is_the_same_but_for_its_names(sim: EsxSim) -> None:
    sim.hostd.ran.clear()
    document = json.loads(capture.render(capture.capture("esx1", Door(sim), b"k" * 32)))
    assert document["problem"] == ""
    text = json.dumps(document, ensure_ascii=False)
    assert [word for word in SECRETS if word.lower() in text.lower()] == []
    reading = (
        "esxcli",
        "vmware",
        "vmsvc/get",
        "vmsvc/power.getstate",
        "vmsvc/device.getdevices",
        "vmsvc/snapshot.get",
        "vmsvc/message",
        "hostsvc/datastore/listsummary",
    )
    assert all(
        words[0].startswith(reading) or words[1].startswith(reading) or len(words) == 2 for words in sim.hostd.ran
    )
    real = EsxHost("esx1", Door(sim)).inventory()
    seen = EsxHost("esx1", Replay(document)).inventory()
    assert (seen.version, seen.invalid, seen.maintenance) == (real.version, real.invalid, real.maintenance)
    assert [(one.kind, one.size) for one in seen.filesystems] == [(one.kind, one.size) for one in real.filesystems]
    by_id = {one.id: one for one in seen.machines}
    for one in real.machines:
        other = by_id[one.id]
        assert other.name != one.name or one.name == "web"
        assert len(other.name) == len(one.name)
        assert other.machine.state is one.machine.state
        assert [(d.size, d.bus, d.refusal) for d in other.machine.disks] == [
            (d.size, d.bus, d.refusal) for d in one.machine.disks
        ]
        assert [len(disk.layers) for disk in other.disks] == [len(disk.layers) for disk in one.disks]


def test_a_host_that_is_not_understood_is_captured_all_the_same(sim: EsxSim) -> None:
    sim.hostd.switches.trailing_blanks = False
    sim.hostd.hostd_down = "Failed to login: something new"
    document = capture.capture("esx1", Door(sim), b"k" * 32)
    assert document["problem"] == "HypervisorRefused"
    assert any("Failed to" in answer["out"] for answer in document["answers"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sim = EsxSim(stores=[("datastore1", "VMFS-6"), ("secretstore", "NFS")]).start()
    populate(sim)
    place, file = configure(sim, tmp_path), tmp_path / "out.json"
    words = ["esx", "capture", "esx1", "--file", str(file), "--config", str(place)]
    assert run(words) == 0
    assert "files" in capsys.readouterr().out
    assert "Payroll" not in file.read_text()
    assert run(words) == 12
    sim.close()
