"""The file systems of a disk that is served by NBD, looked into by libguestfs: a small machine of its own reads them,
not this host's kernel, and volumes in volumes (LVM, RAID) are found, too.

guestfish tells what there is, guestmount shows one of it by FUSE. libguestfs puts a layer over the disk that it throws
away, so a journal is replayed without a write to the checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from drctl.errors import NotFound, PreconditionFailed, SetupFailed, StepFailed

TOOLS = ("guestfish", "guestmount", "guestunmount")
PACKAGES = "libguestfs-tools and guestmount (Debian), guestfs-tools and libguestfs (Fedora)"
#: Its machine has to boot; without KVM that takes minutes.
BOOT_SECONDS = 300.0
#: What is on a disk and is no file system.
_NONE = ("swap", "unknown", "crypto_LUKS", "BitLocker")


@dataclass(frozen=True, slots=True)
class FileSystem:
    """`name` as libguestfs has it, e.g. /dev/sda2 or /dev/vg/root; `kind` e.g. ext4."""

    name: str
    kind: str

    @property
    def mountable(self) -> bool:
        return self.kind not in _NONE


def present() -> bool:
    """Whether it is installed."""
    return all(shutil.which(name) for name in TOOLS)


def demand_tools() -> None:
    """Raises SetupFailed, naming what to install."""
    if not present():
        lacking = ", ".join(name for name in TOOLS if shutil.which(name) is None)
        raise SetupFailed(f"{lacking} is not there", hint=f"install: {PACKAGES}; or: --by kernel")


def file_systems(uri: str) -> list[FileSystem]:
    """Everything on the disk that may be a file system. Raises StepFailed, SetupFailed when its machine can't boot."""
    told = _run(list_command(uri))
    rows = (line.rpartition(": ") for line in told.splitlines() if ": " in line)
    return [FileSystem(name, kind) for name, _, kind in rows]


def list_command(uri: str) -> list[str]:
    return ["guestfish", "--ro", "--format=raw", "-a", address(uri), "run", ":", "list-filesystems"]


def mount_command(uri: str, name: str, place: Path) -> list[str]:
    return ["guestmount", "--ro", "--format=raw", "-a", address(uri), "-m", name, str(place)]


def address(uri: str) -> str:
    """An NBD export as libguestfs names it. Raises StepFailed."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in ("nbd+unix", "nbd"):
        raise StepFailed(f"{uri} is nothing that libguestfs can open")
    return f"nbd://{rest}"


def pick(found: list[FileSystem], wanted: str) -> FileSystem:
    """The file system of that name, of that number of a partition, or the only one. Raises NotFound,
    PreconditionFailed."""
    if wanted:
        name = wanted if wanted.startswith("/dev/") else f"/dev/sda{wanted if wanted != '0' else ''}"
        for one in found:
            if one.name == name:
                return _demand_mountable(one)
        raise NotFound("file system", wanted, known=[one.name for one in found])
    able = [one for one in found if one.mountable]
    if len(able) == 1:
        return able[0]
    kinds = ", ".join(f"{one.name}: {one.kind}" for one in found) or "nothing"
    if able:
        raise PreconditionFailed(f"the disk has several file systems ({kinds})", hint="choose one: --partition NAME")
    hint = "an encrypted one: drctl checkpoint serve, and guestfish with its key on what it serves"
    raise PreconditionFailed(f"no file system that can be mounted was found ({kinds})", hint=hint)


def _demand_mountable(one: FileSystem) -> FileSystem:
    if not one.mountable:
        raise PreconditionFailed(f"{one.name} holds {one.kind}, no file system")
    return one


@contextmanager
def mounted(uri: str, name: str, scratch: Path) -> Iterator[Path]:
    """The file system, read-only, while this lasts. Raises StepFailed, SetupFailed."""
    with tempfile.TemporaryDirectory(prefix="drctl-mount-", dir=scratch) as place:
        _run(mount_command(uri, name, Path(place)))
        try:
            yield Path(place)
        finally:
            # It returns when the mount is gone; the machine ends by itself then.
            subprocess.run(["guestunmount", place], capture_output=True, check=False, timeout=60)


def _run(command: list[str]) -> str:
    """What it printed. Raises SetupFailed when libguestfs can't start its machine, StepFailed else."""
    environment = {"LIBGUESTFS_BACKEND": "direct", **os.environ}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=BOOT_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired as exc:
        raise SetupFailed(f"{command[0]} did not end within {BOOT_SECONDS:.0f} s", hint="or: --by kernel") from exc
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-400:] or f"exited with {done.returncode}"
        if any(word in said for word in ("supermin", "guestfs_launch", "appliance", "could not create")):
            raise SetupFailed(f"libguestfs can't start its machine: {said}", hint="libguestfs-test-tool says why")
        raise StepFailed(f"{command[0]}: {said}")
    return done.stdout.decode(errors="replace")
