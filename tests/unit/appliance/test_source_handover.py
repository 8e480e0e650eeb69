"""The source's half of a switchover against guests and a stream in memory, interrupted wherever it can be."""

from __future__ import annotations

import pytest

from drctl.appliance.source.handover import Handing, begin, why_not
from drctl.appliance.source.handover_record import FinalMark, HandoverFiles, HandoverPhase
from drctl.errors import HypervisorRefused, NotFound, PreconditionFailed, StepFailed, WrongPhase
from drctl.model.machine import MachineState
from drctl.model.move import OnTimeout
from drctl.model.phase import Phase

RUNNING, OFF, PAUSED = MachineState.RUNNING, MachineState.SHUT_OFF, MachineState.PAUSED


class Killed(BaseException):
    pass


class Clock:
    now = 1000.0

    def time(self):
        return self.now

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class World:
    """Guests, their stream, and the protection's state; it outlives the supervisor. Each effect may be the last."""

    def __init__(self, directory):
        self.clock = Clock()
        self.guests = {"db": RUNNING, "web": RUNNING}
        self.deaf = set()
        self.log = []
        self.die_at = 0
        self.phase = Phase.LIVE
        self.generation = 1
        self.epoch = "e1"
        self.finished = False
        self.written = 7
        self.marks = 0
        self.images = {"db.vda": (10, 1, 1), "web.vda": (10, 2, 2)}
        self.trouble = []
        self.clean = None
        self.files = HandoverFiles(directory)

    def effect(self, what):
        self.log.append(what)
        if len(self.log) == self.die_at:
            raise Killed(what)

    # the host
    def state(self, name):
        if name not in self.guests:
            raise NotFound("machine", name)
        return self.guests[name]

    def shutdown(self, name):
        self.effect(f"shutdown {name}")
        if name not in self.deaf:
            self.guests[name] = OFF

    def suspend(self, name):
        self.effect(f"suspend {name}")
        self.guests[name] = PAUSED

    def resume(self, name):
        self.effect(f"resume {name}")
        self.guests[name] = RUNNING

    def destroy(self, name):
        self.effect(f"destroy {name}")
        self.guests[name] = OFF

    def start(self, name):
        self.effect(f"start {name}")
        assert self.phase is not Phase.FAILED_OVER, "a superseded guest must not be started"
        self.guests[name] = RUNNING

    # the group
    def machines(self):
        return list(self.guests)

    def why_not_ready(self):
        return list(self.trouble)

    def drain(self, timeout_seconds):
        assert all(state is not RUNNING for state in self.guests.values()), "a running guest writes on"
        self.finished = True
        self.marks += 1
        self.effect("drain")
        return FinalMark(100 + self.marks, 1.0, self.written, self.epoch)

    def undrain(self):
        self.effect("undrain")
        self.finished = False

    def published(self):
        return self.written

    def stamps(self):
        return dict(self.images)

    def give_away(self, reason):
        self.effect("give away")
        self.phase, self.epoch = Phase.FAILED_OVER, ""

    def take_back(self, generation, clean):
        self.effect("take back")
        self.phase, self.generation, self.clean, self.epoch, self.finished = (
            Phase.LIVE,
            generation,
            dict(clean),
            "e2",
            False,
        )

    def handing(self, **params):
        record = begin(self, self, self.files, "erp", params)
        return Handing(self, self, self.files, record, self.clock)

    def left(self):
        record = self.files.load("erp")
        return {
            "guests": dict(self.guests),
            "phase": self.phase,
            "finished": self.finished,
            "record": record.phase if record else None,
        }


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "handovers")


def taken_back(world, generation=3):
    Handing(world, world, world.files, world.files.load("erp"), world.clock).take_back(generation, lambda: None)


def test_guests_go_in_reverse_order_then_the_mark_then_the_reign(world):
    handing = world.handing()
    handing.hand_over()
    assert world.log == ["shutdown web", "shutdown db", "drain", "give away"]
    record = world.files.load("erp")
    assert (record.phase, record.generation, record.final.number) == (HandoverPhase.HANDED_OVER, 2, 101)
    assert record.as_dict()["final"] == {"number": 101, "time": 1.0, "sequence": 7, "epoch": "e1"}


def test_given_again_it_does_nothing(world):
    world.handing().hand_over()
    done = list(world.log)
    world.handing().hand_over()
    assert world.log == done


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: w.guests.update(db=OFF), "db is shut-off"),
        (lambda w: w.guests.update(db=PAUSED), "db is paused"),
        (lambda w: setattr(w, "phase", Phase.CATCHING_UP), "the group is catching-up"),
        (lambda w: w.trouble.append("the order of writes is not proven"), "the order of writes is not proven"),
    ],
)
def test_it_is_refused_unless_all_is_well(world, spoil, reason):
    spoil(world)
    assert reason in why_not(world, world)
    with pytest.raises(PreconditionFailed, match=reason):
        world.handing()
    assert world.log == []
    assert world.files.load("erp") is None


def test_a_guest_that_stays_on_calls_it_off_and_the_others_run_again(world):
    world.deaf.add("db")
    with pytest.raises(StepFailed, match=r"db did not power off within 60 s; the switchover was called off"):
        world.handing(shutdown_seconds=60).hand_over()
    assert world.left() == {
        "guests": {"db": RUNNING, "web": RUNNING},
        "phase": Phase.LIVE,
        "finished": False,
        "record": None,
    }
    assert world.log.count("shutdown db") == 4, "pressed again each 15 s"
    assert "drain" not in world.log


def test_a_guest_that_is_gone_before_its_shutdown_has_returned_is_off(world):
    real = world.shutdown

    def shutdown(name):
        real(name)
        raise HypervisorRefused("domain is not running")

    world.shutdown = shutdown
    world.handing().hand_over()
    assert world.files.load("erp").phase is HandoverPhase.HANDED_OVER


def test_a_guest_that_stays_on_may_be_taken_as_it_stands(world):
    world.deaf.add("db")
    world.handing(shutdown_seconds=60, on_timeout="suspend").hand_over()
    order = world.log
    assert order.index("suspend db") < order.index("drain") < order.index("destroy db") < order.index("give away")
    assert world.files.load("erp").suspended == ["db"]


def test_without_a_final_mark_it_is_called_off(world):
    handing = world.handing()
    world.trouble.append("the other site is not reached")
    with pytest.raises(StepFailed, match="no final mark could be made within 60 s: the other site is not reached"):
        handing.hand_over()
    assert world.left()["guests"] == {"db": RUNNING, "web": RUNNING}
    assert world.left()["record"] is None


def test_a_write_after_the_final_mark_calls_it_off(world):
    handing = world.handing()
    real = world.drain

    def drain(timeout_seconds):
        mark = real(timeout_seconds)
        world.written += 1
        return mark

    world.drain = drain
    with pytest.raises(StepFailed, match="something was written after the final mark"):
        handing.hand_over()
    assert world.left()["finished"] is False


def test_a_guest_started_by_somebody_calls_it_off(world):
    handing = world.handing()
    real = world.drain

    def drain(timeout_seconds):
        mark = real(timeout_seconds)
        world.guests["web"] = RUNNING
        return mark

    world.drain = drain
    with pytest.raises(StepFailed, match="web was started by somebody"):
        handing.hand_over()


def test_taken_back_with_images_unchanged_needs_no_pass(world):
    world.handing().hand_over()
    taken_back(world)
    assert world.clean == world.images
    assert world.generation == 3
    assert world.left() == {
        "guests": {"db": RUNNING, "web": RUNNING},
        "phase": Phase.LIVE,
        "finished": False,
        "record": None,
    }


def test_taken_back_with_an_image_that_changed_needs_one(world):
    world.handing().hand_over()
    world.images["db.vda"] = (10, 99, 1)
    taken_back(world)
    assert world.clean == {}


def test_guests_may_be_started_before_they_are(world):
    """What refuses superseded guests must know first that these are so no more."""
    world.handing().hand_over()
    Handing(world, world, world.files, world.files.load("erp"), world.clock).take_back(
        3, lambda: world.log.append("unguard")
    )
    assert world.log.index("take back") < world.log.index("unguard") < world.log.index("start db")


def test_one_guest_that_does_not_start_keeps_no_other_down(world):
    world.handing().hand_over()
    real = world.start

    def start(name):
        if name == "db":
            raise HypervisorRefused("no memory")
        real(name)

    world.start = start
    with pytest.raises(StepFailed, match="db: no memory"):
        taken_back(world)
    assert world.guests["web"] is RUNNING
    world.start = real
    taken_back(world)
    assert world.left()["record"] is None


def test_a_switchover_of_a_group_that_comes_back_is_refused(world):
    world.handing().hand_over()
    record = world.files.load("erp")
    record.phase = HandoverPhase.TAKING_BACK
    world.files.save(record)
    with pytest.raises(WrongPhase, match="being taken back"):
        world.handing()


def _killed_everywhere(tmp_path, prepare, act, go_on):
    """Die at each effect; the same command again must come to the same end."""
    world = World(tmp_path / "whole")
    prepare(world)
    before = len(world.log)
    act(world)
    effects, end = len(world.log) - before, world.left()
    for number in range(1, effects + 1):
        world = World(tmp_path / str(number))
        prepare(world)
        world.die_at = len(world.log) + number
        with pytest.raises(Killed):
            act(world)
        world.die_at = 0
        go_on(world)
        assert world.left() == end, (number, world.log)
    return effects


def test_handing_over_killed_at_every_effect_goes_on(tmp_path):
    act = lambda world: world.handing().hand_over()  # noqa: E731
    assert _killed_everywhere(tmp_path, lambda world: None, act, act) == 4


def test_handing_over_a_guest_that_was_suspended_killed_at_every_effect_goes_on(tmp_path):
    prepare = lambda world: world.deaf.add("db")  # noqa: E731
    act = lambda world: world.handing(shutdown_seconds=20, on_timeout=OnTimeout.SUSPEND).hand_over()  # noqa: E731
    assert _killed_everywhere(tmp_path, prepare, act, act) >= 6


def test_taking_back_killed_at_every_effect_goes_on(tmp_path):
    assert _killed_everywhere(tmp_path, lambda world: world.handing().hand_over(), taken_back, taken_back) == 3


def test_killed_before_the_final_mark_it_may_be_called_off(tmp_path):
    for number in (1, 2, 3):
        world = World(tmp_path / str(number))
        world.die_at = number
        with pytest.raises(Killed):
            world.handing().hand_over()
        world.die_at = 0
        world.handing().call_off()
        assert world.left()["guests"] == {"db": RUNNING, "web": RUNNING}
        assert world.left()["record"] is None
        assert not world.finished
