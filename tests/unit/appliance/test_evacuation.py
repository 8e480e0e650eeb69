"""A host's maintenance: what is paused, shut down and taken up again, interrupted wherever it can be."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from drctl.appliance.source.evacuation import Evacuations, in_the_way
from drctl.appliance.source.evacuation_record import EvacuationFile, EvacuationPhase
from drctl.appliance.source.group_state import Desired, DiskState, GroupState
from drctl.errors import HypervisorRefused, NotFound, PreconditionFailed, Refused, WrongPhase
from drctl.model.group import GroupSpec
from drctl.model.machine import MachineState
from drctl.model.phase import Phase
from drctl.replication.reign import Answer, Reign

RUNNING, OFF = MachineState.RUNNING, MachineState.SHUT_OFF


class Killed(BaseException):
    pass


class World:
    """Two groups of two machines each, as an appliance has them. Each effect may be the last before a crash."""

    def __init__(self, home) -> None:
        self.home = home
        self.now = 1000.0
        self.log: list[str] = []
        self.die_at = 0
        self.guests = dict.fromkeys(("db", "web", "mail", "proxy"), RUNNING)
        self.deaf: set[str] = set()
        self.held = True
        self.answer = Answer(Reign.HERE)
        self.busy: list[str] = []
        self.refusing: set[str] = set()
        self.states = {
            name: GroupState(
                GroupSpec(name, "alpha", "beta", machines),
                desired=Desired.PROTECTED,
                phase=Phase.LIVE,
                disks=tuple(DiskState(i, m, "vda", 1, pass_needed=False) for i, m in enumerate(machines)),
            )
            for name, machines in (("shop", ("db", "web")), ("post", ("mail", "proxy")))
        }
        self.restart()

    def restart(self) -> Evacuations:
        self.file = EvacuationFile(self.home)
        self.host = Evacuations(self.file, "a1", self, self, lambda: self.busy, self)
        return self.host

    def effect(self, what: str) -> None:
        self.log.append(what)
        if len(self.log) == self.die_at:
            raise Killed(what)

    def do(self, method: str, **params):
        return getattr(self.host, method)(params, lambda _: None)

    # the clock
    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    # the groups
    def names(self) -> list[str]:
        return sorted(self.states)

    def state(self, name: str):
        if name in self.guests:
            return self.guests[name]
        if name not in self.states:
            raise NotFound("group", name)
        return self.states[name]

    def change(self, name: str, **changes) -> None:
        self.states[name] = msgspec.structs.replace(self.states[name], **changes)

    def reigns(self, state) -> Answer:
        return self.answer

    def superseded(self, name: str, reason: str) -> None:
        self.change(name, phase=Phase.FAILED_OVER, desired=Desired.STOPPED)

    def booted(self, name: str) -> None:
        self.log.append(f"booted {name}")

    def replicate_pause(self, params, progress):
        self.effect(f"pause {params['group']}")
        if params["group"] in self.refusing:
            raise WrongPhase(f"{params['group']} is syncing")
        self.change(params["group"], desired=Desired.PAUSED, phase=Phase.PAUSED)

    def replicate_start(self, params, progress):
        self.effect(f"start {params['group']}")
        self.change(params["group"], desired=Desired.PROTECTED, phase=Phase.LIVE)

    # the guests
    def shutdown(self, name: str) -> None:
        self.effect(f"off {name}")
        if name in self.deaf:
            return
        self.guests[name] = OFF
        if self.held:
            for group, state in self.states.items():
                disks = [
                    msgspec.structs.replace(d, left=(1, 1, 1), held=7) if d.machine == name else d for d in state.disks
                ]
                self.change(group, disks=tuple(disks))

    def start(self, name: str) -> None:
        self.effect(f"on {name}")
        if name in self.refusing:
            raise HypervisorRefused("no memory")
        self.guests[name] = RUNNING


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def test_plain_pauses_and_touches_no_guest(world) -> None:
    world.change("post", desired=Desired.STOPPED, phase=Phase.UNPROTECTED)
    done = world.do("evacuate", by="ann")
    assert world.log == ["pause shop"]
    assert done["evacuation"]["phase"] == "evacuated"
    assert world.host.told("shop") == {"host": "a1", "since": 1000.0, "by": "ann", "phase": "evacuated"}
    assert world.host.told("post") is None
    back = world.do("come_back")
    assert back["returned"] == ["shop"]
    assert world.file.load() is None
    assert world.log == ["pause shop", "start shop"]
    assert world.do("come_back")["returned"] == []


def test_with_shutdown_guests_leave_in_reverse_and_come_back_in_order(world) -> None:
    world.guests["proxy"] = OFF
    world.do("evacuate", shutdown=True)
    assert world.log == ["off mail", "pause post", "off web", "off db", "pause shop"]
    assert world.file.shut_down() == {"post", "shop"}
    world.log.clear()
    world.do("come_back")
    assert world.log == ["start post", "booted post", "on mail", "start shop", "booted shop", "on db", "on web"]
    assert world.guests["proxy"] is OFF


def test_killed_anywhere_it_goes_on_and_all_returns(tmp_path) -> None:
    """Whatever the step at which the supervisor dies: the command given again ends the same, and so does the return."""
    most = 8
    for at in range(1, most + 1):
        home = tmp_path / str(at)
        home.mkdir()
        world = World(home)
        world.die_at = at
        try:
            world.do("evacuate", shutdown=True)
            world.do("come_back")
        except Killed:
            world.restart()
        record = world.file.load()
        if record is not None and record.phase is not EvacuationPhase.RETURNING:
            assert world.do("evacuate", shutdown=True)["failed"] == {}
            assert all(state.desired is Desired.PAUSED for state in world.states.values())
            assert set(world.guests.values()) == {OFF}
        world.do("come_back")
        assert world.file.load() is None
        assert set(world.guests.values()) == {RUNNING}, at
        assert all(state.phase is Phase.LIVE for state in world.states.values()), at


def test_a_deaf_guest_keeps_only_its_group(world) -> None:
    world.deaf.add("web")
    done = world.do("evacuate", shutdown=True, shutdown_seconds=40)
    assert done["failed"] == {"shop": "web did not power off within 40 s"}
    assert done["evacuation"]["phase"] == "leaving"
    assert world.log.count("off web") == 3  # pressed again each 15 s
    assert world.states["post"].desired is Desired.PAUSED
    assert world.guests["db"] is RUNNING
    world.deaf.clear()
    assert world.do("evacuate", shutdown=True)["evacuation"]["phase"] == "evacuated"


def test_without_a_checkpoint_that_holds_the_end_it_is_paused_all_the_same(world) -> None:
    world.held = False
    told: list[dict] = []
    world.host.evacuate({"shutdown": True}, told.append)
    assert [row["group"] for row in told if row["state"] == "given up"] == ["post", "shop"]
    assert world.states["shop"].desired is Desired.PAUSED


def test_what_is_in_the_way_refuses_all(world) -> None:
    world.busy = ["a test of web runs here"]
    with pytest.raises(PreconditionFailed, match="a test of web"):
        world.do("evacuate")
    assert (world.log, world.file.load()) == ([], None)


def test_half_done_moves_and_running_recoveries_are_in_the_way() -> None:
    assert (
        in_the_way({"a": None, "b": {"phase": "handed-over"}}, {"c": [{"state": "committed", "kind": "failover"}]})
        == []
    )
    found = in_the_way(
        {"a": {"phase": "final"}},
        {"c": [{"state": "running", "kind": "test", "id": "t1"}, {"state": "partly", "kind": "failover", "id": "f"}]},
    )
    assert found == [
        "a switchover of a is under way: drctl status a",
        "a test of c runs here: drctl test stop t1",
        "a failover of c runs here: drctl commit c",
    ]


def test_a_group_that_was_failed_over_meanwhile_is_not_started_here(world) -> None:
    world.do("evacuate", shutdown=True)
    world.log.clear()
    world.answer = Answer(Reign.ELSEWHERE, "generation 2 reigns at beta")
    done = world.do("come_back")
    assert "it reigns at beta now" in done["failed"]["shop"]
    assert world.log == []
    assert set(world.guests.values()) == {OFF}
    assert world.do("come_back")["failed"] == {}  # superseded now: nothing of it is to be taken up
    assert world.file.load() is None
    assert set(world.guests.values()) == {OFF}


@pytest.mark.parametrize(("policy", "started"), [("wait", False), ("deny", False), ("allow", True)])
def test_guests_are_not_started_while_nobody_knows_who_reigns(world, policy, started) -> None:
    for name in world.names():
        world.change(name, spec=dataclasses.replace(world.states[name].spec, boot_without_peer=policy))
    world.do("evacuate", shutdown=True)
    world.answer = Answer(Reign.UNKNOWN, "beta does not answer")
    world.do("come_back")
    assert (world.guests["db"] is RUNNING) is started
    world.answer = Answer(Reign.HERE)
    world.do("come_back")
    assert world.guests["db"] is RUNNING


def test_a_pause_without_shutdown_needs_no_answer(world) -> None:
    world.do("evacuate")
    world.answer = Answer(Reign.UNKNOWN, "beta does not answer")
    assert world.do("come_back")["failed"] == {}


def test_what_an_operator_stopped_or_deleted_meanwhile_stays_so(world) -> None:
    world.do("evacuate")
    world.change("shop", desired=Desired.STOPPED, phase=Phase.UNPROTECTED)
    del world.states["post"]
    world.log.clear()
    assert world.do("come_back")["failed"] == {}
    assert (world.log, world.file.load()) == ([], None)


def test_a_guest_that_does_not_start_is_named_and_tried_again(world) -> None:
    world.do("evacuate", shutdown=True)
    world.refusing.add("db")
    assert "db: no memory" in world.do("come_back")["failed"]["shop"]
    assert world.guests["web"] is RUNNING
    world.refusing.clear()
    world.do("come_back")
    assert world.guests["db"] is RUNNING
    assert world.file.load() is None


def test_replicas_stay_in_the_record_until_their_sources_are_resumed(world) -> None:
    world.do("evacuate", recoveries={"far": "beta/b1", "away": "beta/b1"})
    assert world.host.told("far")["phase"] == "evacuated"
    assert world.do("come_back", left=["far"])["evacuation"]["recoveries"] == {"far": "beta/b1"}
    world.do("come_back", left=[])
    assert world.file.load() is None


def test_replication_is_not_begun_by_hand_meanwhile(world) -> None:
    start = world.host.guarded(world.replicate_start)
    world.do("evacuate")
    with pytest.raises(Refused) as caught:
        start({"group": "shop"}, lambda _: None)
    assert caught.value.hint == "drctl host return a1"
    world.do("come_back")
    start({"group": "shop"}, lambda _: None)


def test_a_damaged_record_keeps_no_appliance_from_starting(world, tmp_path) -> None:
    (tmp_path / "evacuation.json").write_text("{")
    assert world.file.shut_down() == set()
