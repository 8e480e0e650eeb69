"""The main job by the command line with simulated ESX hosts at both sides: guests that boot here and there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drctl.appliance.client import Client
from drctl.appliance.esx import address as esx_address
from drctl.appliance.process import Processes
from drctl.cli.app import run
from drctl.errors import DrctlError
from tests.esxsim import guest
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, EsxSim
from tests.esxsim.sites import RECOVERY, SOURCE, Sites, until
from tests.esxsim.test_guest import newest

if reason := simulator.lacking() or guest.lacking():
    pytest.skip(f"needs {reason}", allow_module_level=True)
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PLAN = """plan = "web"
groups = ["web"]
[[stage]]
name = "all"
all_of = ["web"]
[[stage.check]]
kind = "command"
run = ["true"]
"""


class Beta:
    """`beta`: an ESX host and its appliance as a process, with journal and receiver."""

    def __init__(self, sites: Sites) -> None:
        self.sim = EsxSim("7.0U3", [("small", "VMFS-6"), ("fast [1]", "VMFS-6")]).start()
        self.sim.hostd.boots = True
        self.short = Path(tempfile.mkdtemp(prefix="eb-", dir="/tmp"))
        self.home = self.short / "home"
        shutil.copytree(sites.store.parent / "tls", self.home / "tls")
        (self.home / "appliance.toml").write_text(
            f'site = "beta"\nhost = "esx2"\nuri = "{esx_address.render(self.sim.login(), datastore="fast [1]")}"\n'
            f'link = "127.0.0.1:{sites.port}"\nuuid = "{RECOVERY}"\nrun = "{self.short}/r"\n'
            f'[[peer]]\nsite = "alpha"\nhost = "esx1"\nlink = "127.0.0.1:1"\nuuid = "{SOURCE}"\n'
        )
        self.control = f"unix:{self.short}/r/control.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with (self.short / "log").open("ab") as log:
            argv = [sys.executable, "-m", "drctl.appliance.daemon", "--home", str(self.home)]
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        until(self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.short / "log").read_text()
        try:
            return bool(self.call("appliance.info"))
        except DrctlError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def call(self, method: str, **params: Any) -> Any:
        return Client(self.control).call(method, params, timeout=120)

    def dots(self, name: str) -> int:
        """What the guest of this name has said on its serial port."""
        found = [one for number, one in self.sim.hostd.guests.items() if self.sim.hostd.vms[number].name == name]
        return found[0].serial.read_bytes().count(b".") if found and found[0].serial.exists() else 0

    def image(self, name: str) -> bytes:
        """A machine's disk as it is on the datastore: what its guest writes is carried there when it stops."""
        vm = next(vm for vm in self.sim.hostd.vms.values() if vm.name == name)
        raw = self.short / "raw"
        disk = vm.place(next(iter(vm.disks().values())))
        subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", str(disk), str(raw)], check=True)
        return raw.read_bytes()

    def close(self) -> None:
        self.kill()
        processes = Processes(self.short / "r" / "pids", self.home / "logs")
        for name in processes.names():
            processes.end(name, force=True)
        self.sim.close()
        shutil.rmtree(self.short, ignore_errors=True)


@pytest.fixture
def sites() -> Iterator[Sites]:
    sim = EsxSim()
    vm = sim.add_vm("web", (MIB,), guestos="other", ethernet0__present="TRUE", ethernet0__networkname="VM Network")
    sim.write(vm, 0, guest.boot_sector().ljust(MIB, b"\0"))
    sim.hostd.boots = True
    assert sim.run("vim-cmd", "vmsvc/power.on", "1")[0] == 0
    one = Sites(sim)
    sim.start()
    one.start_process(esx_address.render(sim.login()))
    yield one
    one.close()
    sim.close()


@pytest.fixture
def beta(sites: Sites) -> Iterator[Beta]:
    one = Beta(sites)
    yield one
    one.close()


def command(place: Path, sites: Sites, beta: Beta, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """drctl with a configuration of both sites."""

    def host(name: str, site: str, sim: EsxSim, control: str, link: str = "") -> str:
        login = sim.login()
        return (
            f'[[host]]\nname = "{name}"\nsite = "{site}"\nkind = "esx"\nssh = "{login.user}@127.0.0.1:{sim.port}"\n'
            f'ssh_identity = "{login.identity}"\nssh_known_hosts = "{login.known_hosts}"\n'
            f'appliance = "local"\ncontrol = "{control}"\n{link}'
        )

    (place / "groups").mkdir()
    (place / "plans").mkdir()
    (place / "plans" / "web.toml").write_text(PLAN)
    (place / "drctl.toml").write_text(
        '[[site]]\nname = "alpha"\n[[site]]\nname = "beta"\n'
        + host("esx1", "alpha", sites.sim, f"unix:{sites.short}/r/control.sock")
        + host("esx2", "beta", beta.sim, beta.control, f'link = "127.0.0.1:{sites.port}"\n')
    )
    (place / "groups" / "web.toml").write_text(
        'name = "web"\nsource = "alpha"\nrecovery = "beta"\nmachines = ["web"]\ncheckpoint_interval = "1h"\n'
        'ring_size = "16 MiB"\n[networks]\n"VM Network" = "VM Network"\n'
    )

    def drctl(*words: str, code: int = 0) -> str:
        found = run([*words, "--config", str(place)])
        told = capsys.readouterr()
        assert found == code, told
        return told.out

    return drctl


def test_the_main_job(sites: Sites, beta: Beta, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drctl = command(tmp_path, sites, beta, capsys)
    drctl("apply", "--yes")
    drctl("replicate", "start", "web", "--yes", "--wait", "--timeout", "300s")
    serial = sites.sim.hostd.guests[1].serial
    until(lambda: serial.exists() and serial.read_bytes().count(b".") >= 5)
    said = serial.read_bytes().count(b".")
    drctl("checkpoint", "create", "web")
    assert "began at" in drctl("status", "web")
    assert "web: 1 warning\n  warning: " in drctl("plan", "validate", "web")  # that it was never drilled

    test = json.loads(drctl("test", "start", "web", "--yes", "--output", "json"))["recovery"]
    name = f"web-test-{test['id']}"
    until(lambda: beta.dots(name) >= 3)
    assert newest(beta.image(name)) >= said
    drctl("test", "stop", test["id"], "--yes")
    assert not beta.sim.hostd.vms

    drctl("plan", "run", "web", "--mode", "test", "--yes")
    assert "web: ok" in drctl("plan", "validate", "web")
    assert not beta.sim.hostd.vms

    failover = ["failover", "web", "--source-is-down", "drill", "--confirm", "web", "--yes", "--output", "json"]
    assert json.loads(drctl(*failover))["recovery"]["state"] == "running"
    until(lambda: beta.dots("web") >= 3)
    assert newest(beta.image("web")) >= said
    assert [vm.vmx.parts[-6] for vm in beta.sim.hostd.vms.values()] == [beta.sim.hostd.datastores[1].uuid]
    until(lambda: sites.status()["phase"] == "failed-over")
    until(lambda: not sites.snapshots())

    beta.kill()
    beta.start()
    drctl("rollback", "web", "--yes")
    assert not beta.sim.hostd.vms
    until(lambda: sites.status()["phase"] == "live", 180)
    drctl("checkpoint", "create", "web")

    drctl(*failover)
    drctl("commit", "web", "--yes")
    until(lambda: beta.dots("web") >= 3)
    assert [vm.power for vm in beta.sim.hostd.vms.values()] == ["on"]
    refused = run(["failback", "web", "--yes", "--config", str(tmp_path)])
    told = capsys.readouterr()
    assert refused == 14, told
    assert "can't be made by this version" in told.err


def test_an_appliance_that_is_killed_while_it_copies_goes_on(
    sites: Sites, beta: Beta, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its failover is taken up by the next, and ends with one machine."""
    drctl = command(tmp_path, sites, beta, capsys)
    drctl("apply", "--yes")
    drctl("replicate", "start", "web", "--yes", "--wait", "--timeout", "300s")
    beta.sim.hostd.delays["vmkfstools"] = 2.0
    store = beta.sim.hostd.real("/vmfs/volumes/fast [1]")

    def kill() -> None:
        until(lambda: list(store.rglob("*.part.vmdk")), 120)
        beta.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DrctlError):
        beta.call("failover.run", group="web", source_is_down="drill", confirmed=True)
    killer.join()
    beta.sim.hostd.delays.clear()
    beta.start()
    until(lambda: beta.dots("web") >= 3, 180)
    assert [vm.name for vm in beta.sim.hostd.vms.values()] == ["web"]
    assert beta.call("group.status", group="web")["recoveries"][0]["state"] == "running"
