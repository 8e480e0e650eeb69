"""Faults on a protected lab, judged by the witness: nothing may hurt a guest, list a checkpoint that is none, or need a
hand to heal. The fast half runs in `make test`; `long` ones in `make test-long`."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest

from drctl.errors import DrctlError, StepFailed
from drctl.lab import process
from drctl.model.group import Retention
from tests.integration.fault_rig import FaultRig, apply, proc_cpu_seconds, protect, resident_bytes

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
long = pytest.mark.long
MIB = 2**20


@pytest.fixture(scope="module")
def faults(make_lab, request):
    rig = make_lab(rate=20, slots=256)
    made = protect(rig)
    yield made
    made.await_live()
    # All of them take minutes; beside the fast tests a sample of those that no trial has judged must do.
    every = any(item.get_closest_marker("long") for item in request.session.items)
    rest = made.judge_listed(most=0 if every else 30)
    sys.stderr.write(f"\n  {rest} more checkpoints judged at the end\n")
    made.close()


def again(faults: FaultRig, what: str, old: int) -> None:
    """Another process of that name has taken over."""

    def look() -> bool:
        with suppress(FileNotFoundError, ValueError):
            pid = faults.pid(what)
            return pid != old and process.start_time(pid) is not None
        return False

    faults.await_(look, f"another {what}", 20)


# -- processes that die or hang ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tap", "shipper", "receiver", "watchdog"])
def test_a_killed_process_is_back(faults, what):
    with faults.trial(f"SIGKILL {what}"):
        old = faults.kill(what)
        again(faults, what, old)


def test_a_hung_tap_is_killed_by_the_watchdog(faults):
    with faults.trial("SIGSTOP tap") as outcome:
        old = faults.kill("tap", signal.SIGSTOP)
        again(faults, "tap", old)
    assert outcome.live_after < 30


def test_a_killed_supervisor_is_followed_by_one_that_adopts(faults):
    with faults.trial("SIGKILL supervisor"):
        before = [faults.pid(what) for what in ("tap", "shipper", "watchdog")]
        faults.kill("supervisor")
        newest = faults.call("beta", "group.status")["checkpoints"]["newest"]["number"]
        time.sleep(2)
        assert faults.call("beta", "group.status")["checkpoints"]["newest"]["number"] <= newest + 2, "nobody attested"
        faults.up()
        faults.await_live()
        assert [faults.pid(what) for what in ("tap", "shipper", "watchdog")] == before


def test_a_cut_link_costs_time_and_no_checkpoint(faults):
    with faults.trial("link cut 4 s"):
        faults.relay.cut()
        time.sleep(0.5)
        newest = faults.call("beta", "group.status")["checkpoints"]["newest"]
        faults.await_reason("no link to 127.0.0.1")
        time.sleep(3)
        status = faults.call("beta", "group.status")
        assert status["checkpoints"]["newest"] == newest
        assert faults.status()["rpo_seconds"] > 3
        faults.relay.restore()
    # What was marked meanwhile has become checkpoints: a backlog costs none.
    times = [each["time"] for each in faults.checkpoints() if each["time"] >= newest["time"]]
    assert max(b - a for a, b in pairwise(times)) < 3, times


def test_a_mirror_cancelled_by_hand_is_noticed(faults):
    with faults.trial("mirror cancelled by hand"):
        job = faults.monitor("web-2", "query-block-jobs")["return"][0]["device"]
        cancelled = time.time()
        faults.monitor("web-2", "block-job-cancel", device=job)
        faults.await_(lambda: faults.status()["phase"] == "catching-up", "live is left", 5)
    inside = [c["number"] for c in faults.checkpoints() if cancelled + 0.2 < c["time"] < cancelled + 0.7]
    assert not inside, "no mark of a time in which writes were missed is a checkpoint"


@long
def test_a_hung_shipper_is_replaced(faults):
    with faults.trial("SIGSTOP shipper"):
        old = faults.kill("shipper", signal.SIGSTOP)
        again(faults, "shipper", old)


@long
def test_a_shipper_that_stops_while_it_reads_holds_up_no_guest(faults):
    """Whether a read is in flight at that moment is chance; test_hung_reader.py makes sure of it."""
    for turn in range(4):
        with faults.trial(f"SIGSTOP shipper in a pass, SIGKILL tap ({turn})"):
            faults.call("alpha", "resync")
            faults.await_(lambda: faults.status()["sync"], "the pass has begun", 30)
            time.sleep(turn * 0.03)
            old = faults.kill("shipper", signal.SIGSTOP)
            faults.kill("tap")
            again(faults, "shipper", old)


@long
@pytest.mark.parametrize("what", ["receiver", "watchdog"])
def test_a_stopped_process_is_replaced(faults, what):
    with faults.trial(f"SIGSTOP {what}"):
        old = faults.kill(what, signal.SIGSTOP)
        again(faults, what, old)


@long
def test_a_stopped_supervisor_only_costs_checkpoints(faults):
    with faults.trial("SIGSTOP supervisor 6 s"):
        stopped = faults.kill("supervisor", signal.SIGSTOP)
        time.sleep(6)
        os.kill(stopped, signal.SIGCONT)


@long
def test_tap_and_shipper_and_supervisor_die_together(faults):
    with faults.trial("SIGKILL tap, shipper, supervisor"):
        for what in ("supervisor", "tap", "shipper"):
            faults.kill(what)
        time.sleep(1)
        faults.up()


@long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_libvirtd_is_restarted(faults, number):
    with faults.trial(f"libvirtd {number.name}"):
        old = faults.kill("libvirtd", number)
        faults.await_reason("can't be reached")
        faults.await_(lambda: process.start_time(old) is None, "libvirtd has ended", 20)
        faults.up()


@long
def test_a_silent_link_is_waited_for(faults):
    with faults.trial("link silent 6 s"):
        faults.relay.silence()
        time.sleep(6)
        faults.relay.restore()


@long
def test_a_dead_link_is_dialled_anew(faults):
    with faults.trial("link silent 30 s", live=90):
        faults.relay.silence()
        faults.await_reason("silent", 40)
        faults.relay.restore()


# -- space ------------------------------------------------------------------------------------------------------------


@long
def test_a_full_ring_drops_and_catches_up(faults):
    apply(faults, replace(faults.spec, spill_size=0))
    with faults.trial("ring full", live=120):
        faults.relay.cut()
        faults.rig.observer.send("rate max", wait=60)
        faults.await_(lambda: (faults.status()["ring"] or {}).get("dropping"), "the ring is full", 120)
        time.sleep(1)
        faults.rig.observer.send("rate 20", wait=60)
        faults.relay.restore()  # how long its reason is "the ring was full" depends on how soon a pass begins


@long
def test_a_full_ring_under_full_load_catches_up_while_the_guests_write_on(faults):
    apply(faults, replace(faults.spec, spill_size=0))
    with faults.trial("ring full, writes go on", live=240):
        faults.relay.cut()
        faults.rig.observer.send("rate 200", wait=60)
        faults.await_(lambda: (faults.status()["ring"] or {}).get("dropping"), "the ring is full", 120)
        faults.relay.restore()
        faults.await_live(200)
        faults.rig.observer.send("rate 20", wait=60)


@long
def test_a_journal_at_its_limit_stops_acknowledgements_until_there_is_room(faults):
    with faults.trial("journal full", live=90):
        room = faults.spec
        used = faults.call("beta", "group.status")["journal"]["bytes"]
        apply(faults, replace(room, retention=Retention(history=86400.0, journal_limit=used + MIB // 4)))
        faults.await_reason("limit", 60)
        newest = faults.call("beta", "group.status")["checkpoints"]["newest"]
        time.sleep(3)
        assert faults.call("beta", "group.status")["checkpoints"]["newest"] == newest
        apply(faults, room)


# -- guests that go and come ------------------------------------------------------------------------------------------


@long
def test_a_guest_that_reboots_is_still_protected(faults):
    with faults.trial("reboot from inside", unharmed=["web-2"], live=120):
        pid, begun = faults.qemu_pid("web-1"), time.time_ns()
        faults.rig.observer.send("reboot", guest="web-1")
        faults.rig.observer.await_up("web-1", "alpha", after_ns=begun, timeout=180)
        assert faults.qemu_pid("web-1") == pid


@long
def test_a_guest_that_powers_off_and_comes_back(faults):
    with faults.trial("power off and start", unharmed=["web-2"], live=180):
        faults.rig.observer.send("power off", guest="web-1")
        faults.await_(lambda: faults.rig.state("alpha", "web-1") == "shut off", "web-1 is off", 120)
        # Off in order: the group goes on having checkpoints, of the one that runs and of the other as it was left.
        faults.await_live()
        begun = time.time_ns()
        faults.rig.virsh("alpha", "start", "web-1")
        faults.rig.observer.await_up("web-1", "alpha", after_ns=begun, timeout=180)


@long
def test_a_guest_that_ended_unseen_is_read_while_it_is_off(faults):
    with faults.trial("power off without a supervisor", unharmed=["web-2"], live=180):
        faults.kill("supervisor")
        faults.rig.observer.send("power off", guest="web-1")
        faults.await_(lambda: faults.rig.state("alpha", "web-1") == "shut off", "web-1 is off", 120)
        faults.up()
        faults.await_live(120)
        begun = time.time_ns()
        faults.rig.virsh("alpha", "start", "web-1")
        faults.rig.observer.await_up("web-1", "alpha", after_ns=begun, timeout=180)


@long
def test_a_guest_whose_plug_was_pulled(faults):
    with faults.trial("destroy and start", unharmed=["web-2"], live=180):
        faults.rig.virsh("alpha", "destroy", "web-1")
        time.sleep(1)
        begun = time.time_ns()
        faults.rig.virsh("alpha", "start", "web-1")
        faults.rig.observer.await_up("web-1", "alpha", after_ns=begun, timeout=180)


class Drain:
    """A listener that takes all that comes and keeps nothing: where a machine is migrated to, for want of a host."""

    def __enter__(self) -> int:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._take, daemon=True).start()
        return int(self._listener.getsockname()[1])

    def _take(self) -> None:
        with self._listener.accept()[0] as taken:
            while taken.recv(1 << 20):
                pass

    def __exit__(self, *_: object) -> None:
        self._listener.close()


# -- false health -----------------------------------------------------------------------------------------------------


@long
def test_an_idle_guest_with_a_dead_tap_is_not_called_healthy(faults):
    faults.await_live()
    faults.rig.observer.send("stop", wait=60)
    try:
        faults.await_live()  # an idle group still makes checkpoints
        faults.kill("supervisor", signal.SIGSTOP)
        killed = faults.kill("tap")
        moment = time.time()
        time.sleep(3)
        os.kill(faults.pid("supervisor"), signal.SIGCONT)
        again(faults, "tap", killed)
        faults.await_live()
        inside = [c["number"] for c in faults.checkpoints() if moment + 0.5 < c["time"] < moment + 2.5]
        assert not inside, "marks of a time without a tap"
    finally:
        faults.rig.observer.send("go", wait=60)
    faults.await_live()
    faults.judge_listed(since=moment - 3, most=8)


@long
@pytest.mark.parametrize("managed", [False, True])
def test_a_saved_guest_stays_as_it_was_left_until_it_is_back(faults, managed):
    """libvirt ends the guest after a save: its disks are what they were, so checkpoints go on being true."""
    file = faults.alpha.root / "web-1.save"
    with faults.trial("virsh managedsave, start" if managed else "virsh save, restore", unharmed=["web-2"], live=180):
        faults.rig.virsh("alpha", *(["managedsave", "web-1"] if managed else ["save", "web-1", str(file)]))
        assert faults.rig.state("alpha", "web-1") == "shut off"
        faults.await_live(120)
        faults.rig.virsh("alpha", *(["start", "web-1"] if managed else ["restore", str(file)]))
        faults.rig.observer.await_more("web-1", "alpha", 2, timeout=120)


@long
def test_a_snapshot_by_hand_is_refused_or_noticed(faults):
    with faults.trial("virsh snapshot-create-as --disk-only"), pytest.raises(StepFailed):
        faults.rig.virsh("alpha", "snapshot-create-as", "web-1", "mine", "--disk-only", "--no-metadata")


@long
def test_a_guest_that_was_moved_away_is_not_called_healthy(faults):
    faults.await_live()
    with Drain() as port:  # libvirt's sandbox lets QEMU start no program, so `exec:` is out
        faults.monitor("web-1", "migrate", uri=f"tcp:127.0.0.1:{port}")

        def moved_to_nowhere() -> bool:
            status = faults.monitor("web-1", "query-migrate")["return"].get("status")
            assert status != "failed"
            return bool(status == "completed")

        faults.await_(moved_to_nowhere, "moved", 120)
    moved = time.time()
    reason = faults.await_reason("moved to another host", 6)
    assert "web-1" in reason
    time.sleep(3)
    newest = faults.call("beta", "group.status")["checkpoints"]["newest"]
    assert newest["time"] < moved + 0.5
    faults.monitor("web-1", "cont")
    faults.await_live(120)
    faults.judge_listed(since=moved - 3, most=5)


# -- quiesced ---------------------------------------------------------------------------------------------------------


@long
def test_a_quiesced_checkpoint_freezes_and_thaws(faults):
    faults.await_live()
    faults.await_(lambda: agent_answers(faults, "web-1") and agent_answers(faults, "web-2"), "the agents run", 120)
    made = faults.call("alpha", "checkpoint.create", kind="quiesced", tags=["before-upgrade"])
    assert made["kind"] == "quiesced"
    listed = next(each for each in faults.checkpoints() if each["number"] == made["number"])
    assert (listed["kind"], list(listed["tags"])) == ("quiesced", ["before-upgrade"])
    for guest in faults.rig.guests():
        status = faults.rig.virsh("alpha", "qemu-agent-command", guest, '{"execute": "guest-fsfreeze-status"}')
        assert "thawed" in status
    faults.judge_listed(since=made["time"] - 1, most=3)


def agent_answers(faults: FaultRig, guest: str) -> bool:
    return bool(faults.rig.virsh("alpha", "qemu-agent-command", guest, '{"execute": "guest-ping"}'))


@long
def test_a_guest_without_agent_is_named(make_lab):
    faults = protect(make_lab(guests=1, agent=False, slots=256, rate=20))
    try:
        with pytest.raises(DrctlError) as caught:
            faults.call("alpha", "checkpoint.create", kind="quiesced")
        assert "web-1" in caught.value.message
        assert "agent" in caught.value.message + caught.value.hint
        faults.await_live()
    finally:
        faults.close()


# -- under a test -----------------------------------------------------------------------------------------------------


def begin_test(faults: FaultRig, **params: object) -> dict:
    faults.await_live()
    begun = time.time_ns()
    test = faults.call("beta", "test.start", 120, checkpoint="latest", machines=["web-1"], **params)
    faults.rig.observer.await_up("web-1", "beta", after_ns=begun, timeout=180)
    return dict(test)


def list_tests(faults: FaultRig) -> dict[str, dict]:
    return {test["id"]: test for test in faults.call("beta", "test.list")}


@long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_view_that_dies_under_a_guest_pauses_it_at_most(faults, number):
    test = begin_test(faults)
    try:
        name = f"view-{test['id']}"
        with faults.trial(f"{number.name} view server"):
            for _ in range(3):
                old = faults.kill(name, number)
                again(faults, name, old)
                faults.rig.observer.await_more("web-1", "beta", 3, timeout=60)
        assert {s.guest: s.trouble for s in faults.rig.observer.seen() if s.site == "beta" and s.trouble} == {}
        domain = list_tests(faults)[test["id"]]["machines"][0]["recovery_name"]
        # It may pause on a read that came while the view was away, and is resumed when the view is back.
        faults.await_(
            lambda: faults.rig.virsh("beta", "domstate", domain, "--reason").split()[0] == "running",
            f"{domain} runs again",
            timeout=10,
        )
    finally:
        faults.call("beta", "test.stop", 120, id=test["id"])
    faults.await_live()


@long
def test_a_full_scratch_ends_the_test_and_nothing_else(faults):
    with faults.trial("scratch full"):
        test = begin_test(faults, scratch_limit=4 * MIB)

        def ended() -> bool:
            found = list_tests(faults).get(test["id"])
            return found is None or found["state"] in ("stopped", "failed")

        faults.await_(ended, "the test has ended", 120)


# -- what it costs ----------------------------------------------------------------------------------------------------


@long
def test_processes_of_an_idle_group_sleep(faults):
    faults.rig.observer.send("stop", wait=60)
    try:
        faults.await_live()
        names = ("tap", "shipper", "watchdog", "receiver", "supervisor", "beta-supervisor")
        pids = {name: faults.pid(name) for name in names}
        before = {name: proc_cpu_seconds(pid) for name, pid in pids.items()}
        time.sleep(20)
        used = {name: (proc_cpu_seconds(pid) - before[name]) / 20 for name, pid in pids.items()}
        sys.stderr.write(f"  idle: { {name: f'{100 * share:.1f} %' for name, share in used.items()} }, resident ")
        sys.stderr.write(f"{ {name: f'{resident_bytes(pid) / MIB:.0f} MiB' for name, pid in pids.items()} }\n")
        assert max(used.values()) < 0.1, used
    finally:
        faults.rig.observer.send("go", wait=60)


# -- all of it, mixed -------------------------------------------------------------------------------------------------


@long
@pytest.mark.timeout(5400)
def test_sixty_random_faults(faults):
    seed = int(os.environ.get("DRCTL_FAULT_SEED") or random.SystemRandom().randrange(2**32))
    count = int(os.environ.get("DRCTL_FAULTS") or 60)
    sys.stderr.write(f"  seed: DRCTL_FAULT_SEED={seed}\n")
    chance = random.Random(seed)
    pids = {guest: faults.qemu_pid(guest) for guest in faults.rig.guests()}
    begun = time.time()
    for turn in range(count):
        fault = chance.choice(RANDOM)
        sys.stderr.write(f"  {turn}: {fault.__name__[1:]}\n")
        fault(faults, chance)
        if chance.random() < 0.3:
            faults.await_live(120)
        else:
            time.sleep(chance.random() * 2)
    faults.await_live(120)
    faults.assert_unharmed(pids)
    judged = faults.judge_listed()
    sys.stderr.write(f"  {count} random faults in {time.time() - begun:.0f} s, {judged} checkpoints judged\n")


def _kill(faults: FaultRig, chance: random.Random) -> None:
    with suppress(ProcessLookupError, FileNotFoundError):
        faults.kill(chance.choice(["tap", "shipper", "receiver", "watchdog"]))


def _stop(faults: FaultRig, chance: random.Random) -> None:
    with suppress(ProcessLookupError, FileNotFoundError):
        faults.kill(chance.choice(["tap", "shipper", "receiver"]), signal.SIGSTOP)


def _supervisor(faults: FaultRig, chance: random.Random) -> None:
    faults.kill("supervisor")
    if chance.random() < 0.5:
        _kill(faults, chance)
    time.sleep(chance.random() * 2)
    faults.up()


def _libvirtd(faults: FaultRig, chance: random.Random) -> None:
    old = faults.kill("libvirtd", chance.choice([signal.SIGTERM, signal.SIGKILL]))
    faults.await_(lambda: process.start_time(old) is None, "libvirtd has ended", 20)
    faults.up()


def _link(faults: FaultRig, chance: random.Random) -> None:
    chance.choice([faults.relay.cut, faults.relay.silence])()
    time.sleep(chance.random() * 3)
    faults.relay.restore()


def _cancel(faults: FaultRig, chance: random.Random) -> None:
    jobs = faults.monitor(chance.choice(faults.rig.guests()), "query-block-jobs")["return"]
    for job in jobs[:1]:
        with suppress(StepFailed):
            faults.monitor("web-1", "block-job-cancel", device=job["device"])


RANDOM = [_kill, _kill, _kill, _stop, _supervisor, _libvirtd, _link, _link, _cancel]
