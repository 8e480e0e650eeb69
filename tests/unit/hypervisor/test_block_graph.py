"""Names, and what QEMU's answers mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drctl.errors import NotFound
from drctl.hypervisor.block_graph import (
    MirrorName,
    dirty_bytes,
    filters,
    found_mirrors,
    has_filter,
    look,
    source_node,
    virtual_size,
)

NAME = MirrorName.of(1, "0123456789abcdef" * 2, 0)


@given(st.integers(1, 10**6), st.integers(0, 9999), st.text("0123456789abcdef", min_size=32, max_size=32))
def test_a_name_survives_the_way_through_qemu_and_fits_its_limit(generation, disk, epoch):
    name = MirrorName.of(generation, epoch, disk)
    assert MirrorName.parse(name.job) == name
    assert len(name.node) <= 31


def test_a_name_that_qemu_would_refuse_is_refused_here():
    with pytest.raises(ValueError, match="31 characters"):
        MirrorName.of(2**31, "0" * 32, 10**5)


@pytest.mark.parametrize(
    "job", ["", "drive-virtio-disk0", "drctl-g1-0123-d0", "xdrctl-g1-01234567-d0", "drctl-g1-01234567-d0-n"]
)
def test_a_foreign_job_is_nobodys(job):
    assert MirrorName.parse(job) is None


def test_a_job_that_is_not_there_is_not_present():
    state = look(NAME, [{"device": "other", "status": "ready"}], 0)
    assert not state.present
    assert not state.healthy
    assert not state.clean


@pytest.mark.parametrize(
    ("status", "io_status", "healthy"),
    [
        ("ready", "ok", True),
        ("standby", "failed", False),
        ("standby", "ok", False),
        ("ready", "failed", False),
        ("concluded", "ok", False),
    ],
)
def test_only_ready_and_ok_is_healthy(status, io_status, healthy):
    assert look(NAME, [{"device": NAME.job, "status": status, "io-status": io_status}], 0).healthy is healthy


def test_found_mirrors_leave_other_jobs_out():
    jobs = [{"device": "drive-virtio-disk0", "status": "ready"}, {"device": NAME.job, "status": "standby"}]
    assert [state.name for state in found_mirrors(jobs)] == [NAME]


def test_the_nameless_bitmap_of_the_source_is_the_mirrors():
    nodes = [
        {"node-name": "other", "dirty-bitmaps": [{"count": 77}]},
        {"node-name": "disk", "dirty-bitmaps": [{"name": "backup", "count": 1 << 20}, {"count": 8192}]},
    ]
    assert dirty_bytes(nodes, "disk") == 8192


def test_the_bitmap_may_be_at_the_filter_above_the_source():
    nodes = [
        {"node-name": "#block7", "drv": "mirror_top", "dirty-bitmaps": [{"count": 4096}]},
        {"node-name": "#block8", "drv": "mirror_top", "dirty-bitmaps": [{"count": 1 << 20}]},
        {"node-name": "disk"},
    ]
    statistics = [
        {"node-name": "disk"},
        {"node-name": "#block7", "parent": {"node-name": "disk"}},
        {"node-name": "#block8", "parent": {"node-name": "other"}},
        {"node-name": "qcow2", "parent": {"node-name": "file"}},
    ]
    assert has_filter(nodes)
    assert filters(statistics, "disk") == ["#block7"]
    assert dirty_bytes(nodes, "disk") is None
    assert dirty_bytes(nodes, *filters(statistics, "disk")) == 4096
    assert not has_filter(nodes[2:])


@pytest.mark.parametrize(
    "nodes", [[], [{"node-name": "disk"}], [{"node-name": "disk", "dirty-bitmaps": [{"name": "b", "count": 0}]}]]
)
def test_without_a_nameless_bitmap_nothing_is_known_to_be_clean(nodes):
    assert dirty_bytes(nodes, "disk") is None
    assert not look(
        NAME, [{"device": NAME.job, "status": "ready", "io-status": "ok"}], dirty_bytes(nodes, "disk")
    ).clean


def test_virtual_size_of_a_missing_node_is_not_found():
    assert virtual_size([{"node-name": "a", "image": {"virtual-size": 512}}], "a") == 512
    with pytest.raises(NotFound):
        virtual_size([], "a")


@pytest.mark.parametrize(
    ("alias", "qdev"),
    [
        ("virtio-disk0", "/machine/peripheral/virtio-disk0/virtio-backend"),
        ("scsi0-0-0-1", "scsi0-0-0-1"),
        ("sata0-0-0", "sata0-0-0"),
        ("ua-data", "/machine/peripheral/ua-data/virtio-backend"),
    ],
)
def test_a_devices_root_node_is_found_by_its_alias(alias, qdev):
    devices = [{"qdev": "/machine/peripheral/virtio-disk01/virtio-backend", "inserted": {"node-name": "wrong"}}]
    devices.append({"qdev": qdev, "inserted": {"node-name": "libvirt-1-format"}})
    assert source_node(devices, alias) == "libvirt-1-format"


def test_an_unknown_alias_is_not_found():
    with pytest.raises(NotFound):
        source_node([{"device": "floppy0"}], "virtio-disk0")
