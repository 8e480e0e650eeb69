"""The simulator has the quirks that were seen on real hosts. Each test names where (docs/esx-facts.md, with its sources)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.esxsim import host, render
from tests.esxsim.host import MIB, EsxSim
from tests.esxsim.state import PROFILES


@pytest.fixture(params=list(PROFILES))
def sim(request: pytest.FixtureRequest) -> Iterator[EsxSim]:
    yield from _made(EsxSim(request.param))


@pytest.fixture
def esx() -> Iterator[EsxSim]:
    yield from _made(EsxSim())


def _made(one: EsxSim) -> Iterator[EsxSim]:
    yield one
    one.close()


@pytest.fixture(autouse=True, scope="module")
def _able() -> None:
    if reason := host.lacking():
        pytest.skip(reason)


# -- inventory ------------------------------------------------------------------------------------------------------


def test_getallvms_is_the_captured_table() -> None:
    """Facts 1.1: an 8.x capture, whose header is centred but for its first column."""
    rows = [("1", "x8", "[pve-esx] x8/x8.vmx", "centos9_64Guest", "vmx-20", "")]
    told = render.getallvms(rows).splitlines()
    assert told[0] == "Vmid   Name          File              Guest OS       Version   Annotation"
    assert told[1].rstrip() == "1      x8     [pve-esx] x8/x8.vmx   centos9_64Guest   vmx-20"


def test_an_empty_inventory_is_its_header() -> None:
    """Facts 1.1."""
    assert render.getallvms([]) == "Vmid   Name   File   Guest OS   Version   Annotation\n"


def test_rows_are_sorted_as_words(esx: EsxSim) -> None:
    """Facts 1.1: 1, 10, 17, 2, 3."""
    for number in range(11):
        esx.add_vm(f"vm{number}", ())
    told = esx.run("vim-cmd", "vmsvc/getallvms")[1].splitlines()[1:]
    assert [line.split()[0] for line in told[:4]] == ["1", "10", "11", "2"]


def test_a_note_is_printed_raw_and_widens_its_column(esx: EsxSim) -> None:
    """Facts 1.1: the width counts the whole note with its line ends (kuiper, 7.0U3 captures)."""
    esx.add_vm("a", (), annotation="Rocky linux 8\n2      not a row")
    esx.add_vm("b", ())
    told = esx.run("vim-cmd", "vmsvc/getallvms")[1]
    assert "Rocky linux 8\n2      not a row\n2      b" in told
    assert told.endswith(" " * len("Rocky linux 8\n2      not a row") + "\n")


def test_invalid_machines_are_told_on_stderr_and_block_registration(esx: EsxSim) -> None:
    """Facts 1.1 (ghettoVCB #270) and 1.7 (VIM_SSH.pm 1480-1540)."""
    vm = esx.add_vm("a", ())
    vm.invalid = True
    code, out, err = esx.run("vim-cmd", "vmsvc/getallvms")
    assert (code, out.count("\n"), err) == (0, 1, "Skipping invalid VM '1'\n")
    code, out, _ = esx.run("vim-cmd", "solo/registervm", "/vmfs/volumes/datastore1/a/a.vmx")
    assert code == 1
    assert "(vim.fault.AlreadyExists) {" in out
    assert "msg = \"The specified key, name, or identifier '1' already exists.\"" in out
    assert esx.run("vim-cmd", "vmsvc/unregister", "1")[0] == 0
    assert esx.run("vim-cmd", "solo/registervm", "/vmfs/volumes/datastore1/a/a.vmx")[:2] == (0, "1\n")


def test_older_hosts_do_not_print_the_new_id(esx: EsxSim) -> None:
    """Facts 1.7: VCL's notes; a switch."""
    esx.add_vm("a", ())
    esx.run("vim-cmd", "vmsvc/unregister", "1")
    esx.hostd.switches.register_prints_id = False
    assert esx.run("vim-cmd", "solo/registervm", "/vmfs/volumes/datastore1/a/a.vmx")[:2] == (0, "")


def test_faults_have_their_versions_commas(sim: EsxSim) -> None:
    """Facts 1.0: on 7.0 each line of a field ends with comma and blank; quotes inside are not escaped."""
    code, out, _ = sim.run("vim-cmd", "vmsvc/power.getstate", "2")
    comma = ", " if sim.profile.version.startswith("7") else ","
    assert (code, out) == (
        1,
        f"(vim.fault.NotFound) {{\n   faultCause = (vmodl.MethodFault) null{comma}\n   faultMessage = <unset>\n"
        '   msg = "Unable to find a VM corresponding to "2""\n}\n',
    )


def test_a_machine_may_be_named_by_its_vmx(esx: EsxSim) -> None:
    """Facts 1.0: the fault's text of unregister uses paths."""
    esx.add_vm("a", ())
    told = esx.run("vim-cmd", "vmsvc/power.getstate", "/vmfs/volumes/datastore1/a/a.vmx")[1]
    assert told == "Retrieved runtime info\nPowered off\n"


def test_a_program_without_words_tells_its_usage(esx: EsxSim) -> None:
    """Facts 1.0: ghettoVCB finds the style of arguments so."""
    assert "Insufficient arguments.\nUsage: snapshot.remove" in esx.run("vim-cmd", "vmsvc/snapshot.remove")[1]


def test_summary_and_layout_are_structs(esx: EsxSim) -> None:
    """Facts 1.4: `Listsummary:`, a blank line, a struct; the layout has the base first."""
    esx.add_vm("a")
    told = esx.run("vim-cmd", "vmsvc/get.summary", "1")[1]
    assert told.startswith("Listsummary:\n\n(vim.vm.Summary) {\n")
    assert 'vmPathName = "[datastore1] a/a.vmx"' in told
    esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")
    layout = esx.run("vim-cmd", "vmsvc/get.filelayout", "1")[1]
    assert layout.index("[datastore1] a/a.vmdk") < layout.index("[datastore1] a/a-000001.vmdk")
    assert "SeSparseBackingInfo" in esx.run("vim-cmd", "vmsvc/device.getdevices", "1")[1]


# -- power ----------------------------------------------------------------------------------------------------------


def test_power_on_twice(esx: EsxSim) -> None:
    """Facts 1.2: `Power on failed` on 6.x, a fault on older hosts; a switch."""
    esx.add_vm("a")
    assert esx.run("vim-cmd", "vmsvc/power.on", "1")[:2] == (0, "Powering on VM:\n")
    assert esx.run("vim-cmd", "vmsvc/power.on", "1")[:2] == (1, "Powering on VM:\nPower on failed\n")
    esx.hostd.switches.power_fault = True
    told = esx.run("vim-cmd", "vmsvc/power.on", "1")[1]
    assert "(vim.fault.InvalidPowerState)" in told
    assert 'existingState = "poweredOn"' in told


def test_power_on_may_tell_a_failure_that_is_none(esx: EsxSim) -> None:
    """Facts 1.2: VIM_SSH.pm vm_power_on; a switch."""
    vm = esx.add_vm("a")
    esx.hostd.switches.power_on_lies = True
    assert esx.run("vim-cmd", "vmsvc/power.on", "1")[0] == 1
    assert vm.power == "on"


def test_a_moved_machine_blocks_until_it_is_answered(esx: EsxSim) -> None:
    """Facts 1.2 and 1.3: msg.uuid.altered, numbers of the choices from the text."""
    vm = esx.add_vm("a", uuid__location="56 4d 00")
    thread = threading.Thread(target=lambda: esx.run("vim-cmd", "vmsvc/power.on", "1"))
    thread.start()
    while "No message." in (told := esx.run("vim-cmd", "vmsvc/message", "1")[1]):
        time.sleep(0.01)
    assert told.startswith("Virtual machine message 0:\nmsg.uuid.altered:This virtual machine may have been moved")
    assert told.endswith("0. Cancel (Cancel)\n1. I _moved it (I _moved it)\n2. I _copied it (I _copied it) [default]\n")
    assert esx.run("vim-cmd", "vmsvc/get.tasklist", "1")[1].startswith(
        "(ManagedObjectReference) [\n   'vim.Task:haTask-1-"
    )
    assert vm.power == "off"
    assert esx.run("vim-cmd", "vmsvc/message", "1", "0", "1")[:2] == (0, "")
    thread.join()
    assert vm.power == "on"
    assert esx.run("vim-cmd", "vmsvc/get.tasklist", "1")[1] == "(ManagedObjectReference) []\n"


@pytest.mark.parametrize("action", ["keep", "create"])
def test_uuid_action_suppresses_the_question(esx: EsxSim, action: str) -> None:
    """Facts 7."""
    vm = esx.add_vm("a", uuid__location="56 4d 00", uuid__action=action)
    assert esx.run("vim-cmd", "vmsvc/power.on", "1")[0] == 0
    assert vm.power == "on"


def test_shutdown_needs_tools(esx: EsxSim) -> None:
    """Facts 1.2 (text is an assumption, section 9)."""
    vm = esx.add_vm("a", on=True)
    assert "(vim.fault.ToolsUnavailable)" in esx.run("vim-cmd", "vmsvc/power.shutdown", "1")[1]
    vm.tools = True
    assert esx.run("vim-cmd", "vmsvc/power.shutdown", "1")[:2] == (0, "")
    assert vm.power == "off"


def test_tasks_want_their_whole_name(esx: EsxSim) -> None:
    """Facts 1.5."""
    told = esx.run("vim-cmd", "vimsvc/task_info", "3887")[1]
    assert "(vmodl.fault.ManagedObjectNotFound)" in told
    assert 'obj = "vim.Task:3887"' in told


def test_hostd_that_is_down(esx: EsxSim) -> None:
    """Facts 1.0."""
    esx.hostd.hostd_down = "Failed to login: Connection reset by peer"
    assert esx.run("vim-cmd", "vmsvc/getallvms") == (1, "Failed to login: Connection reset by peer\n", "")


# -- snapshots ------------------------------------------------------------------------------------------------------


def test_the_tree_has_its_typo_and_no_leading_zeroes(esx: EsxSim) -> None:
    """Facts 1.6: `Desciption`; two dashes a level; `powered off` unless memory is in it."""
    vm = esx.add_vm("a", on=True)
    assert esx.run("vim-cmd", "vmsvc/snapshot.get", "1")[1] == "Get Snapshot:\n"
    for name in ("s1", "s2"):
        assert esx.run("vim-cmd", "vmsvc/snapshot.create", "1", name, "why", "0", "0")[:2] == (0, "Create Snapshot:\n")
    vm.snapshots[0].created = time.mktime((2026, 4, 5, 9, 0, 7, 0, 0, -1))
    lines = esx.run("vim-cmd", "vmsvc/snapshot.get", "1")[1].splitlines()
    assert lines[1:6] == [
        "|-ROOT",
        "--Snapshot Name        : s1",
        "--Snapshot Id        : 1",
        "--Snapshot Desciption  : why",
        "--Snapshot Created On  : 4/5/2026 9:0:7",
    ]
    assert lines[7:9] == ["--|-CHILD", "----Snapshot Name        : s2"]


def test_a_left_out_description_shifts_the_rest(esx: EsxSim) -> None:
    """Facts 1.6: `snapshot.create 3 "name" 0 1` made description `0` and took memory."""
    vm = esx.add_vm("a", on=True)
    esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "name", "0", "1")
    assert (vm.snapshots[0].description, vm.snapshots[0].state) == ("0", "powered on")


def test_removal_may_outlive_its_command(esx: EsxSim) -> None:
    """Facts 1.6: deltas vanish later; ghettoVCB waits for them."""
    vm = esx.add_vm("a", on=True)
    esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")
    esx.hostd.switches.remove_waits, esx.hostd.switches.merge_seconds = False, 0.1
    assert esx.run("vim-cmd", "vmsvc/snapshot.remove", "1", "1")[0] == 0
    assert vm.place("a-000001-sesparse.vmdk").exists()
    while vm.place("a-000001-sesparse.vmdk").exists():
        time.sleep(0.01)


def test_creation_may_outlive_its_command(esx: EsxSim) -> None:
    """Facts 1.6: PegaProx v2p.py 1169."""
    vm = esx.add_vm("a", on=True)
    esx.hostd.switches.create_waits, esx.hostd.switches.snapshot_seconds = False, 0.05
    assert esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")[0] == 0
    assert vm.snapshots == []
    while not vm.snapshots:
        time.sleep(0.01)


@pytest.mark.parametrize(("tools", "works"), [(False, True), (True, False)])
def test_quiescing_fails_without_tools(esx: EsxSim, tools: bool, works: bool) -> None:
    """Facts 9: its exact text is not known; a switch."""
    esx.add_vm("a", on=True).tools = tools
    esx.hostd.switches.quiesce_works = works
    code, out, _ = esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "1")
    assert code == 1
    assert "(vim.fault." in out


def test_independent_disks_are_left_out_and_physical_mappings_refused(esx: EsxSim) -> None:
    """Facts 5.1 and 7: ghettoVCB refuses vmfsPassthroughRawDeviceMap."""
    vm = esx.add_vm("a", (MIB, MIB), scsi0_1__mode="independent-persistent")
    assert esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")[0] == 0
    assert list(vm.disks().values()) == ["a-000001.vmdk", "a_1.vmdk"]
    other = esx.add_vm("b")
    text = other.place("b.vmdk").read_text().replace('"vmfs"', '"vmfsPassthroughRawDeviceMap"')
    other.place("b.vmdk").write_text(text)
    assert esx.run("vim-cmd", "vmsvc/snapshot.create", "2", "s", "", "0", "0")[0] == 1
    told = esx.run("vmkfstools", "-q", "b.vmdk", cwd="/vmfs/volumes/datastore1/b")[1]
    assert told.startswith("Disk b.vmdk is a Passthrough Raw Device Mapping\nMaps to: vml.")


# -- disks ----------------------------------------------------------------------------------------------------------


def test_locks_of_a_running_machine(esx: EsxSim) -> None:
    """Facts 2: mode 1 for what is written, mode 2 for what is frozen, 0 for nobody's."""
    esx.add_vm("a")
    flat = "/vmfs/volumes/datastore1/a/a-flat.vmdk"
    assert "mode 0" in esx.run("vmkfstools", "-D", flat)[1]
    esx.run("vim-cmd", "vmsvc/power.on", "1")
    assert "mode 1, owner 4fbbf995" in esx.run("vmkfstools", "-D", flat)[1]
    esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")
    told = esx.run("vmkfstools", "-D", flat)[1]
    assert "mode 2, owner 00000000" in told
    assert "RO Owner[0] HB Offset" in told


def test_a_clone_flattens_and_tells_its_progress_on_one_line(esx: EsxSim) -> None:
    """Facts 2: `\\rClone: N% done.`; the clone stands alone."""
    vm = esx.add_vm("a", on=True)
    esx.write(vm, 0, b"old".ljust(512))
    esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")
    esx.write(vm, 0, b"new".ljust(512))
    place = "/vmfs/volumes/datastore1/a"
    code, out, err = esx.run("vmkfstools", "-i", "a.vmdk", "-d", "thin", "c.vmdk", cwd=place)
    assert (code, err) == (0, "")
    assert out.startswith("Destination disk format: VMFS thin-provisioned\nCloning disk 'a.vmdk'...\n\rClone: 0% done.")
    assert out.endswith("\rClone: 100% done.\n")
    assert vm.place("c-flat.vmdk").read_bytes()[:3] == b"old"
    code, _, err = esx.run("vmkfstools", "-i", "a-000001.vmdk", "d.vmdk", cwd=place)
    assert code != 0
    assert err.endswith("a-000001.vmdk': Failed to lock the file (16392).\n")


def test_the_clone_of_a_frozen_base_that_fails(esx: EsxSim) -> None:
    """Facts 2: 7.0U1c, ghettoVCB #226; a switch."""
    esx.add_vm("a", on=True)
    esx.run("vim-cmd", "vmsvc/snapshot.create", "1", "s", "", "0", "0")
    esx.hostd.switches.clone_of_frozen_fails = True
    told = esx.run("vmkfstools", "-i", "/vmfs/volumes/datastore1/a/a.vmdk", "/vmfs/volumes/datastore1/a/c.vmdk")
    assert "Failed to lock the file (16392)" in told[2]


def test_a_full_datastore_leaves_a_part_and_glues_its_error_to_the_progress() -> None:
    """Facts 2: 1835017 = ENOSPC << 16 | 9."""
    esx = EsxSim(size=6 * MIB)
    vm = esx.add_vm("a", (4 * MIB,))
    esx.write(vm, 0, b"x" * 4 * MIB)
    call = esx.run(
        "vmkfstools", "-i", "/vmfs/volumes/datastore1/a/a.vmdk", "-d", "thin", "/vmfs/volumes/datastore1/a/c.vmdk"
    )
    assert call[1].endswith("\rClone: 25% done.")
    assert call[2] == "Failed to clone disk: No space left on device (1835017).\n"
    assert vm.place("c-flat.vmdk").exists()
    esx.close()


def test_what_is_no_disk(esx: EsxSim) -> None:
    """Facts 2: ghettoVCB #139."""
    esx.add_vm("a")
    told = esx.run("vmkfstools", "-i", "/vmfs/volumes/datastore1/a/a.vmx", "/vmfs/volumes/datastore1/a/c.vmdk")
    assert told[2].endswith("The file specified is not a virtual disk (15).\n")


def test_created_grown_renamed_checked_deleted(esx: EsxSim) -> None:
    """Facts 2's table. Options in any order."""
    place = "/vmfs/volumes/datastore1"
    assert esx.run("vmkfstools", "-d", "thin", "-c", "8m", f"{place}/x.vmdk")[:2] == (0, "Create: 100% done.\n")
    assert esx.run("vmkfstools", "-c", "8m", f"{place}/x.vmdk")[2].endswith("The file already exists (39).\n")
    assert esx.run("vmkfstools", "-X", "16m", f"{place}/x.vmdk")[1] == "Grow: 100% done.\n"
    assert esx.run("vmkfstools", "-E", f"{place}/x.vmdk", f"{place}/y.vmdk")[:2] == (0, "")
    assert esx.hostd.real(f"{place}/y-flat.vmdk").stat().st_size == 16 * MIB
    assert esx.run("vmkfstools", "-e", f"{place}/y.vmdk")[1] == "Disk chain is consistent.\n"
    assert esx.run("vmkfstools", "-U", f"{place}/y.vmdk")[:2] == (0, "")
    assert list(esx.hostd.real(place).glob("*.vmdk")) == []


# -- esxcli ---------------------------------------------------------------------------------------------------------


def test_filesystems_by_version(sim: EsxSim) -> None:
    """Facts 3: VFFS on 7.x, VMFSOS on 8.x; the label of a vfat may be empty on 6.x."""
    told = sim.run("esxcli", "storage", "filesystem", "list")[1]
    assert told.splitlines()[1].count("-  -") == 6
    kinds = {"6.7.0": "vfat", "7.0.3": "VFFS", "8.0.3": "VMFSOS"}
    assert kinds[sim.profile.version] in told
    assert ("BOOTBANK1" in told) == (sim.profile.version != "6.7.0")


def test_csv_is_sorted_and_ends_with_a_comma(esx: EsxSim) -> None:
    """Facts 3 (VCL)."""
    told = esx.run("esxcli", "--formatter=csv", "storage", "filesystem", "list")[1].splitlines()
    assert told[0] == "Free,MountPoint,Mounted,Size,Type,UUID,VolumeName,"
    assert all(line.endswith(",") for line in told)


def test_json_is_not_everywhere(sim: EsxSim) -> None:
    """Facts 3: widely used, not documented."""
    code, out, _ = sim.run("esxcli", "--formatter=json", "system", "version", "get")
    assert (code == 0) == (sim.profile.version != "6.7.0")
    assert code == 0 or "Available formatters: xml, csv, keyvalue." in out


def test_own_programs_are_refused_from_8_on(sim: EsxSim) -> None:
    """Facts 4.2: the option is there on 8.0, `Unable to find option` before."""
    told = sim.run("esxcli", "system", "settings", "advanced", "list", "-o", "/User/execInstalledOnly")
    assert (told[0] == 0) == sim.profile.version.startswith("8")


def test_the_list_of_processes_names_places_by_uuid(esx: EsxSim) -> None:
    """Facts 3: it begins with an empty line; `Config File` is not by the datastore's name."""
    esx.add_vm("a b", on=True)
    esx.add_vm("off")
    told = esx.run("esxcli", "vm", "process", "list")[1]
    assert told.startswith("\na b\n   World ID: ")
    uuid = esx.hostd.datastores[0].uuid
    assert f"   Config File: /vmfs/volumes/{uuid}/a b/a_b.vmx\n" in told
    assert "off" not in told
