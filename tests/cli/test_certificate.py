"""`drctl certificate`: who gets a new one, who signs it, and what is refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from drctl.appliance.certificate_service import CertificateService
from drctl.appliance.config import ApplianceToml, Home
from drctl.errors import ApplianceUnreachable
from drctl.replication import identity

UUIDS = {"a1": "11111111-1111-4111-8111-111111111111", "b1": "22222222-2222-4222-8222-222222222222"}


@pytest.fixture
def certified(world, tmp_path_factory):
    """Both appliances answer with the real service; a1's certificate is old. `world.homes` are theirs."""
    ca = world.directory / "ca"
    identity.create_ca(ca)
    (ca / "appliances.json").write_text(json.dumps(UUIDS))
    world.homes = {}
    for fake, age in ((world.alpha, 300), (world.beta, 10)):
        uuid = UUIDS[fake.host]
        path = tmp_path_factory.mktemp(fake.host)
        identity.issue(ca, uuid, path / "tls", start=datetime.now(UTC) - timedelta(days=age))
        world.homes[fake.host] = Home(path, ApplianceToml(fake.site, fake.host, "", "", uuid))
        for method, handler in CertificateService(world.homes[fake.host]).handlers().items():
            fake.replies[method] = handler
    return world


def _serials(world):
    return {name: (home.tls / "cert.pem").read_bytes() for name, home in world.homes.items()}


def test_only_what_is_due_is_renewed_and_again_nothing_is(certified):
    before = _serials(certified)
    result = certified("certificate", "renew", "--all", "--yes")
    assert result.code == 0, result.err
    assert "a1: renewed, holds until" in result.out
    assert "b1: holds until" in result.out
    after = _serials(certified)
    assert (after["a1"] != before["a1"], after["b1"] == before["b1"]) == (True, True)
    again = certified("certificate", "renew", "--all", "--yes")
    assert (again.code, "renewed" in again.out) == (0, False)


def test_force_renews_what_holds_for_long(certified):
    before = _serials(certified)
    assert certified("certificate", "renew", "b1", "--force", "--yes").code == 0
    assert _serials(certified)["b1"] != before["b1"]


def test_a_dry_run_and_a_no_change_nothing(certified):
    before = _serials(certified)
    assert "would renew the certificate of a1" in certified("certificate", "renew", "--all", "--dry-run").err
    assert certified("certificate", "renew", "--all").code == 14
    assert _serials(certified) == before
    assert not certified.alpha.called("certificate.request")


def test_the_key_of_the_ca_goes_nowhere(certified):
    certified("certificate", "renew", "--all", "--force", "--yes")
    key = (certified.directory / "ca" / "ca-key.pem").read_text().splitlines()[1]
    assert key not in json.dumps([certified.alpha.calls, certified.beta.calls])


def test_a_host_that_claims_to_be_another_gets_nothing(certified):
    """A host that was taken over must not get a certificate in the name of another."""
    lying = certified.alpha.replies["certificate.show"]
    certified.alpha.replies["certificate.show"] = lambda *a: lying(*a) | {"appliance": UUIDS["b1"]}
    result = certified("certificate", "renew", "a1", "--yes")
    assert (result.code, "is it the host that it was?" in result.err) == (3, True)
    assert not certified.alpha.called("certificate.install")


def test_an_unknown_host_is_not_enrolled_by_the_way(certified):
    (certified.directory / "ca" / "appliances.json").write_text("{}")
    result = certified("certificate", "renew", "a1", "--yes")
    assert (result.code, "drctl appliance install" in result.err) == (3, True)


def test_one_that_is_down_keeps_nobody_else(certified):
    certified.beta.down = True
    result = certified("certificate", "renew", "--all", "--yes")
    assert result.code == 3
    assert "a1: renewed" in result.out
    assert "b1" in result.err
    certified.beta.down = False
    certified.alpha.replies["certificate.install"] = ApplianceUnreachable("hung up")
    assert certified("certificate", "renew", "a1", "--force", "--yes").code == 3


def test_without_the_key_it_is_told_before_anything_is_asked(certified):
    (certified.directory / "ca" / "ca-key.pem").unlink()
    result = certified("certificate", "renew", "--all", "--yes")
    assert (result.code, "has no certificate authority" in result.err) == (42, True)
    assert not certified.alpha.called("certificate.request")


def test_list_tells_until_when(certified):
    listed = certified("certificate", "list", "--output", "json").json["certificates"]
    assert [(row["host"], row["appliance"], row["due"]) for row in listed] == [
        ("a1", UUIDS["a1"], True),
        ("b1", UUIDS["b1"], False),
    ]
    assert "VALID UNTIL" in certified("certificate", "list").out
    certified.beta.down = True
    assert certified("certificate", "list").code == 3


@pytest.mark.parametrize("named", [(), ("a1", "--all"), ("--site", "alpha", "--all")])
def test_which_hosts_must_be_said_once(certified, named):
    assert certified("certificate", "renew", *named).code == 14


# -- sealed copies of the authority ---------------------------------------------------------------------------------


@pytest.fixture
def passphrase(tmp_path, monkeypatch):
    (tmp_path / "passphrase").write_text("correct horse\n")
    monkeypatch.setenv(identity.PASSPHRASE, str(tmp_path / "passphrase"))
    return b"correct horse"


def test_both_sites_keep_a_sealed_copy_that_can_be_gone_on_with(certified, passphrase, tmp_path):
    result = certified("certificate", "seal", "--all", "--yes")
    assert result.code == 0, result.err
    assert result.out.count("keeps a sealed copy of authority") == 2
    rows = certified("certificate", "list", "--output", "json").json["certificates"]
    assert len({row["authority"]["fingerprint"] for row in rows}) == 1
    assert certified("certificate", "unseal", "b1", str(tmp_path / "new"), "--yes").code == 0
    request = identity.make_request(tmp_path / "tls", UUIDS["a1"])
    assert identity.sign_request(tmp_path / "new", request, UUIDS["a1"], passphrase=passphrase)
    assert json.loads((tmp_path / "new" / "appliances.json").read_text()) == UUIDS
    again = certified("certificate", "unseal", "b1", str(tmp_path / "new"), "--yes")
    assert again.code == 12


def test_an_open_key_is_not_sent(certified):
    result = certified("certificate", "seal", "--all", "--yes")
    assert result.code == 43
    assert "is not encrypted" in result.err
    assert not certified.beta.called("authority.keep")
    assert certified("certificate", "list", "--output", "json").json["certificates"][0]["authority"] is None


def test_nothing_is_sent_unasked(certified, passphrase):
    assert certified("certificate", "seal", "--all").code == 14
    assert "would keep a sealed copy" in certified("certificate", "seal", "b1", "--dry-run").err
    assert not certified.beta.called("authority.keep")


def test_one_host_that_refuses_keeps_no_other_from_its_copy(certified, passphrase):
    certified.alpha.replies["authority.keep"] = ApplianceUnreachable("a1 is down")
    result = certified("certificate", "seal", "--all", "--yes")
    assert result.code == 3
    assert "b1: keeps a sealed copy" in result.out


def test_no_copy_to_unseal(certified, tmp_path):
    assert certified("certificate", "unseal", "b1", str(tmp_path / "new"), "--yes").code == 11
    assert not (tmp_path / "new").exists()
