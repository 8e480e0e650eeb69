"""The host's part of an appliance's identity: its key is made here and never leaves. Run as the appliance's user.

    python -m drctl.appliance.install.enroll check|request|install TLS UUID

`check` says on stdout why the certificate is no good (nothing: it is) and reads the CA's on stdin; `request` prints a
signing request for a new key; `install` reads certificate and CA, as JSON."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from drctl.errors import DrctlError
from drctl.replication import identity


def problem(tls: Path, uuid: str, ca: bytes) -> str:
    """Why the certificate in `tls` can't serve the appliance `uuid` of this CA; empty when it can."""
    try:
        identity.server_context(tls)  # reads all three files, and checks that key and certificate belong together
        certificate = x509.load_pem_x509_certificate((tls / "cert.pem").read_bytes())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
        named = identity.appliance_of(certificate.public_bytes(Encoding.DER))
    except (DrctlError, OSError, ValueError, TypeError, InvalidSignature) as exc:
        return str(exc) or "it is of another CA"
    if (tls / "ca.pem").read_bytes() != ca:
        return "it trusts another CA"
    if named != uuid:
        return f"it names the appliance {named}"
    _, end = identity.certificate_expiry(tls)
    return f"it ends on {end:%Y-%m-%d}" if datetime.now(UTC) > identity.renewal_due(tls) else ""


def main(arguments: list[str]) -> int:
    """One of the three parts. Raises DrctlError."""
    part, tls, uuid = arguments[0], Path(arguments[1]), arguments[2]
    if part == "check":
        sys.stdout.write(problem(tls, uuid, sys.stdin.buffer.read()))
    elif part == "request":
        sys.stdout.write(identity.make_request(tls, uuid).decode())
    else:
        given = json.loads(sys.stdin.read())
        identity.install_certificate(tls, given["certificate"].encode(), given["ca"].encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
