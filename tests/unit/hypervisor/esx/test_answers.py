"""Tables of hosts with hostile names, notes and datastores are read back as they are; what is cut is refused.

They are rendered by the simulator's renderer, which follows published captures and knows nothing of the parser."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drctl.errors import UnsupportedFormat
from drctl.hypervisor.esx import answers
from drctl.hypervisor.esx.answers import Row
from tests.esxsim import render

HOSTILE = string.ascii_letters + string.digits + " []().:_-#'\"|&;$`\\<>%=,{}äß日"
names = st.text(HOSTILE, min_size=1, max_size=20).map(lambda text: f"_{text}_")
stores = st.lists(names, min_size=1, max_size=3, unique=True)
note_lines = st.one_of(
    st.text(HOSTILE, max_size=30),
    st.builds(lambda n: f"{n}      evil   [a] x/x.vmx   otherGuest   vmx-19   ", st.integers(1, 30)),
)
notes = st.lists(note_lines, max_size=4).map("\n".join)


@st.composite
def hosts(draw: st.DrawFn) -> tuple[list[str], list[Row]]:
    datastores = draw(stores)
    ids = draw(st.lists(st.integers(1, 3000), max_size=6, unique=True))
    rows = [
        Row(
            str(vmid),
            draw(names),
            draw(st.sampled_from(datastores)),
            f"{draw(names)}/{draw(names)}.vmx",
            draw(st.sampled_from(["centos8_64Guest", "other", "windows2019srv_64Guest"])),
            f"vmx-{draw(st.integers(4, 21)):02d}",
            draw(notes),
        )
        for vmid in ids
    ]
    return datastores, rows


def rendered(rows: list[Row]) -> str:
    return render.getallvms([(r.id, r.name, f"[{r.datastore}] {r.file}", r.guest, r.version, r.note) for r in rows])


def as_read(rows: list[Row]) -> list[tuple[str, ...]]:
    """Blanks at a note's end are padding to whoever reads."""
    return sorted((r.id, r.name, r.datastore, r.file, r.guest, r.version, r.note.rstrip(" ")) for r in rows)


@given(hosts())
@settings(max_examples=30)
@example(
    (["a"], [Row("1", "x", "a", "x/x.vmx", "g", "vmx-19", "n\n2      x      [a] x/x.vmx   g         vmx-19      ")])
)
def test_hostile_inventories_are_read_back(host: tuple[list[str], list[Row]]) -> None:
    """Never something else: what can't be told apart is refused, which needs as many coincidences as here never come."""
    datastores, rows = host
    assert as_read(answers.machines(rendered(rows), datastores)) == as_read(rows)


@given(hosts(), st.integers(1, 200))
@settings(max_examples=30)
def test_a_table_that_was_cut_is_refused(host: tuple[list[str], list[Row]], cut: int) -> None:
    datastores, rows = host
    text = rendered(rows)
    cut = min(cut, len(text))
    step = text.index("\n") + 1
    if cut % step == 0:
        return  # whole records: batch tells by its marks that something is missing
    with pytest.raises(UnsupportedFormat):
        answers.machines(text[:-cut], datastores)


def test_two_outputs_that_were_mixed_are_refused() -> None:
    rows = [
        Row("1", "a", "ds", "a/a.vmx", "other", "vmx-19", ""),
        Row("2", "b", "ds", "b/b.vmx", "other", "vmx-19", ""),
    ]
    text = rendered(rows)
    head, first, second, _ = text.split("\n")
    mixed = f"{head}\n{first[:20]}{second}{first[20:]}\n"
    with pytest.raises(UnsupportedFormat):
        answers.machines(mixed, ["ds"])
    with pytest.raises(UnsupportedFormat):
        answers.machines(f"{head}\n{second}\n{first}\n", ["ds"])
    with pytest.raises(UnsupportedFormat):
        answers.machines(text, ["another"])


HEAD = ("Mount Point", "Volume Name", "UUID", "Mounted", "Type", "Size", "Free")


@given(
    st.lists(st.tuples(names, st.integers(0, 10**15), st.sampled_from(["VMFS-6", "NFS41", "vfat", "VFFS"])), max_size=5)
)
@settings(max_examples=30)
def test_file_systems_are_read_back(places: list[tuple[str, int, str]]) -> None:
    rows = [
        (f"/vmfs/volumes/{n}", name, f"u{n}", "true", kind, str(size), "0")
        for n, (name, size, kind) in enumerate(places)
    ]
    rows.append(("", "", "u-unmounted", "false", "VMFS-unknown version", "0", "0"))
    found = answers.filesystems(render.table(HEAD, rows, ("Mounted", "Size", "Free")))
    assert [(one.name, one.size, one.kind) for one in found[:-1]] == places
    assert not found[-1].mounted
    assert [one.is_datastore for one in found[:-1]] == [kind in ("VMFS-6", "NFS41") for _, _, kind in places]


@pytest.mark.parametrize("text", ["", "Name\n", "Name\n----\nx", "Name\n-- x\na\n", "Connect to localhost failed\n"])
def test_what_is_no_table(text: str) -> None:
    with pytest.raises(UnsupportedFormat):
        answers.table(text)


def process(name: str, world: int, path: str) -> str:
    return (
        f"\n{name}\n   World ID: {world}\n   Process ID: 0\n   VMX Cartel ID: {world - 1}\n   UUID: 56 4d\n"
        f"   Display Name: {name}\n   Config File: {path}\n"
    )


@given(st.lists(st.tuples(names, names), max_size=5, unique_by=lambda pair: pair[1]))
@settings(max_examples=30)
def test_processes_are_read_back(machines: list[tuple[str, str]]) -> None:
    text = "".join(process(name, n + 1, f"/vmfs/volumes/u/{path}") for n, (name, path) in enumerate(machines))
    expected = {f"/vmfs/volumes/u/{path}": n + 1 for n, (_, path) in enumerate(machines)}
    assert answers.processes(text) == expected
    if text:
        with pytest.raises(UnsupportedFormat):
            answers.processes(text[:-5].rpartition("\n")[0] + "\n")


QUESTION = """Virtual machine message 12:
msg.uuid.altered:This virtual machine may have been moved or copied.

Did you move this virtual machine, or did you copy it?
If you don't know, answer "I copied it".
0. Cancel (Cancel)
1. I _moved it (I _moved it)
2. I _copied it (I _copied it) [default]
"""


def test_a_question() -> None:
    assert answers.question("No message.\n") is None
    asked = answers.question(QUESTION)
    assert asked is not None
    assert (asked.id, asked.key, asked.default) == ("12", "msg.uuid.altered", 2)
    assert asked.choices[1] == "I _moved it (I _moved it)"
    with pytest.raises(UnsupportedFormat):
        answers.question(QUESTION.partition("0. ")[0])


TREE = """Get Snapshot:
|-ROOT
--Snapshot Name        : snap1
--Snapshot Id        : 1
--Snapshot Desciption  : Shapshot #1
of two lines
--Snapshot Created On  : 10/4/2026 19:0:52
--Snapshot State       : powered off
--|-CHILD
----Snapshot Name        : Corelinux running
----Snapshot Id        : 2
----Snapshot Desciption  :
----Snapshot Created On  : 10/4/2026 19:22:55
----Snapshot State       : powered on
"""


def test_a_tree_of_snapshots() -> None:
    """Facts 1.6; blanks at line ends were lost in the capture."""
    first, second = answers.snapshots(TREE)
    assert (first.id, first.name, first.description, first.depth) == ("1", "snap1", "Shapshot #1\nof two lines", 0)
    assert (second.id, second.name, second.description, second.depth) == ("2", "Corelinux running", "", 1)
    assert answers.snapshots("Get Snapshot:\n") == []
    for cut in (20, 60, 100):
        with pytest.raises(UnsupportedFormat):
            answers.snapshots(TREE[:-cut])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(ManagedObjectReference) []\n", []),
        ("(ManagedObjectReference) [\n   'vim.Task:haTask-5-x-1'\n]\n", ["haTask-5-x-1"]),
        ("(ManagedObjectReference) [\n   'vim.Task:a', \n   'vim.Task:b'\n]\n", ["a", "b"]),
    ],
)
def test_tasks(text: str, found: list[str]) -> None:
    assert answers.tasks(text) == found


@pytest.mark.parametrize("text", ["", "(ManagedObjectReference) [\n   'vim.Task:a'", "(vim.fault.X) {\n}\n"])
def test_what_is_no_list_of_tasks(text: str) -> None:
    with pytest.raises(UnsupportedFormat):
        answers.tasks(text)


def test_power_and_version() -> None:
    assert answers.power("Retrieved runtime info\nSuspended\n") == "Suspended"
    told = "   Product: VMware ESXi\n   Version: 8.0.2\n   Build: Releasebuild-22380479\n   Update: 2\n   Patch: 0\n"
    assert answers.version(told)["Build"] == "Releasebuild-22380479"
    for refused in ("Powered on\n", "Retrieved runtime info\nPowered\n"):
        with pytest.raises(UnsupportedFormat):
            answers.power(refused)
    with pytest.raises(UnsupportedFormat):
        answers.version("   Product: VMware ESXi\n")
