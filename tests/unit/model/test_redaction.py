"""Secrets go, and what an engineer needs stays."""

from __future__ import annotations

import json
import tomllib

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.model.redaction import REMOVED, redact

S = "hunter2-geheim"


@pytest.mark.parametrize(
    "text",
    [
        f'password = "{S}"',
        f"PGPASSWORD={S} psql",
        f'{{"token": "{S}"}}',
        f"<graphics type='vnc' passwd='{S}'/>",
        f"api_key: {S}",
        f"curl -H 'Authorization: Bearer {S}' x",
        f"fence_ipmilan --password {S} --ip 1",
        f"fence_ipmilan --password={S} --ip 1",
        f'["fence_x", "--passwd", "{S}"]',
        f'fence = ["fence_ipmilan", "-p", "{S}", "--ip=1"]',
        f"notify = ['sh', '-c', \"curl ]{S}\"]",
        f'  env = {{ A = "{S}", B = "}}" }}',
        f"https://ann:{S}@example.org/x",
        f"pass = {S}",
        f"tool --pass {S}",
        f"my.secret.value={S}",
    ],
)
def test_it_goes(text: str) -> None:
    assert S not in redact(text)
    assert REMOVED in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"pass_needed": true, "passes": [1], "sync": "ab"}',
        "the pass is run again: 12 blocks; bypass=1",
        'ssh_identity = "/root/.ssh/id"\nlink = "a.example:7077"',
        "nbd+unix:///web.vda?socket=/run/x.sock",
        "2026-01-01 12:00:00,123 INFO web: the tap was started",
        "https://example.org:8080/path",
    ],
)
def test_it_stays(text: str) -> None:
    assert redact(text) == text


def test_a_private_key_goes_whole_or_cut_off_at_either_end() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    body = pem.splitlines()[1]
    for text in (f"x\n{pem}y", f"x\n{pem[:150]}", pem[40:], json.dumps({"a": pem})):
        assert body[20:60] not in redact(text)
    assert redact(f"x\n{pem}y").startswith("x\n")
    assert redact(f"x\n{pem}y").endswith("\ny")


def test_documents_stay_documents() -> None:
    told = {"token": None, "secret": 5, "a": [{"password": "x"}], "secrets": ["name"], "b": True}
    after = json.loads(redact(json.dumps(told)))
    assert (after["a"], after["b"], after["secrets"]) == ([{"password": REMOVED}], True, ["name"])
    text = '[[host]]\nname = "a1"\nfence = ["f", "-p", "x"]\nfence_timeout = "5s"\n'
    assert tomllib.loads(redact(text))["host"] == [{"name": "a1", "fence": ["f", REMOVED], "fence_timeout": "5s"}]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_taken_and_twice_is_once(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


def test_a_long_line_of_noise_takes_no_time() -> None:
    """The patterns must not go back and forth over a log."""
    for noise in ("a-" * 100_000, '"' * 100_000, "-" * 100_000, "x=" * 100_000, "pass" * 50_000, "http://" * 20_000):
        redact(noise)
