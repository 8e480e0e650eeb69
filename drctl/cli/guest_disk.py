"""The file systems of a disk that is served by NBD, mounted here read-only over a layer that is thrown away.

A file system that was not shut down has a journal to replay, which is a write: it goes into the layer, and never to
the checkpoint. qemu-nbd serves disk and layer, nbdfuse makes a file of them, and a loop device takes each file system.
Needs root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from drctl.errors import NotFound, PreconditionFailed, SetupFailed, StepFailed

#: What each program is in, on Debian and on Fedora.
TOOLS = {
    "qemu-img": "qemu-utils (Debian), qemu-img (Fedora)",
    "qemu-nbd": "qemu-utils (Debian), qemu-img (Fedora)",
    "nbdfuse": "libnbd-bin (Debian), nbdfuse (Fedora)",
    "losetup": "mount (Debian), util-linux (Fedora)",
    "sfdisk": "fdisk (Debian), util-linux (Fedora)",
    "blkid": "util-linux",
}
#: Until a program that serves is ready, seconds.
READY = 30.0
#: Of one look at a disk's beginning, or of a mount.
_LOOK = 60.0
#: Set so that a journal is replayed and nothing of the guest's is trusted.
_OPTIONS = "ro,nosuid,nodev,noexec"
#: What is no file system by itself, and which program can look into it.
_CONTAINERS = {"LVM2_member", "crypto_LUKS", "linux_raid_member", "BitLocker", "zfs_member", "drbd", "bcache"}


@dataclass(frozen=True, slots=True)
class Volume:
    """A part of a disk that may hold a file system: `number` as the partition table has it, 0 the whole disk.

    `kind` is what blkid takes it for, empty for nothing that it knows. Offsets and sizes in bytes."""

    number: int
    offset: int
    size: int
    kind: str
    label: str

    @property
    def mountable(self) -> bool:
        return bool(self.kind) and self.kind not in _CONTAINERS and self.kind != "swap"


def demand_tools() -> None:
    """Raises SetupFailed, naming what to install."""
    if os.geteuid() != 0:
        raise SetupFailed("only root can mount a disk's file systems", hint="give it by sudo; or: drctl restore disk")
    lacking = [name for name in TOOLS if shutil.which(name) is None]
    if lacking:
        packages = "; ".join(f"{name} is in {TOOLS[name]}" for name in lacking)
        raise SetupFailed(f"{', '.join(lacking)} is not there", hint=f"install: {packages}")
    if not os.path.exists("/dev/fuse"):  # noqa: PTH110 - one place, looked at as it is
        raise SetupFailed("/dev/fuse is not there", hint="modprobe fuse; in a container give it the device")


@contextmanager
def opened(uri: str, scratch: Path) -> Iterator[Path]:
    """The disk as a file that can be written to without harm, while this lasts. Raises StepFailed, SetupFailed."""
    with tempfile.TemporaryDirectory(prefix="drctl-files-", dir=scratch) as name:
        directory = Path(name)
        layer, socket, place = directory / "layer.qcow2", directory / "s", directory / "disk"
        place.mkdir()
        _run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, str(layer)])
        with _serving(["qemu-nbd", "-f", "qcow2", "-k", str(socket), "-t", str(layer)], socket.exists):
            file = place / "nbd"
            try:
                with _serving(["nbdfuse", f"{place}/", f"nbd+unix:///?socket={socket}"], file.exists):
                    yield file
            finally:
                _quietly(["umount", "--lazy", str(place)])  # what nbdfuse leaves when it is killed


def volumes(file: Path) -> list[Volume]:
    """What the disk is divided into. A disk without a partition table is one volume. Raises StepFailed."""
    size = file.stat().st_size
    whole = _volume(file, 0, 0, size)
    if whole.kind:
        return [whole]
    told = subprocess.run(["sfdisk", "--json", str(file)], capture_output=True, check=False, timeout=_LOOK)
    if told.returncode:
        return [whole]
    table = json.loads(told.stdout)["partitiontable"]
    sector = int(table.get("sectorsize") or 512)
    found = []
    for row in table.get("partitions") or []:
        digits = str(row["node"]).removeprefix(str(file)).removeprefix("p")
        start, length = int(row["start"]) * sector, int(row["size"]) * sector
        if start < size:
            found.append(_volume(file, int(digits), start, min(length, size - start)))
    return found


def _volume(file: Path, number: int, offset: int, size: int) -> Volume:
    command = ["blkid", "--probe", "--offset", str(offset), "--size", str(size), "--output", "export", str(file)]
    told = subprocess.run(command, capture_output=True, check=False, timeout=_LOOK).stdout.decode(errors="replace")
    facts = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    kind = facts.get("TYPE", "") if facts.get("USAGE", "filesystem") or facts.get("TYPE") else ""
    return Volume(number, offset, size, kind, facts.get("LABEL", ""))


def pick(found: list[Volume], number: int | None) -> Volume:
    """The volume of that number, or the only one with a file system. Raises NotFound, PreconditionFailed."""
    if number is not None:
        for volume in found:
            if volume.number == number:
                return _demand_mountable(volume)
        raise NotFound("partition", str(number), known=[str(volume.number) for volume in found])
    able = [volume for volume in found if volume.mountable]
    if len(able) == 1:
        return able[0]
    kinds = ", ".join(f"{volume.number}: {volume.kind or 'unknown'}" for volume in found)
    if able:
        raise PreconditionFailed(f"the disk has several file systems ({kinds})", hint="choose one: --partition N")
    raise PreconditionFailed(f"no file system that can be mounted was found ({kinds})", hint=_OTHER)


#: For volumes in volumes: LVM, RAID, encryption.
_OTHER = (
    "with libguestfs (libguestfs-tools, guestmount) LVM and RAID are looked into; encrypted: drctl checkpoint serve"
)


def _demand_mountable(volume: Volume) -> Volume:
    if not volume.mountable:
        what = volume.kind or "nothing that is known"
        raise PreconditionFailed(f"partition {volume.number} holds {what}, no file system", hint=_OTHER)
    return volume


@contextmanager
def mounted(file: Path, volume: Volume, scratch: Path) -> Iterator[Path]:
    """The volume's file system, read-only, while this lasts. Raises StepFailed."""
    command = ["losetup", "--find", "--show", "--offset", str(volume.offset), "--sizelimit", str(volume.size)]
    device = _run([*command, str(file)]).strip()
    try:
        with tempfile.TemporaryDirectory(prefix="drctl-mount-", dir=scratch) as name:
            _run(["mount", "-t", volume.kind, "-o", _OPTIONS, device, name])
            try:
                yield Path(name)
            finally:
                _quietly(["umount", name]) or _quietly(["umount", "--lazy", name])
    finally:
        _quietly(["losetup", "--detach", device])


@contextmanager
def _serving(command: list[str], ready: object) -> Iterator[None]:
    """A program that serves while this lasts; it is ready when `ready()` says so. Raises StepFailed."""
    assert callable(ready)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        try:
            deadline = time.monotonic() + READY
            while not ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    words = " ".join(said.read(2000).decode(errors="replace").split())
                    raise StepFailed(f"{command[0]} does not serve: {words or 'it gave no reason'}")
                time.sleep(0.02)
            yield
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run(command: list[str]) -> str:
    """What it printed. Raises StepFailed."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_LOOK)
    except subprocess.TimeoutExpired as exc:
        raise StepFailed(f"{command[0]} did not end in time") from exc
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise StepFailed(f"{command[0]}: {lines[-1] if lines else f'exited with {done.returncode}'}")
    return done.stdout.decode()


def _quietly(command: list[str]) -> bool:
    """Whether it went well."""
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, check=False, timeout=_LOOK).returncode == 0
    return False
