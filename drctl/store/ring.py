"""The ring's file: made, opened, its words and dirty maps. Knows neither how records are written nor how they are read.

Imported by the tap, so it must not import numpy. The layout is in wire/ring.py.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

from drctl.errors import IntegrityError, Locked, OutOfSpace, UnsupportedFormat
from drctl.model.extent import BLOCK
from drctl.model.identity import StreamIdentity
from drctl.wire.ring import DESCRIPTOR_SIZE, DISK_TABLE, DISK_WORDS, HEADER_SIZE, MAGIC, MAX_DISKS, DiskWord, Word

_PAGE = 4096
#: MAP_LOCKED of the kernel's generic ABI; the mmap module does not name it, and ctypes for mlock() costs the tap 1 MiB.
_MAP_LOCKED = 0x2000
_GENERIC_ABI = frozenset({"x86_64", "aarch64", "riscv64"})
#: A new ring is unordered until the supervisor has proven order, so its stamp differs from ORDERED_STAMP.
_FIRST_STAMP = 1


def exports_path(ring: Path) -> Path:
    """The small JSON file beside a ring that tells the tap which export is which disk."""
    return ring.with_name(ring.name + ".json")


def dirty_map_path(ring: Path, disk: int, which: int) -> Path:
    """The dirty map `which` (0 or 1) of a disk."""
    return ring.with_suffix(f".dirty-{disk}-{which}")


def dirty_map_size(size: int) -> int:
    """Bytes of a dirty map for a disk of `size` bytes: a bit for each 4 KiB, lowest bit first."""
    return -(-size // (BLOCK * 8))


def write_exports(path: Path, exports: Mapping[str, tuple[int, int]]) -> None:
    """Write {export name: (disk number, size)} for the tap, replacing the file at once."""
    body = {"exports": {name: {"number": number, "size": size} for name, (number, size) in exports.items()}}
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(body, indent=1) + "\n")
    temporary.replace(path)


def read_exports(path: Path) -> dict[str, tuple[int, int]]:
    """{export name: (disk number, size)}. Raises UnsupportedFormat when the file is something else."""
    try:
        entries = json.loads(path.read_text())["exports"]
        return {str(name): (int(entry["number"]), int(entry["size"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UnsupportedFormat(f"{path}: not a file of exports: {exc}") from exc


class Ring:
    """An open ring. `words` are the header's 64-bit words, each stored by one instruction; `memory` is the whole file.

    Invariant: slots, data_capacity and the disks' table never change while the ring exists."""

    def __init__(self, path: Path, descriptor: int, mapped: mmap.mmap) -> None:
        self.path = path
        self._descriptor = descriptor
        self._mapped = mapped
        self.memory = memoryview(mapped)
        self.words = self.memory[:HEADER_SIZE].cast("Q")
        self.slots = self.words[Word.SLOTS]
        self.data_capacity = self.words[Word.DATA_CAPACITY]
        self.data_at = _data_at(self.slots)
        self.generation = self.words[Word.GENERATION]
        self.epoch = f"{self.words[Word.EPOCH_HIGH]:016x}{self.words[Word.EPOCH_LOW]:016x}"
        #: Number of each disk → index of its first word.
        self.tables = self._tables()

    def _tables(self) -> dict[int, int]:
        starts = range(DISK_TABLE, DISK_TABLE + DISK_WORDS * self.words[Word.DISKS], DISK_WORDS)
        return {self.words[start + DiskWord.NUMBER]: start for start in starts}

    @classmethod
    def create(
        cls, path: Path, identity: StreamIdentity, disks: Mapping[int, int], data_capacity: int, slots: int
    ) -> Ring:
        """Make and open a new ring for `disks` ({number: size in bytes}) with empty dirty maps, replacing an older one.

        All space is taken now: a full tmpfs is OutOfSpace here and not SIGBUS in the tap later."""
        if not 0 < len(disks) <= MAX_DISKS or slots < 2 or data_capacity < _PAGE or data_capacity % _PAGE:
            raise ValueError(f"a ring of {len(disks)} disks, {slots} slots, {data_capacity} bytes can't be made")
        for number, size in disks.items():
            for which in (0, 1):
                _allocate(dirty_map_path(path, number, which), dirty_map_size(size))
        temporary = path.with_name(path.name + ".new")
        _allocate(temporary, _data_at(slots) + data_capacity)
        _write_header(temporary, identity, disks, data_capacity, slots)
        temporary.replace(path)
        return cls.open(path)

    @staticmethod
    def amend(path: Path, disks: Mapping[int, int]) -> None:
        """Let a ring that nobody has open be about other disks ({number: size in bytes}), or other sizes of them.

        Records stay, also those of disks that are left out; the words of a disk that stays are kept, its dirty maps
        too unless its size changed. Whatever happens in between, the ring's disks are then neither the old nor the new
        ones, and it is not adopted. Raises OutOfSpace, Locked, UnsupportedFormat or IntegrityError."""
        if not 0 < len(disks) <= MAX_DISKS:
            raise ValueError(f"a ring of {len(disks)} disks can't be made")
        ring = Ring.open(path)
        try:
            _lock(ring._descriptor, path)
            old = {number: bytes(ring.words[start : start + DISK_WORDS]) for number, start in ring.tables.items()}
            sizes = ring.disks
            ring.words[Word.DISKS] = 0
            for number, size in disks.items():
                if sizes.get(number) != size:
                    for which in (0, 1):
                        _allocate(dirty_map_path(path, number, which), dirty_map_size(size))
            for index, (number, size) in enumerate(disks.items()):
                start = DISK_TABLE + index * DISK_WORDS
                ring.words[start : start + DISK_WORDS] = memoryview(old.get(number, bytes(8 * DISK_WORDS))).cast("Q")
                ring.words[start + DiskWord.SIZE] = size
                ring.words[start + DiskWord.NUMBER] = number
            ring.words[Word.DISKS] = len(disks)
        finally:
            ring.close()

    @classmethod
    def open(cls, path: Path, *, writer: bool = False, locked: bool = True) -> Ring:
        """Open a ring. As `writer` (the tap) all of it is faulted in, locked in memory where the limit allows, and
        no other writer may have it (Locked), but one that has it and will give its lock to us (`locked` False, and
        take_lock before anything is written). Raises UnsupportedFormat or IntegrityError for what is no ring."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if writer and locked:
                _lock(descriptor, path)
            _check(descriptor, path)
            mapped = _map_resident(descriptor) if writer else mmap.mmap(descriptor, 0)
            return cls(path, descriptor, mapped)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def descriptor(self) -> int:
        """The file's; a writer's holds the lock, which belongs to whoever has the descriptor or a copy of it."""
        return self._descriptor

    def take_lock(self, descriptor: int) -> None:
        """Go on with another writer's descriptor of this ring, and so with its lock. Raises IntegrityError."""
        if not os.path.samestat(os.fstat(descriptor), os.fstat(self._descriptor)):
            raise IntegrityError(f"{self.path}: is not the ring whose lock was given")
        os.dup2(descriptor, self._descriptor, inheritable=False)
        os.close(descriptor)

    def disk_word(self, disk: int, word: DiskWord) -> int:
        """A word of the disk with that number. Raises KeyError for a disk that the ring does not know."""
        return self.words[self.tables[disk] + word]

    @property
    def disks(self) -> dict[int, int]:
        """{number: size in bytes}."""
        return {number: self.words[start + DiskWord.SIZE] for number, start in self.tables.items()}

    def open_dirty_map(self, disk: int, which: int) -> memoryview:
        """The bits of a dirty map, writable; the map stays open as long as the view lives."""
        with dirty_map_path(self.path, disk, which).open("r+b") as file:
            return memoryview(mmap.mmap(file.fileno(), 0))

    def close(self) -> None:
        """Unmap; the file and what is in it stay. No view of `memory` may be in use any more."""
        self.words.release()
        self.memory.release()
        self._mapped.close()
        os.close(self._descriptor)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete a ring, its exports and its dirty maps; no error where there are none."""
        # The socket for a successor is of no use without its ring (replication/tap_handover.py).
        for file in (
            path,
            exports_path(path),
            path.with_suffix(".heir"),
            *path.parent.glob(path.stem + ".dirty-*-[01]"),
        ):
            file.unlink(missing_ok=True)


def _data_at(slots: int) -> int:
    return -(-(HEADER_SIZE + slots * DESCRIPTOR_SIZE) // _PAGE) * _PAGE


def _allocate(path: Path, size: int) -> None:
    """A new file of zeroes that has its space. Raises OutOfSpace, then there is no file."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as exc:
        path.unlink()
        if exc.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OutOfSpace(f"{path}: no room for {size} bytes", hint="see: df; or set a smaller ring_size") from exc
        raise
    finally:
        os.close(descriptor)


def _write_header(
    path: Path, identity: StreamIdentity, disks: Mapping[int, int], data_capacity: int, slots: int
) -> None:
    header = bytearray(HEADER_SIZE)
    words = memoryview(header).cast("Q")
    words[Word.MAGIC] = MAGIC
    words[Word.GENERATION] = identity.generation
    words[Word.EPOCH_HIGH] = int(identity.epoch[:16], 16)
    words[Word.EPOCH_LOW] = int(identity.epoch[16:], 16)
    words[Word.SLOTS] = slots
    words[Word.DATA_CAPACITY] = data_capacity
    words[Word.ORDER_STAMP] = _FIRST_STAMP
    words[Word.DISKS] = len(disks)
    for index, (number, size) in enumerate(disks.items()):
        words[DISK_TABLE + index * DISK_WORDS + DiskWord.SIZE] = size
        words[DISK_TABLE + index * DISK_WORDS + DiskWord.NUMBER] = number
    with path.open("r+b") as file:
        file.write(header)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(f"{path}: another tap has this ring") from None


def _check(descriptor: int, path: Path) -> None:
    header = os.pread(descriptor, HEADER_SIZE, 0)
    if len(header) < HEADER_SIZE or header[:8] != MAGIC.to_bytes(8, "little"):
        raise UnsupportedFormat(f"{path}: not a ring of this version")
    words = memoryview(header).cast("Q")
    expected = _data_at(words[Word.SLOTS]) + words[Word.DATA_CAPACITY]
    actual = os.fstat(descriptor).st_size
    if actual != expected or words[Word.DISKS] > MAX_DISKS:
        raise IntegrityError(f"{path}: the ring's header says {expected} bytes, the file has {actual}")


def _map_resident(descriptor: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    if os.uname().machine in _GENERIC_ABI:
        try:
            return mmap.mmap(descriptor, 0, flags=flags | _MAP_LOCKED)
        except OSError:
            # RLIMIT_MEMLOCK is below the ring's size: it may then be swapped, which is slow but not wrong.
            pass
    return mmap.mmap(descriptor, 0, flags=flags)
