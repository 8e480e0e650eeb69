"""QEMU's own record of what is written while a group is paused: begun in order, stopped, read, removed; on a real QEMU."""

from __future__ import annotations

import pytest

from drctl.errors import HypervisorRefused, StepFailed
from drctl.hypervisor import change_bitmap
from drctl.hypervisor.block_graph import MirrorName
from drctl.hypervisor.change_bitmap import GRANULARITY, PREFIX
from drctl.hypervisor.mirror import Mirror
from drctl.hypervisor.qmp import command
from drctl.hypervisor.reader_export import export_start, export_stop
from drctl.model.extent import Extent, MiB
from tests.integration.qemu_rig import SOURCE, Rig, have

pytestmark = pytest.mark.skipif(not have("qemu-system-x86_64", "qemu-img"), reason="needs QEMU")

NAME = f"{PREFIX}e-1"


@pytest.fixture
def rig():
    rig = Rig()
    rig.monitor(command("nbd-server-stop"))  # the device's: the monitor writes here, and a QEMU has one server
    yield rig
    rig.close()


def write(rig: Rig, offset: int, length: int) -> None:
    rig.monitor(command("human-monitor-command", command_line=f'qemu-io {SOURCE} "write {offset} {length}"'))


def read(rig: Rig) -> list[Extent]:
    socket = str(rig.directory / "reader.sock")
    export_start(rig.monitor, socket, {"db.vda": SOURCE}, {"db.vda": NAME})
    try:
        return change_bitmap.changed(socket, "db.vda", NAME)
    finally:
        export_stop(rig.monitor, socket)


def test_it_has_what_was_written_since_and_nothing_else(rig: Rig) -> None:
    write(rig, 0, 4096)
    change_bitmap.start(rig.monitor, {SOURCE: NAME})
    assert change_bitmap.found(rig.monitor) == {(SOURCE, NAME): True}
    write(rig, 5 * MiB, 4096)
    write(rig, 9 * MiB - 512, 1024)
    change_bitmap.stop(rig.monitor, SOURCE, NAME)
    write(rig, 20 * MiB, 4096)
    assert change_bitmap.found(rig.monitor) == {(SOURCE, NAME): False}
    expected = [Extent(5 * MiB, GRANULARITY), Extent(9 * MiB - GRANULARITY, 2 * GRANULARITY)]
    assert read(rig) == expected
    assert read(rig) == expected, "it can be read again"
    change_bitmap.forget(rig.monitor, [SOURCE])
    assert change_bitmap.found(rig.monitor) == {}


def test_nothing_was_written(rig: Rig) -> None:
    change_bitmap.start(rig.monitor, {SOURCE: NAME})
    change_bitmap.stop(rig.monitor, SOURCE, NAME)
    assert read(rig) == []


def test_one_that_records_is_not_exported(rig: Rig) -> None:
    change_bitmap.start(rig.monitor, {SOURCE: NAME})
    with pytest.raises(HypervisorRefused, match=r"[Ee]nabled bitmap"):
        read(rig)
    with pytest.raises(StepFailed, match="qemu-img map"):
        change_bitmap.changed(str(rig.directory / "nobody.sock"), "db.vda", NAME)


def test_what_an_earlier_pause_left_is_replaced(rig: Rig) -> None:
    change_bitmap.start(rig.monitor, {SOURCE: f"{PREFIX}old-1"})
    change_bitmap.start(rig.monitor, {SOURCE: NAME})
    assert change_bitmap.found(rig.monitor) == {(SOURCE, NAME): True}
    rig.monitor(command("block-dirty-bitmap-add", node=SOURCE, name="somebody-elses"))
    change_bitmap.forget(rig.monitor, [SOURCE])
    nodes = rig.monitor(command("query-named-block-nodes", flat=True))
    assert [b["name"] for node in nodes for b in node.get("dirty-bitmaps") or ()] == ["somebody-elses"]


def test_all_disks_of_a_machine_or_none(rig: Rig) -> None:
    with pytest.raises(HypervisorRefused):
        change_bitmap.start(rig.monitor, {SOURCE: NAME, "no-such-node": f"{PREFIX}e-2"})
    assert change_bitmap.found(rig.monitor) == {}


def test_it_sees_what_passes_the_mirror_and_what_comes_after_it() -> None:
    """As a pause does: begun under a mirror, which then leaves softly."""
    rig = Rig()
    try:
        rig.target()
        mirror = Mirror(rig.monitor, MirrorName.of(1, "5a" * 16, 0), SOURCE)
        mirror.attach(str(rig.tap_socket), "m.vda")
        rig.write(0, 4096)
        change_bitmap.start(rig.monitor, {SOURCE: NAME})
        rig.write(1 * MiB, 4096)
        mirror.detach(lambda: None)
        rig.write(2 * MiB, 4096)
        mirror = Mirror(rig.monitor, MirrorName.of(1, "5b" * 16, 0), SOURCE)
        mirror.attach(str(rig.tap_socket), "m.vda")
        rig.write(3 * MiB, 4096)
        change_bitmap.stop(rig.monitor, SOURCE, NAME)
        rig.write(4 * MiB, 4096)
        nodes = rig.monitor(command("query-named-block-nodes", flat=True))
        bitmaps = [each for node in nodes for each in node.get("dirty-bitmaps") or () if each.get("name") == NAME]
        assert [each["count"] for each in bitmaps] == [3 * GRANULARITY]
    finally:
        rig.close()
