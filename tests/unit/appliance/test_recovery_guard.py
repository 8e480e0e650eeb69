"""The guard: views are restarted, guests resumed, scratch bounded, and nobody else's pause undone."""

from __future__ import annotations

import itertools

import pytest

from drctl.appliance.recovery.guard import EAGER_RESUMES, LONGEST_DELAY
from drctl.appliance.recovery.memory import MemoryWorld
from drctl.appliance.recovery.recoveries import Recovery
from drctl.appliance.recovery.state import RecoveryFiles, RecoveryPhase
from drctl.model.extent import GiB, MiB
from drctl.model.machine import MachineState


@pytest.fixture
def world():
    return MemoryWorld()


@pytest.fixture
def recovery(world, tmp_path):
    return Recovery(world.tools(), RecoveryFiles(tmp_path), "boot", background=lambda _, action: action(), parallel=1)


def start(recovery, **params):
    return recovery.test_start({"group": "erp", **params}, lambda _: None)["id"]


def look(recovery, world, seconds):
    """Supervise at the supervisor's pace for some seconds."""
    for _ in range(int(seconds / 0.25)):
        world.clock.sleep(0.25)
        recovery.supervise()


def pause(world, *, by_error):
    for domain in world.hypervisor.domains.values():
        domain.state, domain.by_error = MachineState.PAUSED, by_error


def states(world):
    return {domain.state for domain in world.hypervisor.domains.values()}


def test_a_dead_view_is_restarted_and_its_guests_resumed_within_two_seconds(recovery, world):
    identity = start(recovery)
    look(recovery, world, 3)
    world.views.running.clear()
    pause(world, by_error=True)
    look(recovery, world, 2)
    assert world.views.running == {identity}
    assert states(world) == {MachineState.RUNNING}
    (listed,) = recovery.test_list({}, lambda _: None)
    assert listed["view_restarts"] == 1
    assert [m["stalls"] for m in listed["machines"]] == [1, 1]


def test_a_guest_that_the_operator_paused_stays_paused(recovery, world):
    start(recovery)
    world.views.running.clear()
    pause(world, by_error=False)
    look(recovery, world, 5)
    assert world.views.running
    assert states(world) == {MachineState.PAUSED}


def test_guests_are_resumed_again_and_again_but_not_in_haste(recovery, world):
    """A full file system or a damaged frame pauses the guest anew each time."""
    start(recovery, machines=["web"])
    tries = []
    world.hypervisor.resume = lambda name: tries.append(world.clock.now)
    pause(world, by_error=True)
    look(recovery, world, 60)
    assert EAGER_RESUMES + 5 <= len(tries) <= EAGER_RESUMES + 12
    assert max(b - a for a, b in itertools.pairwise(tries)) <= LONGEST_DELAY + 1


def test_each_death_of_a_view_is_met_with_the_same_haste(recovery, world):
    """QEMU needs several resumes to reconnect; what an earlier death took must not slow down the next."""
    start(recovery, machines=["web"])
    lazy = []
    real = world.hypervisor.resume

    def resume(name):
        lazy.append(name)
        if len(lazy) % 5 == 0:
            real(name)

    world.hypervisor.resume = resume
    for _ in range(4):
        look(recovery, world, 3)
        world.views.running.clear()
        pause(world, by_error=True)
        look(recovery, world, 2)
        assert states(world) == {MachineState.RUNNING}


def test_a_view_that_cannot_start_is_tried_with_patience_and_the_guests_come_back(recovery, world):
    start(recovery)
    tries = []
    real = world.views.ensure
    world.views.ensure = lambda record: (tries.append(world.clock.now), real(record))[1]
    world.views.running.clear()
    world.views.refuse = True
    pause(world, by_error=True)
    look(recovery, world, 30)
    assert 5 <= len(tries) <= 10
    world.views.refuse = False
    look(recovery, world, LONGEST_DELAY + 12)
    assert states(world) == {MachineState.RUNNING}


def test_a_test_that_uses_up_its_scratch_ends_with_that_reason(recovery, world):
    identity = start(recovery, scratch_limit=GiB)
    for path in world.images.files:
        world.images.sizes[path] = 400 * MiB
    look(recovery, world, 2)
    (listed,) = recovery.test_list({}, lambda _: None)
    assert listed["id"] == identity
    assert listed["state"] == "stopped"
    assert listed["reason"] == "scratch is used up: 1.2 GiB of 1.0 GiB"
    assert world.images.files == {}
    assert world.hypervisor.domains == {}
    assert world.stores.pins == {}


def test_a_test_ends_before_the_file_system_of_the_store_is_full(recovery, world):
    start(recovery)
    for path in world.images.files:
        world.images.sizes[path] = MiB
    world.images.space = GiB // 2
    look(recovery, world, 2)
    (listed,) = recovery.test_list({}, lambda _: None)
    assert listed["reason"] == "only 512.0 MiB are free at /home/scratch, 1.0 GiB are kept"


def test_a_failover_is_never_ended_by_the_guard(recovery, world):
    params = {"group": "erp", "source_is_down": "fire", "confirmed": True}
    recovery.reigns.failover(params, lambda _: None)
    for path in world.images.files:
        world.images.sizes[path] = 100 * GiB
    world.images.space = 0
    look(recovery, world, 3)
    assert states(world) == {MachineState.RUNNING}


def test_a_committed_failover_has_no_view_to_restart(recovery, world):
    recovery.reigns.failover({"group": "erp", "source_is_down": "fire", "confirmed": True}, lambda _: None)
    result = recovery.reigns.commit({"group": "erp"}, lambda _: None)
    assert result["phase"] == RecoveryPhase.COMMITTED
    look(recovery, world, 3)
    assert world.views.running == set()


def test_a_view_restarted_while_its_test_is_ended_does_not_stay(world, tmp_path):
    """The restart runs in a thread of its own; the end of the test may overtake it."""
    waiting = []

    def later(name, action):
        waiting.append(action)

    recovery = Recovery(world.tools(), RecoveryFiles(tmp_path), "boot", background=later, parallel=1)
    identity = start(recovery)
    real = world.views.ensure

    def ensure(record):
        recovery.test_stop({"id": identity}, lambda _: None)
        return real(record)

    world.views.running.clear()
    world.views.ensure = ensure
    world.clock.sleep(1)
    recovery.supervise()
    assert len(waiting) == 1
    recovery.supervise()
    assert len(waiting) == 1
    waiting[0]()
    assert world.views.running == set()
    assert recovery.test_list({}, lambda _: None) == []
