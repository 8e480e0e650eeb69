"""Whether what lies under a directory is encrypted on its disk, as far as the kernel tells (/proc and /sys)."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

#: File systems that encrypt by themselves.
_ENCRYPTING = frozenset({"ecryptfs", "fuse.gocryptfs", "fuse.encfs"})
#: In memory, elsewhere, or of a kind that hides its disks from us: nothing is known.
_HIDING = frozenset({"tmpfs", "ramfs", "zfs", "overlay", "nfs", "nfs4", "cifs", "9p", "virtiofs", "ceph"})


class Encryption(StrEnum):
    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


def encryption(path: Path, root: Path = Path("/")) -> Encryption:
    """Of the volume that holds `path`: YES when each disk under it is behind dm-crypt, NO when one is not."""
    found = _mount(path, (root / "proc/self/mountinfo"))
    if found is None:
        return Encryption.UNKNOWN
    device, kind, source = found
    if kind in _ENCRYPTING:
        return Encryption.YES
    if kind in _HIDING or kind.startswith("fuse"):
        return Encryption.UNKNOWN
    block = root / "sys/dev/block" / device
    if not block.exists():
        block = _of_source(source, root)  # btrfs has a device number of its own
    return _of_block(block) if block.exists() else Encryption.UNKNOWN


def _mount(path: Path, table: Path) -> tuple[str, str, str] | None:
    """(MAJOR:MINOR, file system, source) of the mount that holds the path, proc(5)."""
    wanted = os.path.realpath(path)
    best: tuple[int, tuple[str, str, str]] | None = None
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 2:
            continue
        place = fields[4].encode().decode("unicode_escape")  # blanks are written as \040
        inside = place == "/" or wanted == place or wanted.startswith(place + "/")
        if inside and (best is None or len(place) >= best[0]):
            best = (len(place), (fields[2], rest[0], rest[1]))
    return best[1] if best else None


def _of_source(source: str, root: Path) -> Path:
    name = os.path.realpath(root / source.lstrip("/")).rpartition("/")[2]
    return root / "sys/class/block" / name


def _of_block(block: Path) -> Encryption:
    """A device mapper's target tells by its uuid; a stack of devices is as good as the worst below."""
    try:
        if (block / "dm/uuid").read_text().startswith("CRYPT-"):
            return Encryption.YES
    except OSError:
        pass
    below = sorted((block / "slaves").iterdir()) if (block / "slaves").is_dir() else []
    if not below:
        return Encryption.NO
    found = {_of_block(device.resolve()) for device in below}
    return Encryption.YES if found == {Encryption.YES} else Encryption.NO
