"""Leases: one changing operation per group, whoever orders it; what is not renewed ends by itself."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest

from drctl.appliance.lease import LEASE_SECONDS, Leases
from drctl.errors import Locked, NotFound
from drctl.store.group_store import GroupStore


class World:
    def __init__(self, directory):
        self.now = 1_800_000_000.0
        self.store = directory / "store"
        GroupStore.create(self.store / "web", "web", 4, ()).close()
        self.waits = []
        self.new_appliance()

    def new_appliance(self, process="1:1"):
        self.leases = Leases(self.store, lambda: self.now, self._sleep)
        self.leases._process = process

    def _sleep(self, ended, seconds):
        self.waits.append(seconds)
        return ended.wait(10)

    def do(self, method, **params):
        return getattr(self.leases, method)({"group": "web", **params}, lambda _: None)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_the_second_operator_hears_who_and_until_when(world):
    taken = world.do("take", holder="ann@desk (pid 7)", verb="switchover")
    assert (taken["generation"], taken["expires"] - taken["taken"]) == (4, LEASE_SECONDS)
    world.now += 10
    with pytest.raises(Locked) as caught:
        world.do("take", holder="bob@lap", verb="replicate stop")
    assert caught.value.exit_code == 13
    assert str(caught.value) == "web is being worked on: ann@desk (pid 7), switchover, its lease ends in 20.0 s"
    assert caught.value.as_dict()["holder"] == "ann@desk (pid 7)"
    assert "token" not in caught.value.as_dict()
    assert world.do("show")["verb"] == "switchover"


def test_an_expired_lease_is_taken_over_and_its_holder_learns_it(world):
    first = world.do("take", holder="ann")
    world.now += LEASE_SECONDS
    assert world.do("show") is None
    second = world.do("take", holder="bob")
    with pytest.raises(Locked, match="lost: bob"):
        world.do("renew", token=first["token"])
    assert world.do("release", token=first["token"])["released"] is False
    assert world.do("show")["holder"] == "bob"
    assert world.do("release", token=second["token"])["released"] is True
    assert world.do("show") is None


def test_a_renewed_lease_goes_on(world):
    token = world.do("take", holder="ann")["token"]
    for _ in range(5):
        world.now += LEASE_SECONDS - 1
        world.do("renew", token=token)
    with pytest.raises(Locked):
        world.do("take", holder="bob")


def test_a_lease_survives_the_appliance_but_its_own_methods_do_not(world):
    world.do("take", holder="ann")
    world.new_appliance("2:2")
    with pytest.raises(Locked):
        world.do("take", holder="bob")
    world.now += LEASE_SECONDS
    with world.leases._held("web", "failover.run", {"by": "bob"}):
        world.new_appliance("3:3")  # it died in the middle of it
        world.do("take", holder="carl")


def test_a_clock_that_was_set_back_does_not_lock_for_ever(world):
    world.do("take", holder="ann")
    world.now -= 86400
    world.do("take", holder="bob")


@pytest.mark.parametrize("text", ["", "{", '{"group": 1}'])
def test_a_damaged_file_locks_nobody_out(world, text):
    (world.store / "web" / "lease.json").write_text(text)
    world.do("take", holder="bob")


def test_no_store_no_lease(world):
    for group in ("absent", "", "../store/web"):
        with pytest.raises(NotFound):
            world.do("take", group=group)


def handlers(world, seen):
    def failover(params, _progress):
        seen.append(world.do("show"))
        return "done"

    return world.leases.watch({"failover.run": failover, "test.start": failover})


def test_a_changing_method_holds_a_lease_as_long_as_it_runs(world):
    seen = []
    assert handlers(world, seen)["failover.run"]({"group": "web", "by": "ann"}, None) == "done"
    assert (seen[0]["holder"], seen[0]["verb"]) == ("ann", "failover")
    assert world.do("show") is None
    assert world.waits == [LEASE_SECONDS / 3]


def test_it_is_refused_while_another_holds_one_and_its_own_is_honoured(world):
    token = world.do("take", holder="ann", verb="switchover")["token"]
    seen = []
    with pytest.raises(Locked):
        handlers(world, seen)["failover.run"]({"group": "web", "by": "bob"}, None)
    with pytest.raises(Locked):
        handlers(world, seen)["failover.run"]({"group": "web", "by": "bob", "lease": "guess"}, None)
    assert seen == []
    handlers(world, seen)["failover.run"]({"group": "web", "by": "ann", "lease": token}, None)
    assert seen[0]["verb"] == "switchover"
    assert world.do("show")["holder"] == "ann"


def test_a_test_locks_nobody_and_is_locked_by_nobody(world):
    world.do("take", holder="ann")
    seen = []
    handlers(world, seen)["test.start"]({"group": "web"}, None)
    assert len(seen) == 1


def test_a_method_that_fails_gives_its_lease_back(world):
    def broken(_params, _progress):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        world.leases.watch({"commit": broken})["commit"]({"group": "web"}, None)
    assert world.do("show") is None


def test_of_many_at_once_one_wins(world):
    won = []

    def try_it(name):
        with suppress(Locked):
            won.append(world.do("take", holder=name)["holder"])

    threads = [threading.Thread(target=try_it, args=(f"o{number}",)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
