"""The CA, certificates, and who is let in."""

from __future__ import annotations

import contextlib
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from drctl.errors import CertificateRejected, SetupFailed
from drctl.replication import identity
from drctl.replication.identity import Peer

ALPHA = "11111111-1111-4111-8111-111111111111"
BETA = "22222222-2222-4222-8222-222222222222"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("identity")
    identity.create_ca(root / "ca")
    identity.create_ca(root / "other-ca")
    for name in (ALPHA, BETA):
        identity.issue(root / "ca", name, root / name)
    return root


def handshake(server_dir, client_dir):
    """Both sides in memory; returns the certificate that the server saw and the one that the client saw."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = identity.server_context(server_dir).wrap_bio(to_server, to_client, server_side=True)
    client = identity.client_context(client_dir).wrap_bio(to_client, to_server)
    for _ in range(4):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return server, client


def test_two_appliances_of_one_project_meet(place):
    server, client = handshake(place / ALPHA, place / BETA)
    assert server.version() == client.version() == "TLSv1.3"
    assert identity.appliance_of(server.getpeercert(binary_form=True)) == BETA
    assert identity.appliance_of(client.getpeercert(binary_form=True)) == ALPHA


def test_keys_are_for_the_owner_alone(place):
    for path in (place / "ca" / "ca-key.pem", place / ALPHA / "key.pem"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_certificate_is_valid_since_yesterday(place):
    begin, end = identity.certificate_expiry(place / ALPHA)
    now = datetime.now(UTC)
    assert timedelta(hours=23) < now - begin < timedelta(hours=25)
    assert end - now > timedelta(days=360)


@pytest.mark.parametrize(
    ("shift", "reason"), [(timedelta(days=-500), "expired"), (timedelta(days=30), "not yet valid")]
)
def test_a_certificate_out_of_its_time_is_rejected(place, tmp_path, shift, reason):
    identity.issue(place / "ca", ALPHA, tmp_path, start=datetime.now(UTC) + shift)
    with pytest.raises(ssl.SSLError) as caught:
        handshake(place / BETA, tmp_path)
    assert identity.rejection(caught.value).fields["reason"] == reason


def test_a_foreign_certificate_is_rejected(place, tmp_path):
    identity.issue(place / "other-ca", ALPHA, tmp_path)
    (tmp_path / "ca.pem").write_bytes((place / "ca" / "ca.pem").read_bytes())
    with pytest.raises(ssl.SSLError) as caught:
        handshake(place / BETA, tmp_path)
    assert identity.rejection(caught.value).fields["reason"] == "foreign"


def test_other_failures_are_not_about_certificates():
    assert identity.rejection(ConnectionResetError()) is None
    assert identity.rejection(ssl.SSLError(1, "x")) is None


def test_only_the_list_is_let_in(place, tmp_path):
    certificate = ssl.PEM_cert_to_DER_cert((place / ALPHA / "cert.pem").read_text())
    identity.write_peers(tmp_path, {ALPHA: Peer("east", "a1", ["web"])})
    peers = identity.load_peers(tmp_path)
    uuid, peer = identity.authorise(certificate, peers)
    assert uuid == ALPHA
    assert peer.may("web")
    assert not peer.may("mail")
    with pytest.raises(CertificateRejected) as caught:
        identity.authorise(certificate, {BETA: Peer()})
    assert caught.value.fields["reason"] == "not on the list"


def test_no_list_lets_nobody_in_and_a_broken_one_is_named(tmp_path):
    assert identity.load_peers(tmp_path) == {}
    (tmp_path / "peers.json").write_text("{")
    with pytest.raises(SetupFailed, match=r"peers\.json"):
        identity.load_peers(tmp_path)


def test_a_certificate_without_appliance_is_rejected(place):
    ca = ssl.PEM_cert_to_DER_cert((place / "ca" / "ca.pem").read_text())
    for certificate in (ca, None):
        with pytest.raises(CertificateRejected, match="names no appliance"):
            identity.appliance_of(certificate)


def test_the_request_does_not_choose_its_name(place, tmp_path):
    request = identity.make_request(tmp_path, ALPHA)
    pem = identity.sign_request(place / "ca", request, BETA)
    der = ssl.PEM_cert_to_DER_cert(pem.decode())
    assert identity.appliance_of(der) == BETA
    assert not x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_certificate_for_another_key_is_not_installed(place, tmp_path):
    identity.make_request(tmp_path, ALPHA)
    ca = (place / "ca" / "ca.pem").read_bytes()
    with pytest.raises(CertificateRejected, match="not for this appliance's key"):
        identity.install_certificate(tmp_path, (place / ALPHA / "cert.pem").read_bytes(), ca)
    identity.issue(place / "ca", ALPHA, tmp_path / "x")
    with pytest.raises(CertificateRejected, match="not signed by this CA"):
        identity.install_certificate(
            tmp_path / "x", (tmp_path / "x" / "cert.pem").read_bytes(), (place / "other-ca" / "ca.pem").read_bytes()
        )


@pytest.mark.parametrize("name", ["web", "11111111-1111-4111-8111-11111111111A", "*.drctl"])
def test_an_appliance_is_named_by_a_uuid(place, tmp_path, name):
    with pytest.raises(ValueError, match="UUID"):
        identity.issue(place / "ca", name, tmp_path)


def test_a_malformed_request_is_rejected(place):
    with pytest.raises(CertificateRejected):
        identity.sign_request(place / "ca", b"hello", ALPHA)


def test_no_certificate_is_a_setup_problem(tmp_path):
    with pytest.raises(SetupFailed):
        identity.client_context(tmp_path)


def test_a_sealed_key_signs_with_its_passphrase_alone(tmp_path) -> None:
    identity.create_ca(tmp_path / "ca", b"correct horse")
    sealed = (tmp_path / "ca" / "ca-key.pem").read_bytes()
    assert b"ENCRYPTED" in sealed
    request = identity.make_request(tmp_path / "tls", ALPHA)
    pem = identity.sign_request(tmp_path / "ca", request, ALPHA, passphrase=b"correct horse")
    identity.install_certificate(tmp_path / "tls", pem, (tmp_path / "ca" / "ca.pem").read_bytes())
    for wrong in (None, b"battery staple"):
        with pytest.raises(SetupFailed):
            identity.sign_request(tmp_path / "ca", request, ALPHA, passphrase=wrong)
    # An appliance's own key is not sealed: it has to start by itself.
    assert b"ENCRYPTED" not in (tmp_path / "tls" / "key.pem").read_bytes()


def test_a_passphrase_that_is_not_needed_does_no_harm(tmp_path) -> None:
    identity.create_ca(tmp_path / "ca")
    request = identity.make_request(tmp_path / "tls", ALPHA)
    identity.sign_request(tmp_path / "ca", request, ALPHA, passphrase=b"anything")


def test_a_passphrase_is_the_first_line_of_its_file(tmp_path) -> None:
    file = tmp_path / "pass"
    file.write_bytes(b"one two\r\nthree\n")
    assert identity.read_passphrase(file) == b"one two"
    file.write_bytes(b"\n")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(SetupFailed):
            identity.read_passphrase(path)


def test_init_seals_the_key_with_the_passphrase_of_a_file(tmp_path, monkeypatch) -> None:
    from drctl.appliance.install.roster import Roster
    from drctl.cli.app import run

    file = tmp_path / "pass"
    file.write_text("correct horse\n")
    assert run(["init", str(tmp_path / "dr"), "--ca-passphrase-file", str(file), "--yes"]) == 0
    request = identity.make_request(tmp_path / "tls", ALPHA).decode()
    monkeypatch.delenv(identity.PASSPHRASE, raising=False)
    with pytest.raises(SetupFailed, match="is encrypted"):
        Roster(tmp_path / "dr" / "ca")
    monkeypatch.setenv(identity.PASSPHRASE, str(file))
    assert "BEGIN CERTIFICATE" in Roster(tmp_path / "dr" / "ca").sign(request, ALPHA)
