"""The steps on a host in a directory: what they leave, done again, broken at each operation, upgraded, taken back."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from drctl.appliance.config import load
from drctl.appliance.install.installation import UNIT
from drctl.appliance.install.removal import Holdings, Removal, demand_empty, holdings
from drctl.errors import ConfigInvalid, HostUnreachable, OutOfSpace, Refused, StepFailed
from drctl.replication.identity import load_peers, server_context
from tests.unit.appliance.install.host import HOSTS, PLACE, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_new_host_gets_all_it_needs(world: World) -> None:
    world.run()
    host = world.host
    home = load(host.at(PLACE.home))
    uuids = world.roster.assign(HOSTS)
    assert (home.config.site, home.config.host, home.config.uuid) == ("alpha", "a1", uuids["a1"])
    assert [(peer.host, peer.uuid) for peer in home.config.peer] == [("b1", uuids["b1"])]
    assert home.config.qemu_group == "libvirt-qemu"
    assert list(load_peers(home.tls)) == [uuids["b1"]]
    server_context(home.tls)
    assert (home.tls / "key.pem").stat().st_mode & 0o777 == 0o600
    assert f"{PLACE.prefix}/versions/{world.bundle.identity}/bin/python" in host.service
    assert (host.enabled, host.pid, host.users) == (True, 1, {"drctl"})
    assert not host.at(f"{PLACE.prefix}/wheels").exists()


def test_a_second_run_changes_nothing(world: World) -> None:
    world.run()
    picture, host = world.picture(), world.host
    times = {path: path.lstat().st_mtime_ns for path in host.root.rglob("*")}
    assert world.run().changes == []
    assert world.picture() == picture
    assert {path: path.lstat().st_mtime_ns for path in host.root.rglob("*")} == times
    assert host.pid == 1


def test_a_break_at_any_operation_is_made_up_for(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = World(tmp_path / "whole")
    whole.run()
    total, expected = whole.host.operations, _without_uuids(whole)
    assert total > 30
    for number in range(1, total + 1):
        place = tmp_path / str(number)
        place.mkdir()
        world = World(place)
        world.host.break_at = number
        with pytest.raises(HostUnreachable):
            world.run()
        world.run()
        assert _without_uuids(world) == expected, number
        server_context(world.host.at(f"{PLACE.home}/tls"))
        assert world.host.service == world.host.at(UNIT).read_text()
        assert world.run().changes == [], number


def _without_uuids(world: World) -> dict[str, str]:
    names = {uuid: name for name, uuid in world.roster.assign(HOSTS).items()}
    picture = world.picture()
    for uuid, name in names.items():
        picture = {key: text.replace(uuid, name) for key, text in picture.items()}
    return picture


def test_wheels_that_arrived_are_not_sent_again(world: World) -> None:
    world.host.fail = {".whl/pip install": "ERROR: broken"}
    with pytest.raises(StepFailed, match="a1: python: ERROR: broken"):
        world.run()
    assert len(world.host.sent) == 3
    world.host.fail = {}
    world.run()
    assert len(world.host.sent) == 3


@pytest.mark.parametrize(
    ("fails", "error"), [("No space left on device", OutOfSpace), ("undefined symbol: virDomainX", StepFailed)]
)
def test_an_environment_that_does_not_work_is_never_switched_to(world: World, fails: str, error: type) -> None:
    world.host.fail = {"import drctl.appliance.daemon": f"Traceback\nImportError: {fails}"}
    with pytest.raises(error, match=fails):
        world.run()
    assert not world.host.at(f"{PLACE.prefix}/current").exists()
    assert not world.host.at(f"{PLACE.prefix}/versions/{world.bundle.identity}").exists()
    assert not world.host.at(UNIT).exists()
    assert world.host.pid == 0


def test_install_keeps_the_version_that_runs_and_upgrade_switches(world: World, tmp_path: Path) -> None:
    world.run()
    old = world.bundle
    world.bundle = world.make_bundle(tmp_path / "new", "2.0")
    outcome = world.run()
    assert outcome.changes == []
    assert "drctl appliance upgrade" in outcome.notes[0]
    versions = f"{PLACE.prefix}/versions"
    world.host.children = [
        [7, f"{versions}/{old.identity}/bin/python -m drctl.replication.tap r s b"],
        [8, f"{versions}/{old.identity}/bin/python -m drctl.replication.shipper c"],
        [9, f"{versions}/{world.bundle.identity}/bin/python -m drctl.replication.receiver c"],
    ]
    outcome = world.run(upgrade=True)
    assert "restarted" in outcome.changes
    assert [child[0] for child in world.host.children] == [7, 9]
    assert "1 processes (taps, views) still run" in outcome.notes[0]
    assert world.host.at(f"{versions}/{old.identity}").exists()
    world.host.children = []
    assert world.run(upgrade=True).changes == [f"{versions}/{old.identity} removed"]
    assert world.host.pid == 2


def test_keys_that_an_operator_added_are_kept(world: World) -> None:
    world.run()
    file = world.host.at(f"{PLACE.home}/appliance.toml")
    text = file.read_text().replace('run = "/run/drctl"', '# big\nscratch_limit = 1024\nrun = "/run/drctl"')
    file.write_text(text)
    assert world.run().changes == ["restarted"]
    assert file.read_text() == text
    file.write_text(text.replace('"alpha"', '"gamma"'))
    assert world.run().changes == ["appliance.toml", "restarted"]
    assert tomllib.loads(file.read_text())["scratch_limit"] == 1024
    file.write_text("not TOML")
    with pytest.raises(ConfigInvalid, match=r"appliance.toml of a1: not TOML"):
        world.run()


def test_a_peer_that_was_narrowed_stays_narrow_and_one_that_left_goes(world: World) -> None:
    world.run()
    file = world.host.at(f"{PLACE.home}/tls/peers.json")
    peers = json.loads(file.read_text())
    [uuid] = peers
    peers[uuid]["groups"] = ["web"]
    file.write_text(json.dumps(peers | {"stranger": {"site": "beta", "host": "x", "groups": "*"}}))
    assert world.run().changes == ["peers.json"]
    assert json.loads(file.read_text()) == peers


def test_a_certificate_of_another_ca_is_replaced(world: World, tmp_path: Path) -> None:
    world.run()
    (tmp_path / "other").mkdir()
    foreign = World(tmp_path / "other")
    foreign.host = world.host
    foreign.bundle = world.bundle
    changes = foreign.run().changes
    assert "identity (key and certificate)" in changes
    assert "restarted" in changes


def test_a_damaged_certificate_is_replaced(world: World) -> None:
    world.run()
    world.host.at(f"{PLACE.home}/tls/cert.pem").write_text("nonsense")
    assert "identity (key and certificate)" in world.run().changes


def test_uninstall_leaves_nothing(world: World) -> None:
    before = {path for path in world.host.root.rglob("*") if path.is_file()}
    world.run()
    removal = Removal(world.host, "a1", PLACE)
    assert removal.run(lambda *_: None).changes
    assert {path for path in world.host.root.rglob("*") if path.is_file() or path.is_symlink()} == before
    assert (world.host.users, world.host.pid, world.host.enabled) == (set(), 0, False)
    assert Removal(world.host, "a1", PLACE).run(lambda *_: None).changes == []


def test_uninstall_is_refused_while_something_would_be_lost(world: World) -> None:
    world.run()
    home = world.host.at(PLACE.home)
    (home / "groups").mkdir()
    (home / "groups/web.json").write_text('{"phase": "live"}')
    (home / "groups/idle.json").write_text('{"phase": "unprotected"}')
    (home / "store/shop").mkdir(parents=True)
    held = holdings(world.host, PLACE)
    assert held == Holdings(("web",), ("shop",), ())
    (home / "store/shop/group.json").write_text('{"retention": {"history": 604800, "lock": 86400}}')
    assert holdings(world.host, PLACE).locked == ("shop",)
    (home / "store/shop/group.json").write_text('{"retention": {"history": 604800}}')
    assert holdings(world.host, PLACE).locked == ()
    with pytest.raises(Refused, match="a1 protects web"):
        demand_empty("a1", held, delete_history=True)
    with pytest.raises(Refused, match="keeps the history of shop"):
        demand_empty("a1", Holdings((), ("shop",), ()), delete_history=False)
    with pytest.raises(Refused, match="tests or failovers: t1"):
        demand_empty("a1", Holdings((), (), ("t1",)), delete_history=True)
    demand_empty("a1", Holdings((), ("shop",), ()), delete_history=True)
