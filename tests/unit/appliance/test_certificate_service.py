"""A certificate is renewed over the control socket: both files at once, whatever breaks in between."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from drctl.appliance.certificate_service import CertificateService
from drctl.appliance.config import ApplianceToml, Home
from drctl.errors import CertificateRejected
from drctl.replication import identity

ALPHA = "11111111-1111-4111-8111-111111111111"
BETA = "22222222-2222-4222-8222-222222222222"
OLD = timedelta(days=300)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    for name in ("ca", "other-ca"):
        identity.create_ca(tmp_path / name)
    identity.issue(tmp_path / "ca", ALPHA, tmp_path / "tls", start=datetime.now(UTC) - OLD)
    return Home(tmp_path, ApplianceToml("alpha", "a1", "test:///default", "127.0.0.1:0", ALPHA))


def _call(home: Home, method: str, **params: Any) -> Any:
    return CertificateService(home).handlers()[f"certificate.{method}"](params, lambda _: None)


def _sign(home: Home, request: str, uuid: str = ALPHA, ca: str = "ca") -> str:
    return identity.sign_request(home.path / ca, request.encode(), uuid).decode()


def test_one_that_lived_two_thirds_is_due_and_then_it_is_not(home: Home) -> None:
    before = _call(home, "show")
    assert (before["due"], before["appliance"]) == (True, ALPHA)
    key = (home.tls / "key.pem").read_bytes()
    asked = _call(home, "request")
    identity.client_context(home.tls)  # what was in use is in use
    assert (home.tls / "key.pem").read_bytes() == key
    after = _call(home, "install", certificate=_sign(home, asked["request"]))
    assert (after["due"], after["not_after"] > before["not_after"]) == (False, True)
    assert (home.tls / "key.pem").read_bytes() != key, "a new key, too"
    assert sorted(path.name for path in home.tls.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    assert (home.tls / "key.pem").stat().st_mode & 0o777 == 0o600
    identity.server_context(home.tls)


@pytest.mark.parametrize("wrong", ["name", "ca", "key", "nonsense"])
def test_what_does_not_fit_changes_nothing(home: Home, wrong: str) -> None:
    files = {path.name: path.read_bytes() for path in home.tls.iterdir()}
    asked = _call(home, "request")["request"]
    given = {
        "name": lambda: _sign(home, asked, BETA),
        "ca": lambda: _sign(home, asked, ca="other-ca"),
        "key": lambda: _sign(home, identity.make_request(home.path / "elsewhere", ALPHA).decode()),
        "nonsense": lambda: "-----BEGIN",
    }[wrong]()
    with pytest.raises(CertificateRejected):
        _call(home, "install", certificate=given)
    assert {name: (home.tls / name).read_bytes() for name in files} == files
    identity.client_context(home.tls)


def test_a_crash_between_any_two_steps_leaves_a_working_pair(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The appliance is killed before its n-th rename; whoever connects next finds a key with its certificate."""
    asked = _call(home, "request")["request"]
    certificate = _sign(home, asked)
    whole = home.path / "whole"
    shutil.copytree(home.tls, whole)
    original = Path.replace
    for number in range(4):
        shutil.rmtree(home.tls)
        shutil.copytree(whole, home.tls)
        done = 0

        def replace(self: Path, target: Any, limit: int = number) -> Path:
            nonlocal done
            if done == limit:
                raise KeyboardInterrupt
            done += 1
            return original(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            try:
                _call(home, "install", certificate=certificate)
            except KeyboardInterrupt:
                assert number < 3
        identity.client_context(home.tls)
        renewed = not _call(home, "show")["due"]
        assert renewed == (number >= 2), number


def test_a_certificate_that_is_gone_is_due(home: Home) -> None:
    (home.tls / "cert.pem").unlink()
    told = _call(home, "show")
    assert (told["due"], told["not_after"], "cert.pem" in told["problem"]) == (True, None, True)
    assert not _call(home, "install", certificate=_sign(home, _call(home, "request")["request"]))["due"]
