"""Tests, failovers and commits on a real libvirtd and QEMU, with a real store and view servers.

libvirtd in session mode needs an unprivileged user: run by root, one test runs this file again as `nobody`."""

from __future__ import annotations

import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from drctl.model.extent import KiB, MiB
from drctl.model.group import GroupDisk
from drctl.model.machine import MachineState

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(shutil.which("libvirtd") is None, reason="libvirtd is absent"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is absent"),
]
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only to leave root")
as_user = pytest.mark.skipif(os.getuid() == 0, reason="runs as nobody, in a process of its own")

#: A boot sector that reads the disk from end to end, 32 KiB at a time through INT 13h, over and over. After each 8 reads
#: it halts until the next timer interrupt, after each 32 it writes sector 1 and says `.` on the serial port; after any
#: error it says `E`.
#:     again: mov si,dap; mov ah,42h; mov dl,[drive]; int 13h; mov al,'E'; jc say; add dword [lba],64
#:            and dword [lba],1FFFFh; inc byte [count]; test byte [count],7; jnz again; hlt
#:            test byte [count],31; jnz again; mov si,dap2; mov ax,4300h; mov dl,[drive]; int 13h; …
BOOT_SECTOR = (
    bytes.fromhex(
        "fa31c08ed88ed0bc007cfb8816587cbe5a7cb4428a16587ccd13b0457234668306627c40668126627cffff0100fe06597cf606597c07"
        "75d7f4f606597c1f75cfbe6a7cb800438a16587ccd13b0577202b02ebaf803eeebb7000010004000000000100000000000000000100001000000001001"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
ROOT = Path(__file__).parents[2]
SIZE = 64 * MiB
UUIDS = {"db": "00000000-0000-4000-8000-0000000000d1", "web": "00000000-0000-4000-8000-0000000000d2"}
SPEC = {"name": "erp", "source": "alpha", "recovery": "beta", "machines": ["db", "web"]}
FAILOVER = {"group": "erp", "source_is_down": "drill", "confirmed": "erp"}


@as_root
@pytest.mark.timeout(580)
def test_this_file_as_an_unprivileged_user():
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory(prefix="drctl-rt-") as name:
        os.chown(name, nobody.pw_uid, nobody.pw_gid)
        here = Path(name, "checkout")  # ours may lie where nobody can read, e.g. below /root
        shutil.copytree(ROOT / "tests", here / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", here)
        file = here / Path(__file__).relative_to(ROOT)
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={name}/t", str(file)]
        done = subprocess.run(
            [*argv, "--timeout=180"],
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            env={"PATH": os.environ["PATH"], "HOME": name, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class Host:
    """A recovery host: libvirtd, an appliance's directories, a store of two machines and three disks."""

    def __init__(self):
        # Late, because root only needs the test above and none of this.
        from drctl.appliance.process import Processes
        from drctl.hypervisor.libvirt import LibvirtHypervisor
        from tests.integration.libvirt_rig import Libvirtd

        self.libvirtd = Libvirtd()
        self.home = self.libvirtd.directory / "a"
        self.run = self.libvirtd.directory / "r"
        for directory in (self.home / "logs", self.run / "pids", self.run / "views"):
            directory.mkdir(parents=True)
        self.hypervisor = LibvirtHypervisor(self.libvirtd.uri)
        self.processes = Processes(self.run / "pids", self.home / "logs")
        self.rig = self._store()
        self.supervising = threading.Event()
        self.new_supervisor()

    def _store(self):
        from tests.integration.libvirt_rig import definition
        from tests.integration.store_rig import StoreRig

        rng = random.Random(11)
        disks = [GroupDisk(1, "db", "vda", SIZE), GroupDisk(2, "db", "vdb", 8 * MiB), GroupDisk(3, "web", "vda", SIZE)]
        base = BOOT_SECTOR + bytes(512) + rng.randbytes(16 * MiB)
        rig = StoreRig(self.home / "store" / "erp", "erp", disks, {"db.vda": base, "web.vda": base})
        machines = []
        for name in ("db", "web"):
            images = {d.target: Path(f"/source/{name}.{d.target}.raw") for d in disks if d.machine == name}
            serial = f"<serial type='file'><source path='/source/{name}.log'/></serial>"
            cdrom = (
                "<disk type='file' device='cdrom'><source file='/source/x.iso'/><target dev='sda' bus='sata'/></disk>"
            )
            xml = definition(name, images, extra=serial + (cdrom if name == "db" else ""))
            xml = xml.replace("</name>", f"</name><uuid>{UUIDS[name]}</uuid>")
            machines.append({"name": name, "uuid": UUIDS[name], "definition": xml, "files": {}})
        rig.define(machines, SPEC)
        rig.write("db.vdb", MiB, rng.randbytes(2 * MiB))
        rig.write("web.vda", 20 * MiB, rng.randbytes(3 * MiB))
        rig.mark()
        return rig

    def new_supervisor(self):
        from drctl.appliance.recovery.host import open_recovery

        self.recovery = open_recovery(self.home, self.run, self.hypervisor, self.processes)
        self.recovery.resume()

    def supervise(self):
        """What the appliance's supervisor does each 250 ms, in a thread until the host is closed."""

        def loop():
            while not self.supervising.wait(0.25):
                self.recovery.supervise()

        self._thread = threading.Thread(target=loop)
        self._thread.start()

    def do(self, method, **params):
        reigns = self.recovery.reigns
        moves = {"failover_plan": reigns.plan, "failover_run": reigns.failover, "commit": reigns.commit}
        return (moves.get(method) or getattr(self.recovery, method))(params, lambda _: None)

    def running(self):
        return {m.name for m in self.hypervisor.machines() if m.state is MachineState.RUNNING}

    def said(self, path):
        return path.read_text() if path.exists() else ""

    def wait(self, condition, seconds=60.0, what=""):
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < seconds, f"{what}: {self.logs()}"
            time.sleep(0.02)
        return time.monotonic() - begin

    def logs(self):
        return "\n".join(path.read_text()[-1500:] for path in (self.home / "logs").glob("*.log"))

    def close(self):
        self.supervising.set()
        if hasattr(self, "_thread"):
            self._thread.join()
        self.recovery.close()
        for thread in threading.enumerate():
            if thread.name.startswith(("view-", "end-", "resume-")):
                thread.join(30)
        for machine in self.hypervisor.machines():
            self.hypervisor.destroy(machine.name)
        for name in self.processes.names():
            self.processes.end(name)
        for popen in self.processes._started.values():
            popen.wait(10)
        self.hypervisor.close()
        self.rig.close()
        self.libvirtd.close()


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


@as_user
def test_a_test_boots_cut_off_reads_and_writes_and_leaves_nothing(host):
    result = host.do("test_start", group="erp")
    assert result["exit_code"] == 0, result
    assert host.running() == {f"db-test-{result['id']}", f"web-test-{result['id']}"}
    assert any("cdrom" in note for note in result["machines"][0]["notes"])
    scratch = host.home / "scratch" / result["id"]
    for name in ("db", "web"):
        host.wait(lambda name=name: "." in host.said(scratch / f"{name}.{name}.log"), what=f"{name} reads")
        assert "E" not in host.said(scratch / f"{name}.{name}.log")
    assert len(list(scratch.glob("*.qcow2"))) == 3
    live = host.hypervisor.live_definition(f"web-test-{result['id']}")
    assert UUIDS["web"] not in live
    assert "rerror_policy='stop'" in live
    assert host.rig.store.pins().keys() == {result["id"]}
    host.rig.write("web.vda", 0, bytes(4096))
    host.rig.mark()  # replication goes on beside it
    assert host.do("test_stop", id=result["id"])["removed"]
    assert host.running() == set()
    assert not scratch.exists()
    assert host.rig.store.pins() == {}
    assert host.processes.names() == []
    assert list((host.run / "views").iterdir()) == []
    assert host.rig.store.info.generation == 1


@as_user
def test_guests_wait_for_a_killed_view_server_and_see_no_error(host):
    result = host.do("test_start", group="erp", machines=["web"])
    name = f"web-test-{result['id']}"
    serial = host.home / "scratch" / result["id"] / "web.web.log"
    host.wait(lambda: "." in host.said(serial), what="reads")
    host.supervise()
    for _ in range(3):
        child = host.processes.find(f"view-{result['id']}")
        before = len(host.said(serial))
        killed = time.monotonic()
        os.kill(child.pid, signal.SIGKILL)
        host.wait(lambda: host.hypervisor.state(name) is MachineState.PAUSED, 10, "pause")
        host.wait(lambda: host.hypervisor.state(name) is MachineState.RUNNING, 10, "resume")
        back = time.monotonic() - killed
        host.wait(lambda before=before: len(host.said(serial)) > before + 1, what="reads again")
        # 2 s is the aim on an idle machine; this one may be shared by other tests.
        print(f"back after {back:.2f} s at load {os.getloadavg()[0]:.1f}")
        assert back < 2.0 * max(1.0, os.getloadavg()[0] / 2)
    assert "E" not in host.said(serial)
    (listed,) = host.do("test_list", group="erp")
    assert listed["view_restarts"] == 3
    assert listed["machines"][0]["stalls"] >= 3


@as_user
def test_a_hung_view_server_is_found_and_replaced(host):
    result = host.do("test_start", group="erp", machines=["web"])
    serial = host.home / "scratch" / result["id"] / "web.web.log"
    host.wait(lambda: "." in host.said(serial), what="reads")
    host.supervise()
    time.sleep(1.5)
    child = host.processes.find(f"view-{result['id']}")
    os.kill(child.pid, signal.SIGSTOP)
    host.wait(lambda: (found := host.processes.find(f"view-{result['id']}")) and found.pid != child.pid, 30, "restart")
    before = len(host.said(serial))
    host.wait(lambda: len(host.said(serial)) > before + 1, what="reads again")
    assert "E" not in host.said(serial)


@as_user
def test_failover_then_commit_leaves_standalone_disks_that_boot_again(host):
    plan = host.do("failover_plan", group="erp")
    assert [f for f in plan["findings"] if f["severity"] == "error"] == []
    assert plan["space"]["commit_bytes"] > 30 * MiB
    result = host.do("failover_run", **FAILOVER)
    assert result["exit_code"] == 0, result
    assert result["rto_seconds"] < 30
    assert host.running() == {"db", "web"}
    assert host.hypervisor.machine("web").uuid == UUIDS["web"]
    assert host.rig.store.info.mode == "failed-over"
    assert host.rig.store.info.generation == 2
    with pytest.raises(Exception, match="failed over"):
        host.rig.write("web.vda", 0, bytes(4096))
    host.supervise()
    serial = host.home / "images" / "erp" / "web.web.log"
    host.wait(lambda: "." in host.said(serial), what="reads")
    told = []
    committed = host.recovery.reigns.commit({"group": "erp"}, told.append)
    assert committed["state"] == "committed"
    assert {t["disk"] for t in told} == {"vda", "vdb"}
    assert host.running() == {"db", "web"}
    before = len(host.said(serial))
    host.wait(lambda: len(host.said(serial)) > before + 1, what="reads on")
    assert host.processes.names() == []
    assert host.rig.store.pins() == {}
    for name in ("db", "web"):
        assert "E" not in host.said(host.home / "images" / "erp" / f"{name}.{name}.log")
        host.hypervisor.destroy(name)
    _compare(host)
    before = len(host.said(serial))
    host.hypervisor.start("web")
    host.wait(lambda: "." in host.said(serial)[before:] or "." in host.said(serial), what="boots without the view")


@as_user
def test_a_staged_failover_boots_one_by_one_as_it_was_ordered(host):
    changes = {"db": {"memory": 48 * MiB, "new_macs": True}}
    result = host.do("failover_run", **FAILOVER, staged=True, changes=changes)
    assert (result["state"], host.running()) == ("staged", set()), result
    assert {machine.name for machine in host.hypervisor.machines()} == {"db", "web"}, "defined"
    assert f"<memory unit='KiB'>{48 * 1024}</memory>" in host.hypervisor.definition("db")
    of_db = {"recovery": result["id"], "machine": "db"}
    with pytest.raises(Exception, match="does not run"):
        host.recovery.guests.console(of_db, print)
    assert host.do("boot", recovery=result["id"], machines=["db"])["state"] == "staged"
    assert host.running() == {"db"}
    host.wait(lambda: "." in host.recovery.guests.console(of_db, print)["text"], what="its console says so")
    assert host.do("boot", recovery=result["id"], machines=["web"])["state"] == "running"
    assert host.running() == {"db", "web"}
    host.supervise()
    assert host.do("commit", group="erp")["state"] == "committed"


@as_user
def test_a_staged_test_leaves_nothing_of_what_was_held(host):
    result = host.do("test_start", group="erp", staged=True)
    assert (result["state"], host.running()) == ("staged", set())
    host.do("boot", recovery=result["id"], machines=["web"])
    assert host.running() == {f"web-test-{result['id']}"}
    assert host.do("test_stop", id=result["id"])["removed"]
    assert host.running() == set()
    assert not (host.home / "scratch" / result["id"]).exists()
    assert host.rig.store.pins() == {}


def _compare(host):
    """Every byte is the checkpoint's, but for sector 1, which the boot sector writes."""
    for name, image in host.rig.marks[1].items():
        overlay = host.home / "images" / "erp" / f"{name}-g2.qcow2"
        info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(overlay)]))
        assert "backing-filename" not in info
        out = host.home / "out.raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(overlay), str(out)], check=True)
        data = out.read_bytes()
        assert data[:512] + data[1024:] == image[:512] + image[1024:]


@as_user
def test_a_new_supervisor_adopts_and_one_killed_during_commit_goes_on(host):
    host.do("failover_run", **FAILOVER)
    views = host.processes.names()
    host.recovery.close()
    host.new_supervisor()
    assert host.processes.names() == views
    assert host.running() == {"db", "web"}

    class Died(BaseException):
        pass

    def die(report):
        if report["done_bytes"] >= report["total_bytes"]:
            raise Died

    with pytest.raises(Died):
        host.recovery.reigns.commit({"group": "erp"}, die)
    host.new_supervisor()
    host.wait(lambda: [r["state"] for r in host.recovery.recoveries("erp")] == ["committed"], 60, "commit goes on")
    for name in ("db", "web"):
        host.hypervisor.destroy(name)
    _compare(host)


@as_user
def test_a_test_that_writes_past_its_scratch_is_ended(host):
    # The guest's single sector makes a cluster of 64 KiB, and there is more of metadata.
    host.do("test_start", group="erp", machines=["web"], scratch_limit=64 * KiB)
    host.supervise()
    host.wait(lambda: host.do("test_list")[0]["state"] == "stopped", 20, "ended")
    assert "scratch is used up" in host.do("test_list")[0]["reason"]
    assert host.running() == set()
