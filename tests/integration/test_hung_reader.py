"""A reader of a guest's disk that stops holds up QEMU's next drain, and with it the guest; the watchdog frees them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from drctl.appliance.source import watchdog
from drctl.hypervisor.qmp import command
from drctl.wire.ring import HEADER_SIZE, MAGIC, Word
from tests.integration.qemu_rig import DEVICE, Rig, have

pytestmark = pytest.mark.skipif(not have("qemu-system-x86_64"), reason="needs qemu-system-x86_64")

#: A shipper as far as QEMU and the watchdog see one: it has asked for 4 MiB, and takes nothing of it.
READER = """
import sys, time
from drctl.model.extent import Extent, MiB
from drctl.replication.disk_scan import _Connection, _pieces, Export
connection = _Connection(Export(sys.argv[1], sys.argv[2]))
connection._socket.sendall(b"".join(connection._reads.ask(*piece) for piece in _pieces(Extent(0, 4 * MiB))))
print("asked", flush=True)
time.sleep(600)
"""


def test_a_drain_waits_for_a_stopped_reader_until_the_watchdog_kills_it(tmp_path: Path) -> None:
    rig = Rig("none", size=8 << 20)
    words = [sys.executable, "-c", READER, str(rig.device_socket), DEVICE, "drctl.replication.shipper"]
    reader = subprocess.Popen(words, stdout=subprocess.PIPE)
    drained = threading.Event()
    out = reader.stdout
    assert out is not None

    def drain() -> None:
        rig.monitor(command("transaction", actions=[]))
        drained.set()

    try:
        assert out.readline() == b"asked\n"
        reader.send_signal(signal.SIGSTOP)
        time.sleep(0.3)  # QEMU has read it all, and its socket is full
        draining = threading.Thread(target=drain)
        draining.start()
        assert not drained.wait(1), "QEMU waits for nobody: then the watchdog need not look at shippers"
        header = [0] * (HEADER_SIZE // 8)
        header[Word.MAGIC], header[Word.SHIPPER_PID], header[Word.SHIPPER_HEARTBEAT] = MAGIC, reader.pid, 1
        (tmp_path / "web.ring").write_bytes(b"".join(word.to_bytes(8, "little") for word in header))
        watchdog.look(tmp_path, time.monotonic_ns())
        assert drained.wait(5)
        draining.join()
    finally:
        reader.kill()
        reader.wait()
        out.close()
        rig.close()
