"""Whether KVM really runs a guest here: found by running one, since a /dev/kvm that opens proves nothing."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from drctl.lab.command import need
from drctl.lab.guest import Kit

#: A guest under KVM says its first line within two seconds; nested ones a bit later.
_PATIENCE_SECONDS = 10.0


def choose(wanted: str, kit: Kit, cache: Path, progress: Callable[[str], None]) -> str:
    """`kvm` or `tcg`. The answer of a trial is kept in the cache until the machine boots again."""
    if wanted != "auto":
        return wanted
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    answer = cache / f"accelerator-{os.getuid()}-{_boot()}"
    if not answer.exists():
        progress("trying whether KVM runs a guest here")
        answer.write_text("kvm" if _runs(kit) else "tcg")
    return answer.read_text()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]


def _runs(kit: Kit) -> bool:
    """Boots kernel and initramfs without disks under KVM and waits for the witness to miss them."""
    with tempfile.TemporaryDirectory(prefix="drl-kvm-") as directory:
        serial = Path(directory) / "serial"
        machine = ["-machine", "pc,accel=kvm", "-cpu", "host", "-m", "224", "-nodefaults", "-display", "none"]
        boot = ["-kernel", kit.vmlinuz, "-initrd", kit.initrd, "-append", "console=ttyS0 quiet panic=-1 witness=probe"]
        argv = [need("qemu-system-x86_64"), *machine, *boot, "-serial", f"file:{serial}", "-no-reboot"]
        trial = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while time.monotonic() < deadline and trial.poll() is None:
                if serial.exists() and b"DRCTL-GUEST" in serial.read_bytes():
                    return True
                time.sleep(0.05)
            return False
        finally:
            trial.kill()
            trial.wait()
