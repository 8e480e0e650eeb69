"""A whole stream without a hypervisor: a fake guest, the real shipper and receiver as processes, a relay between them.

The guest writes as QEMU's mirror does: to the disk first, then to the ring, then it goes on. It remembers what it
wrote, in order, so that any checkpoint can be compared with the prefix that it claims to be.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from drctl.model.group import GroupDisk
from drctl.model.identity import StreamIdentity
from drctl.replication import identity
from drctl.replication.identity import Peer
from drctl.store.group_store import GroupStore
from drctl.store.ring import Ring
from drctl.store.ring_writer import RingWriter
from drctl.wire.ring import Word

SOURCE = "11111111-1111-4111-8111-111111111111"
RECOVERY = "22222222-2222-4222-8222-222222222222"
MiB = 1 << 20


def until(what: Callable[[], object], timeout: float = 20.0, why: str = ""):
    """The first true value of `what`, which is asked until then."""
    end = time.monotonic() + timeout
    while True:
        with suppress(OSError, ConnectionError):
            if value := what():
                return value
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {timeout} s: {why or what}")
        time.sleep(0.02)


def call(path: Path, method: str, patience: float = 60.0, **params):
    """One request to a control socket; the error's dictionary is raised as RuntimeError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patience)
        sock.connect(str(path))
        sock.sendall(json.dumps({"method": method, "params": params, "id": 1}).encode() + b"\n")
        line = sock.makefile("rb").readline()
    reply = json.loads(line)
    if reply.get("error"):
        raise RuntimeError(reply["error"])
    return reply["result"]


class Guest:
    """Disks as raw files, a ring, and the history of writes. `beat` must be called while nothing is written."""

    def __init__(self, directory: Path, sizes: dict[int, int], ring_bytes: int, slots: int, epoch: str = "") -> None:
        self.directory = directory
        self.sizes = sizes
        self.ring_path = directory / "web.ring"
        self.bell_path = directory / "web.bell"
        self.epoch = epoch or uuid.uuid4().hex
        self.files = {}
        self.start = {}
        for number, size in sizes.items():
            path = directory / f"disk{number}.raw"
            if not path.exists():
                path.write_bytes(b"")
                os.truncate(path, size)
            self.files[number] = os.open(path, os.O_RDWR)
        self._ring_bytes, self._slots = ring_bytes, slots
        self.new_ring(self.epoch)
        self.lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heart, daemon=True)
        self._thread.start()

    def new_ring(self, epoch: str, generation: int = 1) -> None:
        self.epoch = epoch
        stream = StreamIdentity("web", "host-a", generation, epoch)
        self.ring = Ring.create(self.ring_path, stream, self.sizes, self._ring_bytes, self._slots)
        self.writer = RingWriter(self.ring)
        for number in self.sizes:
            self.writer.connected(number)
        self.history: list[tuple[int, int, int, bytes]] = []
        # Of a disk for benchmarks nothing is remembered: it would not fit into memory.
        self.start = {number: self.disk(number) for number, size in self.sizes.items() if size <= 1 << 30}
        self.prove_order()

    def path(self, number: int) -> Path:
        return self.directory / f"disk{number}.raw"

    def disk(self, number: int) -> bytes:
        return os.pread(self.files[number], self.sizes[number], 0)

    def prove_order(self) -> None:
        words = self.ring.words
        words[Word.ORDERED_SEQUENCE] = words[Word.PUBLISHED]
        words[Word.ORDERED_STAMP] = words[Word.ORDER_STAMP]

    def write(self, disk: int, offset: int, data: bytes) -> int:
        """The guest's write; its sequence, 0 when it was dropped."""
        with self.lock:
            os.pwrite(self.files[disk], data, offset)
            zero = not any(data)
            if zero:
                sequence = self.writer.append_zeroes(disk, offset, len(data))
            else:
                sequence = self.writer.append(disk, offset, memoryview(data))
            self.writer.publish()
            self.history.append((sequence, disk, offset, data))
            if self.ring.words[Word.READER_WAITING]:
                self.ring.words[Word.READER_WAITING] = 0
                self._ring_bell()
            return sequence

    def unseen(self, disk: int, count: int) -> None:
        """Writes that pass the ring by, as of a machine that runs while it is not attached."""
        dice = random.Random(count)
        for _ in range(count):
            os.pwrite(self.files[disk], dice.randbytes(4096), dice.randrange(self.sizes[disk] // 4096) * 4096)

    def _ring_bell(self) -> None:
        with suppress(OSError):
            bell = os.open(self.bell_path, os.O_WRONLY | os.O_NONBLOCK)
            with suppress(BlockingIOError):
                os.write(bell, b"x")
            os.close(bell)

    def _heart(self) -> None:
        while not self._stop.wait(0.03):
            with self.lock:
                self.writer.poll(time.monotonic_ns())

    def scribble(self, count: int, seed: int, *, largest: int = 16, pause: float = 0.0) -> None:
        """Random writes and zeroes."""
        dice = random.Random(seed)
        for _ in range(count):
            disk = dice.choice(list(self.sizes))
            blocks = dice.choice([1, 1, 2, largest])
            offset = dice.randrange(self.sizes[disk] // 4096 - blocks) * 4096
            kind = dice.random()
            if kind < 0.1:
                data = bytes(blocks * 4096)
            elif kind < 0.5:
                data = dice.randbytes(blocks * 4096)
            else:
                data = (f"{dice.random():.6f} ".encode() * (blocks * 512))[: blocks * 4096]
            self.write(disk, offset, data)
            if pause:
                time.sleep(pause)

    def prefix(self, sequence: int) -> dict[int, bytes]:
        """The disks with all that was acknowledged up to record `sequence`."""
        disks = {number: bytearray(data) for number, data in self.start.items()}
        for number, disk, offset, data in self.history:
            if number > sequence:
                break
            disks[disk][offset : offset + len(data)] = data
        return {number: bytes(data) for number, data in disks.items()}

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for file in self.files.values():
            os.close(file)


class Supervisor:
    """The supervisor's control socket: attests as told, proves order as the guest allows, keeps reports."""

    def __init__(self, path: Path, guest: Guest) -> None:
        self.path = path
        self.guest = guest
        self.answer: dict | None = {"ok": True}
        self.prove = True
        self.reports: list[dict] = []
        self.attested: list[int] = []
        self._start()

    def _start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self._open.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError, ValueError):
            stream = sock.makefile("rwb")
            while line := stream.readline():
                request = json.loads(line)
                result = self._answer(request["method"], request["params"])
                stream.write(json.dumps({"id": request["id"], "result": result}).encode() + b"\n")
                stream.flush()

    def _answer(self, method: str, params: dict):
        if method == "shipper.attest":
            self.attested.append(params["number"])
            return self.answer
        if method == "shipper.order":
            if self.prove:
                self.guest.prove_order()
            return {}
        self.reports.append(params)
        return {}

    def stop(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    restart = _start


class Relay:
    """A TCP relay with latency that can be cut: `cut` ends all connections and refuses new ones until `mend`."""

    def __init__(self, target: int, latency: float = 0.0) -> None:
        self.target = target
        self.latency = latency
        self._cut = False
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        if latency:  # a slow link holds little: what waits, waits at the source
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                # Port 1 refuses: what a cut link looks like.
                far = socket.create_connection(("127.0.0.1", 1 if self._cut else self.target), 5)
            except OSError:
                near.close()
                continue
            self._pairs += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(65536):
                if self.latency:
                    time.sleep(self.latency)
                b.sendall(data)
        for sock in (a, b):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self._cut = True
        self.drop()

    def drop(self) -> None:
        pairs, self._pairs = self._pairs, []
        for sock in pairs:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def mend(self) -> None:
        self._cut = False

    def close(self) -> None:
        self._listener.close()
        self.drop()


class LinkRig:
    """Everything of one group on one machine. `short` is a directory with a short path, for sockets."""

    def __init__(
        self,
        directory: Path,
        short: Path,
        *,
        sizes: dict[int, int] | None = None,
        ring_bytes: int = 8 * MiB,
        slots: int = 4096,
        interval: float = 0.5,
        latency: float = 0.0,
    ) -> None:
        self.directory = directory
        self.short = short
        self.interval = interval
        sizes = sizes or {1: 4 * MiB, 2: 2 * MiB}
        identity.create_ca(directory / "ca")
        for name in (SOURCE, RECOVERY):
            identity.issue(directory / "ca", name, directory / name)
            identity.write_peers(directory / name, {SOURCE: Peer("east"), RECOVERY: Peer("west")})
        (directory / "source").mkdir()
        self.guest = Guest(directory / "source", sizes, ring_bytes, slots)
        self.supervisor = Supervisor(short / "super.sock", self.guest)
        self.disks = [GroupDisk(number, f"vm{number}", "vda", size) for number, size in sizes.items()]
        self.store_root = directory / "store" / "web"
        GroupStore.create(self.store_root, "web", 1, self.disks).close()
        self.processes: dict[str, subprocess.Popen] = {}
        self.exports: dict[str, dict[str, str]] = {}
        self.receiver_port = free_port()
        self.relay = Relay(self.receiver_port, latency)
        self.write_definition(1)

    def write_definition(self, version: int) -> None:
        fields = {
            "version": version,
            "spec": {"name": "web"},
            "machines": [
                {"name": disk.machine, "uuid": "", "definition": "<domain/>", "files": {}} for disk in self.disks
            ],
            "disks": [
                {"number": d.number, "machine": d.machine, "target": d.target, "size": d.size} for d in self.disks
            ],
            "source_site": "east",
            "source_host": "host-a",
        }
        fresh = self.directory / "definition.new"
        fresh.write_text(json.dumps(fields))
        fresh.replace(self.directory / "definition.json")

    # processes

    def start_receiver(self, **changes) -> None:
        config = {
            "listen": f"127.0.0.1:{self.receiver_port}",
            "tls": str(self.directory / RECOVERY),
            "store": str(self.directory / "store"),
            "control": str(self.short / "recv.sock"),
            **changes,
        }
        self._start("receiver", config)
        until(lambda: call(self.short / "recv.sock", "status"), why="receiver up")

    def start_shipper(self, **changes) -> None:
        config = {
            "group": "web",
            "host": "host-a",
            "appliance": SOURCE,
            "ring": str(self.guest.ring_path),
            "bell": str(self.guest.bell_path),
            "control": str(self.short / "ship.sock"),
            "supervisor": str(self.supervisor.path),
            "peer": f"127.0.0.1:{self.relay.port}",
            "peer_appliance": RECOVERY,
            "tls": str(self.directory / SOURCE),
            "definition": str(self.directory / "definition.json"),
            "interval": self.interval,
            **changes,
        }
        self._start("shipper", config)
        until(self.status, why="shipper up")

    def _start(self, name: str, config: dict) -> None:
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(config))
        with (self.directory / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", f"drctl.replication.{name}", str(path)]
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def terminate(self, name: str) -> int:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(10)

    def serve_disks(self) -> None:
        """QEMU's read-only exports of the guest's disks."""
        for number in self.guest.sizes:
            sock = self.short / f"nbd{number}.sock"
            self.processes[f"nbd{number}"] = subprocess.Popen(
                [
                    "qemu-nbd",
                    "-r",
                    "-t",
                    "-e",
                    "8",
                    "-f",
                    "raw",
                    "-k",
                    sock,
                    "-x",
                    f"d{number}",
                    self.guest.path(number),
                ]
            )
            until(sock.exists)
            self.exports[str(number)] = {"socket": str(sock), "export": f"d{number}"}

    # questions

    def status(self) -> dict:
        return call(self.short / "ship.sock", "status")

    def receiver_status(self) -> dict:
        return call(self.short / "recv.sock", "status")

    def sync(self, mode: str, timeout: float = 30.0, **more) -> None:
        until(lambda: self.status()["needs"] != "unknown", why="receiver reached")
        call(self.short / "ship.sock", "sync.start", **{"mode": mode, "disks": self.exports, **more})
        until(lambda: self.status()["sync"]["job"] == "done", timeout, why="sync done")

    def mark(self, **params) -> dict:
        return call(self.short / "ship.sock", "mark", **params)

    def checkpoints(self):
        store = GroupStore.open(self.store_root)
        try:
            return store.checkpoints()
        finally:
            store.close()

    def view(self, number: int) -> dict[int, bytes]:
        store = GroupStore.open(self.store_root)
        view = store.open_view(number)
        try:
            return {
                disk.number: b"".join(
                    bytes(view.disk(disk.name).read(at, min(MiB, disk.size - at))) for at in range(0, disk.size, MiB)
                )
                for disk in self.disks
            }
        finally:
            view.close()
            store.close()

    def check_all(self, history: Guest | None = None) -> int:
        """Every listed checkpoint is a true prefix; returns how many there are."""
        checkpoints = [c for c in self.checkpoints() if c.epoch == self.guest.epoch]
        for checkpoint in checkpoints:
            expected = self.guest.prefix(checkpoint.sequence)
            seen = self.view(checkpoint.number)
            for disk, data in expected.items():
                if seen[disk] != data:
                    wrong = [
                        at for at in range(0, len(data), 4096) if data[at : at + 4096] != seen[disk][at : at + 4096]
                    ]
                    raise AssertionError(
                        f"checkpoint #{checkpoint.number} (sequence {checkpoint.sequence}), disk {disk}: "
                        f"{len(wrong)} blocks differ, first at {wrong[0]}"
                    )
        return len(checkpoints)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.relay.close()
        self.supervisor.stop()
        self.guest.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]
