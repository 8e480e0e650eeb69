"""Sealed copies of the authority: never open, only the project's own, and good to go on with."""

from __future__ import annotations

import json

import pytest

from drctl.errors import AlreadyExists, CertificateRejected, NotFound, SetupFailed
from drctl.replication import authority, identity

PASSPHRASE = b"correct horse battery"
UUID = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(params=["open", "sealed"])
def ca(tmp_path, request):
    """The operator's directory, its key open or sealed already."""
    identity.create_ca(tmp_path / "ca", PASSPHRASE if request.param == "sealed" else None)
    (tmp_path / "ca" / "appliances.json").write_text(json.dumps({"a1": UUID}))
    return tmp_path / "ca"


def keep(tmp_path, ca, files=None):
    files = files or authority.seal(ca, PASSPHRASE)
    return authority.keep(tmp_path / "home", files, (ca / "ca.pem").read_bytes())


def test_a_copy_signs_with_the_passphrase_and_not_without(tmp_path, ca) -> None:
    assert authority.kept(tmp_path / "home") is None
    fingerprint = keep(tmp_path, ca)
    told = authority.kept(tmp_path / "home")
    assert told is not None
    assert told["fingerprint"] == fingerprint
    authority.unpack(tmp_path / "new", authority.fetch(tmp_path / "home"))
    request = identity.make_request(tmp_path / "tls", UUID)
    signed = identity.sign_request(tmp_path / "new", request, UUID, passphrase=PASSPHRASE)
    identity.install_certificate(tmp_path / "tls", signed, (ca / "ca.pem").read_bytes())
    for wrong in (None, b"another"):
        with pytest.raises(SetupFailed):
            identity.sign_request(tmp_path / "new", request, UUID, passphrase=wrong)
    assert (tmp_path / "new" / "appliances.json").read_text() == (ca / "appliances.json").read_text()


def test_the_open_key_is_nowhere_in_it(tmp_path, ca) -> None:
    keep(tmp_path, ca)
    key = (ca / "ca-key.pem").read_text()
    body = "".join(key.splitlines()[1:-1])
    for path in (tmp_path / "home").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        if "ENCRYPTED" not in key:
            assert body[:40] not in path.read_text()
            assert "BEGIN PRIVATE KEY" not in path.read_text()


def test_an_open_key_is_neither_sent_nor_taken(tmp_path) -> None:
    identity.create_ca(tmp_path / "ca")
    with pytest.raises(SetupFailed, match="is not encrypted"):
        authority.seal(tmp_path / "ca", None)
    files = authority.seal(tmp_path / "ca", PASSPHRASE)
    files["ca-key.pem"] = (tmp_path / "ca" / "ca-key.pem").read_text()
    with pytest.raises(CertificateRejected, match="not encrypted"):
        keep(tmp_path, tmp_path / "ca", files)
    assert not (tmp_path / "home").exists()


def test_a_foreign_one_is_refused_and_the_old_copy_stays(tmp_path, ca) -> None:
    keep(tmp_path, ca)
    before = authority.fetch(tmp_path / "home")
    identity.create_ca(tmp_path / "other", PASSPHRASE)
    with pytest.raises(CertificateRejected, match="trusts"):
        keep(tmp_path, ca, authority.seal(tmp_path / "other", None))
    with pytest.raises(CertificateRejected, match="not a copy"):
        keep(tmp_path, ca, before | {"../key.pem": "x"})
    assert authority.fetch(tmp_path / "home") == before
    keep(tmp_path, ca)  # a second time replaces it


def test_nothing_is_written_over(tmp_path, ca) -> None:
    keep(tmp_path, ca)
    with pytest.raises(AlreadyExists):
        authority.unpack(ca, authority.fetch(tmp_path / "home"))
    with pytest.raises(NotFound):
        authority.fetch(tmp_path / "nowhere")


def test_a_wrong_passphrase_is_told_before_anything_travels(tmp_path) -> None:
    identity.create_ca(tmp_path / "ca", PASSPHRASE)
    with pytest.raises(SetupFailed, match="can't be read"):
        authority.seal(tmp_path / "ca", b"wrong")
    assert "ENCRYPTED" in authority.seal(tmp_path / "ca", None)["ca-key.pem"]
