"""Who is not let in at the link's port, and what a receiver does with nonsense: it says why, and goes on."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import struct
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from drctl.replication import identity
from drctl.replication.identity import Peer
from drctl.replication.reign import Question, Reign, ask
from drctl.store.group_store import GroupStore
from drctl.wire import link as wire
from drctl.wire.link import Hello
from tests.integration.link_rig import RECOVERY, SOURCE, LinkRig, call, until


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    short = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))
    rig = LinkRig(tmp_path_factory.mktemp("refused"), short)
    rig.start_receiver()
    yield rig
    # Whatever was thrown at it, it is still the same process and still answers.
    assert rig.processes["receiver"].poll() is None
    assert rig.receiver_status()["port"] == rig.receiver_port
    rig.close()
    shutil.rmtree(short)


def rejection(rig, before):
    """The newest error after `before` rejections."""
    until(lambda: rig.receiver_status()["rejections"] > before)
    return rig.receiver_status()["rejected"][-1]


def count(rig):
    return rig.receiver_status()["rejections"]


def tls(rig, directory):
    """A TLS connection with the identity in `directory`."""
    context = identity.client_context(directory)
    raw = socket.create_connection(("127.0.0.1", rig.receiver_port), 10)
    return context.wrap_socket(raw)


def ended(sock):
    """What the receiver says until it closes."""
    sock.settimeout(15)
    data = b""
    try:
        while more := sock.recv(65536):
            data += more
    except (ssl.SSLError, OSError):
        pass
    sock.close()
    return data


def refused(data):
    messages = wire.Decoder().feed(data)
    assert len(messages) == 1
    return messages[0]


def certificate(rig, tmp_path, name=SOURCE, ca="ca", **options):
    if ca != "ca":
        identity.create_ca(tmp_path / ca)
    directory = tmp_path / "tls"
    identity.issue(tmp_path / ca if ca != "ca" else rig.directory / "ca", name, directory, **options)
    (directory / "ca.pem").write_bytes((rig.directory / "ca" / "ca.pem").read_bytes())
    return directory


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ca": "other"}, "foreign"),
        ({"start": datetime.now(UTC) - timedelta(days=500)}, "expired"),
        ({"start": datetime.now(UTC) + timedelta(days=30)}, "not yet valid"),
        ({"name": "33333333-3333-4333-8333-333333333333"}, "not on the list"),
    ],
    ids=["foreign", "expired", "not-yet-valid", "not-on-the-list"],
)
def test_a_certificate_that_is_not_good(rig, tmp_path, options, reason):
    before = count(rig)
    sock = tls(rig, certificate(rig, tmp_path, **options))
    assert ended(sock) == b""
    told = rejection(rig, before)
    assert (told["error"], told["reason"]) == ("certificate-rejected", reason)


def test_no_certificate(rig):
    before = count(rig)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(rig.directory / "ca" / "ca.pem")
    sock = context.wrap_socket(socket.create_connection(("127.0.0.1", rig.receiver_port), 10))
    assert ended(sock) == b""
    rejection(rig, before)


def test_tls_1_2(rig):
    before = count(rig)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(rig.directory / "ca" / "ca.pem")
    context.load_cert_chain(rig.directory / SOURCE / "cert.pem", rig.directory / SOURCE / "key.pem")
    raw = socket.create_connection(("127.0.0.1", rig.receiver_port), 10)
    with raw, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(raw)
    assert rejection(rig, before)["error"] == "protocol-violation"


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", os.urandom(4096), b""])
def test_what_is_no_tls(rig, noise):
    before = count(rig)
    with socket.create_connection(("127.0.0.1", rig.receiver_port), 10) as sock:
        sock.sendall(noise)
        sock.shutdown(socket.SHUT_WR)
        ended(sock)
    rejection(rig, before)


@pytest.mark.parametrize(
    "data",
    [
        os.urandom(200),
        struct.pack("<IB", 2**31, 3),
        struct.pack("<IB", 100, 99) + bytes(99),
        struct.pack("<IB", 6, 1) + b"hello",
        wire.encode(wire.Frames(b"x" * 100)),
    ],
    ids=["noise", "too-long", "unknown", "malformed", "frames-first"],
)
def test_nonsense_inside_of_tls(rig, data):
    before = count(rig)
    sock = tls(rig, rig.directory / SOURCE)
    sock.sendall(data)
    told = refused(ended(sock))
    assert told.error == "protocol-violation"
    assert rejection(rig, before)["error"] == "protocol-violation"


def hello(**changes):
    fields = {"group": "web", "host": "host-a", "generation": 1, "epoch": "e" * 32, "appliance": SOURCE} | changes
    return wire.encode(Hello(**fields))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"group": "mail"}, "not-found"),
        ({"group": "../web"}, "not-found"),
        ({"appliance": RECOVERY}, "refused"),
        ({"generation": 7}, "refused"),
        ({"generation": 0}, "superseded"),
        ({"version": 9}, "unsupported-format"),
        ({"epoch": "../../etc"}, "protocol-violation"),
    ],
)
def test_a_hello_that_is_refused(rig, changes, error):
    sock = tls(rig, rig.directory / SOURCE)
    sock.sendall(hello(**changes))
    assert refused(ended(sock)).error == error


def test_a_group_of_somebody_else(rig):
    identity.write_peers(rig.directory / RECOVERY, {SOURCE: Peer("east", "", ["mail"])})
    sock = tls(rig, rig.directory / SOURCE)
    sock.sendall(hello())
    told = refused(ended(sock))
    identity.write_peers(rig.directory / RECOVERY, {SOURCE: Peer("east")})
    assert told.error == "refused"
    assert "may not replicate group web" in told.message


def test_damaged_frames_are_not_stored(rig):
    sock = tls(rig, rig.directory / SOURCE)
    sock.sendall(hello())
    sock.settimeout(10)
    assert sock.recv(65536)
    sock.sendall(wire.encode(wire.Frames(b"DRFR" + os.urandom(300))))
    assert refused(ended(sock)).error == "integrity"
    until(lambda: not rig.receiver_status()["groups"]["web"]["connected"])


def test_a_truncated_message_is_forgotten(rig):
    sock = tls(rig, rig.directory / SOURCE)
    sock.sendall(hello())
    sock.settimeout(10)
    assert sock.recv(65536)
    sock.sendall(struct.pack("<IB", 1000, 3) + b"half")
    sock.close()
    until(lambda: not rig.receiver_status()["groups"]["web"]["connected"])


def test_a_silent_peer_holds_nobody_up(rig):
    silent = socket.create_connection(("127.0.0.1", rig.receiver_port), 10)
    sock = tls(rig, rig.directory / SOURCE)
    sock.sendall(hello())
    sock.settimeout(10)
    assert isinstance(refused(sock.recv(65536)), wire.Welcome)
    sock.close()
    silent.close()


def test_a_second_connection_replaces_the_first(rig):
    first = tls(rig, rig.directory / SOURCE)
    first.sendall(hello())
    first.settimeout(10)
    assert first.recv(65536)
    second = tls(rig, rig.directory / SOURCE)
    second.sendall(hello())
    second.settimeout(10)
    assert isinstance(refused(second.recv(65536)), wire.Welcome)
    assert ended(first) == b""
    second.close()


def test_a_released_group_takes_no_stream(rig):
    call(rig.short / "recv.sock", "group.release", group="web")
    sock = tls(rig, rig.directory / SOURCE)
    sock.sendall(hello())
    assert refused(ended(sock)).error == "refused"
    GroupStore.open(rig.store_root, writer=True).close()
    call(rig.short / "recv.sock", "group.accept", group="web")
    sock = tls(rig, rig.directory / SOURCE)
    sock.sendall(hello())
    sock.settimeout(10)
    assert isinstance(refused(sock.recv(65536)), wire.Welcome)
    sock.close()


def test_a_superseded_source_is_told_and_reports_it(rig):
    store = GroupStore.open(rig.store_root)
    store.set_generation(2)
    store.close()
    rig.start_shipper()
    status = until(lambda: (s := rig.status())["link"]["state"] == "refused" and s)
    assert status["link"]["error"]["refusal"] == "superseded"
    assert "superseded" in status["link"]["error"]["message"]
    rig.kill("shipper")


def test_a_shipper_whose_receiver_is_foreign_says_so(rig, tmp_path):
    directory = certificate(rig, tmp_path, ca="other")
    (directory / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
    identity.write_peers(directory, {RECOVERY: Peer("west")})
    rig.start_shipper(tls=str(directory))
    status = until(lambda: (s := rig.status())["link"]["state"] == "rejected" and s)
    assert status["link"]["error"]["reason"] == "foreign"
    rig.kill("shipper")


def test_a_receiver_that_is_not_the_expected_one(rig):
    rig.start_shipper(peer_appliance=SOURCE)
    status = until(lambda: (s := rig.status())["link"]["state"] == "rejected" and s)
    assert status["link"]["error"]["reason"] == "another appliance"
    time.sleep(0.1)
    rig.kill("shipper")


def question(rig, group="web", generation=1, port=0, appliance=RECOVERY):
    peer = f"127.0.0.1:{port or rig.receiver_port}"
    return Question(group, "a1", generation, SOURCE, peer, appliance)


def test_a_source_that_asks_hears_whether_it_reigns(rig, tmp_path):
    directory = certificate(rig, tmp_path)
    identity.write_peers(directory, {RECOVERY: Peer("beta", "b1")})
    # Other tests here have raised the generation.
    assert ask(question(rig, generation=9), directory).reign is Reign.HERE
    # A stream that stands is not disturbed by it, nor is one begun.
    assert rig.receiver_status()["groups"]["web"]["connected"] is False
    assert ask(question(rig, "unheard-of"), directory).reign is Reign.UNKNOWN
    foreign = ask(question(rig, appliance="33333333-3333-4333-8333-333333333333"), directory)
    assert (foreign.reign, "where 33333333" in foreign.reason) == (Reign.UNKNOWN, True)


def test_a_superseded_source_that_asks_hears_it(rig, tmp_path):
    directory = certificate(rig, tmp_path)
    identity.write_peers(directory, {RECOVERY: Peer("beta", "b1")})
    before = ask(question(rig, generation=0), directory)
    assert before.reign is Reign.ELSEWHERE
    assert "generation 0 is superseded by" in before.reason


def test_nobody_who_answers_is_no_answer(rig, tmp_path):
    directory = certificate(rig, tmp_path)
    identity.write_peers(directory, {RECOVERY: Peer("beta", "b1")})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        silent = ask(question(rig, port=free.getsockname()[1]), directory)
    assert silent.reign is Reign.UNKNOWN
    assert "no link to" in silent.reason
    assert ask(question(rig), tmp_path / "absent").reign is Reign.UNKNOWN
