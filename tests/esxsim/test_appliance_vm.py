"""The machine of an appliance on a simulated host: made, gone on with after a lost connection, taken away."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drctl.appliance import config as configuration
from drctl.appliance.install import campaign
from drctl.appliance.install.esx_access import EsxAccess, appliance_uri, forget, learn
from drctl.appliance.install.image import VMDK, Image
from drctl.appliance.install.vm import ApplianceVm, VmWanted
from drctl.appliance.install.vm_text import seed
from drctl.errors import AlreadyExists, HostUnreachable, HypervisorRefused, NotFound, OutOfSpace, Refused
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.session import Session
from drctl.hypervisor.shell import Done
from drctl.model.site import ApplianceMachine, Host, HostKind, Login
from tests.esxsim.host import MIB, Door, EsxSim, lacking
from tests.esxsim.state import Vm
from tests.unit.appliance.install.host import HOSTS, FakeHost, World

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())
UUID = "33333333-3333-4333-8333-333333333333"
KEY = "ssh-ed25519 AAAAC3Nz operator"
DIRECTORY = f"/vmfs/volumes/datastore1/drctl-appliance-{UUID}"


class Lossy(Door):
    """Loses the connection once at each command that it has not seen before, at its begin or its end."""

    def __init__(self, sim: EsxSim, event: str) -> None:
        super().__init__(sim)
        self.event, self.seen = event, set[str]()

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Done:
        key = re.sub(rb"[0-9a-f]{32} ", b"", " ".join(argv).encode() + stdin).decode("latin-1")
        if key not in self.seen:
            self.seen.add(key)
            self.drop = (self.event, self.count + 1)
        return super().run(argv, stdin=stdin, timeout=timeout)


class Site:
    def __init__(self, sim: EsxSim, place: Path, door: Door | None = None, **changes: object) -> None:
        machine = {"image": str(place), "datastore": "datastore1", "network": "VM Network", "authorized_key": "k"}
        self.machine = ApplianceMachine(**{**machine, "disk": 4 * MIB, **changes})  # type: ignore[arg-type]
        self.door = door or Door(sim)
        wanted = VmWanted("esx1", UUID, self.machine, KEY)
        self.vm = ApplianceVm(EsxHost("esx1", self.door), self.door, wanted, sleep=lambda _: None)


@pytest.fixture
def sim() -> Iterator[EsxSim]:
    sim = EsxSim()
    started = sim.hostd.started

    def tell(vm: Vm) -> None:
        started(vm)
        line = "key ssh-ed25519 AAAAhost"
        lines = [line, "address 192.0.2.20", "ready 1"]
        text = "".join(
            f"\r\ndrctl-appliance {one} {hashlib.sha256(one.encode()).hexdigest()[:16]}\r\n" for one in lines
        )
        (vm.vmx.parent / "console.log").write_text(f"[ 0.0] Linux\n{text}")

    sim.hostd.started = tell  # type: ignore[method-assign]
    yield sim
    sim.close()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    raw = tmp_path / "raw"
    raw.write_bytes(hashlib.sha512(b"disk").digest() * 2048 + bytes(2 * MIB))
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run([*argv, str(raw), str(tmp_path / VMDK)], check=True)
    sha256 = hashlib.sha256((tmp_path / VMDK).read_bytes()).hexdigest()
    return Image(tmp_path, "1-abc", "bookworm", raw.stat().st_size, {VMDK: sha256})


def content(sim: EsxSim) -> dict[str, bytes]:
    base = sim.hostd.real("/vmfs/volumes/datastore1")
    return {str(path.relative_to(base)): path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}


def test_a_machine_is_made_started_and_taken_away(sim: EsxSim, image: Image) -> None:
    sim.add_vm("files")
    before, said = content(sim), list[str]()
    site = Site(sim, image.directory)
    assert site.vm.ensure(image, said.append)[1] == "powered on"
    assert said == ["image", "definition", "start"]
    told = site.vm.console(said.append)
    assert (told.keys, told.addresses) == ((("ssh-ed25519", "AAAAhost"),), ("192.0.2.20",))
    [made] = [vm for vm in sim.hostd.vms.values() if vm.name == "drctl-esx1"]
    assert (made.power, made.config["guestinfo.drctl.appliance"]) == ("on", UUID)
    assert sorted(made.disks()) == ["scsi0:0", "scsi0:1"]
    raw = (image.directory / "raw").read_bytes()
    assert sim.read(made)[: len(raw)] == raw
    assert len(sim.read(made)) == 4 * MIB
    assert sim.read(made, "scsi0:1") == seed("drctl-esx1", site.machine, KEY)
    files = set(content(sim)) - set(before)
    assert not any(name.endswith((".part", "image.vmdk", "drctl-clone")) for name in files)
    assert site.vm.ensure(image, said.append) == []
    assert site.vm.remove(said.append)[0] == "machine drctl-esx1"
    assert content(sim) == before
    assert [vm.name for vm in sim.hostd.vms.values()] == ["files"]
    assert site.vm.remove(said.append) == []


@pytest.mark.long
@pytest.mark.parametrize("event", ["begin", "end"])
def test_a_connection_lost_at_any_command_leaves_nothing_twice(sim: EsxSim, image: Image, event: str) -> None:
    site = Site(sim, image.directory, Lossy(sim, event))

    def until_done(work: object) -> int:
        for lost in range(200):
            try:
                work()  # type: ignore[operator]
                return lost
            except HostUnreachable:
                assert len([vm for vm in sim.hostd.vms.values() if vm.name == "drctl-esx1"]) <= 1
        raise AssertionError("it does not end")

    assert until_done(lambda: site.vm.ensure(image, lambda _: None)) > 15
    [made] = sim.hostd.vms.values()
    raw = (image.directory / "raw").read_bytes()
    assert made.power == "on"
    assert sim.read(made)[: len(raw)] == raw
    assert until_done(lambda: site.vm.remove(lambda _: None)) > 3
    assert content(sim) == {}
    assert sim.hostd.vms == {}


def test_what_keeps_a_machine_from_being_made(sim: EsxSim, image: Image) -> None:
    site = Site(sim, image.directory)
    with pytest.raises(NotFound, match="datastore"):
        Site(sim, image.directory, datastore="other").vm.look(image)
    sim.hostd.maintenance = True
    with pytest.raises(HypervisorRefused, match="maintenance mode"):
        site.vm.ensure(image, lambda _: None)
    sim.hostd.maintenance = False
    sim.hostd.datastores[0].size = 1 << 20
    with pytest.raises(OutOfSpace, match="are needed"):
        site.vm.ensure(image, lambda _: None)
    sim.hostd.datastores[0].size = 1 << 36
    sim.hostd.datastores[0].read_only = True
    with pytest.raises(HypervisorRefused):
        site.vm.ensure(image, lambda _: None)
    sim.hostd.datastores[0].read_only = False
    sim.add_vm("drctl-esx1", folder="mine")
    before = {name: data for name, data in content(sim).items() if name.startswith("mine")}
    for work in (lambda: site.vm.ensure(image, lambda _: None), lambda: site.vm.remove(lambda _: None)):
        with pytest.raises(AlreadyExists, match="another machine is called drctl-esx1"):
            work()
    assert {name: data for name, data in content(sim).items() if name.startswith("mine")} == before


def test_a_broken_off_removal_is_not_installed_over(sim: EsxSim, image: Image) -> None:
    site = Site(sim, image.directory)
    sim.hostd.real(f"{DIRECTORY}.removing").write_text("")
    with pytest.raises(Refused, match="an uninstallation was begun"):
        site.vm.ensure(image, lambda _: None)
    assert site.vm.remove(lambda _: None)
    assert content(sim) == {}


def test_a_silent_machine_is_told_with_its_last_words(sim: EsxSim, image: Image) -> None:
    site = Site(sim, image.directory)
    site.vm.ensure(image, lambda _: None)
    sim.hostd.real(f"{DIRECTORY}/console.log").write_text("Kernel panic - not syncing: no root")
    with pytest.raises(HypervisorRefused, match="Kernel panic"):
        site.vm.console(lambda _: None, timeout=3)


def test_the_appliance_is_let_in_with_a_key_of_its_own(sim: EsxSim, tmp_path: Path) -> None:
    keys = sim.root / "etc/ssh/keys-root/authorized_keys"
    keys.parent.mkdir(parents=True)
    keys.write_text("ssh-rsa AAAA somebody\n")
    host = Host("esx1", "alpha", HostKind.ESX, "qemu:///system", "", "", Login("esx1.example", "root", 2222))
    uri = "esx://root@esx1.example:2222?identity=/h/esx/id&known_hosts=/h/esx/known_hosts"
    assert appliance_uri(host, "/h") == uri
    remote = FakeHost(tmp_path / "vm")
    remote.root.mkdir()
    place = remote.at("/h/esx")

    def made(argv: Sequence[str], **_: object) -> dict[str, object]:
        assert argv[:4] == ["ssh-keygen", "-q", "-t", "ecdsa"]
        (place / "id.pub").write_text(f"ecdsa-sha2-nistp256 AAAA{len(calls)} {argv[7]}\n")
        calls.append(argv)
        return {"code": 0, "out": "", "err": ""}

    calls: list[Sequence[str]] = []
    remote._run = made  # type: ignore[method-assign,assignment]
    access = EsxAccess(Session("esx1", Door(sim)), host, UUID, ("ecdsa-sha2-nistp256", "AAAAhost"))
    assert access.grant(remote, "/h", "drctl")
    assert not access.grant(remote, "/h", "drctl")
    assert keys.read_text() == f"ssh-rsa AAAA somebody\necdsa-sha2-nistp256 AAAA0 drctl-appliance-{UUID}\n"
    assert (place / "known_hosts").read_text() == "[esx1.example]:2222 ecdsa-sha2-nistp256 AAAAhost\n"
    (place / "id.pub").unlink()  # a machine that was made anew
    assert access.grant(remote, "/h", "drctl")
    assert keys.read_text() == f"ssh-rsa AAAA somebody\necdsa-sha2-nistp256 AAAA1 drctl-appliance-{UUID}\n"
    assert access.revoke()
    assert not access.revoke()
    assert keys.read_text() == "ssh-rsa AAAA somebody\n"


def test_a_new_machine_is_known_until_it_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "known"
    login = Login("192.0.2.20", "root", 22, "id", str(file))
    file.write_text("192.0.2.2 ssh-rsa A")
    assert learn(login, (("ssh-ed25519", "B"), ("ssh-rsa", "C")))
    assert not learn(login, (("ssh-ed25519", "D"),))
    assert file.read_text() == "192.0.2.2 ssh-rsa A\n192.0.2.20 ssh-ed25519 B\n192.0.2.20 ssh-rsa C\n"
    assert forget(login)
    assert not forget(login)
    assert file.read_text() == "192.0.2.2 ssh-rsa A\n"


class Operator(Door):
    """The operator's own way in, which knows the host's key."""

    def host_key(self) -> tuple[str, str]:
        return "ecdsa-sha2-nistp256", "AAAAesx"


def test_one_command_makes_the_machine_installs_on_it_and_takes_it_back(
    sim: EsxSim, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sim.root / "etc/ssh/keys-root/authorized_keys"
    keys.parent.mkdir(parents=True)
    keys.write_text("ssh-rsa AAAA somebody\n")
    (tmp_path / "id.pub").write_text(KEY)
    world, run = World(tmp_path), FakeHost._run

    def programs(self: FakeHost, argv: list[str], **options: Any) -> dict[str, Any]:
        if argv[0] == "ssh-keygen":
            self.at("/var/lib/drctl/esx/id.pub").write_text(f"ecdsa-sha2-nistp256 AAAA {argv[7]}\n")
        return run(self, argv, **options)

    @contextmanager
    def session(*_: object) -> Iterator[FakeHost]:
        yield world.host

    monkeypatch.setattr(FakeHost, "_run", programs)
    monkeypatch.setattr(campaign, "agent_session", session)
    monkeypatch.setattr(campaign, "look", lambda *_: world.facts(libvirt="", qemu=""))
    appliance = Login("192.0.2.20", "root", 22, str(tmp_path / "id"), str(tmp_path / "known"))
    machine = ApplianceMachine(str(image.directory), "datastore1", "n", str(tmp_path / "id.pub"), disk=4 * MIB)
    esx = Host("esx1", "alpha", HostKind.ESX, "qemu:///system", "unix:/run/drctl/control.sock", "192.0.2.20:7077")
    esx = replace(esx, login=Login("esx1.example", "root"), appliance=appliance, machine=machine)
    shell: Any = Operator(sim)

    def target() -> campaign.Target:
        made = campaign.esx_target(esx, shell, world.roster, lambda: image)
        made.vm._sleep = lambda _: None
        return campaign.Target(esx, shell, world.answers, made)

    def install() -> list[str]:
        told = target()
        assert campaign.survey([told], world.bundle) == []
        campaign.install([told], [esx, HOSTS[1]], world.bundle, world.roster, lambda *_: None, upgrade=False)
        assert told.error is None, told.error
        assert told.outcome
        return told.outcome.changes

    assert campaign.survey([target()], world.bundle) == []
    assert content(sim) == {}  # looking changes nothing
    changes = install()
    assert changes[0].startswith("machine drctl-esx1")
    assert {"powered on", "access to the ESX host", "identity (key and certificate)", "started"} <= set(changes)
    assert (tmp_path / "known").read_text() == "192.0.2.20 ssh-ed25519 AAAAhost\n"
    home = configuration.load(world.host.at("/var/lib/drctl"))
    assert home.config.uri == (
        "esx://root@esx1.example?identity=/var/lib/drctl/esx/id&known_hosts=/var/lib/drctl/esx/known_hosts"
    )
    assert (world.host.at("/var/lib/drctl/esx/known_hosts")).read_text() == "esx1.example ecdsa-sha2-nistp256 AAAAesx\n"
    assert "drctl-appliance-" in keys.read_text()
    assert install() == []

    [vm] = sim.hostd.vms.values()
    vm.power = "off"
    with pytest.raises(Refused, match="is off: whether it keeps history"):
        campaign.held_by(target())
    vm.power = "on"
    told = target()
    assert campaign.survey([told], None) == []
    assert campaign.held_by(told).stores == ()
    assert campaign.uninstall(told, lambda *_: None, delete_history=False).changes
    assert (content(sim), sim.hostd.vms) == ({}, {})
    assert keys.read_text() == "ssh-rsa AAAA somebody\n"
    assert (tmp_path / "known").read_text() == ""
    told = target()
    assert campaign.survey([told], None) == []
    assert campaign.uninstall(told, lambda *_: None, delete_history=False).changes == []
