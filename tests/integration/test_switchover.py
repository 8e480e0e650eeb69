"""Switchover, rollback and failover between two real sites, given as an operator gives them, judged by the witness.

web-1 runs without ACPI, and no agent: it hears no power button, as a guest that hangs. The tests go from one to the next."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import ExitStack, closing

import pytest

from drctl.lab import layout, process
from drctl.lab.disk import FileDisk
from drctl.lab.judge import judge, loss
from drctl.store.group_store import GroupStore
from tests.integration.fault_rig import GROUP, protect

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
long = pytest.mark.long
MIB = 2**20
UP = 300.0
SUSPEND = ("--shutdown-timeout", "25s", "--on-shutdown-timeout", "suspend")


class Sites:
    """The protected lab, and a command line for it."""

    def __init__(self, faults):
        self.faults, self.rig = faults, faults.rig

    def drctl(self, *arguments, code=0):
        """(stdout, stderr) of a command."""
        command = [sys.executable, "-m", "drctl.cli", "--config", str(self.rig.directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    def recovery(self):
        return self.faults.call("beta", "group.status")

    def states(self, site):
        return {guest: self.rig.state(site, guest) for guest in self.rig.guests()}

    def write_more(self, site, count=5):
        for guest in self.rig.guests():
            self.rig.observer.await_more(guest, site, count, timeout=UP)

    def boot(self, site, after_ns):
        for guest in self.rig.guests():
            self.rig.observer.await_up(guest, site, after_ns=after_ns, timeout=UP)

    def store(self):
        return closing(GroupStore.open(self.faults.beta.home / "store" / GROUP))


def deafen(rig, guest):
    """Take ACPI and agent from a guest, and boot it again."""
    rig.virsh("alpha", "destroy", guest)
    root = ET.fromstring(rig.virsh("alpha", "dumpxml", "--inactive", guest))
    root.find("features").remove(root.find("features/acpi"))
    # An agent would halt it: then it would neither write nor power off.
    agent = root.find("devices/channel/target[@name='org.qemu.guest_agent.0']/..")
    root.find("devices").remove(agent)
    path = rig.directory / f"{guest}.deaf.xml"
    path.write_text(ET.tostring(root, encoding="unicode"))
    path.chmod(0o644)
    rig.virsh("alpha", "define", str(path))
    begun = time.time_ns()
    rig.virsh("alpha", "start", guest)
    rig.observer.await_up(guest, "alpha", after_ns=begun, timeout=UP)


@pytest.fixture(scope="module")
def sites(make_lab):
    rig = make_lab(guests=2, rate=20, slots=256)
    deafen(rig, "web-1")
    faults = protect(rig)
    yield Sites(faults)
    faults.close()


@pytest.mark.long
def test_a_guest_that_stays_on_calls_the_switchover_off(sites):
    pid = sites.faults.qemu_pid("web-1")
    begun = time.time_ns()
    _, said = sites.drctl("switchover", GROUP, "--shutdown-timeout", "25s", "--yes", code=40)
    assert "web-1 did not power off within 25 s; the switchover was called off" in said
    assert sites.faults.qemu_pid("web-1") == pid
    assert sites.states("alpha") == {"web-1": "running", "web-2": "running"}
    sites.rig.observer.await_up("web-2", "alpha", after_ns=begun, timeout=UP)
    sites.faults.await_live(120)
    assert sites.recovery()["mode"] == "journal"
    sites.write_more("alpha")


def test_a_failover_beside_a_source_that_runs_is_refused(sites):
    _, said = sites.drctl("failover", GROUP, code=15)
    assert "web-1, web-2 run there" in said
    assert sites.recovery()["mode"] == "journal"


def final_images(sites, number):
    """The source's own disks and the final checkpoint's are compared byte by byte; the judge's word on the latter."""
    with sites.store() as store, closing(store.open_view(number)) as view, ExitStack() as stack:
        machines = {}
        for guest in sites.rig.guests():
            for path, target in zip(sites.rig.images(guest), ("vda", "vdb"), strict=True):
                source = stack.enter_context(FileDisk(path))
                there = view.disk(f"{guest}.{target}")
                assert source.size == there.size
                for offset in range(0, source.size, MIB):
                    assert source.read(offset, MIB) == bytes(there.read(offset, MIB)), f"{path}+{offset} differs"
                machines.setdefault(guest, []).append(there)
        return judge(machines, payload=True)


def test_a_switchover_loses_nothing(sites):
    """The last thing that any guest was told is on the disks that it finds at the other site."""
    sites.faults.await_live(120)
    begun = time.time_ns()
    told, said = sites.drctl("switchover", GROUP, *SUSPEND, "--yes", "-o", "json")
    moment = time.time_ns()
    document = json.loads(told)
    assert (document["loss_seconds"], document["recovery"]["state"]) == (0.0, "running")
    assert "loss: none" in said
    assert sites.states("alpha") == {"web-1": "shut off", "web-2": "shut off"}
    assert sites.faults.status()["phase"] == "failed-over"
    verdict = final_images(sites, document["recovery"]["checkpoint"]["number"])
    assert verdict.true_prefix, str(verdict)
    for guest, lost in loss(verdict, sites.rig.observer.logs("alpha"), moment).items():
        assert set(lost.missing) == {0}, f"{guest} lost {lost}"
    sites.boot("beta", begun)
    sites.write_more("beta")
    again, said = sites.drctl("switchover", GROUP, "--yes", "-o", "json")
    assert json.loads(again)["recovery"]["id"] == document["recovery"]["id"]
    assert "runs at beta" in said


@long
def test_its_rollback_brings_it_home(sites):
    sites.drctl("switchover", GROUP, *SUSPEND, "--yes")  # where it runs there already this does nothing
    begun = time.time_ns()
    told, _ = sites.drctl("rollback", GROUP, "--yes", "-o", "json")
    document = json.loads(told)
    assert document["generation"] == 3
    assert all(layer["written_bytes"] > 0 for layer in document["kept"])
    assert sites.rig.virsh("beta", "list", "--all", "--name").split() == []
    assert sites.states("alpha") == {"web-1": "running", "web-2": "running"}
    sites.boot("alpha", begun)
    sites.faults.await_live(180)
    assert sites.faults.status()["generation"] == 3
    sites.write_more("alpha")
    sites.faults.await_live(120)
    assert sites.faults.judge_listed(since=begun / 1e9, most=3) > 0


def cut_off(sites):
    """Nothing of alpha answers or sends any more."""
    for what in ("shipper", "tap"):
        sites.faults.kill("supervisor" if what == "shipper" else what)
        if what == "shipper":
            sites.faults.kill(what)
    for guest in sites.rig.guests():
        sites.rig.virsh("alpha", "destroy", guest)


@long
def test_failover_rollback_and_failover_again_to_an_older_checkpoint(sites):
    older = sites.faults.checkpoints()[-1]["number"]
    sites.faults.await_live(120)
    cut_off(sites)
    order = ("--source-is-down", "fire", "--confirm", GROUP, "-o", "json")
    first = json.loads(sites.drctl("failover", GROUP, *order)[0])["recovery"]
    assert first["checkpoint"]["number"] > older
    _, said = sites.drctl("rollback", GROUP, "--yes")
    assert "afterwards the group runs nowhere" in said
    assert sites.rig.virsh("beta", "list", "--all", "--name").split() == []
    assert sites.recovery()["mode"] == "journal"
    begun = time.time_ns()
    told = sites.drctl("failover", GROUP, "--checkpoint", f"#{older}", *order)[0]
    again = json.loads(told)["recovery"]
    assert (again["checkpoint"]["number"], again["generation"]) == (older, first["generation"] + 2)
    sites.boot("beta", begun)
    sites.write_more("beta")


@long
def test_rolled_back_by_the_clock_with_nobody_there(sites):
    sites.drctl("rollback", GROUP, "--yes")
    order = ("--source-is-down", "fire", "--confirm", GROUP, "--auto", "rollback", "--after", "10s", "-o", "json")
    sites.drctl("failover", GROUP, *order)
    assert "rollback in " in sites.drctl("status", GROUP, code=3)[0]
    state = layout.load(sites.rig.directory)
    process.stop([state.process("beta/appliance")])
    sites.faults.up()
    sites.faults.await_(lambda: sites.recovery()["mode"] == "journal", "rolled back by the clock", 60)
    assert sites.rig.virsh("beta", "list", "--all", "--name").split() == []
