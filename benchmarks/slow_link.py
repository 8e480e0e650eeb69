"""A link of a limited rate between two ports of this machine: tc's tbf in a network namespace, latency, outages.

    python -m benchmarks.slow_link TARGET_PORT LATENCY_MS RATE_MBIT     as root; prints the port it listens on

Each connection is led through a TCP connection on the loopback of a namespace of its own, whose packets tbf passes at
the rate (both directions together), and then held back by the latency. Socket buffers on the way are small, so that
what waits is in the sender, as with a real link. Lines on stdin: `rate MBIT`, `cut` (nothing passes, nothing ends; who
dials gets no answer), `mend` (what stood is reset, as a router does that has forgotten it).
"""

from __future__ import annotations

import collections
import ctypes
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress

_CLONE_NEWNET = 0x40000000
#: Bytes of one direction on their way: twice what 100 Mbit/s carry in 20 ms.
_IN_FLIGHT = 512 * 1024
_BUFFER = 128 * 1024


class Namespace(threading.Thread):
    """The only thread inside; makes pairs of connected sockets there."""

    def __init__(self, rate: float) -> None:
        super().__init__(daemon=True)
        self._rate = rate
        self._orders: queue.SimpleQueue = queue.SimpleQueue()

    def run(self) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare: a network namespace needs root")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        self._shape("add", self._rate)
        while True:
            work, answer = self._orders.get()
            answer.put(work())

    def _shape(self, how: str, rate: float) -> None:
        words = f"tc qdisc {how} dev lo root tbf rate {round(rate * 1000)}kbit burst 128kb latency 50ms".split()
        subprocess.run(words, check=True)

    def _do(self, work):
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._orders.put((work, answer))
        return answer.get(timeout=10)

    def set_rate(self, rate: float) -> None:
        self._do(lambda: self._shape("change", rate))

    def pair(self) -> tuple[socket.socket, socket.socket]:
        return self._do(_pair)


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.socket()
        for each in (one, listener):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * _BUFFER)
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    for each in (one, other):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


class Delay:
    """One direction: passes on what it takes, that much later."""

    def __init__(self, link: Link, source: socket.socket, target: socket.socket, latency: float) -> None:
        self._link, self._source, self._target, self._latency = link, source, target, latency
        self._waiting: collections.deque[tuple[float, bytes]] = collections.deque()
        self._size = 0
        self._changed = threading.Condition()
        for work in (self._take, self._give):
            threading.Thread(target=work, daemon=True).start()

    def _take(self) -> None:
        data = b"x"
        while data:
            try:
                data = self._source.recv(65536)
            except OSError:
                data = b""
            with self._changed:
                while self._size > _IN_FLIGHT:
                    self._changed.wait()
                self._waiting.append((time.monotonic() + self._latency, data))
                self._size += len(data)
                self._changed.notify_all()

    def _give(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                due, data = self._waiting.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            self._link.passing.wait()
            with suppress(OSError):
                if not data:
                    self._target.shutdown(socket.SHUT_WR)
                    return
                self._target.sendall(data)
            with self._changed:
                self._size -= len(data)
                self._changed.notify_all()


class Link:
    def __init__(self, target: int, latency: float, rate: float) -> None:
        self._target, self._latency = target, latency
        self.passing = threading.Event()
        self.passing.set()
        self._open: list[socket.socket] = []
        self.namespace = Namespace(rate)
        self.namespace.start()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * _BUFFER)
        self.port = self._listener.getsockname()[1]

    def serve(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                self.passing.wait()
                far = socket.create_connection(("127.0.0.1", self._target), 5)
                far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
                one, other = self.namespace.pair()
            except (OSError, queue.Empty):
                near.close()
                continue
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open += [near, far, one, other]
            # The latency is put in behind the slow hop; before it nothing waits.
            for source, target, latency in ((near, one, 0.0), (other, far, self._latency)):
                Delay(self, source, target, latency)
            for source, target, latency in ((far, other, 0.0), (one, near, self._latency)):
                Delay(self, source, target, latency)

    def cut(self) -> None:
        self.passing.clear()

    def mend(self) -> None:
        was, self._open = self._open, []
        for each in was:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self.passing.set()


def main() -> None:
    target, latency, rate = int(sys.argv[1]), float(sys.argv[2]) / 1e3, float(sys.argv[3])
    link = Link(target, latency, rate)
    threading.Thread(target=link.serve, daemon=True).start()
    print(link.port, flush=True)
    for line in sys.stdin:
        word, _, value = line.strip().partition(" ")
        if word == "rate":
            link.namespace.set_rate(float(value))
        elif word == "cut":
            link.cut()
        elif word == "mend":
            link.mend()


class SlowLink:
    """The program above as a process of ours; stands where `Relay` does."""

    def __init__(self, target: int, latency: float, rate: float) -> None:
        command = [sys.executable, "-m", "benchmarks.slow_link", str(target), str(latency * 1e3), str(rate)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def cut(self) -> None:
        self.say("cut")

    def mend(self) -> None:
        self.say("mend")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    main()
