"""The mirror on real QEMU: no guest may end or see an I/O error, whatever happens to the tap."""

import subprocess
import time
from functools import partial

import pytest

from drctl.errors import HypervisorRefused
from drctl.hypervisor.block_graph import MirrorName
from drctl.hypervisor.mirror import Mirror, find
from drctl.hypervisor.qmp import command
from drctl.hypervisor.reader_export import export_start
from tests.integration.qemu_rig import DEVICE, SOURCE, Rig, have, until

pytestmark = pytest.mark.skipif(
    not have("qemu-system-x86_64", "qemu-storage-daemon", "qemu-nbd", "qemu-io", "fio"),
    reason="QEMU's tools or fio are not installed",
)
NAME = MirrorName.of(1, "5a" * 16, 0)


@pytest.fixture(params=["none", "qsd"])
def rig(request):
    rig = Rig(request.param)
    yield rig
    rig.close()


@pytest.fixture
def bare():
    """A bare QEMU, which has the human monitor that a storage daemon lacks."""
    rig = Rig("none")
    yield rig
    rig.close()


def mirror_of(rig):
    return Mirror(rig.monitor, NAME, SOURCE)


def no_sink():
    raise AssertionError("a live tap needs no sink")


def cycles(rig, count):
    mirror = mirror_of(rig)
    rig.target()
    load = rig.load(600)
    until(lambda: rig.disk.stat().st_blocks > 0, what="load")
    for _ in range(count):
        assert mirror.attach(str(rig.tap_socket), "m.vda").healthy
        assert mirror.prove_order(lambda: 1) == 1
        mirror.detach(no_sink)
        assert rig.alive()
        assert load.poll() is None, "the guest saw an I/O error"
    assert not find(rig.monitor)


def test_five_cycles_of_attach_prove_detach_under_load(rig):
    cycles(rig, 5)


@pytest.mark.long
def test_a_hundred_cycles_of_attach_prove_detach_under_load(rig):
    cycles(rig, 100)


def test_every_write_reaches_the_tap_before_it_is_acknowledged(rig):
    rig.target()
    mirror_of(rig).attach(str(rig.tap_socket), "m.vda")
    rig.write(8192, 4096, 0x5A)
    with (rig.directory / "target.raw").open("rb") as target:
        target.seek(8192)
        assert target.read(4096) == b"\x5a" * 4096


def test_a_killed_tap_under_load_costs_the_guest_nothing_and_loses_nothing(rig):
    mirror = mirror_of(rig)
    target = rig.target()
    mirror.attach(str(rig.tap_socket), "m.vda")
    load = rig.load(600)
    for _ in range(3):
        time.sleep(0.5)
        rig.kill(target)
        until(lambda: mirror.inspect().status == "standby", what="standby")
        assert mirror.inspect().dirty > 0
        assert load.poll() is None, "the guest saw an I/O error"
        target = rig.target()
        assert mirror.recover(rig.connected).healthy
        mirror.prove_order(lambda: 1, rig.connected)
    rig.kill(load)
    assert rig.alive()
    until(lambda: mirror.inspect().clean, what="clean")
    mirror.barrier()
    assert rig.compare(), "what failed was sent again"


def test_order_is_proven_for_an_idle_guest_only_over_a_live_connection(bare):
    """QEMU does not notice a tap that dies while the guest is idle: the job stays ready and clean."""
    mirror = mirror_of(bare)
    target = bare.target()
    mirror.attach(str(bare.tap_socket), "m.vda")
    bare.write(0, 4096)
    bare.kill(target)
    assert mirror.inspect().healthy
    with pytest.raises(HypervisorRefused, match="did not connect"):
        mirror.prove_order(lambda: 1, bare.connected, timeout_seconds=2)
    bare.target()
    assert not bare.connected()
    assert mirror.prove_order(lambda: 5, bare.connected) == 5
    assert bare.connected()


def test_a_write_that_no_tap_took_is_sent_again_before_order_is_proven(rig):
    mirror = mirror_of(rig)
    target = rig.target()
    mirror.attach(str(rig.tap_socket), "m.vda")
    rig.kill(target)
    rig.write(4096, 4096, 0x11)
    rig.write(65536, 1024, 0x22)
    assert mirror.inspect().dirty == 8192
    rig.target()
    mirror.prove_order(lambda: 1, rig.connected)
    assert mirror.inspect().clean
    assert rig.compare()


@pytest.mark.parametrize("idle", [True, False], ids=["unnoticed", "in-error-standby"])
def test_detach_from_a_dead_tap_ends_through_a_sink(rig, idle):
    mirror = mirror_of(rig)
    target = rig.target()
    mirror.attach(str(rig.tap_socket), "m.vda")
    rig.kill(target)
    if not idle:
        rig.write(0, 4096)
        assert mirror.inspect().status == "standby"
    sinks = []
    mirror.detach(lambda: sinks.append(rig.sink()))
    assert not find(rig.monitor)
    assert len(sinks) == 1
    rig.write(0, 4096)
    assert rig.alive()


def test_detach_from_a_dead_tap_under_load_ends_through_a_sink(rig):
    mirror = mirror_of(rig)
    target = rig.target()
    mirror.attach(str(rig.tap_socket), "m.vda")
    load = rig.load(600)
    time.sleep(0.5)
    rig.kill(target)
    mirror.detach(lambda: rig.sink())
    assert not find(rig.monitor)
    assert load.poll() is None, "the guest saw an I/O error"
    assert rig.alive()


def test_detach_without_tap_or_sink_gives_up_and_hurts_nobody(rig):
    mirror = mirror_of(rig)
    target = rig.target()
    mirror.attach(str(rig.tap_socket), "m.vda")
    rig.kill(target)
    rig.write(0, 4096)
    with pytest.raises(HypervisorRefused, match="did not detach in time"):
        mirror.detach(lambda: None, timeout_seconds=4)
    rig.write(0, 4096)
    rig.sink()
    mirror.detach(no_sink)
    assert not find(rig.monitor)


def test_a_new_supervisor_finds_the_mirror_and_goes_on(rig):
    rig.target()
    mirror_of(rig).attach(str(rig.tap_socket), "m.vda")
    (found,) = find(rig.monitor)
    assert found.name == NAME
    assert mirror_of(rig).attach(str(rig.tap_socket), "m.vda").healthy
    mirror_of(rig).detach(no_sink)


def test_barriers_under_load_hurt_nobody(rig):
    mirror = mirror_of(rig)
    rig.target()
    mirror.attach(str(rig.tap_socket), "m.vda")
    load = rig.load(600)
    for _ in range(100):
        mirror.barrier()
    assert rig.alive()
    assert load.poll() is None


def test_a_read_only_export_of_the_source_works_beside_the_mirror(bare):
    bare.target()
    bare.write(0, 1 << 20, 0x77)
    mirror_of(bare).attach(str(bare.tap_socket), "m.vda")
    load = bare.load(600)
    bare.monitor(command("block-export-add", id="reader", type="nbd", node_name=SOURCE, name="reader"))
    reader = f"nbd+unix:///reader?socket={bare.device_socket}"
    copy = subprocess.run(
        ["qemu-img", "convert", "-O", "raw", reader, str(bare.directory / "copy")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert copy.returncode == 0, copy.stderr
    assert load.poll() is None
    assert bare.alive()
    assert mirror_of(bare).inspect().healthy


def test_anothers_nbd_server_is_left_alone(bare):
    with pytest.raises(HypervisorRefused, match=f"in use by exports {DEVICE}"):
        export_start(bare.monitor, str(bare.directory / "reader.sock"), {"m.vda": SOURCE}, sleep=partial(time.sleep))
    bare.write(0, 4096)
