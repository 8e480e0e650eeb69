"""Sealed copies of the project's authority, for both sites: useless without the operator's passphrase.

A copy is what lies in the operator's `ca/`: ca.pem, ca-key.pem (encrypted, always) and appliances.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from drctl.errors import AlreadyExists, CertificateRejected, NotFound, SetupFailed
from drctl.replication.identity import PASSPHRASE
from drctl.store.secrecy import keep_memory_secret

CERTIFICATE, KEY, ROSTER = "ca.pem", "ca-key.pem", "appliances.json"
#: All three are some KiB; more is a mistake or an attack.
MOST = 4 << 20
_SEALED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def seal(ca_dir: Path, passphrase: bytes | None) -> dict[str, str]:
    """The files of a copy. A key that lies open here is encrypted with the passphrase on its way.

    Raises SetupFailed when it can't be sealed: no passphrase, a wrong one, no authority."""
    keep_memory_secret()
    try:
        key = (ca_dir / KEY).read_bytes()
        files = {CERTIFICATE: (ca_dir / CERTIFICATE).read_text()}
        files[ROSTER] = (ca_dir / ROSTER).read_text() if (ca_dir / ROSTER).exists() else "{}\n"
    except OSError as exc:
        raise SetupFailed(f"{exc.filename}: {exc.strerror}", hint="the authority's directory is needed here") from exc
    files[KEY] = _sealed(key, passphrase, ca_dir / KEY).decode()
    return files


def _sealed(key: bytes, passphrase: bytes | None, path: Path) -> bytes:
    encrypted = _SEALED in key
    if passphrase is None and not encrypted:
        raise SetupFailed(
            f"{path} is not encrypted", hint=f"name a file with a passphrase for the copy in ${PASSPHRASE}"
        )
    if passphrase is None:
        return key  # as it is: only its owner can open it
    try:
        loaded = serialization.load_pem_private_key(key, passphrase if encrypted else None)
    except ValueError as exc:
        raise SetupFailed(f"{path} can't be read: {exc}", hint="is the passphrase right?") from exc
    if encrypted:
        return key
    sealing = serialization.BestAvailableEncryption(passphrase)
    return loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealing)


def keep(directory: Path, files: Mapping[str, str], ca: bytes) -> str:
    """Keep a copy in a directory for this user alone; its fingerprint. `ca`: the authority that is trusted here.

    Raises CertificateRejected for another one's, and for a key that is not sealed: then nothing was changed."""
    if set(files) != {CERTIFICATE, KEY, ROSTER} or sum(map(len, files.values())) > MOST:
        raise CertificateRejected("not a copy of an authority", reason="malformed")
    if not files[KEY].encode().lstrip().startswith(_SEALED):
        raise CertificateRejected("the authority's key is not encrypted: it is not kept here", reason="open")
    if _fingerprint(files[CERTIFICATE].encode()) != _fingerprint(ca):
        raise CertificateRejected("it is not the authority that this appliance trusts", reason="foreign")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in files.items():
        fresh = directory / f".{name}.new"
        fresh.unlink(missing_ok=True)
        _write_private(fresh, text)
    for name in files:
        (directory / f".{name}.new").replace(directory / name)
    return _fingerprint(ca)


def kept(directory: Path) -> dict[str, object] | None:
    """{fingerprint, kept (seconds since the epoch)} of the copy that lies there; None: none that can be read."""
    try:
        return {
            "fingerprint": _fingerprint((directory / CERTIFICATE).read_bytes()),
            "kept": (directory / KEY).stat().st_mtime,
        }
    except (OSError, CertificateRejected):
        return None


def fetch(directory: Path) -> dict[str, str]:
    """The files of the copy. Raises NotFound."""
    try:
        return {name: (directory / name).read_text() for name in (CERTIFICATE, KEY, ROSTER)}
    except OSError as exc:
        raise NotFound("copy of the authority", str(directory), hint="drctl certificate seal sends one") from exc


def unpack(directory: Path, files: Mapping[str, str]) -> None:
    """Make an operator's `ca/` of a copy; its key stays sealed. Raises AlreadyExists over another one."""
    if directory.exists() and any(directory.iterdir()):
        raise AlreadyExists(f"{directory} is there already", hint="name another directory; nothing was written")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (CERTIFICATE, KEY, ROSTER):
        _write_private(directory / name, files[name])
    (directory / ".gitignore").write_text(f"{KEY}\n", "utf-8")


def _fingerprint(certificate: bytes) -> str:
    try:
        return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()
    except ValueError as exc:
        raise CertificateRejected(f"not a certificate: {exc}", reason="malformed") from exc


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
