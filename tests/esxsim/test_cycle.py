"""The snapshot cycle on simulated hosts: what arrives is what the guest had; no snapshot is left, whatever is cut when."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from drctl.errors import HostUnreachable, HypervisorRefused
from drctl.hypervisor.esx.cycle import CycleState, DiskKey
from drctl.hypervisor.esx.disks import Disks
from drctl.hypervisor.esx.frozen import FrozenDisk
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.session import Runner
from drctl.hypervisor.esx.snapshots import Snapshots, owner
from drctl.hypervisor.esx.source import Parts, Source
from drctl.model.extent import Extent
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, Door, EsxSim
from tests.esxsim.state import Vm

if reason := simulator.lacking():
    pytest.skip(reason, allow_module_level=True)


@dataclass
class MemoryRecord:
    state: CycleState

    def load(self) -> CycleState:
        return self.state

    def save(self, state: CycleState) -> None:
        self.state = state


@dataclass
class Images:
    """Disks at the recovery site. What was not committed is not seen."""

    disks: dict[DiskKey, bytearray] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    sent: int = 0
    read_whole: set[DiskKey] = field(default_factory=set)

    @property
    def wholes(self) -> int:
        return len(self.read_whole)

    def begin(self, number: int, identity: str) -> None:
        self._staged = {disk: bytearray(data) for disk, data in self.disks.items()}
        self.sent, self.read_whole = 0, set()

    def whole(self, disks: Mapping[DiskKey, FrozenDisk]) -> None:
        for disk, frozen in disks.items():
            self._staged[disk] = bytearray(frozen.read(0, frozen.size))
            self.read_whole.add(disk)

    def write(self, disk: DiskKey, offset: int, data: bytes | memoryview) -> None:
        self._staged[disk][offset : offset + len(data)] = data
        self.sent += len(data)

    def zero(self, disk: DiskKey, extent: Extent) -> None:
        self._staged[disk][extent.offset : extent.end] = bytes(extent.length)

    def commit(self, number: int, taken: float) -> None:
        self.disks = self._staged
        self.checkpoints.append(number)


class World:
    """A host with machines that write, and a source that replicates them."""

    def __init__(self, *sizes: int, store: str = "VMFS-6") -> None:
        self.sim = EsxSim(stores=[("datastore1", store)])
        self.vms = [self.sim.add_vm(f"vm{n}", (size,), on=True) for n, size in enumerate(sizes)]
        self.record, self.images = MemoryRecord(CycleState("web")), Images()
        self.chance = random.Random(5)
        for vm in self.vms:
            self.scribble(vm)

    @property
    def paths(self) -> list[str]:
        return [self.sim.hostd.inside(vm.vmx) for vm in self.vms]

    def source(self, runner: Runner | None = None) -> Source:
        wait = threading.Event().wait
        host = EsxHost("esx1", runner or Door(self.sim), sleep=lambda _: wait(0.005) and None)
        parts = Parts(
            host,
            Snapshots(host, sleep=lambda _: wait(0.005) and None),
            Disks(host.session, sleep=lambda _: wait(0.005) and None),
        )
        return Source(parts, self.record, self.images)

    def scribble(self, vm: Vm, count: int = 5) -> None:
        size = 1 * MIB
        for _ in range(count):
            offset = self.chance.randrange(size // 512 - 8) * 512
            self.sim.write(vm, offset, self.chance.randbytes(512 * self.chance.randint(1, 8)))

    def cycle(self, runner: Runner | None = None) -> int:
        return self.source(runner).run(self.paths)

    def check(self) -> None:
        """The recovery site has what the guests have, and each machine one snapshot of ours."""
        for vm, path in zip(self.vms, self.paths, strict=True):
            assert bytes(self.images.disks[path, "scsi0:0"]) == self.sim.read(vm)
            ours = [one.name for one in vm.snapshots if owner(one.name)]
            assert len(ours) == 1
            layers = len(
                [path for path in vm.vmx.parent.glob("*.vmdk") if not path.name.endswith(("-flat.vmdk", "x.vmdk"))]
            )
            assert layers == 3 + 2 * (len(vm.snapshots) - 1) - 0, sorted(p.name for p in vm.vmx.parent.glob("*.vmdk"))

    def close(self) -> None:
        self.sim.close()


@pytest.fixture
def make() -> Iterator[type]:
    made: list[World] = []

    def one(*sizes: int, **options: str) -> World:
        made.append(World(*sizes, **options))
        return made[-1]

    yield one  # type: ignore[misc]
    for each in made:
        each.close()


@pytest.mark.parametrize("store", ["VMFS-6", "NFS"])
def test_cycle_after_cycle(make, store: str) -> None:
    """The first reads everything, the others what was written since; three machines go together."""
    world = make(MIB, MIB, 2 * MIB, store=store)
    assert world.cycle() == 1
    assert world.images.wholes == 3
    world.check()
    for number in range(2, 5):
        for vm in world.vms[:2]:
            world.scribble(vm)
        assert world.cycle() == number
        assert world.images.wholes == 0
        assert world.images.sent < 150_000
        world.check()
    world.source().stop()
    for vm in world.vms:
        assert vm.snapshots == []
        assert sorted(path.suffix for path in vm.vmx.parent.iterdir()) == [".vmdk", ".vmdk", ".vmsd", ".vmx", ".vswp"]


def test_what_is_written_meanwhile_is_in_the_next(make) -> None:
    world = make(MIB)
    world.cycle()
    before = world.sim.read(world.vms[0])
    world.scribble(world.vms[0])
    assert bytes(world.images.disks[world.paths[0], "scsi0:0"]) == before
    world.cycle()
    world.check()


@pytest.mark.parametrize(("base", "delta"), [(False, True), (True, False), (False, False)])
def test_where_frozen_layers_can_not_be_read(make, base: bool, delta: bool) -> None:
    """Facts 2 and 9: both worlds. A clone is made of what is frozen, and nothing of it stays."""
    world = make(MIB)
    world.sim.hostd.switches.raw_read_of_frozen_base = base
    world.sim.hostd.switches.raw_read_of_frozen_delta = delta
    for _ in range(3):
        world.cycle()
        assert world.images.wholes == (1 if not delta or len(world.images.checkpoints) == 1 else 0)
        world.check()
        world.scribble(world.vms[0])


def test_commands_that_return_early(make) -> None:
    world = make(MIB)
    switches = world.sim.hostd.switches
    switches.create_waits = switches.remove_waits = False
    switches.snapshot_seconds = switches.merge_seconds = 0.1
    for _ in range(3):
        world.cycle()
        world.check()
        world.scribble(world.vms[0])


def foreign(world: World, verb: str, *words: str) -> None:
    assert world.sim.run("vim-cmd", f"vmsvc/snapshot.{verb}", "1", *words)[0] == 0


def test_snapshots_of_others_come_and_go(make) -> None:
    """A user's snapshot before, between and after ours: its layers are taken along, and it stays."""
    world = make(MIB)
    (vm,) = world.vms
    foreign(world, "create", "users", "", "0", "0")
    world.scribble(vm)
    world.cycle()
    world.scribble(vm)
    foreign(world, "create", "backup", "", "0", "0")
    world.scribble(vm)
    world.cycle()
    assert world.images.wholes == 0
    world.check()
    assert [one.name for one in vm.snapshots if not owner(one.name)] == ["users", "backup"]
    foreign(world, "remove", "1")
    world.scribble(vm)
    world.cycle()
    world.check()


def test_a_user_who_removes_all_snapshots_costs_a_whole_read(make) -> None:
    world = make(MIB)
    world.cycle()
    world.scribble(world.vms[0])
    foreign(world, "removeall")
    world.scribble(world.vms[0])
    source = world.source()
    source.run(world.paths)
    assert world.images.wholes == 1
    assert "is read whole: its last snapshot" in source.remarks[0]
    world.check()


def test_a_machine_that_joins_and_one_that_leaves(make) -> None:
    world = make(MIB, MIB)
    gone, paths = world.vms[1], world.paths
    world.source().run(paths[:1])
    world.source().run(paths)
    assert world.images.wholes == 1
    world.check()
    world.source().run(paths[:1])
    assert gone.snapshots == []


def test_a_snapshot_that_is_refused_leaves_none_of_its_cycle(make) -> None:
    world = make(MIB, MIB)
    world.cycle()
    kept = [one.name for vm in world.vms for one in vm.snapshots]
    text = world.vms[1].place("vm1.vmdk").read_text()
    world.vms[1].place("vm1.vmdk").write_text(text)
    real = world.sim.hostd.create_snapshot

    def refuse(vm: Vm, *words: object) -> None:
        from tests.esxsim.state import Fault

        if vm is world.vms[1]:
            raise Fault("vim.fault.InsufficientResourcesFault", "no space")
        real(vm, *words)  # type: ignore[arg-type]

    world.sim.hostd.create_snapshot = refuse  # type: ignore[method-assign]
    with pytest.raises(HypervisorRefused, match="no space"):
        world.cycle()
    assert [one.name for vm in world.vms for one in vm.snapshots] == kept
    world.sim.hostd.create_snapshot = real  # type: ignore[method-assign]
    world.cycle()
    world.check()


def cut(world: World, event: str, number: int) -> bool:
    """A cycle whose connection is lost at a command; then another process goes on. False when there was no such command."""
    world.scribble(world.vms[0], 2)
    door = Door(world.sim)
    door.drop = (event, number)
    try:
        world.cycle(door)
    except HostUnreachable:
        world.cycle()
    world.cycle()
    world.check()
    return door.count >= number


@pytest.mark.parametrize("event", ["begin", "end"])
def test_cut_here_and_there(make, event: str) -> None:
    world = make(MIB)
    world.cycle()
    number = 3 if event == "begin" else 1
    while cut(world, event, number):
        number += 11
    assert number > 22
    assert world.images.checkpoints == sorted(set(world.images.checkpoints))
    world.source().stop()
    assert world.vms[0].snapshots == []


@pytest.mark.long
@pytest.mark.parametrize("event", ["begin", "end"])
@pytest.mark.parametrize("waits", [True, False])
def test_cut_at_every_command(make, event: str, waits: bool) -> None:
    """A whole cycle and a first one, cut at each of their commands, with removals that wait and such that don't."""
    world = make(MIB, MIB)
    switches = world.sim.hostd.switches
    switches.create_waits = switches.remove_waits = waits
    switches.snapshot_seconds = switches.merge_seconds = 0.0 if waits else 0.05
    number = 1
    while cut(world, event, number):
        number += 1
        if number % 10 == 0:
            world.source().stop()
            assert all(vm.snapshots == [] for vm in world.vms)
    assert number > 15


@pytest.mark.long
@pytest.mark.parametrize("event", ["begin", "end"])
def test_cut_over_real_ssh(make, event: str) -> None:
    """The sshd that carries the connection is killed; the host goes on with what it does."""
    world = make(MIB)
    world.sim.start()
    world.cycle(world.sim.shell())
    for number in (5, 9, 14):
        world.scribble(world.vms[0], 2)
        world.sim.hostd.drop = (event, number)
        try:
            world.cycle(world.sim.shell())
        except HostUnreachable:
            world.cycle(world.sim.shell())
        world.sim.hostd.drop = None
        world.cycle(world.sim.shell())
        world.check()
