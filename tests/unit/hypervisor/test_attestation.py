"""Attached or not, from one round of queries; and the reader's export, against the model of QEMU."""

import pytest

from drctl.errors import HypervisorRefused
from drctl.hypervisor import reader_export
from drctl.hypervisor.attestation import ask, attest
from drctl.hypervisor.block_graph import MirrorName
from drctl.hypervisor.memory_qemu import MemoryQemu, MemoryTap
from drctl.hypervisor.mirror import Mirror
from drctl.hypervisor.reader_export import export_start, export_stop

NAMES = [MirrorName.of(2, "c0" * 16, number) for number in (0, 1)]
READY = [{"device": name.job, "status": "ready", "io-status": "ok"} for name in NAMES]
RUNNING = {"status": "running"}


def test_all_disks_ready_on_a_machine_that_is_here_is_attached():
    assert attest(NAMES, READY, RUNNING, {}).attached


@pytest.mark.parametrize("status", ["postmigrate", "inmigrate", "finish-migrate", "colo"])
def test_a_machine_that_lives_elsewhere_is_not_attached_though_its_job_says_ready(status):
    found = attest(NAMES, READY, {"status": status}, {})
    assert not found.attached
    assert "host" in found.reason or "COLO" in found.reason


@pytest.mark.parametrize("status", ["setup", "active", "postcopy-active", "pre-switchover", "device", "cancelling"])
def test_a_machine_on_the_move_is_not_attached(status):
    assert attest(NAMES, READY, RUNNING, {"status": status}).reason == "it is being moved to another host"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "none"])
def test_a_migration_of_the_past_does_not_count_against_a_machine_that_runs(status):
    assert attest(NAMES, READY, RUNNING, {"status": status}).attached


def test_one_missing_mirror_spoils_the_machine():
    assert attest(NAMES, READY[:1], RUNNING, {}).reason == "disk 1: its mirror is gone"


@pytest.mark.parametrize(
    ("status", "io_status"), [("standby", "failed"), ("standby", "ok"), ("concluded", "ok"), ("ready", "nospace")]
)
def test_one_sick_mirror_spoils_the_machine(status, io_status):
    jobs = [READY[0], {**READY[1], "status": status, "io-status": io_status}]
    assert attest(NAMES, jobs, RUNNING, {}).reason == f"disk 1: its mirror is {status}, io-status {io_status}"


def test_a_mirror_of_another_epoch_is_not_ours():
    stale = MirrorName.of(2, "c1" * 16, 0)
    jobs = [{"device": stale.job, "status": "ready", "io-status": "ok"}]
    assert not attest(NAMES[:1], jobs, RUNNING, {}).attached


def test_the_place_is_asked_after_the_jobs():
    qemu = MemoryQemu({"a": ("disk", 1 << 30)}, {"/tap": MemoryTap()})
    Mirror(qemu, NAMES[0], "disk").attach("/tap", "x")
    qemu.log.clear()
    assert ask(qemu, NAMES[:1]).attached
    assert qemu.done() == ["query-block-jobs", "query-status", "query-migrate"]


@pytest.fixture
def qemu():
    return MemoryQemu({"a": ("one", 1 << 30), "b": ("two", 1 << 30)})


def start(qemu, exports):
    slept = []
    export_start(qemu, "/reader.sock", exports, sleep=slept.append)
    return slept


def test_a_pass_exports_disks_read_only_and_leaves_nothing(qemu):
    assert start(qemu, {"m.vda": "one", "m.vdb": "two"}) == []
    added = [each["arguments"] for each in qemu.log if each["execute"] == "block-export-add"]
    assert [(each["name"], each["node-name"], each["writable"]) for each in added] == [
        ("m.vda", "one", False),
        ("m.vdb", "two", False),
    ]
    export_stop(qemu, "/reader.sock")
    assert not qemu.server
    assert not qemu.exports


def test_what_an_earlier_pass_left_is_replaced(qemu):
    start(qemu, {"m.vda": "one"})
    start(qemu, {"m.vdb": "two"})
    assert list(qemu.exports.values()) == ["two"]


def test_a_server_left_without_exports_is_taken_over_after_a_while(qemu):
    qemu.server = "/old"
    assert start(qemu, {"m.vda": "one"}) == [1.0]
    assert qemu.server == "/reader.sock"


def test_anothers_server_is_left_alone_and_named(qemu):
    qemu.server, qemu.exports["backup0"] = "/backup", "one"
    with pytest.raises(HypervisorRefused, match="exports backup0"):
        start(qemu, {"m.vda": "one"})
    assert (qemu.server, qemu.exports) == ("/backup", {"backup0": "one"})


def test_a_server_that_a_migration_has_just_started_is_left_alone(qemu):
    qemu.server, qemu.migration = "/migration", "setup"
    with pytest.raises(HypervisorRefused, match="a migration"):
        start(qemu, {"m.vda": "one"})
    assert qemu.server == "/migration"


def test_our_exports_on_anothers_server_end_alone(qemu):
    start(qemu, {"m.vda": "one"})
    qemu.exports["backup0"] = "two"
    export_stop(qemu, "/reader.sock")
    assert (qemu.server, qemu.exports) == ("/reader.sock", {"backup0": "two"})


def test_a_server_is_not_stopped_under_a_client_that_stays(qemu, monkeypatch):
    """QEMU would wait for it and hold up the guest."""
    start(qemu, {"m.vda": "one"})
    monkeypatch.setattr(reader_export, "connected", lambda socket: 1)
    slept = []
    with pytest.raises(HypervisorRefused, match=r"does not leave /reader\.sock"):
        export_stop(qemu, "/reader.sock", sleep=slept.append)
    assert sum(slept) > 10
    assert (qemu.server, qemu.exports) == ("/reader.sock", {})
    with pytest.raises(HypervisorRefused, match="does not leave"):
        start(qemu, {"m.vda": "one"})
    monkeypatch.setattr(reader_export, "connected", lambda socket: 0)
    start(qemu, {"m.vda": "one"})
    assert list(qemu.exports.values()) == ["one"]


def test_a_disk_that_is_not_there_leaves_no_server(qemu):
    with pytest.raises(HypervisorRefused):
        start(qemu, {"m.vdz": "three"})
    assert not qemu.server
