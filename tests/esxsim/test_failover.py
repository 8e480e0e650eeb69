"""The main job by the command line: a guest that runs on a simulated ESX host, recovered on a real libvirtd and QEMU."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drctl.appliance.client import Client
from drctl.appliance.esx import address as esx_address
from drctl.cli.app import run
from drctl.errors import DrctlError
from tests.esxsim import guest
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, EsxSim
from tests.esxsim.sites import RECOVERY, SOURCE, Sites, until
from tests.integration.libvirt_rig import Libvirtd, libvirt_missing

if reason := simulator.lacking() or guest.lacking() or libvirt_missing():
    pytest.skip(f"needs {reason}", allow_module_level=True)
pytestmark = [
    pytest.mark.lab,
    pytest.mark.long,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.getuid() != 0, reason="a libvirtd of another user is made by root"),
]


class Recovery:
    """`beta`: libvirtd and an appliance as `nobody`."""

    def __init__(self, sites: Sites) -> None:
        self.libvirt = Libvirtd()
        self.short = Path(tempfile.mkdtemp(prefix="eb-", dir="/tmp"))
        self.home = self.short / "home"
        shutil.copytree(sites.store.parent / "tls", self.home / "tls")
        (self.home / "appliance.toml").write_text(
            f'site = "beta"\nhost = "beta1"\nuri = "{self.libvirt.uri}"\nlink = "127.0.0.1:{sites.port}"\n'
            f'uuid = "{RECOVERY}"\nrun = "{self.short}/r"\n'
            f'[[peer]]\nsite = "alpha"\nhost = "esx1"\nlink = "127.0.0.1:1"\nuuid = "{SOURCE}"\n'
        )
        nobody = pwd.getpwnam("nobody")
        subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", str(self.short)], check=True)
        self._log = (self.libvirt.directory / "appliance.log").open("wb")
        argv = [sys.executable, "-m", "drctl.appliance.daemon", "--home", str(self.home)]
        self._process = subprocess.Popen(
            argv, stdout=self._log, stderr=self._log, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd="/"
        )
        until(self._answers)

    @property
    def control(self) -> str:
        return f"unix:{self.short}/r/control.sock"

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.libvirt.directory / "appliance.log").read_text()
        try:
            return bool(self.call("appliance.info"))
        except DrctlError:
            return False

    def call(self, method: str, **params: Any) -> Any:
        return Client(self.control).call(method, params, timeout=60)

    def dots(self, recovery: str) -> int:
        """What the recovered guest has said on its serial port."""
        return str(self.call("recovery.console", recovery=recovery, machine="web")["text"]).count(".")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        from drctl.appliance.process import Processes

        processes = Processes(self.short / "r" / "pids", self.home / "logs")
        for name in processes.names():
            processes.end(name, force=True)
        self._log.close()
        self.libvirt.close()
        shutil.rmtree(self.short, ignore_errors=True)


@pytest.fixture
def sites() -> Iterator[Sites]:
    sim = EsxSim()
    port = {"serial0__present": "TRUE", "serial0__fileType": "file", "serial0__fileName": "serial.log"}
    vm = sim.add_vm("web", (MIB,), guestos="other", **port)
    sim.write(vm, 0, guest.boot_sector().ljust(MIB, b"\0"))
    sim.hostd.boots = True
    assert sim.run("vim-cmd", "vmsvc/power.on", "1")[0] == 0
    one = Sites(sim)
    sim.start()
    one.start_process(esx_address.render(sim.login(), "qemu"))
    yield one
    one.close()
    sim.close()


@pytest.fixture
def beta(sites: Sites) -> Iterator[Recovery]:
    one = Recovery(sites)
    yield one
    one.close()


def test_the_main_job(sites: Sites, beta: Recovery, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    login = sites.sim.login()
    (tmp_path / "groups").mkdir()
    (tmp_path / "drctl.toml").write_text(
        f'[[site]]\nname = "alpha"\n[[site]]\nname = "beta"\n'
        f'[[host]]\nname = "esx1"\nsite = "alpha"\nkind = "esx"\nssh = "{login.user}@127.0.0.1:{sites.sim.port}"\n'
        f'ssh_identity = "{login.identity}"\nssh_known_hosts = "{login.known_hosts}"\n'
        f'appliance = "local"\ncontrol = "unix:{sites.short}/r/control.sock"\n'
        f'[[host]]\nname = "beta1"\nsite = "beta"\ncontrol = "{beta.control}"\nlink = "127.0.0.1:{sites.port}"\n'
    )
    (tmp_path / "groups" / "web.toml").write_text(
        'name = "web"\nsource = "alpha"\nrecovery = "beta"\nmachines = ["web"]\ncheckpoint_interval = "1h"\nring_size = "16 MiB"\n'
    )

    def drctl(*words: str, code: int = 0) -> str:
        found = run([*words, "--config", str(tmp_path)])
        told = capsys.readouterr()
        assert found == code, told
        return told.out

    assert "running" in drctl("host", "list")
    drctl("apply", "--yes")
    drctl("replicate", "start", "web", "--yes", "--wait", "--timeout", "60s")
    serial = sites.sim.hostd.guests[1].serial
    until(lambda: serial.exists() and serial.read_bytes().count(b".") >= 5)
    drctl("checkpoint", "create", "web")
    status = json.loads(drctl("status", "web", "--output", "json"))
    assert status["groups"][0]["phase"] == "live"
    assert len(json.loads(drctl("checkpoint", "list", "web", "--output", "json"))["checkpoints"]) == 2

    test = json.loads(drctl("test", "start", "web", "--yes", "--output", "json"))
    identity = test["recovery"]["id"] if "recovery" in test else test["id"]
    until(lambda: beta.dots(identity) >= 3)
    drctl("test", "stop", identity, "--yes")

    drctl("replicate", "pause", "web", "--yes")
    assert len(sites.snapshots()) == 1
    drctl("replicate", "resume", "web", "--yes", "--wait", "--timeout", "60s")

    failover = ["failover", "web", "--source-is-down", "drill", "--confirm", "web", "--yes", "--output", "json"]
    done = json.loads(drctl(*failover))
    identity = done["recovery"]["id"] if "recovery" in done else done["id"]
    until(lambda: beta.dots(identity) >= 3)
    until(lambda: sites.status()["phase"] == "failed-over")
    until(lambda: not sites.snapshots())
    until(lambda: sites.status()["strays"] == ["web"])
    assert sites.status()["reason"].startswith("superseded")
    assert run(["replicate", "start", "web", "--yes", "--config", str(tmp_path)]) == 14
    capsys.readouterr()

    drctl("rollback", "web", "--yes")
    until(lambda: sites.status()["phase"] == "live")
    told = sites.status()
    assert told["generation"] == 3
    assert len(sites.snapshots()) == 1
    drctl("checkpoint", "create", "web")
