"""Groups recovered on a simulated host: tests, failovers, commits and rollbacks by the same steps as on libvirt.

The disks that machines get there are judged byte by byte, and by qemu-img; a guest really boots from its own."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drctl.appliance.esx.datastore import safe
from drctl.appliance.esx.guests import EsxGuests
from drctl.appliance.esx.recovery_side import open_esx_recovery
from drctl.appliance.recovery.recoveries import Recovery
from drctl.appliance.recovery.state import LIVE
from drctl.errors import DrctlError, OutOfSpace, WrongPhase
from drctl.hypervisor.esx.host import EsxHost
from drctl.model.group import GroupDisk, GroupSpec
from drctl.model.machine import MachineState
from tests.esxsim import guest
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, Door, EsxSim
from tests.esxsim.sites import until
from tests.esxsim.state import Vm
from tests.integration.store_rig import EPOCH, StoreRig

if reason := simulator.lacking():
    pytest.skip(reason, allow_module_level=True)

DISKS = [GroupDisk(1, "web", "vda", 2 * MIB), GroupDisk(2, "db", "vda", MIB), GroupDisk(3, "db", "sdb", MIB)]
SPEC = GroupSpec("shop", "alpha", "beta", ("web", "db"), networks=(("lan", "VM Network"),))
UUIDS = {"web": "564d0000-0000-4000-8000-0000000000c1", "db": "564d0000-0000-4000-8000-0000000000c2"}
ORDER = {"group": "shop", "source_is_down": "drill", "confirmed": True}
OURS = "drctl-recovery"


def definition(name: str) -> str:
    disks = "".join(
        f"<disk type='file' device='disk'><source file='/x'/><target dev='{disk.target}' "
        f"bus='{'virtio' if disk.target.startswith('v') else 'sata'}'/></disk>"
        for disk in DISKS
        if disk.machine == name
    )
    card = "<interface type='network'><mac address='52:54:00:00:00:01'/><source network='lan'/></interface>"
    return (
        f"<domain type='kvm'><name>{name}</name><uuid>{UUIDS[name]}</uuid><memory unit='MiB'>64</memory>"
        f"<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{disks}{card}</devices></domain>"
    )


class World:
    """`beta`: an ESX host and the recoveries of its appliance, over a store that has two checkpoints."""

    def __init__(self, profile: str = "8.0U3") -> None:
        self.sim = EsxSim(profile)
        self.stranger = self.sim.add_vm("files", (MIB,), on=True)
        self.home = Path(tempfile.mkdtemp(prefix="esxrec-", dir="/var/tmp"))
        root = self.home / "store" / "shop"
        root.parent.mkdir()
        boot = guest.boot_sector() if not guest.lacking() else b"\xeb\xfe"
        rig = StoreRig(root, "shop", DISKS, {"web.vda": boot, "db.sdb": bytes(MIB - 512) + b"end" * 100})
        machines = [{"name": name, "uuid": UUIDS[name], "definition": definition(name)} for name in SPEC.machines]
        rig.define(machines, msgspec.to_builtins(SPEC))
        for number in range(2):
            rig.write("db.vda", 4096 * number, bytes([number + 1]) * 69632)
            rig.write("web.vda", MIB + 4096, bytes([number + 1]) * 512)
            rig.mark(kind="crash-consistent" if not number else "final")
        rig.close()
        self.marks = rig.marks
        self.recovery = self.open()

    def open(self, door: Door | None = None) -> Recovery:
        """An appliance's recoveries, as a new process would have them."""
        host = EsxHost("esx2", door or Door(self.sim), sleep=lambda _: None)
        return open_esx_recovery(self.home, self.home / "run", EsxGuests(host, sleep=lambda _: None))

    def test(self, recovery: Recovery | None = None, **more: Any) -> dict[str, Any]:
        return (recovery or self.recovery).test_start({"group": "shop", **more}, quietly)

    def failover(self, recovery: Recovery | None = None, **more: Any) -> dict[str, Any]:
        return (recovery or self.recovery).reigns.failover(ORDER | more, quietly)

    def vms(self) -> dict[str, Vm]:
        """All but the stranger."""
        found = {vm.name: vm for vm in self.sim.hostd.vms.values() if vm is not self.stranger}
        assert len(found) == len(self.sim.hostd.vms) - 1, "two machines of one name"
        return found

    def content(self, vm: Vm) -> dict[str, bytes]:
        """The machine's disks as a reader of VMDKs sees them, by the disk that they are of."""
        found = {}
        for name in vm.disks().values():
            raw = self.home / "raw"
            subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", str(vm.place(name)), str(raw)], check=True)
            found[".".join(name.split(".")[:2]).partition("-g")[0]] = raw.read_bytes()
        return found

    def judge(self, number: int) -> None:
        """Each machine runs, is registered once, and stands on the checkpoint's bytes."""
        found: dict[str, bytes] = {}
        for vm in self.vms().values():
            assert vm.power == "on"
            found |= self.content(vm)
        names = {vm.name.partition("-test-")[0] for vm in self.vms().values()}
        assert names
        assert found == {disk: data for disk, data in self.marks[number].items() if disk.split(".")[0] in names}

    def left(self) -> list[str]:
        """Files of ours on the datastore."""
        root = self.sim.hostd.real("/vmfs/volumes/datastore1") / OURS
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def close(self) -> None:
        self.recovery.close()
        self.sim.close()
        shutil.rmtree(self.home, ignore_errors=True)


def quietly(report: dict[str, Any]) -> None:
    del report


@pytest.fixture
def world() -> Iterator[World]:
    one = World()
    yield one
    assert one.stranger.power == "on"
    one.close()


def test_a_test_has_machines_of_its_own_and_leaves_nothing(world: World) -> None:
    told = world.test()
    assert told["exit_code"] == 0, told
    names = {f"{name}-test-{told['id']}" for name in ("web", "db")}
    assert set(world.vms()) == names
    world.judge(2)
    web = world.vms()[f"web-test-{told['id']}"]
    assert web.config["uuid.bios"] != UUIDS["web"]
    assert web.config["ethernet0.startconnected"] == "FALSE"
    assert web.config["displayname"].startswith("web-test-")
    assert world.recovery.test_stop({"id": told["id"]}, quietly)["removed"]
    assert world.vms() == {}
    assert world.left() == []
    assert not list((world.home / "copies").iterdir())


def test_a_failover_reigns_is_committed_and_stays(world: World) -> None:
    plan = world.recovery.reigns.plan({"group": "shop"}, quietly)
    assert [one for one in plan["findings"] if one["severity"] == "error"] == []
    told = world.failover(checkpoint="#1")
    assert told["exit_code"] == 0, told
    assert set(world.vms()) == {"web", "db"}
    world.judge(1)
    web = world.vms()["web"]
    assert web.config["uuid.bios"].replace(" ", "").replace("-", "") == UUIDS["web"].replace("-", "")
    assert web.config["ethernet0.networkname"] == "VM Network"
    assert web.question is None
    assert world.failover()["id"] == told["id"]
    assert world.recovery.reigns.commit({"group": "shop"}, quietly)["state"] == "committed"
    with pytest.raises(WrongPhase):
        world.recovery.reigns.rollback({"group": "shop"}, quietly)
    assert {vm.power for vm in world.vms().values()} == {"on"}


def test_a_rollback_forgets_the_machines_and_keeps_what_they_wrote(world: World) -> None:
    world.failover()
    done = world.recovery.reigns.rollback({"group": "shop"}, quietly)
    assert done["recovery"]["state"] == "rolled-back"
    assert world.vms() == {}
    assert len([name for name in world.left() if name.endswith("-flat.vmdk")]) == 3
    assert world.failover()["exit_code"] == 0
    assert {vm.vmx.parent.name for vm in world.vms().values()} == {"web-g4", "db-g4"}
    world.judge(2)
    world.recovery.reigns.rollback({"group": "shop"}, quietly)
    for record in world.recovery._works.records():
        record.times["rolled-back"] = 0.0
        world.recovery.reigns.expire(record)
    assert world.left() == []


def test_a_switchover_is_carried_out_at_the_final_checkpoint(world: World) -> None:
    order = {"group": "shop", "generation": 2, "number": 2, "epoch": EPOCH}
    told = world.recovery.reigns.switchover(order, quietly)
    assert (told["kind"], told["state"]) == ("switchover", "running")
    world.judge(2)
    assert world.recovery.reigns.commit({"group": "shop"}, quietly)["state"] == "committed"


def test_a_stranger_of_the_same_name_is_left_alone(world: World) -> None:
    other = world.sim.add_vm("web", (MIB,), folder="somebody's web", on=True)
    world.sim.write(other, 0, b"precious")
    plan = world.recovery.reigns.plan({"group": "shop"}, quietly)
    assert any("already" in one["message"] for one in plan["findings"])
    told = world.failover()
    assert told["exit_code"] == 3
    assert [m["reason"] for m in told["machines"] if m["state"] == "failed"] == [
        "the host has a machine named web already, with disks of its own"
    ]
    world.recovery.reigns.rollback({"group": "shop"}, quietly)
    assert other.power == "on"
    assert world.sim.read(other).startswith(b"precious")
    assert [vm.name for vm in world.sim.hostd.vms.values()] == ["files", "web"]


def test_a_full_datastore_is_told_before_anything_is_copied(world: World) -> None:
    world.sim.hostd.datastores[0].size = world.sim.hostd.used(world.sim.hostd.datastores[0]) + 100_000
    with pytest.raises(OutOfSpace):
        world.test()
    with pytest.raises(OutOfSpace):
        world.failover()
    assert world.left() == []
    assert world.vms() == {}
    plan = world.recovery.reigns.plan({"group": "shop"}, quietly)
    assert any("its disks take" in one["message"] for one in plan["findings"] if one["severity"] == "error")


def test_a_locked_disk_fails_one_machine_and_the_next_try_goes_on(world: World) -> None:
    root = world.sim.hostd.real("/vmfs/volumes/datastore1") / OURS / "groups/shop/db-g2"
    world.sim.hostd.held.add(root / "db.vda-g2-flat.vmdk")
    told = world.failover()
    assert told["exit_code"] == 3
    assert [m["name"] for m in told["machines"] if m["state"] == "failed"] == ["db"]
    world.sim.hostd.held.clear()
    assert world.failover()["exit_code"] == 0
    world.judge(2)


def test_what_the_host_lacks_is_told_before(world: World) -> None:
    world.sim.hostd.networks = {"Other": 0}
    world.sim.hostd.maintenance = True
    plan = world.recovery.reigns.plan({"group": "shop"}, quietly)
    errors = [one["message"] for one in plan["findings"] if one["severity"] == "error"]
    assert any("no port group 'VM Network'" in text for text in errors)
    assert any("maintenance mode" in text for text in errors)
    told = world.failover()
    assert told["exit_code"] == 40
    world.sim.hostd.maintenance = False
    assert world.failover()["exit_code"] == 0


def test_staged_machines_are_registered_and_off_until_told(world: World) -> None:
    told = world.failover(staged=True)
    assert told["state"] == "staged"
    assert {vm.power for vm in world.vms().values()} == {"off"}
    booted = world.recovery.boot({"recovery": told["id"], "machines": ["db"]}, quietly)
    assert booted["state"] == "staged"
    assert world.vms()["db"].power == "on"
    assert world.failover()["state"] == "running"
    world.judge(2)


@pytest.mark.skipif(bool(guest.lacking()), reason="a guest can't be booted here")
def test_the_guest_boots_from_its_checkpoint_and_writes_there(world: World) -> None:
    """Its dots come from a boot sector that only the replica has; what it wrote is kept by a rollback."""
    world.sim.hostd.boots = True
    told = world.test(machines=["web"])
    assert told["exit_code"] == 0
    until(lambda: _dots(world, f"web-test-{told['id']}") >= 3)
    world.recovery.test_stop({"id": told["id"]}, quietly)
    world.failover(machines=["web"])
    until(lambda: _dots(world, "web") >= 5)
    vm = world.vms()["web"]
    world.recovery.reigns.rollback({"group": "shop"}, quietly)
    image = world.content(vm)["web.vda"]
    assert image[MIB + 4096 : MIB + 4608] == bytes([2]) * 512
    assert int.from_bytes(image[65 * 512 : 65 * 512 + 4], "little") == 1


def _dots(world: World, name: str) -> int:
    serial = world.sim.hostd.guests[world.vms()[name].id].serial
    return serial.read_bytes().count(b".") if serial.exists() else 0


def test_names_of_files_are_plain_and_differ() -> None:
    names = ["a", "a/b", "a b", "a\nb", "-a", ".a", "ä", "x" * 99, "x" * 98, ""]
    made = [safe(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(name and not name.startswith((".", "-")) and name.isascii() and "/" not in name for name in made)


@pytest.mark.parametrize("profile", ["6.7", "7.0U3"])
def test_older_hosts(profile: str) -> None:
    world = World(profile)
    try:
        assert world.failover()["exit_code"] == 0
        world.judge(2)
        assert world.vms()["web"].config["virtualhw.version"] == {"6.7": "14", "7.0U3": "17"}[profile]
    finally:
        world.close()


# -- the connection is lost --------------------------------------------------------------------------------------------


def every_drop(act: Callable[[World, Recovery], None], check: Callable[[World], None]) -> None:
    """`act` with the connection lost at each of its commands, before and after its work; then again by a new process.

    One host for all: `check` ends with nothing of ours on it."""
    world = World()
    try:
        door = Door(world.sim)
        act(world, world.open(door))
        check(world)
        # Each fifth first, so that a run that is ended early has been everywhere.
        places = [number for first in range(1, 6) for number in range(first, door.count + 1, 5)]
        for number, event in itertools.product(places, ("begin", "end")):
            print(f"{event} of command {number} of {door.count}", flush=True)
            broken = Door(world.sim)
            broken.drop = (event, number)
            recovery = world.open(broken)
            with suppress(DrctlError):
                act(world, recovery)
            recovery.close()
            check(world)
        assert world.stranger.power == "on"
    finally:
        world.close()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_connection_lost_at_every_command_of_a_failover() -> None:
    """The next one goes on with it: each machine is registered once, on the checkpoint's bytes."""

    def act(world: World, recovery: Recovery) -> None:
        world.failover(recovery, machines=["web"])

    def check(world: World) -> None:
        again = world.open()
        for record in again._works.records():
            if record.phase in LIVE:
                again._works.adopt(record)
        assert world.failover(again, machines=["web"])["exit_code"] == 0
        assert set(world.vms()) == {"web"}
        world.judge(2)
        again.reigns.rollback({"group": "shop"}, quietly)
        assert world.vms() == {}
        for record in again._works.records():
            record.times["rolled-back"] = 0.0
            again.reigns.expire(record)
        assert world.left() == []

    every_drop(act, check)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_connection_lost_at_every_command_of_a_test_and_of_its_end() -> None:
    """Its end, given again, leaves nothing."""

    def act(world: World, recovery: Recovery) -> None:
        told = world.test(recovery, machines=["web"])
        recovery.test_stop({"id": told["id"]}, quietly)

    def check(world: World) -> None:
        again = world.open()
        for record in again._works.records():
            if record.phase.value != "ended":
                work = again._works.adopt(record)
                again.test_stop({"id": record.id}, quietly)
                assert work.record.phase.value == "ended"
        assert world.vms() == {}
        assert world.left() == []

    every_drop(act, check)


def test_a_rollback_that_loses_its_connection_is_given_again(world: World) -> None:
    world.failover()
    for number in range(1, 60):
        door = Door(world.sim)
        door.drop = ("end", number)
        recovery = world.open(door)
        for record in recovery._works.records():
            if record.phase in LIVE:
                recovery._works.adopt(record)
        try:
            recovery.reigns.rollback({"group": "shop"}, quietly)
            break
        except DrctlError:
            pass
    else:
        pytest.fail("it never ended")
    assert world.vms() == {}
    assert [one.state for one in world.open()._tools.hypervisor.machines()] == [MachineState.RUNNING]
