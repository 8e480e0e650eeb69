"""Who starts a protected guest after the host's boot, and who is refused: policies, notes, the hook itself."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import msgspec
import pytest

from drctl.appliance import libvirt_hook
from drctl.appliance.config import ApplianceToml, Home
from drctl.appliance.info import hook_findings
from drctl.appliance.source import guest_notes
from drctl.appliance.source.boot_guard import (
    GRACE_SECONDS,
    BootGuard,
    BootMarks,
    Duty,
    GuardFiles,
    Step,
    decide,
    refusals,
    undecided,
)
from drctl.appliance.source.group_state import Desired, GroupState, GuestNote
from drctl.appliance.source.reign_guard import ReignGuard
from drctl.appliance.source.strays import Strays, superseded_here
from drctl.errors import HypervisorRefused, NotFound
from drctl.model.group import GroupSpec
from drctl.model.machine import Machine, MachineState
from drctl.model.phase import Phase
from drctl.replication.reign import Answer, Reign
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore

HERE = Answer(Reign.HERE)
ELSEWHERE = Answer(Reign.ELSEWHERE, "web has failed over to this site")
SILENT = Answer(Reign.UNKNOWN, "no link to 192.0.2.1:7077")
UUID = "0a1b2c3d-0000-4000-8000-00000000000a"


class Host:
    """Guests by name: state and autostart flag. `broken` refuse everything."""

    def __init__(self, **states):
        self.states = {name.replace("_", "-"): state for name, state in states.items()}
        self.flags = {}
        self.broken = set()

    def state(self, name):
        if name not in self.states:
            raise NotFound("machine", name)
        return self.states[name]

    def start(self, name):
        if name in self.broken:
            raise HypervisorRefused(f"{name}: no memory")
        self.states[name] = MachineState.RUNNING

    def destroy(self, name):
        self.states[name] = MachineState.SHUT_OFF

    def set_autostart(self, name, on):
        if name not in self.states:
            raise NotFound("machine", name)
        self.flags[name] = on


class Group:
    def __init__(self, state):
        self.state = state

    def superseded(self, reason):
        self.state = msgspec.structs.replace(
            self.state, phase=Phase.FAILED_OVER, desired=Desired.STOPPED, reason=reason
        )


def state(**changes):
    spec = GroupSpec("web", "alpha", "beta", ("web-1", "web-2"), **changes)
    notes = (GuestNote("web-1", UUID, autostart=True), GuestNote("web-2", "b", autostart=True), GuestNote("web-3", "c"))
    return GroupState(spec, Desired.PROTECTED, Phase.LIVE, guests=notes)


class World:
    """A boot guard whose clock goes on when it waits, and whose peer says one answer after the other."""

    def __init__(self, directory, *answers, **policy):
        self.host = Host(web_1=MachineState.SHUT_OFF, web_2=MachineState.SHUT_OFF, web_3=MachineState.SHUT_OFF)
        self.group = Group(state(**policy))
        self.marks = BootMarks(directory / "boots")
        self.now = 0.0
        self.answers = list(answers)
        self.asked = 0
        world = self

        class Stopped(threading.Event):
            def wait(self, timeout=None):
                world.now += timeout
                return self.is_set()

        self.stopped = Stopped()
        self.guard = BootGuard(self.group, self.host, self.marks, self._ask, self.stopped, lambda: self.now)

    def _ask(self, _state):
        self.asked += 1
        if len(self.answers) == 1 and self.asked > 20:
            self.stopped.set()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def run(self):
        self.guard.run()
        return self.guard.duty

    def running(self):
        return [name for name, found in self.host.states.items() if found is MachineState.RUNNING]


def test_guests_start_once_the_other_site_says_that_the_group_reigns_here(tmp_path):
    world = World(tmp_path, SILENT, SILENT, HERE)
    assert world.run() is Duty.STARTED
    assert world.running() == ["web-1", "web-2"]  # web-3 was never to start at boot
    assert world.asked == 3
    assert world.marks.done("web")


def test_a_superseded_group_starts_nothing_and_says_why(tmp_path):
    world = World(tmp_path, ELSEWHERE, boot_without_peer="allow")
    assert world.run() is Duty.REFUSED
    assert world.running() == []
    assert world.group.state.phase is Phase.FAILED_OVER
    assert "failed over" in world.guard.told()["reason"]


def test_the_word_of_the_other_site_counts_also_when_it_comes_late(tmp_path):
    world = World(tmp_path, *[SILENT] * 15, ELSEWHERE)
    assert world.run() is Duty.REFUSED
    assert world.running() == []


def test_wait_waits_for_ever_and_says_so(tmp_path):
    world = World(tmp_path, SILENT)
    assert world.run() is Duty.WAITING
    assert world.running() == []
    assert "192.0.2.1" in world.guard.reason
    assert "boot_without_peer = wait" in world.guard.reason
    assert not world.marks.done("web")


def test_allow_starts_after_the_grace(tmp_path):
    world = World(tmp_path, SILENT, boot_without_peer="allow")
    assert world.run() is Duty.ALLOWED
    assert world.running() == ["web-1", "web-2"]
    assert world.now >= GRACE_SECONDS


def test_deny_leaves_them_to_the_operator(tmp_path):
    world = World(tmp_path, SILENT, boot_without_peer="deny")
    assert world.run() is Duty.DENIED
    assert world.running() == []
    assert world.marks.done("web")


def test_a_guest_that_does_not_start_is_named_and_the_others_start(tmp_path):
    world = World(tmp_path, HERE)
    world.host.broken.add("web-1")
    assert world.run() is Duty.STARTED
    assert world.running() == ["web-2"]
    assert world.guard.reason == "web-1: web-1: no memory"


def test_no_wish_no_question(tmp_path):
    world = World(tmp_path, HERE)
    world.group.state = msgspec.structs.replace(world.group.state, guests=())
    assert world.run() is Duty.NONE
    assert world.asked == 0


@pytest.mark.parametrize(
    ("policy", "answer", "silent", "step"),
    [
        ("deny", HERE, 0, Step.START),
        ("allow", ELSEWHERE, 1e9, Step.REFUSE),
        ("wait", SILENT, 1e9, Step.ASK_AGAIN),
        ("allow", SILENT, GRACE_SECONDS - 1, Step.ASK_AGAIN),
        ("allow", SILENT, GRACE_SECONDS, Step.START_UNASKED),
        ("deny", SILENT, GRACE_SECONDS, Step.GIVE_UP),
        ("nonsense", SILENT, GRACE_SECONDS, Step.GIVE_UP),
    ],
)
def test_the_rule(policy, answer, silent, step):
    assert decide(policy, answer, silent) is step


# -- autostart ----------------------------------------------------------------------------------------------------------


def machine(name, *, autostart):
    return Machine(name, f"uuid-{name}", MachineState.RUNNING, (), autostart=autostart)


def test_autostart_is_noted_taken_and_given_back():
    host = Host(a=MachineState.RUNNING, b=MachineState.RUNNING)
    host.flags = {"a": True, "b": False}
    machines = [machine("a", autostart=True), machine("b", autostart=False)]
    before = GroupState(GroupSpec("web", "alpha", "beta", ("a", "b")))
    after = guest_notes.noted(before, machines)
    guest_notes.take(host, machines)
    assert host.flags == {"a": False, "b": False}
    assert guest_notes.wanted(after) == ["a"]
    # Seen with the flag off by ourselves, the wish stays; one switched on meanwhile is taken too.
    again = guest_notes.noted(after, [machine("a", autostart=False), machine("b", autostart=True)])
    assert guest_notes.wanted(again) == ["a", "b"]
    assert guest_notes.noted(again, [machine("a", autostart=False), machine("b", autostart=False)]) is again
    del host.states["b"]
    back = guest_notes.give_back(host, again)
    assert host.flags["a"] is True
    assert guest_notes.wanted(back) == []


# -- superseded guests --------------------------------------------------------------------------------------------------


def gone(**changes):
    return msgspec.structs.replace(state(**changes), phase=Phase.FAILED_OVER, desired=Desired.STOPPED)


def test_strays_are_told_or_stopped(tmp_path):
    host = Host(web_1=MachineState.RUNNING, web_2=MachineState.SHUT_OFF)
    strays = Strays(host, tmp_path)
    strays.look(gone())
    assert strays.names == ("web-1",)
    assert host.states["web-1"] is MachineState.RUNNING
    Strays(host, tmp_path).look(gone(superseded_guest="stop"))
    assert host.states["web-1"] is MachineState.SHUT_OFF


def test_what_reigns_is_no_stray(tmp_path):
    host = Host(web_1=MachineState.RUNNING)
    strays = Strays(host, tmp_path)
    strays.look(state(superseded_guest="stop"))
    assert (strays.names, host.states["web-1"]) == ((), MachineState.RUNNING)


def test_a_group_that_was_failed_over_to_here_again_reigns_here(tmp_path):
    store = GroupStore.create(tmp_path / "web", "web", 1, ())
    assert superseded_here(gone(), tmp_path)
    store.set_generation(3)
    store.set_mode(StoreMode.FAILED_OVER)
    store.close()
    assert not superseded_here(gone(), tmp_path)
    (tmp_path / "web" / "group.json").write_text("damaged")
    assert not superseded_here(gone(), tmp_path)


# -- the hook -----------------------------------------------------------------------------------------------------------

XML = f"<domain type='kvm'>\n  <name>web-1</name>\n  <uuid>{UUID}</uuid>\n  <metadata><uuid>x</uuid></metadata>\n</domain>\n"


def hook(tmp_path: Path, name="web-1", operation="prepare", stage="begin", xml=XML, home=None):
    script = tmp_path / "hook"
    script.write_text(libvirt_hook.script(home or tmp_path))
    return subprocess.run(
        ["sh", str(script), name, operation, stage, "-"], input=xml, capture_output=True, text=True, timeout=10
    )


@pytest.fixture
def guarded(tmp_path):
    """The files of a superseded group with a guest of that UUID."""
    home = tmp_path / "it's home"
    files = GuardFiles(home / "guard")
    files.sync(refusals([gone()]))
    return home


def test_the_hook_refuses_a_superseded_guest_and_says_why(tmp_path, guarded):
    for operation in ("prepare", "start"):
        done = hook(tmp_path, operation=operation, home=guarded)
        assert done.returncode == 1
        assert done.stderr.startswith("drctl: web-1 of group web may not run here: generation 1 is superseded")
        assert len(done.stderr.splitlines()) == 1


def test_a_renamed_guest_is_the_same_guest(tmp_path, guarded):
    assert hook(tmp_path, name="other", xml=XML.replace("web-1", "other"), home=guarded).returncode == 1
    assert hook(tmp_path, xml=XML.upper().replace("UUID", "uuid"), home=guarded).returncode == 1


@pytest.mark.parametrize(
    "case",
    [
        {"xml": XML.replace("0a1b", "ffff")},
        {"operation": "stopped", "stage": "end"},
        {"operation": "release", "stage": "end"},
        {"operation": "reconnect"},
        {"operation": "migrate"},
        {"operation": "start", "stage": "end"},
        {"xml": ""},
        {"xml": "\0garbage<uuid>../../etc/passwd</uuid>"},
        {"xml": "<uuid></uuid>", "name": "../guard"},
        {"xml": "", "name": ""},
    ],
)
def test_the_hook_is_in_nobody_elses_way(tmp_path, guarded, case):
    done = hook(tmp_path, home=guarded, **case)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_hook_that_is_not_installed_is_a_finding_of_the_systems_libvirt(tmp_path):
    (found,) = hook_findings("qemu:///system", tmp_path / "drctl")
    assert found["severity"] == "warning"
    assert hook_findings("qemu+unix:///session?socket=/x", tmp_path / "drctl") == []
    (tmp_path / "drctl").touch()
    assert hook_findings("qemu:///system", tmp_path / "drctl") == []


def test_without_files_the_hook_lets_all_pass(tmp_path):
    assert hook(tmp_path, home=tmp_path / "absent").returncode == 0


def test_files_go_when_the_group_is_no_longer_superseded(tmp_path, guarded):
    GuardFiles(guarded / "guard").sync({})
    assert hook(tmp_path, home=guarded).returncode == 0
    assert list((guarded / "guard").iterdir()) == []


# -- until it is decided ------------------------------------------------------------------------------------------------


def test_until_it_is_decided_the_hook_refuses_every_guest_of_the_group(tmp_path):
    world = World(tmp_path, SILENT, HERE)
    assert set(undecided([world.guard])) == {UUID, "b", "c"}
    seen = []
    world.guard.decided = lambda: seen.append((dict(undecided([world.guard])), world.running()))
    world.run()
    assert seen == [({}, [])]  # free before the first one is started


def test_a_group_whose_guests_never_start_at_boot_is_asked_about_too(tmp_path):
    """libvirt-guests would start what ran at the shutdown."""
    world = World(tmp_path, ELSEWHERE)
    guests = tuple(msgspec.structs.replace(note, autostart=False) for note in world.group.state.guests)
    world.group.state = msgspec.structs.replace(world.group.state, guests=guests)
    assert world.run() is Duty.REFUSED
    assert world.asked == 1


def test_a_file_that_was_removed_by_hand_stays_away(tmp_path):
    home = Home(
        tmp_path, ApplianceToml("alpha", "a1", "test:///default", "127.0.0.1:0", "u", run=str(tmp_path / "run"))
    )
    reign = ReignGuard(home, Host())
    world = World(tmp_path, SILENT)
    reign._boots.append(world.guard)
    reign.sync([world.group.state])
    guard = tmp_path / "guard"
    assert {path.name for path in guard.iterdir()} == {UUID, "b", "c"}
    (guard / "b").unlink()
    reign.sync([world.group.state])
    other = World(tmp_path / "other", SILENT)
    other.group.state = msgspec.structs.replace(other.group.state, guests=(GuestNote("db-1", "d"),))
    reign._boots.append(other.guard)
    reign.sync([world.group.state])
    assert {path.name for path in guard.iterdir()} == {UUID, "c", "d"}
    world.guard.duty = Duty.STARTED
    reign.sync([world.group.state])
    assert {path.name for path in guard.iterdir()} == {"d"}
