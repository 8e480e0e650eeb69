"""The link's port and the control sockets under whatever somebody sends: no crash, no growth, no entry.

The peer of most of these has a good certificate: what a stranger may send ends in the TLS handshake."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import ssl
import struct
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from drctl.replication import identity
from drctl.replication.identity import Peer
from drctl.store.segment import HEADER_SIZE
from drctl.wire import link as wire
from drctl.wire.link import Hello
from tests.integration.link_rig import RECOVERY, SOURCE, LinkRig, call, until

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd (qemu-utils)")
MiB = 1 << 20
#: Growth of the receiver that is none: its allocator, logs, the newest rejections.
SLACK = 24 * MiB


class Target:
    """A receiver that has checkpoints, what it was before, and genuine frames of its stream."""

    def __init__(self, rig: LinkRig) -> None:
        self.rig = rig
        rig.guest.scribble(200, 1)
        rig.serve_disks()
        rig.start_receiver(maintenance=False)
        rig.start_shipper()
        rig.sync("initial")
        for turn in range(3):
            rig.guest.scribble(60, turn)
            self.mark = rig.mark()
        self.epoch = rig.guest.epoch
        rig.terminate("shipper")
        self.pid = rig.processes["receiver"].pid
        self.before = rig.view(self.mark["number"])
        self.numbers = [checkpoint.number for checkpoint in rig.checkpoints()]
        segments = sorted((rig.store_root / "streams").glob("*/*/*.seg"))
        self.frames = b"".join(path.read_bytes()[HEADER_SIZE:] for path in segments)[: 2 * MiB]
        self.context = identity.client_context(rig.directory / SOURCE)

    def connect(self, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.rig.receiver_port), 10)
        return (context or self.context).wrap_socket(raw)

    def hello(self, **changes) -> bytes:
        fields = {"group": "web", "host": "host-a", "generation": 1, "epoch": self.epoch, "appliance": SOURCE}
        return wire.encode(Hello(**(fields | changes)))

    def resident(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def is_unharmed(self) -> None:
        assert self.rig.processes["receiver"].poll() is None
        assert self.rig.receiver_status()["port"] == self.rig.receiver_port
        log = (self.rig.directory / "receiver.log").read_text()
        assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
        assert [checkpoint.number for checkpoint in self.rig.checkpoints()] == self.numbers
        assert self.rig.view(self.mark["number"]) == self.before


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    short = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))
    rig = LinkRig(tmp_path_factory.mktemp("fuzz"), short)
    try:
        yield Target(rig)
    finally:
        rig.close()
        shutil.rmtree(short)


def _strange_hello(target: Target, chooser: random.Random) -> bytes:
    """A HELLO as JSON that may be anything."""
    values = [0, -1, 2**63, 1e308, "", "../../x", "web", "e" * 32, "\0", "x" * 70_000, None, True, [], {}, [[]] * 50]
    names = ("group", "host", "generation", "epoch", "appliance", "version", "software", "wall_ns", "ask")
    fields = {
        "group": "web",
        "host": "host-a",
        "generation": 1,
        "epoch": target.epoch,
        "appliance": SOURCE,
        "version": 1,
    }
    for name in chooser.sample(names, chooser.randint(1, 3)):
        fields[name] = chooser.choice(values)
    body = json.dumps(fields).encode()
    if chooser.random() < 0.1:
        body = b"[" * 100_000
    return struct.pack("<IB", len(body) + 1, 1) + body


def _mutated(data: bytes, chooser: random.Random) -> bytes:
    """Genuine bytes with some flipped, cut off, doubled, swapped or longer than they say."""
    raw = bytearray(data)
    match chooser.randrange(6):
        case 0:
            for _ in range(chooser.randint(1, 8)):
                raw[chooser.randrange(len(raw))] ^= 1 << chooser.randrange(8)
        case 1:
            del raw[chooser.randrange(1, len(raw)) :]
        case 2:
            raw = raw * 2
        case 3:
            half = len(raw) // 2
            raw = raw[half:] + raw[:half]
        case 4:
            at = chooser.randrange(len(raw))
            raw[at:at] = chooser.randbytes(chooser.randint(1, 64))
        case _:
            raw[: min(200, len(raw))] = chooser.randbytes(min(200, len(raw)))
    return bytes(raw)


def _messages(target: Target, chooser: random.Random) -> bytes:
    """What comes after a good HELLO."""
    start = chooser.randrange(len(target.frames) // 2)
    piece = target.frames[start : start + chooser.randint(1, 100_000)]
    genuine = wire.frames_head(len(target.frames)) + target.frames
    match chooser.randrange(7):
        case 0:
            return genuine  # all of it again
        case 1:
            return _mutated(genuine, chooser)
        case 2:
            return wire.frames_head(len(piece)) + piece
        case 3:
            return struct.pack("<IB", chooser.choice([0, 1, wire.MAX_MESSAGE, wire.MAX_MESSAGE + 1, 2**32 - 1]), 3)
        case 4:
            body = chooser.randbytes(chooser.randint(0, 5000))
            return struct.pack("<IB", len(body) + 1, chooser.randrange(13)) + body
        case 5:
            return target.hello() + genuine
        case _:
            return chooser.randbytes(chooser.randint(1, 20_000))


def _attack(target: Target, chooser: random.Random) -> None:
    """One connection, from the first byte to its end."""
    with suppress(OSError), target.connect() as sock:
        sock.settimeout(0.3)
        if chooser.random() < 0.3:
            sock.sendall(
                _mutated(target.hello(), chooser) if chooser.random() < 0.5 else _strange_hello(target, chooser)
            )
        else:
            epoch = target.epoch if chooser.random() < 0.5 else f"{chooser.getrandbits(128):032x}"
            sock.sendall(target.hello(epoch=epoch))
            sock.recv(65536)
            sock.sendall(_messages(target, chooser))
        while sock.recv(65536):
            pass


def _many(target: Target, seed: int, count: int) -> None:
    chooser = random.Random(seed)
    for _ in range(10):
        _attack(target, chooser)
    before, open_before = target.resident(), target.descriptors()
    for _ in range(count):
        _attack(target, chooser)
    until(lambda: target.descriptors() <= open_before + 12, 30, why="connections are forgotten")
    assert target.resident() - before < SLACK
    target.is_unharmed()


def test_a_peer_that_sends_anything_changes_nothing(target):
    _many(target, 20, 25)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_a_peer_that_sends_anything_for_long_changes_nothing(target, seed):
    _many(target, seed, 3000)


def test_strangers_get_nowhere(target, tmp_path):
    """Self-signed, of another authority, expired, not yet valid, without one, TLS 1.2, and what is no TLS."""
    rig, ca = target.rig, target.rig.directory / "ca"
    until(lambda: not rig.receiver_status()["groups"]["web"]["connected"])
    own = (ca / "ca.pem").read_bytes()
    identity.create_ca(tmp_path / "other")
    kinds = {
        "foreign": (tmp_path / "other", {}),
        "expired": (ca, {"start": datetime.now(UTC) - timedelta(days=900)}),
        "early": (ca, {"start": datetime.now(UTC) + timedelta(days=9)}),
    }
    contexts = []
    for name, (signer, options) in kinds.items():
        identity.issue(signer, SOURCE, tmp_path / name, **options)
        (tmp_path / name / "ca.pem").write_bytes(own)
        contexts.append(identity.client_context(tmp_path / name))
    # Self-signed: a CA's own certificate and key shown as a client's.
    plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    plain.check_hostname = False
    plain.load_verify_locations(ca / "ca.pem")
    plain.load_cert_chain(tmp_path / "other" / "ca.pem", tmp_path / "other" / "ca-key.pem")
    old = identity.client_context(rig.directory / SOURCE)
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    before = rig.receiver_status()["rejections"]
    contexts += [plain, old]
    for context in contexts:
        with suppress(OSError), target.connect(context) as sock:
            sock.settimeout(5)
            sock.sendall(target.hello())
            assert sock.recv(65536) == b"", "nothing is said to a stranger"
    chooser = random.Random(4)
    for _ in range(20):
        with suppress(OSError), socket.create_connection(("127.0.0.1", rig.receiver_port), 10) as sock:
            sock.sendall(
                chooser.choice([b"\x16\x03\x01", b"\x16\x03\x03\x40\x00", b""])
                + chooser.randbytes(chooser.randrange(1, 600))
            )
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(5)
            while sock.recv(4096):
                pass
    until(lambda: rig.receiver_status()["rejections"] >= before + len(contexts) + 20)
    assert not rig.receiver_status()["groups"]["web"]["connected"]
    target.is_unharmed()


def test_a_thousand_connections_that_say_nothing_keep_nobody_out(target):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2500)), hard))
    crowd = []
    before = target.resident()
    try:
        for number in range(1000):
            sock = socket.socket()
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.connect(("127.0.0.1", target.rig.receiver_port))
            crowd.append(sock)
            if number % 100 == 99:
                time.sleep(0.02)
        begun = time.monotonic()
        context = identity.client_context(target.rig.directory / SOURCE)
        while True:  # a stream that is turned out dials again, as the shipper does
            with suppress(OSError), target.connect(context) as sock:
                sock.settimeout(5)
                sock.sendall(target.hello())
                if sock.recv(5):
                    break
            assert time.monotonic() - begun < 20
        assert target.descriptors() < 300
        assert target.resident() - before < 64 * MiB
    finally:
        for sock in crowd:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until(lambda: target.descriptors() < 60, 30)
    log = (target.rig.directory / "receiver.log").read_text()
    assert log.count("no TLS handshake") < 300, "a crowd does not fill the log"
    target.is_unharmed()


@pytest.mark.long
def test_slow_clients_are_let_go(target):
    """A handshake byte by byte, and a good one that never says HELLO: both end by the clock."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    shake = target.context.wrap_bio(incoming, outgoing)
    with suppress(ssl.SSLWantReadError):
        shake.do_handshake()
    with socket.create_connection(("127.0.0.1", target.rig.receiver_port), 10) as slow, target.connect() as dumb:
        begun = time.monotonic()
        with suppress(OSError):
            for byte in outgoing.read():
                slow.sendall(bytes([byte]))
                time.sleep(0.2)
            pytest.fail("a handshake may take for ever")
        assert time.monotonic() - begun < 25
        dumb.settimeout(25)
        assert dumb.recv(65536)  # REFUSED: no HELLO
    target.is_unharmed()


def test_the_receivers_control_socket_takes_nonsense(target):
    chooser = random.Random(8)
    path = target.rig.short / "recv.sock"
    requests = [
        b"[]\n",
        b"5\n",
        b"null\n",
        b'"x"\n',
        b"{}\n",
        b'{"method": 5, "params": 7}\n',
        b'{"method": "status", "params": []}\n',
        b"[" * 200_000 + b"\n",
        b"\xff\xfe\n",
        b"x" * 5_000_000,
    ]
    requests += [chooser.randbytes(chooser.randrange(1, 3000)) for _ in range(20)]
    requests += [b'{"method": "group.release"}\n', b'{"method": "group.release", "params": {"group": "../../etc"}}\n']
    for request in requests:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(path))
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
    assert call(path, "status")["port"] == target.rig.receiver_port
    assert target.rig.processes["receiver"].poll() is None


def test_a_good_source_goes_on_afterwards(target):
    """Last in this file: the store takes the genuine stream as if nothing had been."""
    rig = target.rig
    identity.write_peers(rig.directory / RECOVERY, {SOURCE: Peer("east")})
    rig.start_shipper()
    until(lambda: rig.status()["link"]["state"] == "connected")
    if rig.status()["needs"] != "nothing":
        rig.sync("full")
    rig.guest.scribble(100, 9)
    told = rig.mark()
    assert rig.view(told["number"]) == rig.guest.prefix(told["sequence"])
