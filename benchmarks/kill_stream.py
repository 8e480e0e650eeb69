"""What `kill_loop.py` kills: a QEMU under load, its mirror, a real tap and shipper, a receiver with a journal, a view.

No guest is needed: fio writes 4 KiB at depth 32 through QEMU's block layer, where a guest's writes pass, too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

from drctl.hypervisor.block_graph import MirrorName
from drctl.hypervisor.mirror import Mirror
from drctl.model.identity import StreamIdentity
from drctl.store.group_store import GroupStore
from drctl.store.ring import Ring, exports_path, write_exports
from drctl.wire.ring import DiskWord, Word
from tests.integration.link_rig import LinkRig, call, until
from tests.integration.qemu_rig import DEVICE, SOURCE, Rig

DISK = 1
EXPORT = "vm1.vda"
MiB = 1 << 20
#: Slow enough that a kill meets the first sync, bytes a second.
SLOW = 8 * MiB
#: What the load writes in some seconds; then the tap drops, as it does at a long outage.
RING_BYTES, SLOTS = 256 * MiB, 65536
#: How fio ends that was told to, and saw no error before.
FIO_INTERRUPTED = 128
NO = {"ok": False, "reason": "the tap was killed"}


class StreamBench:
    """One QEMU for many cycles; each cycle is a group of its own, with a new store, epoch and mirror."""

    def __init__(self, mode: str, binary: str) -> None:
        self.qemu = Rig(mode, size=32 * MiB, binary=binary)
        with self.qemu.disk.open("r+b") as file:
            file.write(os.urandom(self.qemu.size))
        self.memory = Path(tempfile.mkdtemp(prefix="drctl-kill-", dir="/dev/shm"))
        self.short = Path(tempfile.mkdtemp(prefix="dk-", dir="/tmp"))
        self.rig = LinkRig(
            self.memory, self.short, sizes={DISK: self.qemu.size}, ring_bytes=MiB, slots=64, interval=0.5
        )
        guest = self.rig.guest  # the rig's own writer makes room for the tap
        guest._stop.set()
        guest._thread.join()
        self.rig.supervisor.prove = False
        self.load = self.qemu.load(10**6)
        self.compared = 0
        self.mirror: Mirror | None = None
        self.view: list[subprocess.Popen[bytes]] = []

    # -- a cycle ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new group under a new epoch, up to where the first sync could start. The load writes on."""
        rig = self.rig
        self.end()
        shutil.rmtree(rig.store_root, ignore_errors=True)
        GroupStore.create(rig.store_root, "web", 1, rig.disks).close()
        self._new_ring()
        write_exports(exports_path(rig.guest.ring_path), {EXPORT: (DISK, self.qemu.size)})
        rig.supervisor.answer = NO
        rig.start_receiver()
        self.start_tap()
        self.start_shipper()
        self.mirror = Mirror(self.qemu.monitor, MirrorName.of(1, rig.guest.epoch, 0), SOURCE)
        self.mirror.attach(str(self.qemu.tap_socket), EXPORT)

    def _new_ring(self) -> None:
        guest = self.rig.guest
        if not hasattr(guest, "writer"):
            guest.ring.close()
        else:
            del guest.writer  # it holds on to the rig's first ring
        guest.epoch = uuid.uuid4().hex
        stream = StreamIdentity("web", "host-a", 1, guest.epoch)
        guest.ring = Ring.create(guest.ring_path, stream, guest.sizes, RING_BYTES, SLOTS)

    def end(self) -> None:
        self.end_view()
        if self.mirror is not None:
            self.start_tap()
            self.mirror.recover(self.connected)
            self.mirror.detach(lambda: None)
            self.mirror = None
        for name in ("shipper", "receiver", "tap"):
            if name in self.rig.processes:
                self.rig.kill(name)

    def start_tap(self) -> None:
        """Unless it runs."""
        if "tap" in self.rig.processes:
            return
        self.qemu.tap_socket.unlink(missing_ok=True)
        guest = self.rig.guest
        command = [sys.executable, "-m", "drctl.replication.tap", str(guest.ring_path), str(self.qemu.tap_socket)]
        with (self.qemu.directory / "tap.log").open("ab") as log:
            self.rig.processes["tap"] = subprocess.Popen([*command, str(guest.bell_path)], stdout=log, stderr=log)
        until(self.qemu.tap_socket.exists, why="the tap listens")

    def start_shipper(self) -> None:
        """Unless it runs. Connected when this returns."""
        if "shipper" not in self.rig.processes:
            self.rig.start_shipper(peer=f"127.0.0.1:{self.rig.receiver_port}", read_limit=SLOW)
        until(lambda: self.rig.status()["link"]["state"] == "connected", 30, why="the link stands")

    # -- looking ----------------------------------------------------------------------------------------------------

    @property
    def words(self) -> memoryview:
        return self.rig.guest.ring.words

    def writes(self) -> int:
        return int(self.words[Word.PUBLISHED]) + int(self.words[Word.DROPPED])

    def connected(self) -> bool:
        return "tap" in self.rig.processes and self.rig.guest.ring.disk_word(DISK, DiskWord.CONNECTION) != 0

    def ordered(self) -> bool:
        return bool(self.words[Word.ORDERED_STAMP] == self.words[Word.ORDER_STAMP])

    def syncing(self) -> bool:
        sync = self.rig.status()["sync"]
        return bool(sync["job"] == "running" and sync["mode"] == "initial" and sync["read_bytes"])

    def dead(self) -> str:
        """What ended that must not, empty when nothing did."""
        if not self.qemu.alive():
            return f"QEMU ended with {self.qemu.qemu.poll()}"
        if self.load.poll() is not None:
            return "the guest saw a write fail"
        if any(process.poll() is not None for process in self.view):
            return "the view ended, or who read from it saw a read fail"
        return ""

    def log(self) -> str:
        return (self.qemu.directory / "log").read_text(errors="replace")[-600:]

    # -- doing ------------------------------------------------------------------------------------------------------

    def kill(self, *victims: str) -> bool:
        """Kill them at once; True when writes were in flight."""
        before = self.writes()
        time.sleep(0.05)
        moving = self.writes() > before and self.load.poll() is None
        if "tap" in victims:
            self.rig.supervisor.answer = NO
        for name in victims:
            self.rig.processes[name].send_signal(signal.SIGKILL)
        for name in victims:
            self.rig.processes.pop(name).wait(10)
        return moving

    def mend(self) -> None:
        """What the supervisor does: start what is dead and let the mirror run again, while the load writes on."""
        assert self.mirror is not None
        self.start_tap()
        self.mirror.recover(self.connected)

    def sync(self, mode: str) -> None:
        exports = {str(DISK): {"socket": str(self.qemu.device_socket), "export": DEVICE}}
        until(lambda: self.rig.status()["needs"] != "unknown", why="receiver reached")
        call(self.short / "ship.sock", "sync.start", mode=mode, disks=exports)

    def settle(self) -> None:
        """Until the group is live: the load rests, all is sent, order is proven, and a mark equals the disk."""
        self.start_shipper()
        self._rest()
        try:
            self._settle()
        finally:
            self.load = self.qemu.load(10**6)
        begun = self.words[Word.PUBLISHED]
        until(lambda: self.words[Word.PUBLISHED] > begun + 100, why="the load goes on")

    def _rest(self) -> None:
        """End the load. Not by SIGSTOP: a client that stops amid a request holds up each drain of QEMU for ever."""
        self.load.send_signal(signal.SIGINT)
        if self.load.wait(10) != FIO_INTERRUPTED:
            raise AssertionError("the guest saw a write fail")

    def _settle(self) -> None:
        call(self.short / "ship.sock", "limit", read_limit=0)
        if self.rig.status()["sync"]["job"] != "running":
            needs = self.rig.status()["needs"]
            self.sync("dirty" if needs == "nothing" else needs)
        until(lambda: self.rig.status()["sync"]["job"] == "done", 60, why="synced")
        self.prove()
        self.rig.supervisor.answer = {"ok": True}
        mark = self.rig.mark(timeout=30.0)
        if self.rig.view(mark["number"])[DISK] != self.qemu.disk.read_bytes():
            raise AssertionError(f"checkpoint #{mark['number']} differs from the disk that it was cut of")
        self.compared += 1

    def prove(self) -> None:
        assert self.mirror is not None
        for _ in range(20):
            stamp = self.words[Word.ORDER_STAMP]
            sequence = self.mirror.prove_order(lambda: int(self.words[Word.PUBLISHED]), self.connected)
            if self.words[Word.ORDER_STAMP] == stamp:
                self.words[Word.ORDERED_SEQUENCE] = sequence
                self.words[Word.ORDERED_STAMP] = stamp
                return
        raise AssertionError("the order was lost at every proof")

    # -- a view -----------------------------------------------------------------------------------------------------

    def begin_view(self) -> None:
        """Serve the newest checkpoint, and read from it."""
        path = self.short / "view.sock"
        path.unlink(missing_ok=True)
        config: dict[str, Any] = {
            "store": str(self.rig.store_root),
            "group": "web",
            "checkpoint": self._newest(),
            "epoch": self.rig.guest.epoch,
            "view": "kills",
            "socket": str(path),
            "exports": [],
        }
        (self.memory / "view.json").write_text(json.dumps(config))
        log = (self.qemu.directory / "view.log").open("ab")
        with log:
            command = [sys.executable, "-m", "drctl.replication.view_server", str(self.memory / "view.json")]
            self.view.append(subprocess.Popen(command, stdout=log, stderr=log))
            until(path.exists, 30, why="the view is served")
            reader = [
                "fio", "--name=view", "--ioengine=nbd", f"--uri=nbd+unix:///{EXPORT}?socket={path}", "--rw=randread",
                "--bs=4k", "--iodepth=4", "--rate_iops=500", "--time_based", "--runtime=1000000", "--thread",
                f"--size={self.qemu.size}",
            ]  # fmt: skip
            self.view.append(subprocess.Popen(reader, stdout=log, stderr=log, cwd=self.qemu.directory))

    def _newest(self) -> int:
        with closing(GroupStore.open(self.rig.store_root)) as store:
            return store.checkpoints()[-1].number

    def end_view(self) -> None:
        for process in reversed(self.view):
            process.kill()
            process.wait(10)
        self.view = []

    def close(self) -> None:
        self.end_view()
        self.rig.close()
        self.qemu.close()
        for directory in (self.memory, self.short):
            shutil.rmtree(directory, ignore_errors=True)
