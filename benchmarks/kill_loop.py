"""Kill the tap under load, again and again: does the guest's QEMU survive it?

    python benchmarks/kill_loop.py --kills 50 [--qemu /usr/bin/qemu-system-x86_64] [--mode none|qsd]

Run it on your own QEMU before you trust the guest's life to it. No guest is needed: fio writes 4 KiB at depth 32
through QEMU's block layer, where a guest's writes pass, too. The kills fall in turn into three phases: `steady`
(mirror ready, tap alive), `catching-up` (just after the tap is back, while QEMU sends again what failed), `attaching`
(the mirror was attached a moment ago). Only kills with writes in flight count (fio was running and the tap had taken
writes in the last 50 ms). A death is a QEMU that ended, or a write that failed for the guest. The exit code is 1 when
there was one.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drctl.errors import DrctlError
from drctl.hypervisor.block_graph import MirrorName
from drctl.hypervisor.mirror import Mirror
from drctl.model.identity import StreamIdentity
from drctl.store.ring import Ring, exports_path, write_exports
from drctl.wire.ring import DiskWord, Word
from tests.integration.qemu_rig import SOURCE, Rig, until

EPOCH = "7e" * 16
NAME = MirrorName.of(1, EPOCH, 0)
EXPORT = "guest.vda"
PHASES = ("steady", "catching-up", "attaching")
MiB = 1 << 20


class Bench:
    """A QEMU under load with a mirror to a real tap on a real ring. The ring is small: it drops, as a full one does."""

    def __init__(self, mode: str, binary: str) -> None:
        self.rig = Rig(mode, binary=binary)
        self.ring_path = self.rig.directory / "group.ring"
        identity = StreamIdentity("bench", "here", 1, EPOCH)
        self.ring = Ring.create(self.ring_path, identity, {0: self.rig.size}, 64 * MiB, 16384)
        write_exports(exports_path(self.ring_path), {EXPORT: (0, self.rig.size)})
        self.mirror = Mirror(self.rig.monitor, NAME, SOURCE)
        self.load = self.rig.load(10**6)
        self.start_tap()
        self.mirror.attach(str(self.rig.tap_socket), EXPORT)

    def start_tap(self) -> None:
        self.rig.tap_socket.unlink(missing_ok=True)
        bell = self.rig.directory / "bell"
        self.tap = self.rig.run(
            sys.executable, "-m", "drctl.replication.tap", str(self.ring_path), str(self.rig.tap_socket), str(bell)
        )  # fmt: skip
        until(self.rig.tap_socket.exists, what="tap's socket")

    def writes(self) -> int:
        return int(self.ring.words[Word.PUBLISHED]) + int(self.ring.words[Word.DROPPED])

    def connected(self) -> bool:
        return self.ring.disk_word(0, DiskWord.CONNECTION) != 0

    def kill(self) -> bool:
        """Kill the tap; True when writes were in flight."""
        before = self.writes()
        time.sleep(0.05)
        moving = self.writes() > before and self.load.poll() is None
        self.rig.kill(self.tap, signal.SIGKILL)
        return moving

    def into(self, phase: str) -> None:
        """Bring about the phase in which the next kill shall fall."""
        if phase == "attaching":
            self.mirror.recover(self.connected)
            self.mirror.detach(lambda: None)
            self.mirror.attach(str(self.rig.tap_socket), EXPORT)
        elif phase == "catching-up":
            time.sleep(0.3)  # blocks get dirty while nobody takes them
            self.recover()
        else:
            self.mirror.recover(self.connected)
            self.mirror.prove_order(lambda: 1, self.connected)
            time.sleep(0.2)

    def recover(self) -> None:
        """Until the first moment at which the job runs again."""
        self.mirror.recover(self.connected)

    def dead(self) -> str:
        """What ended, empty when nothing did."""
        if not self.rig.alive():
            return f"QEMU ended with {self.rig.qemu.poll()}"
        if self.load.poll() is not None:
            return "the guest saw a write fail"
        return ""

    def log(self) -> str:
        return (self.rig.directory / "log").read_text(errors="replace")[-600:]

    def close(self) -> None:
        self.ring.close()
        self.rig.close()


def run(kills: int, mode: str, binary: str) -> tuple[Counter[str], list[str]]:
    """Counted kills per phase, and deaths in words."""
    counted: Counter[str] = Counter()
    deaths: list[str] = []
    bench = Bench(mode, binary)
    turn = 0
    try:
        while counted.total() < kills:
            phase = PHASES[turn % len(PHASES)]
            turn += 1
            try:
                bench.into(phase)
                counted[phase] += bench.kill()
                time.sleep(0.1)
                reason = bench.dead()
                if not reason:
                    bench.start_tap()
            except DrctlError as exc:
                reason = bench.dead() or f"stuck: {exc.message}"
            if reason:
                deaths.append(f"{phase}: {reason}\n{bench.log()}")
                bench.close()
                bench = Bench(mode, binary)
            if turn > kills * 4:
                raise SystemExit("too few kills met writes in flight: is the machine overloaded?")
    finally:
        bench.close()
    return counted, deaths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--qemu", default="", help="binary to test; default: the installed one of the mode")
    parser.add_argument(
        "--mode", choices=("none", "qsd"), default="none", help="none: a QEMU without machine; qsd: qemu-storage-daemon"
    )
    arguments = parser.parse_args()
    binary = arguments.qemu or {"none": "qemu-system-x86_64", "qsd": "qemu-storage-daemon"}[arguments.mode]
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    started = time.monotonic()
    counted, deaths = run(arguments.kills, arguments.mode, binary)
    result = {
        "qemu": version,
        "mode": arguments.mode,
        "kills_with_writes_in_flight": counted.total(),
        "by_phase": dict(counted),
        "deaths": len(deaths),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(result))
    for death in deaths:
        print(death, file=sys.stderr)
    return 1 if deaths else 0


if __name__ == "__main__":
    raise SystemExit(main())
