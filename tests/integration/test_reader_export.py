"""QEMU's NBD server is stopped only when nobody is connected: else QEMU, and the guest with it, stands still for ever."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing, suppress

import pytest

from drctl.hypervisor.qmp import command
from drctl.hypervisor.reader_export import connected, export_start, export_stop
from tests.integration.qemu_rig import SOURCE, Rig, have

pytestmark = pytest.mark.skipif(not have("qemu-system-x86_64"), reason="needs QEMU")


@pytest.fixture
def rig():
    rig = Rig()
    rig.monitor(command("nbd-server-stop"))  # the device's: a QEMU has one server
    yield rig
    rig.close()


def dial(path: str) -> socket.socket:
    """One that never says a word: it stays in the handshake."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def status(rig: Rig) -> str:
    return str(rig.monitor(command("query-status"))["status"])


def test_who_is_shaking_hands_is_waited_for_and_the_machine_goes_on(rig: Rig) -> None:
    path = str(rig.directory / "reader.sock")
    export_start(rig.monitor, path, {"m.vda": SOURCE})
    with closing(dial(path)) as silent:
        assert connected(path) == 1
        threading.Timer(0.5, silent.shutdown, (socket.SHUT_RDWR,)).start()
        begun = time.monotonic()
        export_stop(rig.monitor, path)
        assert time.monotonic() - begun >= 0.4
    assert connected(path) == 0
    with pytest.raises(FileNotFoundError):
        dial(path)
    assert status(rig)
    export_start(rig.monitor, path, {"m.vda": SOURCE})
    export_stop(rig.monitor, path)
    export_stop(rig.monitor, path)


def test_who_connects_all_the_time_does_not_stop_the_machine(rig: Rig) -> None:
    path, stop = str(rig.directory / "reader.sock"), threading.Event()

    def crowd() -> None:
        while not stop.is_set():
            time.sleep(0.002)
            with suppress(OSError), closing(dial(path)) as sock:
                sock.settimeout(0.01)
                sock.recv(100)
                sock.sendall(bytes([0, 0, 0, 3]))

    threads = [threading.Thread(target=crowd) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            export_start(rig.monitor, path, {"m.vda": SOURCE})
            time.sleep(0.02)
            export_stop(rig.monitor, path)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert status(rig)
