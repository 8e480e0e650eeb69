"""What an ESX host's appliance keeps and is told: the cycle's record, the host's address."""

from __future__ import annotations

from pathlib import Path

import pytest

from drctl.appliance.esx import address as esx_address
from drctl.appliance.esx.record import CycleFile
from drctl.errors import ConfigInvalid, IntegrityError
from drctl.hypervisor.esx.cycle import CycleState, Mark
from drctl.model.site import Login

VMX = "/vmfs/volumes/u/web 1/web.vmx"


def test_a_record_is_read_back(tmp_path: Path) -> None:
    baseline = Mark(3, {VMX: "drctl.web.3.aa"}, {(VMX, "scsi0:0"): ("a-000002.vmdk", "a-000001.vmdk")}, 17.5)
    state = CycleState("web", baseline, Mark(4, {VMX: "drctl.web.4.bb"}, taken=18.0), 4)
    file = CycleFile(tmp_path, "web")
    assert file.load() == CycleState("web")
    file.checkpoint = 12
    file.save(state)
    again = CycleFile(tmp_path, "web")
    assert again.load() == state
    assert again.checkpoint == 12


def test_without_a_baseline_no_checkpoint_is_vouched_for(tmp_path: Path) -> None:
    file = CycleFile(tmp_path, "web")
    file.checkpoint = 12
    file.save(CycleState("web", last=4))
    again = CycleFile(tmp_path, "web")
    assert again.load().last == 4
    assert again.checkpoint == 0


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": 2, "group": "web", "last": 0, "baseline": null, "pending": null}']
)
def test_a_damaged_record_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "web.cycle").write_text(text)
    with pytest.raises(IntegrityError):
        CycleFile(tmp_path, "web").load()


@pytest.mark.parametrize(
    "login",
    [
        Login("esx1", "root"),
        Login("192.0.2.7", "drctl", 2222, "/etc/drctl/key", "/etc/drctl/known hosts"),
        Login("2001:db8::7", "root"),
    ],
)
@pytest.mark.parametrize("domain", ["kvm", "qemu"])
def test_an_address_is_read_back(login: Login, domain: str) -> None:
    uri = esx_address.render(login, domain)
    assert esx_address.is_esx(uri)
    assert esx_address.parse(uri) == esx_address.EsxAddress(login, domain)


@pytest.mark.parametrize("uri", ["esx://", "esx://root@h:99999", "esx://h?password=x", "esx://h/vm", "qemu:///system"])
def test_what_is_no_address(uri: str) -> None:
    with pytest.raises(ConfigInvalid):
        esx_address.parse(uri)
