"""Machine definitions (.vmx) and disk descriptors (.vmdk): read, changed and written without loss; oddities refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import UnsupportedFormat
from drctl.hypervisor import vmdk, vmx
from drctl.hypervisor.vmdk import Descriptor, Piece
from drctl.hypervisor.vmx import Vmx
from tests.esxsim import formats, state

values = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
keys = st.from_regex(r"[a-z][a-z0-9]{0,8}(\.[A-Za-z]{1,8})?", fullmatch=True)

MACHINE = """.encoding = "UTF-8"
config.version = "8"
displayName = "web |22prod|22 [1]"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:10.present = "TRUE"
scsi0:10.fileName = "b.vmdk"
scsi0:2.fileName = "/vmfs/volumes/other/a.vmdk"
scsi0:2.present = "true"
scsi0:2.mode = "independent-persistent"
scsi0:3.present = "FALSE"
scsi0:3.fileName = "gone.vmdk"
ide1:0.present = "TRUE"
ide1:0.fileName = "x.iso"
ide1:0.deviceType = "cdrom-image"
sata0:0.present = "TRUE"
sata0:0.fileName = "auto detect"
"""


@given(st.dictionaries(keys, values, max_size=8))
@settings(max_examples=25)
def test_a_definition_is_read_back(content: dict[str, str]) -> None:
    """Keys that differ in case alone are the same key."""
    unique = {key.lower(): (key, value) for key, value in content.items()}
    given_ = Vmx(dict(unique.values()))
    found = vmx.parse(vmx.render(given_))
    assert {key: found[key] for key in given_} == {key: given_[key] for key in given_}


def test_the_simulator_reads_what_is_written(tmp_path) -> None:
    (tmp_path / "a.vmx").write_text(vmx.render(vmx.parse(MACHINE)))
    assert state.read_vmx(tmp_path / "a.vmx")["displayname"] == 'web "prod" [1]'


def test_disks_and_names() -> None:
    found = vmx.parse(MACHINE)
    assert found["DISPLAYNAME"] == 'web "prod" [1]'
    assert [(disk.device, disk.file, disk.controller, disk.mode) for disk in found.disks()] == [
        ("scsi0:2", "/vmfs/volumes/other/a.vmdk", "pvscsi", "independent-persistent"),
        ("scsi0:10", "b.vmdk", "pvscsi", "persistent"),
    ]


def test_changes_keep_the_rest() -> None:
    found = vmx.parse(MACHINE).changed({"DisplayName": "x", "scsi0:3.fileName": None, "uuid.action": "keep"})
    assert (found["displayName"], found["uuid.action"], "scsi0:3.filename" in found) == ("x", "keep", False)
    assert found["scsi0:2.mode"] == "independent-persistent"
    assert vmx.render(found).startswith('.encoding = "UTF-8"\n')


@pytest.mark.parametrize("text", ["no line\n", 'a = "1"\nA = "2"\n', "x" * (vmx.LIMIT + 1)])
def test_what_is_no_definition(text: str) -> None:
    with pytest.raises(UnsupportedFormat):
        vmx.parse(text)


@pytest.mark.parametrize("kind", ["vmfs", "seSparse", "vmfsSparse", "vmfsRawDeviceMap", "vmfsPassthroughRawDeviceMap"])
@pytest.mark.parametrize("parent", [False, True])
def test_descriptors_of_the_simulator(kind: str, parent: bool) -> None:
    """Facts 5.1. What is read is written the same."""
    text = formats.descriptor(
        kind, 8192, "x y.vmdk", parent=("1234abcd", "base [1].vmdk") if parent else ("ffffffff", "")
    )
    found = vmdk.parse(text)
    assert (found.kind, found.size, found.pieces[0].file) == (kind, 8192 * 512, "x y.vmdk")
    assert found.parent == ("base [1].vmdk" if parent else "")
    assert vmdk.render(found) == text
    assert found.is_redo_log == (kind in ("seSparse", "vmfsSparse"))


def test_change_tracking_and_several_extents() -> None:
    """Facts 5.1 and 5.3: version 3 with change tracking; access words, a fifth field, ZERO."""
    pieces = (Piece("RW", 100, "FLAT", "a-f001.vmdk", 63), Piece("RDONLY", 28, "ZERO", ""))
    disk = Descriptor("twoGbMaxExtentFlat", "12345678", vmdk.NO_PARENT, "", pieces, (), "a-ctk.vmdk", 3)
    assert vmdk.parse(vmdk.render(disk)) == disk
    assert disk.size == 128 * 512


def test_a_flat_one() -> None:
    found = vmdk.parse(vmdk.render(vmdk.flat("a-flat.vmdk", 4096)))
    assert (found.size, found.is_thin, found.kind) == (4096, True, "vmfs")
    for size, file in ((100, "a"), (4096, 'a"b')):
        with pytest.raises(ValueError, match="no disk of"):
            vmdk.flat(file, size)


GOOD = formats.descriptor("vmfs", 8, "a-flat.vmdk")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "KDMV" + GOOD,
        GOOD.replace("parentCID=ffffffff", "parentCID=12345678"),
        GOOD.replace('createType="vmfs"', 'createType="vmfsThin"'),
        GOOD.replace(" VMFS ", " SESPARSE "),
        GOOD.replace("CID=", "CDI=", 1),
        GOOD.partition("# Extent")[0],
        GOOD + "version=1\n",
        GOOD + "something else\n",
    ],
)
def test_what_is_no_descriptor(text: str) -> None:
    with pytest.raises(UnsupportedFormat):
        vmdk.parse(text)
