"""Control methods by which the operator renews this appliance's certificate. The CA's key comes here sealed only.

The appliance makes a new key and asks; the operator's machine, which has the CA's key, signs; both are put in place
together. Connections that stand go on, new ones are made with the new certificate: nothing is restarted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from drctl.appliance.config import Home
from drctl.appliance.control import Handler, Progress
from drctl.errors import CertificateRejected
from drctl.replication import authority, identity


class CertificateService:
    """`certificate.show`, `.request` and `.install`, `authority.keep` and `.fetch` of one appliance."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._copy = home.path / "authority"

    def handlers(self) -> dict[str, Handler]:
        return {
            "certificate.show": self.show,
            "certificate.request": self.request,
            "certificate.install": self.install,
            "authority.keep": self.keep,
            "authority.fetch": self.fetch,
        }

    def show(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{} → {appliance, not_before, not_after, renewal (seconds since the epoch), due, problem, authority}."""
        del params, progress
        told: dict[str, Any] = {"appliance": self._home.config.uuid, "due": True, "problem": ""}
        told["authority"] = authority.kept(self._copy)
        try:
            begin, end = identity.certificate_expiry(self._home.tls)
            renewal = identity.renewal_due(self._home.tls)
        except (OSError, ValueError) as exc:
            return told | {"not_before": None, "not_after": None, "renewal": None, "problem": str(exc)}
        return told | {
            "not_before": begin.timestamp(),
            "not_after": end.timestamp(),
            "renewal": renewal.timestamp(),
            "due": datetime.now(UTC) > renewal,
        }

    def request(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{} → {appliance, request (PEM)}, for a new key. What is in use is not touched."""
        del params, progress
        uuid = self._home.config.uuid
        return {"appliance": uuid, "request": identity.make_request(self._home.tls, uuid).decode()}

    def install(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{certificate (PEM)} → as certificate.show. It must be for the key of the newest request, of the CA that this
        appliance trusts already, and name this appliance. Raises CertificateRejected: then nothing was changed."""
        given = str(params.get("certificate") or "").encode()
        ca = (self._home.tls / "ca.pem").read_bytes()
        try:
            named = identity.appliance_of(x509.load_pem_x509_certificate(given).public_bytes(Encoding.DER))
        except ValueError as exc:
            raise CertificateRejected(f"not a certificate: {exc}", reason="malformed") from exc
        if named != self._home.config.uuid:
            raise CertificateRejected(
                f"the certificate is for appliance {named}, this one is {self._home.config.uuid}", reason="foreign"
            )
        identity.install_certificate(self._home.tls, given, ca)
        return self.show({}, progress)

    def keep(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{files} → {fingerprint}: keep a sealed copy of the authority. Raises CertificateRejected."""
        del progress
        files = {str(name): str(text) for name, text in dict(params.get("files") or {}).items()}
        return {"fingerprint": authority.keep(self._copy, files, (self._home.tls / "ca.pem").read_bytes())}

    def fetch(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{} → {files}: the sealed copy. Raises NotFound."""
        del params, progress
        return {"files": authority.fetch(self._copy)}
