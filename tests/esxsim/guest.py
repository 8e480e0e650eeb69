"""A machine that really runs, under QEMU with its VMDKs. QEMU can't write redo logs: it writes a qcow2 over the chain, and
what is new in that goes into the active extent whenever the host freezes or stops something."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.esxsim import formats
from tests.esxsim.state import Vm

HERE = Path(__file__).parent
#: VMware's SCSI controllers → QEMU's; of the two that it lacks the nearest.
CONTROLLERS = {"pvscsi": "pvscsi", "lsisas1068": "mptsas1068", "lsilogic": "lsi53c895a", "buslogic": "lsi53c895a"}
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "as", "ld")


def lacking() -> str:
    return ", ".join(program for program in PROGRAMS if not shutil.which(program))


def boot_sector() -> bytes:
    """The guest of guest.S."""
    with tempfile.TemporaryDirectory() as place:
        made = Path(place)
        subprocess.run(["as", "--32", "-o", made / "o", HERE / "guest.S"], check=True)
        argv = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", made / "b", made / "o"]
        subprocess.run(argv, check=True)
        return (made / "b").read_bytes()[:512]


def controller(vm: Vm) -> list[str]:
    """QEMU's devices for the machine's disk, at the controller that its .vmx names; SeaBIOS boots from each of them."""
    name = next(iter(vm.disks())).partition(":")[0]
    if name.startswith("ide"):
        return ["-device", "ide-hd,drive=d"]
    if name.startswith("sata"):
        return ["-device", "ahci,id=c", "-device", "ide-hd,drive=d,bus=c.0"]
    kind = CONTROLLERS[vm.config.get(f"{name}.virtualdev", "lsilogic").lower()]
    return ["-device", f"{kind},id=c", "-device", "scsi-hd,drive=d,bus=c.0"]


class Guest:
    """A running machine with one disk."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._place = Path(tempfile.mkdtemp(prefix="esxguest-", dir="/var/tmp"))
        self._number = 0
        self.serial = self._place / "serial"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "vmdk", "-b", str(self._top()), str(self._overlay())]
        subprocess.run(argv, check=True)
        argv = ["qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-vga", "none"]
        argv += ["-serial", f"file:{self.serial}", "-qmp", f"unix:{self._place}/qmp,server=on,wait=off"]
        argv += ["-drive", f"if=none,id=d,file={self._overlay()},format=qcow2,file.locking=off"]
        self._process = subprocess.Popen([*argv, *controller(vm)], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        self._qmp = socket.socket(socket.AF_UNIX)
        while self._qmp.connect_ex(f"{self._place}/qmp"):
            assert time.monotonic() < deadline, "no monitor"
            time.sleep(0.02)
        self._lines = self._qmp.makefile("r")
        self._lines.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> None:
        self._qmp.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        assert "return" in answer, answer

    def freeze(self) -> None:
        """Let what was written go into the active extent; what is written from now on goes in the next time."""
        frozen = self._overlay()
        self._number += 1
        self.command("blockdev-snapshot-sync", device="d", **{"snapshot-file": str(self._overlay()), "format": "qcow2"})
        self._carry(frozen)

    def stop(self) -> None:
        self.command("stop")
        self._process.kill()  # QEMU has flushed its caches when it stops
        self._process.wait()
        self._lines.close()
        self._qmp.close()
        self._carry(self._overlay())
        shutil.rmtree(self._place)

    def _overlay(self) -> Path:
        return self._place / f"{self._number}.qcow2"

    def _top(self) -> Path:
        return self._vm.place(next(iter(self._vm.disks().values())))

    def _carry(self, overlay: Path) -> None:
        raw = self._place / "raw"
        subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", str(overlay), str(raw)], check=True)
        argv = ["qemu-img", "map", "-U", "--output=json", str(overlay)]
        told = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
        with raw.open("rb") as file:
            for one in told:
                if one["depth"] == 0 and one.get("present", True):
                    file.seek(one["start"])
                    formats.write(self._top(), one["start"], file.read(one["length"]).ljust(one["length"], b"\0"))
