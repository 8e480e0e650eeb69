"""Machines that are powered on really run, under QEMU with their VMDKs, while they are replicated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.esxsim import guest, host
from tests.esxsim.host import MIB
from tests.esxsim.state import Vm
from tests.esxsim.test_cycle import World

if reason := host.lacking() or guest.lacking():
    pytest.skip(f"needs {reason}", allow_module_level=True)


@pytest.fixture(params=["VMFS-6", pytest.param("NFS", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    one = World(MIB, store=request.param)
    vm = one.vms[0]
    one.sim.run("vim-cmd", "vmsvc/power.off", "1")
    one.sim.write(vm, 0, guest.boot_sector().ljust(MIB, b"\0"))
    one.sim.hostd.boots = True
    assert one.sim.run("vim-cmd", "vmsvc/power.on", "1")[0] == 0
    yield one
    one.close()


def dots(world: World) -> int:
    serial = world.sim.hostd.guests[1].serial
    return serial.read_bytes().count(b".") if serial.exists() else 0


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def newest(image: bytes) -> int:
    """The guest's counter in its newest sector, after a look that all before it are there."""
    counters = [int.from_bytes(image[sector * 512 : sector * 512 + 4], "little") for sector in range(64, 1088)]
    last = max(counters)
    assert counters[1 : last + 1] == list(range(1, last + 1))
    return last


def image(world: World, vm: Vm) -> bytes:
    return bytes(world.images.disks[world.sim.hostd.inside(vm.vmx), "scsi0:0"])


def test_a_guest_that_writes_is_replicated_cycle_by_cycle(world: World) -> None:
    """Each checkpoint holds all that the guest had been told to be written when its cycle began, in order."""
    vm = world.vms[0]
    seen = 0
    for number in range(1, 4):
        wait(lambda wanted=seen + 8: dots(world) >= wanted)  # type: ignore[misc]
        before = dots(world)
        assert before < 1000
        assert world.cycle() == number
        found = newest(image(world, vm))
        assert before <= found <= dots(world) + 1
        assert found > seen
        seen = found
    assert world.images.wholes == 0
    assert world.sim.run("vim-cmd", "vmsvc/power.off", "1")[0] == 0
    world.cycle()
    world.check()
    world.source().stop()
    assert newest(vm.place("vm0-flat.vmdk").read_bytes()) >= seen


def test_it_boots_from_a_chain(world: World) -> None:
    """Off and on again, on top of a redo log: the counter begins anew, the disk is the same."""
    world.cycle()
    wait(lambda: dots(world) >= 3)
    assert world.sim.run("vim-cmd", "vmsvc/power.off", "1")[0] == 0
    assert world.sim.run("vim-cmd", "vmsvc/power.on", "1")[0] == 0
    wait(lambda: dots(world) >= 3)


@pytest.mark.long
@pytest.mark.parametrize(("device", "kind"), [("sata0:0", ""), ("ide0:0", ""), ("scsi0:0", "lsisas1068")])
def test_it_boots_at_the_controller_that_its_definition_names(device: str, kind: str) -> None:
    sim = host.EsxSim()
    try:
        vm = sim.add_vm("web", (MIB,))
        sim.write(vm, 0, guest.boot_sector().ljust(MIB, b"\0"))
        for key in ("present", "filename"):
            vm.config[f"{device}.{key}"] = vm.config.pop(f"scsi0:0.{key}")
        vm.config["scsi0.virtualdev"] = kind
        sim.hostd.boots = True
        assert sim.run("vim-cmd", "vmsvc/power.on", "1")[0] == 0
        serial = sim.hostd.guests[1].serial
        wait(lambda: serial.exists() and serial.read_bytes().count(b".") >= 3)
    finally:
        sim.close()
