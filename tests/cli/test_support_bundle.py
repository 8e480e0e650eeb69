"""`drctl support-bundle`: one file that helps, holds no secret, and needs nobody to be up."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from drctl.errors import NotFound
from drctl.replication import identity
from tests.cli.conftest import CONFIG

PASSPHRASE = "korrekt-pferd-batterie"


@pytest.fixture
def secrets(world, tmp_path, monkeypatch):
    """Everything secret that a configuration and an appliance may hold, and how to look for it."""
    identity.create_ca(world.directory / "ca", PASSPHRASE.encode())
    (tmp_path / "pass").write_text(PASSPHRASE)
    monkeypatch.setenv(identity.PASSPHRASE, str(tmp_path / "pass"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "drctl").mkdir()
    (tmp_path / "drctl" / "errors.log").write_text("drctl x\nToken: T0KEN-IN-LOG\n")
    text = CONFIG.replace('name = "a1"\n', 'name = "a1"\nfence = ["fence_ipmi", "-p", "FENCE-PASS"]\n')
    (world.directory / "drctl.toml").write_text(text)
    files = {
        "logs/tap-web.log": "tap: vm.vda: connection 1\n",
        "store/web/lease.json": '{"token": "LEASE-TOKEN"}',
        "../../../etc/cron.d/x": "* * * * * root x\n",
    }
    for fake in (world.alpha, world.beta):
        fake.replies["support.collect"] = {"files": files}
    key = (world.directory / "ca" / "ca-key.pem").read_text().splitlines()[1]
    return [PASSPHRASE, "FENCE-PASS", "T0KEN-IN-LOG", "LEASE-TOKEN", key, "PRIVATE KEY-----\\nM"]


def _read(path):
    with tarfile.open(path) as archive:
        names = archive.getnames()
        return {name.partition("/")[2]: archive.extractfile(name).read().decode() for name in names}


def test_it_holds_what_helps_and_no_secret(world, secrets, tmp_path):
    world.applied()
    file = tmp_path / "case.tar.gz"
    result = world("support-bundle", "--output", str(file))
    assert result.code == 0, result.err
    found = _read(file)
    wanted = {"about.json", "config/drctl.toml", "config/groups/web.toml", "doctor.json", "status.json", "errors.log"}
    wanted |= {
        f"hosts/{host}/{name}"
        for host in ("a1", "b1")
        for name in ("appliance.info.json", "appliance.history.json", "logs/tap-web.log")
    }
    assert wanted <= set(found)
    assert "fence_ipmi" in found["config/drctl.toml"]
    assert json.loads(found["status.json"])["groups"][0]["group"] == "web"
    assert file.stat().st_mode & 0o777 == 0o600
    whole = "\n".join(found.values())
    assert [secret for secret in secrets if secret in whole] == []
    assert not any("ca-key" in name or ".." in name or name.startswith("/") for name in found)


def test_sites_that_are_down_are_named_and_the_rest_is_there(world, secrets, tmp_path):
    world.applied()
    world.alpha.down = True
    file = tmp_path / "one.tar.gz"
    result = world("support-bundle", "--output", str(file))
    assert (result.code, "no answer from a1" in result.err) == (3, True)
    found = _read(file)
    assert "hosts/a1/error.json" in found
    assert "hosts/b1/logs/tap-web.log" in found
    world.beta.down = True
    both = tmp_path / "none.tar.gz"
    assert world("support-bundle", "--output", str(both)).code == 3
    found = _read(both)
    assert json.loads(found["about.json"])["silent"].keys() == {"a1", "b1"}
    assert {"doctor.json", "status.json", "config/drctl.toml"} <= set(found)


def test_an_older_appliance_that_knows_nothing_of_it(world, secrets, tmp_path):
    world.alpha.replies["support.collect"] = NotFound("method", "support.collect")
    file = tmp_path / "old.tar.gz"
    assert world("support-bundle", "--output", str(file)).code == 3
    assert "support.collect" in _read(file)["hosts/a1/error.json"]


def test_a_file_is_not_written_over_and_a_place_that_is_none_is_told(world, secrets, tmp_path):
    file = tmp_path / "case.tar.gz"
    file.write_text("mine")
    assert world("support-bundle", "--output", str(file)).code == 12
    assert file.read_text() == "mine"
    assert world("support-bundle", "--output", str(tmp_path / "none" / "x.tar.gz")).code == 14
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".new")] == []


def test_it_is_a_tar_that_others_can_read(world, secrets, tmp_path):
    file = tmp_path / "case.tar.gz"
    world("support-bundle", "--output", str(file))
    with tarfile.open(fileobj=io.BytesIO(file.read_bytes()), mode="r:gz") as archive:
        assert {member.name.split("/")[0] for member in archive} == {"case"}
