"""Certificates are renewed at both ends while a stream stands: it goes on, and the next connection has the new ones."""

from __future__ import annotations

import shutil
import socket
from datetime import UTC, datetime, timedelta

import pytest

from drctl.appliance.certificate_service import CertificateService
from drctl.appliance.config import ApplianceToml, Home
from drctl.replication import identity
from tests.integration.link_rig import RECOVERY, SOURCE, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")


def _renew(rig, name):
    home = Home(rig.directory / name, ApplianceToml("s", "h", "", "", name))
    # The rig has the files of an identity right in its directory.
    (home.path / "tls").symlink_to(home.path, target_is_directory=True)
    service = CertificateService(home)
    asked = service.request({}, lambda _: None)
    signed = identity.sign_request(rig.directory / "ca", asked["request"].encode(), name).decode()
    service.install({"certificate": signed}, lambda _: None)


def _shown(rig):
    """The serial of the certificate that the receiver shows to who connects now."""
    context = identity.client_context(rig.directory / SOURCE)
    with socket.create_connection(("127.0.0.1", rig.receiver_port), 10) as raw, context.wrap_socket(raw) as sock:
        return sock.getpeercert()["serialNumber"]


def test_the_stream_goes_on_and_the_next_one_is_of_the_new_certificates(make_rig):
    rig = make_rig()
    for name in (SOURCE, RECOVERY):
        identity.issue(rig.directory / "ca", name, rig.directory / name, start=datetime.now(UTC) - timedelta(days=360))
    rig.serve_disks()
    rig.start_receiver()
    rig.start_shipper()
    rig.sync("initial")
    before, pids = rig.status()["link"], {name: process.pid for name, process in rig.processes.items()}
    shown = _shown(rig)
    for name in (SOURCE, RECOVERY):
        _renew(rig, name)
    rig.guest.scribble(300, 1)
    told = rig.mark()
    assert rig.view(told["number"]) == rig.guest.prefix(told["sequence"])
    after = rig.status()["link"]
    assert (after["state"], after["connections"]) == ("connected", before["connections"])
    assert _shown(rig) != shown
    rig.relay.drop()
    until(lambda: rig.status()["link"]["connections"] > before["connections"])
    until(lambda: rig.status()["link"]["state"] == "connected")
    rig.guest.scribble(300, 2)
    told = rig.mark()
    assert rig.view(told["number"]) == rig.guest.prefix(told["sequence"])
    assert {name: process.pid for name, process in rig.processes.items()} == pids
    assert rig.receiver_status()["rejections"] == 2  # the two looks, which say no HELLO
