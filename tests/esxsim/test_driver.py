"""The driver of ESX hosts on simulated ones: what it sees, what it changes, what it leaves alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drctl.errors import (
    DrctlError,
    HostKeyRejected,
    HostUnreachable,
    HypervisorRefused,
    LoginRefused,
    NotFound,
    OutOfSpace,
)
from drctl.hypervisor.esx.disks import Disks, LockMode
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.snapshots import Snapshots, new_name, owner, remove_leftovers
from drctl.model.machine import MachineState
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, Door, EsxSim
from tests.esxsim.state import PROFILES, Fault, Question

if reason := simulator.lacking():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def sim() -> Iterator[EsxSim]:
    yield from _made(EsxSim())


@pytest.fixture(params=list(PROFILES))
def every(request: pytest.FixtureRequest) -> Iterator[EsxSim]:
    yield from _made(EsxSim(request.param, [("datastore1", "VMFS-6"), ("nfs [1] a", "NFS")]))


@pytest.fixture(scope="module")
def real() -> Iterator[EsxSim]:
    """One with SSH, for those tests that are about it."""
    yield from _made(EsxSim().start())


def _made(one: EsxSim) -> Iterator[EsxSim]:
    yield one
    one.close()


def driver(sim: EsxSim) -> EsxHost:
    return EsxHost("esx1", Door(sim), sleep=lambda _: threading.Event().wait(0.01) and None)


def snapshots(host: EsxHost) -> Snapshots:
    return Snapshots(host, sleep=lambda _: threading.Event().wait(0.01) and None)


# -- inventory ------------------------------------------------------------------------------------------------------


def test_the_inventory_of_each_version(every: EsxSim) -> None:
    every.add_vm("web [datastore1] x/y.vmx", on=True, annotation="line\n2      not a row")
    every.add_vm("db", (MIB, 2 * MIB), store="nfs [1] a", folder="db (old): [2]")
    every.add_vm("sleeper", on=True)
    every.run("vim-cmd", "vmsvc/power.suspend", "3")
    every.add_vm("gone").invalid = True
    found = driver(every).inventory()
    assert [(one.id, one.name, one.machine.state) for one in found.machines] == [
        ("2", "db", MachineState.SHUT_OFF),
        ("3", "sleeper", MachineState.PAUSED),
        ("1", "web [datastore1] x/y.vmx", MachineState.RUNNING),
    ]
    assert found.invalid == ("4",)
    assert [disk.size for disk in found.machines[0].machine.disks] == [MIB, 2 * MIB]
    assert [(one.name, one.kind) for one in found.datastores] == [("datastore1", "VMFS-6"), ("nfs [1] a", "NFS")]
    assert found.version["Version"] == every.profile.version
    assert found.machines[0].machine.memory == 512 * MIB
    assert len(found.machines[0].machine.uuid) == 36


def test_three_hundred_machines_cost_few_round_trips(real: EsxSim) -> None:
    for number in range(300):
        real.add_vm(f"vm{number}", (MIB,), on=number % 2 == 0)
    shell = real.shell()
    shell.run(["true"])
    logins, commands = real.logins, len(real.hostd.commands)
    assert len(EsxHost("esx1", shell).inventory().machines) == 300
    assert real.logins == logins
    assert len(real.hostd.commands) - commands <= 6


def test_a_table_without_its_blanks_costs_a_call_for_each_machine(sim: EsxSim) -> None:
    """Strict framing needs the trailing blanks; without them every candidate is asked for by its number."""
    sim.add_vm("a", annotation="note\n7      looks like   [datastore1] a/a.vmx")
    sim.add_vm("b", on=True)
    expected = driver(sim).inventory().machines
    sim.hostd.switches.trailing_blanks = False
    found = driver(sim).inventory().machines
    assert [(one.id, one.machine) for one in found] == [(one.id, one.machine) for one in expected]


def test_what_stands_in_the_way_of_a_disk_is_named(sim: EsxSim) -> None:
    vm = sim.add_vm(
        "a",
        (MIB,) * 5,
        scsi0_1__mode="independent-persistent",
        scsi0_2__sharing="multi-writer",
    )
    text = vm.place("a_3.vmdk").read_text()
    vm.place("a_3.vmdk").write_text(
        text.replace('"vmfs"', '"vmfsPassthroughRawDeviceMap"').replace(" VMFS ", " VMFSRDM ")
    )
    vm.place("a_4.vmdk").unlink()
    sim.add_vm("tpm", vtpm__present="TRUE")
    first, second = driver(sim).inventory().machines
    assert [disk.disk.refusal for disk in first.disks] == [
        "",
        "its mode is independent-persistent: snapshots leave it out",
        "it is shared (multi-writer)",
        "a physical raw device mapping: it can't be snapshotted",
        "its descriptor, or one below it, can't be read",
    ]
    assert "TPM" in second.machine.disks[0].refusal


def test_layers_of_snapshots_are_followed(sim: EsxSim) -> None:
    sim.add_vm("a", on=True)
    for name in ("one", "two"):
        sim.run("vim-cmd", "vmsvc/snapshot.create", "1", name, "", "0", "0")
    (machine,) = driver(sim).inventory().machines
    kinds = [layer.descriptor.kind for layer in machine.disks[0].layers]
    assert kinds == ["seSparse", "seSparse", "vmfs"]
    assert machine.has_snapshots


def test_names_that_are_not_there_or_twice(sim: EsxSim) -> None:
    sim.add_vm("a")
    sim.add_vm("a", folder="other")
    host = driver(sim)
    with pytest.raises(NotFound):
        host.find("b")
    with pytest.raises(HypervisorRefused, match="two machines are named 'a'"):
        host.find("a")
    path = host.inventory().machines[0].vmx
    assert host.find(path).vmx == path


# -- power ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize("fault", [False, True])
def test_on_and_off_twice(sim: EsxSim, lies: bool, fault: bool) -> None:
    """Whatever the host says, its state afterwards counts."""
    sim.hostd.switches.power_on_lies, sim.hostd.switches.power_fault = lies, fault
    vm, host = sim.add_vm("a"), driver(sim)
    for _ in range(2):
        host.start(host.find("a"))
        assert vm.power == "on"
    for _ in range(2):
        host.stop(host.find("a"))
        assert vm.power == "off"


@pytest.mark.parametrize("copied", [False, True])
def test_a_moved_machine_is_answered(sim: EsxSim, copied: bool) -> None:
    vm, host = sim.add_vm("a", uuid__location="56 4d 00"), driver(sim)
    host.start(host.find("a"), copied=copied)
    assert vm.power == "on"
    answered = [words for words in sim.hostd.ran if words[1] == "vmsvc/message" and len(words) == 5]
    assert answered == [["vim-cmd", "vmsvc/message", "1", "0", "2" if copied else "1"]]


def test_another_question_is_not_answered_by_guess(sim: EsxSim, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and the start is cancelled."""
    vm, host = sim.add_vm("a", uuid__location="56 4d 00"), driver(sim)
    real = Question.__init__

    def other(self: Question, *words: object) -> None:
        real(self, words[0], "msg.disk.odd:Something odd.", ("Cancel (Cancel)", "Go on"), 1)  # type: ignore[arg-type]

    monkeypatch.setattr(Question, "__init__", other)
    with pytest.raises(HypervisorRefused, match=r"msg\.disk\.odd"):
        host.start(host.find("a"))
    assert vm.power == "off"
    assert vm.question is None


def test_a_start_that_the_host_refuses(sim: EsxSim) -> None:
    sim.add_vm("a")
    sim.hostd.maintenance = True
    host = driver(sim)
    assert host.inventory().maintenance
    with pytest.raises(HypervisorRefused, match="not allowed in the current state of the host"):
        host.start(host.find("a"))


def test_shutdown_without_tools(sim: EsxSim) -> None:
    vm, host = sim.add_vm("a", on=True), driver(sim)
    with pytest.raises(HypervisorRefused, match="VMware Tools is not running"):
        host.shutdown(host.find("a"))
    vm.tools = True
    host.shutdown(host.find("a"))
    assert host.state("a") is MachineState.SHUT_OFF


def test_a_number_that_is_another_machines_now(sim: EsxSim) -> None:
    """Numbers are given anew: nothing is done to a machine that only has the number."""
    sim.add_vm("a")
    host = driver(sim)
    machine = host.find("a")
    sim.run("vim-cmd", "vmsvc/unregister", "1")
    other = sim.add_vm("b")
    assert str(other.id) == machine.id
    for change in (host.start, snapshots(host).create):
        with pytest.raises(NotFound, match="no more"):
            change(machine, *([new_name("g", 1)] if change != host.start else []))
    assert other.power == "off"
    assert other.snapshots == []


# -- registration ---------------------------------------------------------------------------------------------------


def forgotten(sim: EsxSim) -> str:
    """The path of a machine that the host does not know."""
    vm = sim.add_vm("a")
    sim.run("vim-cmd", "vmsvc/unregister", str(vm.id))
    return sim.hostd.inside(vm.vmx)


@pytest.mark.parametrize("prints", [True, False])
def test_registered_once(sim: EsxSim, prints: bool) -> None:
    sim.hostd.switches.register_prints_id = prints
    path, host = forgotten(sim), driver(sim)
    assert host.register(path).id == host.register(path).id == "1"
    host.unregister(host.find("a"))
    assert host.inventory().machines == ()
    with pytest.raises(NotFound):
        host.register(path + "x")


def test_an_invalid_twin_makes_room(sim: EsxSim) -> None:
    vm = sim.add_vm("a")
    vm.invalid = True
    assert driver(sim).register(sim.hostd.inside(vm.vmx)).id == "1"
    assert len(sim.hostd.vms) == 1


@pytest.mark.parametrize("event", ["begin", "end"])
def test_a_registration_that_is_cut_is_never_doubled(sim: EsxSim, event: str) -> None:
    path = forgotten(sim)

    def work(host: EsxHost) -> None:
        host.register(path)

    def check() -> None:
        assert len(sim.hostd.vms) == 1
        sim.hostd.vms.clear()

    cut_everywhere(sim, event, work, check)


def cut_everywhere(sim: EsxSim, event: str, work: Callable[[EsxHost], None], check: Callable[[], None]) -> None:
    """Lose the connection at each command in turn; do the work again; it is done, once."""
    for number in range(1, 60):
        host, door = driver(sim), Door(sim)
        door.drop = (event, number)
        try:
            work(EsxHost("esx1", door, sleep=lambda _: None))
        except HostUnreachable:
            work(host)
        check()
        if door.count < number:
            assert number > 3
            return
    raise AssertionError("the work has no end")


# -- snapshots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [True, False])
def test_a_snapshot_is_made_found_and_removed(sim: EsxSim, waits: bool) -> None:
    """Also where the commands return before their work is done."""
    switches = sim.hostd.switches
    switches.create_waits = switches.remove_waits = waits
    switches.snapshot_seconds = switches.merge_seconds = 0.0 if waits else 0.15
    vm, host = sim.add_vm("a", on=True), driver(sim)
    name, ours = new_name("web", 7), snapshots(host)
    assert owner(name) == ("web", 7)
    for _ in range(2):
        ours.create(host.find("a"), name)
        assert [one.name for one in vm.snapshots] == [name]
    sim.write(vm, 4096, b"x" * 4096)
    expected = sim.read(vm)
    for _ in range(2):
        ours.remove(host.find("a"), name)
        assert vm.snapshots == []
    assert sim.read(vm) == expected
    assert sorted(path.name for path in vm.vmx.parent.glob("*.vmdk")) == ["a-flat.vmdk", "a.vmdk"]


def test_others_snapshots_are_never_touched(sim: EsxSim) -> None:
    vm, host = sim.add_vm("a", on=True), driver(sim)
    for name in ("VEEAM BACKUP TEMPORARY SNAPSHOT", "drctl.web.1.short", new_name("web", 1), new_name("db", 1)):
        sim.run("vim-cmd", "vmsvc/snapshot.create", "1", name, "", "0", "0")
    kept = vm.snapshots[3].name
    ours, machine = snapshots(host), host.find("a")
    assert [one.name for one in ours.foreign(machine)] == ["VEEAM BACKUP TEMPORARY SNAPSHOT", "drctl.web.1.short"]
    for name in ("VEEAM BACKUP TEMPORARY SNAPSHOT", "drctl.web.1.short"):
        with pytest.raises(HypervisorRefused, match="is not ours"):
            ours.remove(machine, name)
    assert len(remove_leftovers(host, "web")) == 1
    assert [one.name for one in vm.snapshots] == ["VEEAM BACKUP TEMPORARY SNAPSHOT", "drctl.web.1.short", kept]


def test_a_copy_of_our_name_is_not_touched(sim: EsxSim) -> None:
    vm, host = sim.add_vm("a", on=True), driver(sim)
    name = new_name("web", 1)
    for _ in range(2):
        sim.run("vim-cmd", "vmsvc/snapshot.create", "1", name, "", "0", "0")
    with pytest.raises(HypervisorRefused, match="has 2 snapshots named"):
        snapshots(host).remove(host.find("a"), name)
    assert len(vm.snapshots) == 2


def test_what_the_host_refuses_leaves_no_snapshot(sim: EsxSim) -> None:
    vm, host = sim.add_vm("a", on=True), driver(sim)
    with pytest.raises(HypervisorRefused, match="ApplicationQuiesceFault"):
        snapshots(host).create(host.find("a"), new_name("web", 1), quiesce=True)
    assert vm.snapshots == []


@pytest.mark.parametrize("event", ["begin", "end"])
def test_a_snapshot_whose_making_was_cut_is_not_doubled(sim: EsxSim, event: str) -> None:
    vm = sim.add_vm("a", (MIB,), on=True)
    name = new_name("web", 1)

    def check() -> None:
        assert [one.name for one in vm.snapshots] == [name]
        assert sim.run("vim-cmd", "vmsvc/snapshot.removeall", "1")[0] == 0

    cut_everywhere(sim, event, lambda host: snapshots(host).create(host.find("a"), name), check)


@pytest.mark.parametrize("event", ["begin", "end"])
def test_a_snapshot_whose_removal_was_cut_is_gone_after_it(sim: EsxSim, event: str) -> None:
    vm = sim.add_vm("a", (MIB,), on=True)
    name = new_name("web", 1)

    def begin() -> None:
        assert vm.snapshots == []
        sim.run("vim-cmd", "vmsvc/snapshot.create", "1", name, "", "0", "0")

    begin()
    cut_everywhere(sim, event, lambda host: snapshots(host).remove(host.find("a"), name), begin)


# -- disks ----------------------------------------------------------------------------------------------------------

PLACE = "/vmfs/volumes/datastore1"


def disks(sim: EsxSim) -> Disks:
    return Disks(driver(sim).session, sleep=lambda _: threading.Event().wait(0.02) and None)


def test_made_grown_and_deleted_twice(sim: EsxSim) -> None:
    one, path = disks(sim), f"{PLACE}/it's [new].vmdk"
    for _ in range(2):
        one.create(path, 8 * MIB)
    one.grow(path, 16 * MIB)
    assert sim.hostd.real(path.replace(".vmdk", "-flat.vmdk")).stat().st_size == 16 * MIB
    assert one.mapping(path) is None
    for _ in range(2):
        one.delete(path)
        assert not one.exists(path)


def test_a_clone_of_what_is_frozen(sim: EsxSim) -> None:
    vm, one = sim.add_vm("a", on=True), disks(sim)
    sim.write(vm, 8192, b"x" * 4096)
    before = sim.read(vm)
    sim.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")
    seen: list[int] = []
    for _ in range(2):
        one.clone(f"{PLACE}/a/a.vmdk", f"{PLACE}/c.vmdk", on_progress=seen.append)
        assert sim.hostd.real(f"{PLACE}/c-flat.vmdk").read_bytes() == before
    assert not list(sim.hostd.real(PLACE).glob("*drctl*"))
    assert len([words for words in sim.hostd.ran if words[:2] == ["vmkfstools", "-i"]]) == 1


@pytest.mark.parametrize("event", ["begin", "end"])
def test_a_clone_whose_connection_is_cut_is_made_once(sim: EsxSim, event: str) -> None:
    sim.add_vm("a")

    def check() -> None:
        assert len([words for words in sim.hostd.ran if words[:2] == ["vmkfstools", "-i"]]) == 1
        sim.run("vmkfstools", "-U", f"{PLACE}/c.vmdk")
        sim.hostd.ran.clear()

    cut_everywhere(
        sim,
        event,
        lambda host: Disks(host.session, sleep=lambda _: None).clone(f"{PLACE}/a/a.vmdk", f"{PLACE}/c.vmdk"),
        check,
    )


def test_a_full_datastore() -> None:
    sim = EsxSim(size=6 * MIB)
    vm = sim.add_vm("a", (4 * MIB,))
    sim.write(vm, 0, b"x" * 4 * MIB)
    with pytest.raises(OutOfSpace, match=r"No space left on device \(1835017\)"):
        disks(sim).clone(f"{PLACE}/a/a.vmdk", f"{PLACE}/c.vmdk")
    assert sorted(path.name for path in sim.hostd.real(PLACE).iterdir()) == ["a"]
    sim.close()


def test_locks_and_what_can_be_read(sim: EsxSim) -> None:
    sim.add_vm("a")
    one, flat = disks(sim), f"{PLACE}/a/a-flat.vmdk"
    assert one.lock(flat) is LockMode.FREE
    sim.run("vim-cmd", "vmsvc/power.on", "1")
    assert one.lock(flat) is LockMode.EXCLUSIVE
    assert not one.can_read(flat)
    with pytest.raises(HypervisorRefused, match="16392") as caught:
        one.clone(f"{PLACE}/a/a.vmdk", f"{PLACE}/c.vmdk")
    assert "holds the file" in caught.value.hint
    sim.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")
    assert one.lock(flat) is LockMode.SHARED
    assert one.can_read(flat)
    sim.hostd.switches.raw_read_of_frozen_base = False
    assert not one.can_read(flat)


def test_raw_device_mappings(sim: EsxSim) -> None:
    vm = sim.add_vm("a", (MIB, MIB))
    for name, kind in (("a", "vmfsRawDeviceMap"), ("a_1", "vmfsPassthroughRawDeviceMap")):
        text = vm.place(f"{name}.vmdk").read_text().replace('"vmfs"', f'"{kind}"').replace(" VMFS ", " VMFSRDM ")
        vm.place(f"{name}.vmdk").write_text(text)
    virtual, physical = (disks(sim).mapping(f"{PLACE}/a/{name}.vmdk") for name in ("a", "a_1"))
    assert virtual is not None
    assert physical is not None
    assert (virtual.physical, physical.physical) == (False, True)
    with pytest.raises(HypervisorRefused, match=r"cannot find the file specified \(25\)"):
        disks(sim).mapping(f"{PLACE}/a/none.vmdk")


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_read_only_datastore(sim: EsxSim) -> None:
    sim.hostd.datastores[0].read_only = True
    with pytest.raises(HypervisorRefused, match="Read-only file system"):
        disks(sim).create(f"{PLACE}/x.vmdk", MIB)
    assert list(sim.hostd.real(PLACE).iterdir()) == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("Failed to login: Connection reset by peer", HypervisorRefused),
        ("Connect to localhost failed: Connection failure", HypervisorRefused),
    ],
)
def test_a_sick_host(sim: EsxSim, words: str, error: type[DrctlError]) -> None:
    sim.add_vm("a")
    host = driver(sim)
    machine = host.find("a")
    sim.hostd.hostd_down = words
    with pytest.raises(error) as caught:
        host.power(machine)
    assert "hostd" in caught.value.hint


@pytest.mark.parametrize("kind", ["vim.fault.NotFound", "vmodl.fault.ManagedObjectNotFound"])
def test_faults_of_what_is_gone(sim: EsxSim, kind: str) -> None:
    sim.add_vm("a")
    host = driver(sim)
    machine = host.find("a")
    sim.hostd.faults["vmsvc/power.getstate"] = Fault(kind, "it is gone")
    with pytest.raises(NotFound, match="it is gone"):
        host.power(machine)


def test_a_foreign_host_key(real: EsxSim, tmp_path: Path) -> None:
    (tmp_path / "known").write_text(f"[127.0.0.1]:{real.port} {(simulator.parts() / 'stranger.pub').read_text()}")
    before = len(real.hostd.commands)
    with pytest.raises(HostKeyRejected):
        EsxHost("esx1", real.shell(known_hosts=str(tmp_path / "known"))).inventory()
    assert len(real.hostd.commands) == before


def test_a_key_that_is_not_accepted(real: EsxSim) -> None:
    with pytest.raises(LoginRefused):
        EsxHost("esx1", real.shell("stranger")).inventory()


@pytest.mark.parametrize("event", ["begin", "end"])
def test_a_connection_that_is_lost_tells_so(real: EsxSim, event: str) -> None:
    host = EsxHost("esx1", real.shell())
    host.version()
    real.hostd.drop = (event, 0)
    if event == "begin":
        with pytest.raises(HostUnreachable):
            host.version()
    else:
        host.version()  # its last mark had come: all of it is there
    assert host.version().startswith("VMware ESXi 8.0.3 Update 3 build-")
