"""Handovers as control methods: one at a time, going on without their caller, taken back when the other side gave back."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from drctl.appliance.source import handover_service
from drctl.appliance.source.handover_record import HandoverPhase
from drctl.appliance.source.handover_service import HandoverService
from drctl.errors import Locked, NotFound, Refused, StepFailed
from drctl.model.machine import MachineState
from drctl.model.phase import Phase
from drctl.replication.reign import Answer, Reign
from tests.unit.appliance.test_source_handover import World

RUNNING = MachineState.RUNNING


class Service(HandoverService):
    """With a world in memory instead of protections."""

    def __init__(self, directory):
        self.world = World(directory / "handovers")
        self.answer = Answer(Reign.UNKNOWN)
        self.unguarded_at = []

        def find(name):
            if name != "erp":
                raise NotFound("group", name)
            return SimpleNamespace(state=None)

        super().__init__(
            SimpleNamespace(path=directory),
            self.world,
            find,
            lambda: self.unguarded_at.append(len(self.world.log)),
            lambda state: self.answer,
        )

    def _group(self, name):
        self._find(name)
        return self.world

    def do(self, method, **params):
        return getattr(self, method)({"group": "erp", **params}, lambda _: None)

    def look_once(self):
        """A look, and what it began is done."""
        self._due = 0.0
        self.look()
        for thread in threading.enumerate():
            if thread.name == "handover-erp":
                thread.join(10)


@pytest.fixture
def service(tmp_path, monkeypatch):
    made = Service(tmp_path)
    monkeypatch.setattr(handover_service, "WallTimer", lambda: made.world.clock)
    return made


def test_a_plan_changes_nothing_and_tells_what_is_in_the_way(service):
    service.world.guests["db"] = MachineState.SHUT_OFF
    assert service.do("plan")["reasons"] == ["db is shut-off"]
    assert service.world.log == []
    with pytest.raises(NotFound):
        service.plan({"group": "hr"}, lambda _: None)


def test_handed_over_and_taken_back(service):
    assert service.do("run")["phase"] == HandoverPhase.HANDED_OVER
    assert service.told("erp")["final"]["number"] == 101
    told = service.do("undo", generation=3)
    assert (told["generation"], told["started"]) == (3, ["db", "web"])
    assert service.world.guests == {"db": RUNNING, "web": RUNNING}
    assert service.told("erp") is None
    assert service.unguarded_at == [service.world.log.index("start db")]


def test_steps_are_told(service):
    told = []
    service.run({"group": "erp"}, told.append)
    assert [(step["step"], step["machine"], step["state"]) for step in told if step["step"] != "waiting"] == [
        ("machine", "web", "shutting down"),
        ("machine", "web", "off"),
        ("machine", "db", "shutting down"),
        ("machine", "db", "off"),
        ("final", "", "done"),
        ("handed-over", "", "done"),
    ]


def test_it_comes_back_under_a_higher_generation_alone(service):
    service.do("run")
    for generation in (0, 1):
        with pytest.raises(Refused, match="generation above 1"):
            service.do("undo", generation=generation)
    assert service.world.phase is Phase.FAILED_OVER


def test_undo_where_nothing_was_handed_over_does_nothing(service):
    assert service.do("undo", generation=9)["started"] == []
    assert service.world.log == []


def test_undo_after_a_failover_starts_no_machine_that_we_did_not_stop(service):
    service.world.phase, service.world.epoch = Phase.FAILED_OVER, ""
    service.world.guests["db"] = MachineState.SHUT_OFF
    assert service.do("undo", generation=3)["generation"] == 3
    assert service.world.guests["db"] is MachineState.SHUT_OFF


def test_a_caller_that_goes_away_stops_nothing(service):
    class Gone(Exception):
        pass

    def leave(report):
        raise Gone

    with pytest.raises(Gone):
        service.run({"group": "erp"}, leave)
    for thread in threading.enumerate():
        if thread.name == "handover-erp":
            thread.join(10)
    assert service.told("erp")["phase"] == HandoverPhase.HANDED_OVER


def test_two_at_once_are_one_too_many(service):
    def during(report):
        with pytest.raises(Locked):
            service.do("run")

    service.world.shutdown = lambda name, real=service.world.shutdown: (during(name), real(name))
    service.do("run")


def test_an_error_reaches_the_caller(service):
    service.world.deaf.add("db")
    with pytest.raises(StepFailed, match="called off"):
        service.do("run", shutdown_seconds=1)


@pytest.mark.parametrize(
    ("answer", "back"),
    [
        (Answer(Reign.UNKNOWN, "no route"), False),
        (Answer(Reign.ELSEWHERE, "failed over"), False),
        (Answer(Reign.HERE, generation=1), False),  # not recovered there yet
        (Answer(Reign.HERE, generation=0), False),  # an older receiver, that does not tell
        (Answer(Reign.HERE, generation=3), True),
    ],
)
def test_what_was_given_back_by_the_clock_is_taken_back(service, answer, back):
    service.do("run")
    service.answer = answer
    service.look_once()
    assert (service.world.guests == {"db": RUNNING, "web": RUNNING}) is back
    assert (service.told("erp") is None) is back
    assert service.world.generation == (3 if back else 1)


def test_nobody_is_asked_while_nothing_is_handed_over(service):
    service._asking = lambda state: pytest.fail("asked")
    service.look_once()


@pytest.mark.parametrize("phase", [HandoverPhase.STOPPING, HandoverPhase.FINAL, HandoverPhase.TAKING_BACK])
def test_a_new_supervisor_goes_on(service, phase):
    service.do("run")
    record = service.world.files.load("erp")
    record.phase = phase
    if phase is HandoverPhase.STOPPING:
        service.world.phase, service.world.epoch = Phase.LIVE, "e1"
    service.world.files.save(record)
    service.resume(["erp", "hr"])
    for thread in threading.enumerate():
        if thread.name == "handover-erp":
            thread.join(10)
    expected = None if phase is HandoverPhase.TAKING_BACK else HandoverPhase.HANDED_OVER
    told = service.told("erp")
    assert (told["phase"] if told else None) == expected
