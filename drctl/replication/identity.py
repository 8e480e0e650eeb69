"""Who an appliance is: the project's CA, certificates, and the list of peers that a site accepts.

A certificate names one appliance by its UUID (DNS name `UUID.drctl`). A peer is accepted only when its certificate is
signed by our CA *and* its UUID is on the list `peers.json`; what it may touch there is written beside it.

    tls/ca.pem      the CA's certificate            tls/key.pem     private key, 0600
    tls/cert.pem    our certificate                 tls/peers.json  {UUID: {site, host, groups: [NAME...] or "*"}}

The CA's own directory (with the operator, not on appliances) holds ca.pem and ca-key.pem (0600), which may be encrypted
with a passphrase. A process that reads or makes a private key makes no core dump from then on (store/secrecy.py).
"""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from drctl.errors import CertificateRejected, SetupFailed
from drctl.store.secrecy import keep_memory_secret

DOMAIN = "drctl"
#: Names a file whose first line is the passphrase of the CA's key: never in TOML, never in an argument list.
PASSPHRASE = "DRCTL_CA_PASSPHRASE_FILE"
#: Back-dated, so that a site whose clock is a little late accepts a new certificate.
BACKDATE = timedelta(days=1)
CA_LIFE = timedelta(days=3650)
#: Renewed at two thirds of it.
CERTIFICATE_LIFE = timedelta(days=365)
#: A key that has no certificate yet, and a certificate whose key is in place already (see _settle).
_KEY, _FRESH_KEY, _CERTIFICATE, _FRESH_CERTIFICATE = "key.pem", "key.pem.new", "cert.pem", "cert.pem.new"


class Peer(msgspec.Struct, frozen=True):
    """An appliance on the list. `groups` is `*` or the names of the groups that it may replicate to us."""

    site: str = ""
    host: str = ""
    groups: list[str] | str = "*"

    def may(self, group: str) -> bool:
        return self.groups == "*" or (isinstance(self.groups, list) and group in self.groups)


def create_ca(directory: Path, passphrase: bytes | None = None) -> None:
    """Make a new CA: `ca.pem` and `ca-key.pem` (0600, encrypted with `passphrase` where there is one) in `directory`.

    Raises FileExistsError over an old one."""
    keep_memory_secret()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"drctl CA {uuid4()}")])
    builder = _builder(name, name, key.public_key(), CA_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(certificate_authority=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    _write_private(directory / "ca-key.pem", _key_pem(key, passphrase))
    (directory / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def read_passphrase(path: Path) -> bytes:
    """The first line of a file. Raises SetupFailed when there is none."""
    keep_memory_secret()
    try:
        first = path.read_bytes().split(b"\n", 1)[0].strip(b"\r")
    except OSError as exc:
        raise SetupFailed(f"{path}: {exc.strerror}", hint="it holds the passphrase of the CA's key") from exc
    if not first:
        raise SetupFailed(f"{path} is empty", hint="its first line is the passphrase of the CA's key")
    return first


def make_request(tls_dir: Path, appliance: str) -> bytes:
    """The appliance's part of enrolment: a new key (`key.pem.new`, 0600) and the signing request (PEM) for it.

    Key and certificate that are in use stay so until the new ones are installed together."""
    keep_memory_secret()
    tls_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    (tls_dir / _FRESH_KEY).unlink(missing_ok=True)
    _write_private(tls_dir / _FRESH_KEY, _key_pem(key))
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(appliance)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def sign_request(
    ca_dir: Path,
    request: bytes,
    appliance: str,
    *,
    start: datetime | None = None,
    life: timedelta = CERTIFICATE_LIFE,
    passphrase: bytes | None = None,
) -> bytes:
    """The operator's part: a certificate (PEM) for `appliance`, whatever name the request claims.

    `start` (default now) is back-dated by a day. Raises CertificateRejected when the request is not whole, SetupFailed
    when the CA's key can't be read with this passphrase."""
    try:
        asked = x509.load_pem_x509_csr(request)
    except ValueError as exc:
        raise CertificateRejected(f"not a signing request: {exc}", reason="malformed") from exc
    public = asked.public_key()
    if not asked.is_signature_valid or not isinstance(public, ec.EllipticCurvePublicKey):
        raise CertificateRejected("the signing request is not signed by its own P-256 key", reason="malformed")
    ca, ca_key = _load_ca(ca_dir, passphrase)
    builder = _builder(_subject(appliance), ca.subject, public, life, start)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(_dns_name(appliance))]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(certificate_authority=False), critical=True)
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(purposes, critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def install_certificate(tls_dir: Path, certificate: bytes, ca: bytes) -> None:
    """The last part: put certificate, CA and the key of the request in place, if they belong together.

    Connections that stand are not touched; each new one reads the files anew. Raises CertificateRejected when the
    certificate is not for our key, or not signed by that CA."""
    _settle(tls_dir)
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
    except ValueError as exc:
        raise CertificateRejected(f"not a certificate: {exc}", reason="malformed") from exc
    fresh = tls_dir / _FRESH_KEY
    renewed = fresh.exists() and _belongs(fresh, loaded)
    if not renewed and not ((tls_dir / _KEY).exists() and _belongs(tls_dir / _KEY, loaded)):
        raise CertificateRejected("the certificate is not for this appliance's key", reason="foreign")
    try:
        loaded.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise CertificateRejected("the certificate is not signed by this CA", reason="foreign") from exc
    for name, data in (("ca.pem.new", ca), (_FRESH_CERTIFICATE, certificate)):
        _write_durably(tls_dir / name, data)
    (tls_dir / "ca.pem.new").replace(tls_dir / "ca.pem")
    if renewed:
        fresh.replace(tls_dir / _KEY)
    _settle(tls_dir)


def _settle(tls_dir: Path) -> None:
    """Key and certificate are two files: whoever finds the key replaced and its certificate waiting ends the exchange,
    which may have been broken off by a crash, or be under way."""
    waiting = tls_dir / _FRESH_CERTIFICATE
    try:
        if _belongs(tls_dir / _KEY, x509.load_pem_x509_certificate(waiting.read_bytes())):
            waiting.replace(tls_dir / _CERTIFICATE)
    except (OSError, ValueError):
        return  # none waits, or somebody else has just done it


def _belongs(key: Path, certificate: x509.Certificate) -> bool:
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    return _public_bytes(loaded.public_key()) == _public_bytes(certificate.public_key())


def issue(
    ca_dir: Path, appliance: str, out_dir: Path, *, start: datetime | None = None, life: timedelta = CERTIFICATE_LIFE
) -> None:
    """All three parts at once, where CA and appliance are in one place (lab, first install)."""
    request = make_request(out_dir, appliance)
    certificate = sign_request(ca_dir, request, appliance, start=start, life=life)
    install_certificate(out_dir, certificate, (ca_dir / "ca.pem").read_bytes())


def write_peers(tls_dir: Path, peers: dict[str, Peer]) -> None:
    """Replace the list of accepted peers; one that says the same is left alone, also on a full disk."""
    path, data = tls_dir / "peers.json", msgspec.json.format(msgspec.json.encode(peers)) + b"\n"
    if path.exists() and path.read_bytes() == data:
        return
    fresh = path.with_name("peers.json.new")
    fresh.write_bytes(data)
    fresh.replace(path)


def load_peers(tls_dir: Path) -> dict[str, Peer]:
    """The list, read anew at each connection so that an edit needs no restart. Raises SetupFailed when it is broken."""
    path = tls_dir / "peers.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Peer])
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as exc:
        raise SetupFailed(f"{path}: {exc}", hint="it maps appliance UUIDs to {site, host, groups}") from exc


def certificate_expiry(tls_dir: Path) -> tuple[datetime, datetime]:
    """Begin and end of our own certificate's validity (UTC)."""
    loaded = x509.load_pem_x509_certificate((tls_dir / "cert.pem").read_bytes())
    return loaded.not_valid_before_utc, loaded.not_valid_after_utc


def renewal_due(tls_dir: Path) -> datetime:
    """When our own certificate shall be renewed: at two thirds of its life. Raises OSError, ValueError."""
    begin, end = certificate_expiry(tls_dir)
    return begin + (end - begin) * 2 / 3


def server_context(tls_dir: Path) -> ssl.SSLContext:
    """TLS 1.3 only; a client without a certificate of our CA does not get past the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # no resumption: every connection is checked against the list and the calendar anew
    return _prepared(context, tls_dir)


def client_context(tls_dir: Path) -> ssl.SSLContext:
    """TLS 1.3 only. The peer is checked by `authorise` after the handshake, not by its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _prepared(context, tls_dir)


def _prepared(context: ssl.SSLContext, tls_dir: Path) -> ssl.SSLContext:
    keep_memory_secret()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    _settle(tls_dir)
    try:
        context.load_verify_locations(tls_dir / "ca.pem")
        context.load_cert_chain(tls_dir / "cert.pem", tls_dir / "key.pem")
    except (OSError, ssl.SSLError) as exc:
        raise SetupFailed(f"{tls_dir}: this appliance has no usable certificate: {exc}") from exc
    return context


def authorise(certificate: bytes | None, peers: dict[str, Peer]) -> tuple[str, Peer]:
    """UUID and entry of the peer with this certificate (DER), whose signature TLS has checked.

    Raises CertificateRejected when it names no appliance or is not on the list."""
    appliance = appliance_of(certificate)
    if (peer := peers.get(appliance)) is None:
        raise CertificateRejected(
            f"appliance {appliance} is not on this site's list",
            hint="add it to peers.json, or enrol it with drctl appliance install",
            reason="not on the list",
            appliance=appliance,
        )
    return appliance, peer


def appliance_of(certificate: bytes | None) -> str:
    """The UUID that a certificate (DER) names. Raises CertificateRejected when it names none."""
    names: list[str] = []
    if certificate is not None:
        loaded = x509.load_der_x509_certificate(certificate)
        for extension in loaded.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                names = extension.value.get_values_for_type(x509.DNSName)
    for name in names:
        uuid, dot, domain = name.partition(".")
        if dot and domain == DOMAIN and _is_uuid(uuid):
            return uuid
    raise CertificateRejected("the peer's certificate names no appliance", reason="foreign")


#: OpenSSL's X509_V_ERR numbers (x509_vfy.h).
_VERIFY_REASONS = {
    9: ("not yet valid", "one of the two clocks is wrong"),
    10: ("expired", "renew it; or a clock is wrong"),
}
#: What the peer's alerts about *our* certificate are called by OpenSSL (TLS 1.3 tells them after the handshake).
_ALERTS = {
    "ALERT_UNKNOWN_CA": "foreign",
    "ALERT_CERTIFICATE_EXPIRED": "expired",
    "ALERT_BAD_CERTIFICATE": "foreign or not yet valid",
    "ALERT_CERTIFICATE_REQUIRED": "missing",
    "ALERT_UNSUPPORTED_CERTIFICATE": "unsupported",
    "ALERT_CERTIFICATE_UNKNOWN": "unknown",
}


def rejection(exc: BaseException) -> CertificateRejected | None:
    """What a failed handshake says about certificates; None when it failed for another cause."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        reason, hint = _VERIFY_REASONS.get(exc.verify_code, ("foreign", "it is not signed by this project's CA"))
        return CertificateRejected(
            f"the peer's certificate is {reason}: {exc.verify_message}", hint=hint, reason=reason
        )
    if isinstance(exc, ssl.SSLError):
        name = getattr(exc, "reason", None) or ""  # absent on errors that Python makes itself
        for alert, reason in _ALERTS.items():
            if alert in name:
                message = f"the peer rejects our certificate as {reason}"
                return CertificateRejected(message, hint="see the receiver's log", reason=reason)
    return None


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    life: timedelta,
    start: datetime | None = None,
) -> x509.CertificateBuilder:
    begin = (start or datetime.now(UTC)) - BACKDATE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + BACKDATE + life)
    )


def _usage(*, certificate_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificate_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificate_authority,
        crl_sign=certificate_authority,
        encipher_only=False,
        decipher_only=False,
    )


def check_ca(ca_dir: Path, passphrase: bytes | None = None) -> None:
    """Raise SetupFailed when nothing can be signed with the CA's key."""
    _load_ca(ca_dir, passphrase)


def _load_ca(ca_dir: Path, passphrase: bytes | None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    keep_memory_secret()
    certificate = x509.load_pem_x509_certificate((ca_dir / "ca.pem").read_bytes())
    sealed = (ca_dir / "ca-key.pem").read_bytes()
    encrypted = b"ENCRYPTED" in sealed
    if encrypted and passphrase is None:
        raise SetupFailed(f"{ca_dir}/ca-key.pem is encrypted", hint=f"name a file with its passphrase in ${PASSPHRASE}")
    try:
        key = serialization.load_pem_private_key(sealed, passphrase if encrypted else None)
    except ValueError as exc:
        raise SetupFailed(f"{ca_dir}/ca-key.pem can't be read: {exc}", hint="is the passphrase right?") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SetupFailed(f"{ca_dir}/ca-key.pem is not an elliptic curve key")
    return certificate, key


def _subject(appliance: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _dns_name(appliance))])


def _dns_name(appliance: str) -> str:
    if not _is_uuid(appliance):
        raise ValueError(f"an appliance is named by a UUID in small letters, not {appliance!r}")
    return f"{appliance}.{DOMAIN}"


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def _public_bytes(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateRejected("not an elliptic curve key", reason="foreign")
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _key_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> bytes:
    sealing: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        sealing = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealing)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
