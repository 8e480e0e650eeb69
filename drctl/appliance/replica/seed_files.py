"""Files that hold a disk as it once was, made the base of its replica: moved there, cloned or copied. Knows no group.

    store/GROUP/seeds.json    {MACHINE.TARGET: {"path", "way", "done"}}: what was taken, or is being taken

A note is durable before its file is touched: so a move that was done before a crash is known by the file's absence."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from drctl.appliance.recovery.images import free_at
from drctl.errors import NotFound, OutOfSpace, PreconditionFailed, Refused, SetupFailed, StepFailed
from drctl.model.extent import MiB, format_bytes
from drctl.model.group import GroupDisk
from drctl.store import atomic
from drctl.store.replica import base_path

#: linux/fs.h: _IOW(0x94, 9, int)
_FICLONE = 0x40049409
#: Formats by the end of a file's name; what is not here is raw. The content is not asked: a guest writes it.
FORMATS = {".qcow2": "qcow2", ".qcow": "qcow", ".vmdk": "vmdk", ".vdi": "vdi", ".vhdx": "vhdx", ".vhd": "vpc"}
#: Asking about an image touches its header only.
_SHORT_SECONDS = 20.0
_POLL_SECONDS = 0.2
#: A copy of so few bytes is over before one could look twice.
_SMALL = 64 * MiB

#: Told how many bytes are there, of how many.
Tell = Callable[[int, int], None]


class Way(StrEnum):
    """How a seed becomes a base. `move`: it is the base from then on, no byte is copied; `clone`: the file system
    shares its blocks; `copy`: it takes its own space."""

    MOVE = "move"
    CLONE = "clone"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class SeedFile:
    """A file (or block device) with a disk's older content. `used` are the bytes that it holds, about."""

    path: Path
    format: str
    size: int
    used: int


def format_of(path: Path) -> str:
    return FORMATS.get(path.suffix.lower(), "raw")


def look(path: Path, form: str = "") -> SeedFile:
    """What a file is, without opening it for writing. Raises NotFound, PreconditionFailed (somebody writes to it, it
    can't be read, it is no image)."""
    form = form or format_of(path)
    if not path.exists():
        raise NotFound("file", str(path), message=f"there is no {path} on this host")
    if not (path.is_file() or path.is_block_device()):
        raise PreconditionFailed(f"{path} is neither a file nor a block device")
    if not os.access(path, os.R_OK):
        raise PreconditionFailed(f"{path} can't be read by the appliance", hint="mend its owner or mode there")
    if form == "raw":
        _demand_raw(path)
    # Without -U: an image that a running QEMU writes to is refused by its lock.
    try:
        told = json.loads(_run("info", "--output=json", "-f", form, str(path)))
    except StepFailed as exc:
        raise PreconditionFailed(f"{path} can't be used: {exc.message}", path=str(path)) from exc
    size = int(told["virtual-size"])
    return SeedFile(path, form, size, _used(path, size))


def _demand_raw(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) == b"QFI\xfb":
            raise PreconditionFailed(f"{path} is a qcow2 image by its content, and raw by its name", hint="rename it")


def _used(path: Path, size: int) -> int:
    return size if path.is_block_device() else path.stat().st_blocks * 512


def same_size(seed: SeedFile, disk: GroupDisk) -> None:
    """Raises Refused when the seed is not of the disk's size: then it is another disk, or of another time."""
    if seed.size != disk.size:
        raise Refused(
            f"{seed.path} has {seed.size} bytes ({format_bytes(seed.size)}), {disk.name} has {disk.size} "
            f"({format_bytes(disk.size)}): it is no seed of that disk",
            hint="name the right file, or leave this one out: the disk is copied in full then",
            disk=disk.name,
            path=str(seed.path),
        )


def way_of(seed: SeedFile, root: Path, *, give_up: bool) -> Way:
    """How the seed can become a base below `root`. `give_up`: the file may be used up."""
    if seed.format != "raw":
        return Way.COPY
    facts = seed.path.stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_dev != root.stat().st_dev:
        return Way.COPY
    movable = facts.st_nlink == 1 and not seed.path.is_symlink() and os.access(seed.path, os.W_OK)
    if give_up and movable and os.access(seed.path.parent, os.W_OK):
        return Way.MOVE
    return Way.CLONE if _clones(root) else Way.COPY


def _clones(root: Path) -> bool:
    """Whether the file system shares blocks between files: tried with two small ones."""
    first, second = root / ".clone-a.tmp", root / ".clone-b.tmp"
    try:
        first.write_bytes(bytes(4096))
        with first.open("rb") as source, second.open("wb") as target:
            fcntl.ioctl(target, _FICLONE, source.fileno())
    except OSError:
        return False
    else:
        return True
    finally:
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)


def room_needed(seed: SeedFile, way: Way) -> int:
    """Bytes that it takes beside what is there already. A clone takes space only as the two grow apart."""
    return seed.used if way is Way.COPY else 0


def demand_room(root: Path, needed: int) -> None:
    """Raises OutOfSpace before anything was copied."""
    free = free_at(root)
    if needed > free:
        raise OutOfSpace(
            f"the seeds need {format_bytes(needed)} at {root}, {format_bytes(free)} are free",
            hint="free space there, or put raw files on the same file system: they are moved, not copied",
            needed=needed,
            free=free,
        )


class Seeding:
    """Takes seeds into one group's store. The caller holds the store: nobody else writes to its bases."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file = root / "seeds.json"

    def notes(self) -> dict[str, dict[str, Any]]:
        """What was taken, by disk. Raises IntegrityError."""
        found: dict[str, dict[str, Any]] = atomic.read_json(self._file) or {}
        return found

    def taken(self, disk: str, path: Path) -> bool:
        """That file is the disk's base already."""
        note = self.notes().get(disk)
        if note is None or note["path"] != str(path):
            return False
        return bool(note["done"]) or (note["way"] == Way.MOVE and not path.exists())

    def take(
        self, disk: GroupDisk, path: Path, form: str = "", *, give_up: bool = False, tell: Tell = lambda *_: None
    ) -> Way:
        """Make the file the disk's base; nothing is done when it is already. Raises what `look` and `same_size`
        raise, OutOfSpace, StepFailed; then the base is what it was."""
        if self.taken(disk.name, path):
            self._note(disk.name, path, way := Way(self.notes()[disk.name]["way"]), done=True)
            return way
        seed = look(path, form)
        same_size(seed, disk)
        way = way_of(seed, self._root, give_up=give_up)
        base = base_path(self._root, disk)
        atomic.make_directory(base.parent)
        self._note(disk.name, path, way, done=False)
        if way is Way.MOVE:
            _move(seed, base)
        else:
            way = _duplicate(seed, base, way, tell)
        self._note(disk.name, path, way, done=True)
        tell(seed.used, seed.used)
        return way

    def _note(self, disk: str, path: Path, way: Way, *, done: bool) -> None:
        atomic.write_json(self._file, {**self.notes(), disk: {"path": str(path), "way": way.value, "done": done}})


def _move(seed: SeedFile, base: Path) -> None:
    seed.path.chmod(0o600)
    with seed.path.open("rb") as file:
        os.fsync(file.fileno())
    seed.path.replace(base)
    atomic.step("move seed")
    atomic.sync_directory(base.parent)
    atomic.sync_directory(seed.path.parent)


def _duplicate(seed: SeedFile, base: Path, way: Way, tell: Tell) -> Way:
    """Beside the base, and then in its place."""
    beside = atomic.temporary(base)
    beside.unlink(missing_ok=True)
    try:
        if way is Way.CLONE and not _clone(seed.path, beside):
            way = Way.COPY
        if way is Way.COPY:
            _copy(seed, beside, tell)
        beside.chmod(0o600)
        with beside.open("r+b") as file, atomic.space_errors(beside):
            os.fsync(file.fileno())
        atomic.step("copy seed")
        atomic.commit(beside, base)
    finally:
        beside.unlink(missing_ok=True)
    return way


def _clone(source: Path, target: Path) -> bool:
    with source.open("rb") as one, target.open("wb") as other:
        try:
            fcntl.ioctl(other, _FICLONE, one.fileno())
        except OSError as exc:
            if exc.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
                return False
            raise
    return True


def _copy(seed: SeedFile, target: Path, tell: Tell) -> None:
    """Sparse; progress is what the target holds so far."""
    command = ["qemu-img", "convert", "-q", "-f", seed.format, "-O", "raw", "-S", "64k", str(seed.path), str(target)]
    with _start(command) as running:
        try:
            while (code := running.poll()) is None:
                if target.exists():
                    tell(min(target.stat().st_blocks * 512, seed.used), seed.used)
                time.sleep(_POLL_SECONDS if seed.used > _SMALL else 0.01)
            assert running.stderr is not None
            _demand_success("convert", code, running.stderr.read())
        except BaseException:
            running.kill()
            raise


def _start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError as exc:
        raise SetupFailed("qemu-img is not installed", hint="apt install qemu-utils") from exc


def _run(command: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["qemu-img", command, *arguments], capture_output=True, text=True, timeout=_SHORT_SECONDS, check=False
        )
    except FileNotFoundError as exc:
        raise SetupFailed("qemu-img is not installed", hint="apt install qemu-utils") from exc
    except subprocess.TimeoutExpired as exc:
        raise StepFailed(f"qemu-img {command} did not end within {_SHORT_SECONDS:.0f} s") from exc
    _demand_success(command, done.returncode, done.stderr)
    return done.stdout


def _demand_success(command: str, code: int, said: str) -> None:
    if code:
        said = said.strip() or f"exit code {code}"
        error = OutOfSpace if "No space left" in said else StepFailed
        raise error(f"qemu-img {command}: {said}")


def disks_by_name(told: Mapping[str, Any]) -> dict[str, GroupDisk]:
    """The disks of a request, by MACHINE.TARGET."""
    disks = [
        GroupDisk(int(one["number"]), str(one["machine"]), str(one["target"]), int(one["size"]))
        for one in told["disks"]
    ]
    return {disk.name: disk for disk in disks}
