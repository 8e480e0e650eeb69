"""The mirror's logic against a model of QEMU; the same against real QEMU is in tests/integration/test_mirror.py."""

import pytest

from drctl.errors import HypervisorRefused, PreconditionFailed
from drctl.hypervisor.block_graph import MirrorName
from drctl.hypervisor.memory_qemu import MemoryQemu, MemoryTap
from drctl.hypervisor.mirror import Mirror, Pace, find
from drctl.model.extent import GiB

NAME = MirrorName.of(3, "ab" * 16, 7)
SOCKET = "/run/tap.sock"


class Time:
    """Owned by the test. `at` runs something when a moment is reached."""

    def __init__(self):
        self.now = 0.0
        self.at = []

    def sleep(self, seconds):
        self.now += seconds
        for moment, action in list(self.at):
            if moment <= self.now:
                self.at.remove((moment, action))
                action()

    @property
    def pace(self):
        return Pace(lambda: self.now, self.sleep)


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def tap():
    return MemoryTap()


@pytest.fixture(params=[False, True], ids=["qemu-7", "qemu-10"])
def qemu(tap, request):
    return MemoryQemu({"virtio-disk0": ("disk", GiB)}, {SOCKET: tap}, bitmap_at_filter=request.param)


@pytest.fixture
def mirror(qemu, time):
    return Mirror(qemu, NAME, "disk", pace=time.pace)


@pytest.fixture
def attached(mirror):
    mirror.attach(SOCKET, "m.vda")
    return mirror


def connected(qemu):
    return lambda: qemu.connected(NAME.node)


def no_sink():
    raise AssertionError("a live tap needs no sink")


def sent(qemu, execute):
    return [each["arguments"] for each in qemu.log if each["execute"] == execute]


def test_attach_is_ready_at_once_and_says_what_was_measured_to_be_safe(mirror, qemu):
    state = mirror.attach(SOCKET, "m.vda")
    assert state.healthy
    assert state.clean
    (job,) = sent(qemu, "blockdev-mirror")
    assert job["sync"] == "none"
    assert job["copy-mode"] == "write-blocking"
    assert job["on-target-error"] == "stop"
    assert job["granularity"] == 4096
    assert job["auto-dismiss"] is False
    assert job["job-id"] == "drctl-g3-abababab-d7"


def test_attach_waits_for_writes_that_passed_before_the_job_looked(mirror, qemu):
    mirror.attach(SOCKET, "m.vda")
    assert qemu.done().index("transaction") > qemu.done().index("blockdev-mirror")


def test_attach_adopts_the_mirror_of_an_earlier_supervisor(attached, qemu, time):
    again = Mirror(qemu, NAME, "disk", pace=time.pace)
    assert again.attach(SOCKET, "m.vda").healthy
    assert len(sent(qemu, "blockdev-mirror")) == 1


def test_attach_clears_away_a_connection_whose_supervisor_died_before_the_job(mirror, qemu, tap):
    qemu.nodes[NAME.node] = (SOCKET, tap.size)
    assert mirror.attach(SOCKET, "m.vda").healthy
    assert sent(qemu, "blockdev-del") == [{"node-name": NAME.node}]


def test_attach_to_a_tap_of_another_size_is_refused_and_leaves_nothing(mirror, qemu, tap):
    tap.size = GiB // 2
    with pytest.raises(PreconditionFailed, match="the tap was told"):
        mirror.attach(SOCKET, "m.vda")
    assert not qemu.nodes
    assert not qemu.jobs


def test_attach_beside_anothers_job_is_refused_and_leaves_nothing(attached, qemu, time):
    other = Mirror(qemu, MirrorName.of(4, "cd" * 16, 7), "disk", pace=time.pace)
    with pytest.raises(HypervisorRefused, match="busy"):
        other.attach(SOCKET, "m.vda")
    assert list(qemu.nodes) == [NAME.node]


def test_find_tells_our_mirrors_of_any_epoch(attached, qemu):
    assert [state.name for state in find(qemu)] == [NAME]


def test_a_dead_tap_leaves_standby_and_dirty_blocks(attached, qemu, tap):
    tap.die()
    qemu.write("disk")
    state = attached.inspect()
    assert (state.status, state.io_status, state.dirty) == ("standby", "failed", 4096)
    assert not state.healthy


def test_recover_sends_again_what_failed(attached, qemu, tap, time):
    tap.die()
    qemu.write("disk")
    time.at.append((1.0, tap.live_again))
    assert attached.recover(connected(qemu)).healthy
    assert attached.inspect().clean


def test_recover_tells_what_is_left_when_the_tap_stays_dead(attached, qemu, tap):
    tap.die()
    qemu.write("disk")
    with pytest.raises(HypervisorRefused, match=r"did not recover in time: status standby.*dirty 4096 bytes"):
        attached.recover(connected(qemu), timeout_seconds=3)


def test_recover_reconnects_an_idle_guest_that_noticed_nothing(attached, qemu, tap):
    tap.die()
    tap.live_again()
    assert attached.inspect().healthy  # QEMU does not know
    attached.recover(connected(qemu))
    assert connected(qemu)()


def test_order_is_proven_between_a_drain_and_the_reading_of_the_sequence(attached, qemu):
    qemu.log.clear()
    read = []

    def read_sequence():
        read.append(list(qemu.done()))
        return 41

    assert attached.prove_order(read_sequence, connected(qemu)) == 41
    before = read[0]
    looks = [number for number, name in enumerate(before) if name == "query-named-block-nodes"]
    drain = before.index("transaction")
    assert before.index("block-job-pause") < drain
    assert any(before.index("block-job-pause") < look < drain for look in looks), "clean before the drain"
    assert looks[-1] > drain, "clean after the drain"


def test_a_proof_leaves_the_job_running(attached, qemu):
    attached.prove_order(lambda: 1, connected(qemu))
    assert attached.inspect().healthy


def test_a_write_that_fails_while_order_is_proven_starts_the_proof_again(attached, qemu, tap):
    """The tap dies at the first drain: what was in flight then is in the bitmap after it."""
    plain, drains = qemu._do_transaction, []

    def drain(actions):
        drains.append(1)
        if len(drains) == 1:
            tap.die()
            qemu.write("disk")
            tap.live_again()
        return plain(actions)

    qemu._do_transaction = drain
    assert attached.prove_order(lambda: len(drains), connected(qemu)) == 2


def test_order_is_not_proven_for_a_dead_connection_that_an_idle_guest_does_not_notice(attached, qemu, tap):
    tap.die()
    with pytest.raises(HypervisorRefused, match="did not connect to the tap in time"):
        attached.prove_order(lambda: 1, connected(qemu), timeout_seconds=2)


def test_order_is_proven_after_the_tap_came_back_to_an_idle_guest(attached, qemu, tap):
    tap.die()
    tap.live_again()
    assert attached.prove_order(lambda: 9, connected(qemu)) == 9


def test_order_of_a_mirror_that_is_gone_is_refused(attached, qemu):
    qemu.jobs.clear()
    with pytest.raises(HypervisorRefused, match="is gone"):
        attached.prove_order(lambda: 1)


def test_detach_is_soft_and_leaves_nothing(attached, qemu):
    attached.detach(no_sink)
    assert not qemu.jobs
    assert not qemu.nodes
    assert all(cancel == {"device": NAME.job, "force": False} for cancel in sent(qemu, "block-job-cancel"))


def test_detach_of_what_is_not_there_does_nothing(mirror, qemu):
    mirror.detach(no_sink)
    assert set(qemu.done()) <= {"query-named-block-nodes", "query-block-jobs"}


def test_detach_with_a_dead_tap_asks_once_for_a_sink(attached, qemu, tap):
    tap.die()
    qemu.write("disk")
    asked = []

    def start_sink():
        asked.append(1)
        tap.live_again()

    attached.detach(start_sink)
    assert asked == [1]
    assert not qemu.jobs
    assert not any(cancel["force"] for cancel in sent(qemu, "block-job-cancel"))


def test_detach_that_can_not_end_softly_gives_up_and_never_forces(attached, qemu, tap):
    tap.die()
    qemu.write("disk")
    with pytest.raises(HypervisorRefused, match="did not detach in time"):
        attached.detach(lambda: None, timeout_seconds=5)
    assert qemu.jobs
    assert not any(cancel["force"] for cancel in sent(qemu, "block-job-cancel"))


def test_detach_sweeps_up_a_job_that_ended_by_itself(attached, qemu):
    qemu.jobs[NAME.job].status = "concluded"
    attached.detach(no_sink)
    assert not qemu.jobs
    assert not qemu.nodes
