"""A group on a simulated ESX host, replicated by its appliance over the real link into a real store."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from drctl.errors import DrctlError, HostUnreachable, Refused
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore
from tests.esxsim import guest
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, Door, EsxSim
from tests.esxsim.sites import Sites, until
from tests.esxsim.state import Vm
from tests.esxsim.test_guest import newest

if reason := simulator.lacking():
    pytest.skip(reason, allow_module_level=True)


class World:
    """Machines that write, and their replica. `states` are what their disks were when a checkpoint was ordered."""

    def __init__(self, *sizes: int, store: str = "VMFS-6", start: bool = True, ssh: bool = False) -> None:
        self.sim = EsxSim(stores=[("datastore1", store)])
        self.vms = [self.sim.add_vm(f"vm{n}", (size,), on=True) for n, size in enumerate(sizes)]
        self.sites = Sites(self.sim)
        self.chance = random.Random(3)
        self.states: dict[int, list[bytes]] = {}
        for vm in self.vms:
            self.scribble(vm)
        self.sites.start_receiver()
        if ssh:
            self.sim.start()
            self.sites.start_process()
        else:
            self.sites.start_appliance()
        if start:
            self.protect()

    @property
    def names(self) -> list[str]:
        return [vm.name for vm in self.vms]

    def protect(self) -> None:
        before = self.now()
        self.sites.protect(*self.names)
        self.sites.live()
        self.states[self.sites.checkpoints()[-1].number] = before

    def scribble(self, vm: Vm, count: int = 5) -> None:
        for _ in range(count):
            offset = self.chance.randrange(MIB // 512 - 8) * 512
            self.sim.write(vm, offset, self.chance.randbytes(512 * self.chance.randint(1, 8)))

    def now(self) -> list[bytes]:
        return [self.sim.read(vm) for vm in self.vms]

    def checkpoint(self, *tags: str) -> int:
        before = self.now()
        number = self.sites.checkpoint(*tags)
        self.states[number] = before
        return number

    def check(self) -> None:
        """Every checkpoint is what the machines had; each machine has one snapshot of ours."""
        for number, state in self.states.items():
            for vm, data in zip(self.vms, state, strict=True):
                assert self.sites.image(f"{vm.name}.sda", number) == data, (number, vm.name)
        assert len(self.sites.snapshots()) == len(self.vms)

    @property
    def remarks(self) -> list[str]:
        return list(self.sites.status()["cycle"]["remarks"])

    def close(self) -> None:
        self.sites.close()
        self.sim.close()


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def one(*sizes: int, **options: Any) -> World:
        made.append(World(*sizes, **options))
        return made[-1]

    yield one
    for each in made:
        each.close()


def test_each_cycle_is_a_checkpoint(make: Callable[..., World]) -> None:
    """Two machines go together; older checkpoints stay what they were; at the end nothing of ours is left."""
    began = time.time()
    world = make(MIB, 2 * MIB)
    for number in range(2):
        for vm in world.vms[: number + 1]:
            world.scribble(vm)
        world.checkpoint(f"t{number}")
    world.check()
    assert len([one for one in world.remarks if "read whole" in one]) == 2  # the first, of each disk
    told = world.sites.checkpoints()
    assert [one.tags for one in told][-2:] == [("t0",), ("t1",)]
    assert began <= told[0].time < told[-1].time <= time.time()
    status = world.sites.status()
    assert status["phase"] == "live"
    assert status["interval"] == 3600
    assert status["last_checkpoint"]["number"] == told[-1].number
    assert [disk["state"] for machine in status["machines"] for disk in machine["disks"]] == ["attached"] * 2
    assert world.sites.call("replicate.stop")["phase"] == "unprotected"
    assert world.sites.snapshots() == []


@pytest.mark.long
def test_what_is_written_meanwhile_is_in_the_next(make: Callable[..., World]) -> None:
    """The checkpoint's time is not later than its snapshot: RPO is told from what is in it."""
    world = make(MIB)
    real = world.sim.hostd.create_snapshot
    made: list[float] = []

    def noted(*words: object) -> None:
        made.append(time.time())
        real(*words)  # type: ignore[arg-type]
        world.scribble(world.vms[0], 1)

    world.sim.hostd.create_snapshot = noted  # type: ignore[method-assign]
    world.checkpoint()
    world.check()
    assert world.sites.checkpoints()[-1].time <= made[0]
    world.checkpoint()
    world.check()


@pytest.mark.long
def test_an_appliance_that_is_killed_goes_on(make: Callable[..., World]) -> None:
    """With its ring, and without: nothing is read whole again. A process of its own, and real SSH."""
    world = make(MIB, ssh=True)
    world.scribble(world.vms[0])
    world.sites.kill_process()
    world.sites.start_process()
    world.sites.live()
    world.checkpoint()
    epoch = world.sites.status()["epoch"]
    world.check()
    world.sites.call("replicate.pause")
    assert len(world.sites.snapshots()) == 1
    world.scribble(world.vms[0])
    before = world.now()
    world.sites.call("replicate.resume")
    world.sites.live()
    world.states[world.sites.checkpoints()[-1].number] = before
    world.check()
    assert world.sites.status()["epoch"] != epoch
    assert not [one for one in world.remarks if "read whole" in one]


@pytest.mark.long
def test_a_replica_that_is_lost_is_made_anew(make: Callable[..., World]) -> None:
    world = make(MIB)
    world.checkpoint()
    world.states.clear()
    world.sites.stop_receiver()
    world.scribble(world.vms[0])
    shutil.rmtree(world.sites.store / "web")
    spec = world.sites.spec(world.names)
    GroupStore.create(world.sites.store / "web", "web", 1, (), spec.retention).close()
    world.sites.start_receiver()
    until(lambda: world.sites.status()["link"]["state"] == "connected")
    before = world.now()
    with pytest.raises(DrctlError):
        world.checkpoint()
    world.sites.live()
    world.states[until(world.sites.checkpoints)[-1].number] = before
    world.checkpoint()
    world.check()


@pytest.mark.long
def test_the_other_site_is_away_in_the_middle(make: Callable[..., World]) -> None:
    """A cycle that has begun waits for it; while it is away none begins."""
    world = make(MIB)
    world.scribble(world.vms[0], 60)
    real = world.sim.hostd.create_snapshot

    def cut(*words: object) -> None:
        real(*words)  # type: ignore[arg-type]
        world.sites.stop_receiver()

    world.sim.hostd.create_snapshot = cut  # type: ignore[method-assign]
    before = world.now()
    world.sites.appliance._source.protections()[0]._due = 0.0  # type: ignore[union-attr]
    until(lambda: world.sites._receiver is None)
    world.sim.hostd.create_snapshot = real  # type: ignore[method-assign]
    count = len(world.sites.checkpoints())
    time.sleep(0.5)
    world.sites.start_receiver()
    until(lambda: len(world.sites.checkpoints()) > count)
    world.states[world.sites.checkpoints()[-1].number] = before
    world.sites.live()
    world.checkpoint()
    world.check()


@pytest.mark.parametrize(("base", "delta"), [(False, True), pytest.param(True, False, marks=pytest.mark.long)])
def test_where_frozen_layers_can_not_be_read(make: Callable[..., World], base: bool, delta: bool) -> None:
    """Facts 2 and 9: a clone is read, compared with the replica, and deleted."""
    world = make(MIB, start=False)
    world.sim.hostd.switches.raw_read_of_frozen_base = base
    world.sim.hostd.switches.raw_read_of_frozen_delta = delta
    world.protect()
    for _ in range(2):
        world.scribble(world.vms[0])
        world.checkpoint()
    world.check()
    assert [one for one in world.remarks if "a clone is read" in one]
    assert not list(world.vms[0].vmx.parent.glob("drctl.*"))


@pytest.mark.long
def test_a_datastore_that_fills_up_loses_our_snapshots(make: Callable[..., World]) -> None:
    world = make(MIB)
    (store,) = world.sim.hostd.datastores
    size, store.size = store.size, world.sim.hostd.used(store) + MIB
    with pytest.raises(DrctlError, match="nearly full"):
        world.checkpoint()
    assert world.sites.snapshots() == []
    store.size = size
    world.sites.appliance._source.protections()[0]._due = 0.0  # type: ignore[union-attr]
    world.scribble(world.vms[0])
    world.sites.live()
    world.checkpoint()
    world.check()


@pytest.mark.long
def test_machines_that_stand_still_are_left_in_peace(make: Callable[..., World]) -> None:
    """Twice as long between cycles while it lasts, up to a limit; back when it is over."""
    world = make(MIB)
    told = []
    for stun in (100_000, 7_000_000, 9_000_000, 200_000, 300_000):
        world.sim.hostd.stun = stun
        world.checkpoint()
        told.append((world.sites.status()["cycle"]["stun"], world.sites.status()["cycle"]["slower"]))
        if stun == 9_000_000:
            assert "4 intervals apart" in world.sites.status()["reason"]
    assert told == [(0.1, 1), (7.0, 2), (9.0, 4), (0.2, 2), (0.3, 1)]
    assert world.sites.status()["reason"] == ""
    assert "vm0 stood still for 7.0 s: cycles are 2 intervals apart" in world.remarks
    world.check()


@pytest.mark.long
def test_a_machine_that_is_gone_is_named(make: Callable[..., World]) -> None:
    world = make(MIB, MIB)
    vm = world.sim.hostd.vms.pop(2)
    with pytest.raises(DrctlError, match=r"no machine 'vm1' on esx1"):
        world.checkpoint()
    world.sim.hostd.vms[2] = vm
    world.sites.appliance._source.protections()[0]._due = 0.0  # type: ignore[union-attr]
    world.sites.live()
    world.checkpoint()
    world.check()


@pytest.mark.long
def test_after_a_failover_nothing_is_replicated(make: Callable[..., World]) -> None:
    """The other side reigns: snapshots are removed, the machine that still runs is a stray."""
    world = make(MIB)
    world.sites.stop_receiver()
    with closing(GroupStore.open(world.sites.store / "web", writer=True)) as store:
        store.set_generation(2)
        store.set_mode(StoreMode.FAILED_OVER)
    world.sites.start_receiver()
    until(lambda: world.sites.status()["phase"] == "failed-over")
    until(lambda: not world.sites.snapshots())
    until(lambda: world.sites.status()["strays"] == ["vm0"])
    with pytest.raises(Refused, match="reigns at the other site"):
        world.sites.call("replicate.start")


@pytest.mark.skipif(bool(guest.lacking()), reason=f"needs {guest.lacking()}")
def test_a_guest_that_runs_is_recovered(make: Callable[..., World], tmp_path: Path) -> None:
    """It writes all the time. Each checkpoint is a prefix of what it wrote, and holds all that it knew to be written;
    the newest one boots."""
    world = make(MIB, start=False)
    (vm,) = world.vms
    world.sim.run("vim-cmd", "vmsvc/power.off", "1")
    world.sim.write(vm, 0, guest.boot_sector().ljust(MIB, b"\0"))
    world.sim.hostd.boots = True
    assert world.sim.run("vim-cmd", "vmsvc/power.on", "1")[0] == 0
    serial = world.sim.hostd.guests[1].serial
    world.sites.protect(vm.name)
    world.sites.live()
    seen = 0
    for _ in range(2):
        until(lambda wanted=seen + 8: dots(serial) >= wanted)  # type: ignore[misc]
        before = dots(serial)
        number = world.sites.checkpoint()
        found = newest(world.sites.image("vm0.sda", number))
        assert seen < before <= found <= dots(serial) + 1 < 1000
        seen = found
    (tmp_path / "disk").write_bytes(world.sites.image("vm0.sda", number))
    argv = ["qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-vga", "none"]
    argv += ["-serial", f"file:{tmp_path}/serial", "-drive", f"if=none,id=d,file={tmp_path}/disk,format=raw"]
    with subprocess.Popen([*argv, "-device", "ide-hd,drive=d"]) as recovered:
        try:
            until(lambda: dots(tmp_path / "serial") >= 3)
        finally:
            recovered.kill()


def dots(serial: Path) -> int:
    """How many of its writes a guest knows to be done."""
    return serial.read_bytes().count(b".") if serial.exists() else 0


def cut(world: World, event: str, number: int) -> bool:
    """A cycle whose connection is lost at a command, and the next. False when there was no such command."""
    world.scribble(world.vms[0], 2)
    door = world.sites.door
    door.count, door.drop = 0, (event, number)
    before = world.now()
    count = len(world.sites.checkpoints())
    try:
        world.sites.checkpoint()
    except HostUnreachable:
        world.sites.appliance._source.protections()[0]._due = 0.0  # type: ignore[union-attr]
    reached = door.count >= number
    until(lambda: len(world.sites.checkpoints()) > count)
    door.drop = None
    world.sites.live()
    until(world.sites.is_quiet)
    world.states = {world.sites.checkpoints()[-1].number: before}
    world.check()
    return reached


@pytest.mark.parametrize("event", [pytest.param("begin", marks=pytest.mark.long), "end"])
def test_cut_here_and_there(make: Callable[..., World], event: str) -> None:
    """No orphan snapshot, no lost checkpoint."""
    world = make(MIB)
    number = 4 if event == "begin" else 9
    while cut(world, event, number):
        number += 11
    assert number > 15


@pytest.mark.long
@pytest.mark.parametrize("event", ["begin", "end"])
def test_cut_at_every_command(make: Callable[..., World], event: str) -> None:
    world = make(MIB, MIB)
    number = 1
    while cut(world, event, number):
        number += 1
    assert number > 15
    assert isinstance(world.sites.door, Door)
