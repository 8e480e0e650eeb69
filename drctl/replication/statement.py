"""Statements that an appliance signs with its key, and what proves them: its certificate, by the project's CA."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from drctl.errors import CertificateRejected, SetupFailed
from drctl.replication.identity import DOMAIN

#: In front of what is signed, so that no signature of the link's TLS can stand for one of these.
_PURPOSE = b"drctl statement\0"


def sign_statement(tls_dir: Path, text: bytes) -> dict[str, str]:
    """{signature (base64), certificate (PEM)}. Raises SetupFailed without a key."""
    try:
        key = serialization.load_pem_private_key((tls_dir / "key.pem").read_bytes(), None)
        certificate = (tls_dir / "cert.pem").read_text()
    except (OSError, ValueError) as exc:
        raise SetupFailed(
            f"{tls_dir}: {exc}", hint="drctl appliance install gives an appliance its certificate"
        ) from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SetupFailed(f"{tls_dir}/key.pem is no P-256 key")
    signature = key.sign(_PURPOSE + text, ec.ECDSA(hashes.SHA256()))
    return {"signature": base64.b64encode(signature).decode(), "certificate": certificate}


def check_statement(text: bytes, told: Mapping[str, Any], ca: bytes) -> str:
    """The UUID of the appliance that signed it. Raises CertificateRejected when it is not so.

    A certificate that has run out since still proves what it signed; when that was, the statement itself has to say."""
    try:
        certificate = x509.load_pem_x509_certificate(str(told.get("certificate")).encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (name,) = names.get_values_for_type(x509.DNSName)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as exc:
        raise CertificateRejected("its certificate is not by this project's CA", reason="foreign") from exc
    key = certificate.public_key()
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise CertificateRejected("its certificate has no P-256 key", reason="foreign")
        key.verify(
            base64.b64decode(str(told.get("signature")), validate=True), _PURPOSE + text, ec.ECDSA(hashes.SHA256())
        )
    except (InvalidSignature, binascii.Error, ValueError) as exc:
        raise CertificateRejected("the signature does not fit", reason="foreign") from exc
    return name.removesuffix(f".{DOMAIN}")
