"""Replicas: the sparse raw base image of each disk. Knows no journal."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from drctl.errors import IntegrityError
from drctl.model.extent import Extent
from drctl.model.group import GroupDisk
from drctl.store import atomic
from drctl.store.segment import safe_name


def base_path(root: Path, disk: GroupDisk) -> Path:
    return root / "disks" / safe_name(disk.name) / "base.raw"


def create_base(root: Path, disk: GroupDisk) -> None:
    """Make the base, all zeroes, or let it grow to the disk's size. Never shrinks it."""
    path = base_path(root, disk)
    atomic.make_directory(path.parent)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(file).st_size < disk.size:
            os.ftruncate(file, disk.size)
            os.fsync(file)
            atomic.step("size base")
    finally:
        os.close(file)
    atomic.sync_directory(path.parent)


class Base:
    """An open base; a missing one raises IntegrityError. One thread at a time.

    `size` is what readers see; beyond the file's end it reads as zeroes."""

    def __init__(self, root: Path, disk: GroupDisk, *, writer: bool = False) -> None:
        self.path = base_path(root, disk)
        self.size = disk.size
        try:
            self._file = os.open(self.path, (os.O_RDWR if writer else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise IntegrityError(f"{self.path}: the base is gone", path=self.path) from exc
        self._dirty = False
        # Where data was found last. The end of a large extent is far: looking for it at each of many small pieces of
        # it is quadratic. A hole made there meanwhile is told as data, which it may be called.
        self._data = 0, 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`; zeroes beyond the end of the file."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file, [buffer[done:]], offset + done)
            except OSError as exc:
                raise IntegrityError(f"{self.path}+{offset + done}: {exc.strerror}", path=self.path) from exc
            if count == 0:
                buffer[done:] = bytes(len(buffer) - done)
                return
            done += count

    def write(self, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Write at `offset`. Raises OutOfSpace."""
        with atomic.space_errors(self.path):
            self._dirty = True
            atomic.write_at(self._file, buffers, offset)

    def zero(self, offset: int, length: int) -> None:
        """Make a range a hole."""
        self._data = 0, 0
        for extent, data in list(self.extents(offset, length)):
            if data:
                with atomic.space_errors(self.path):
                    self._dirty = True
                    atomic.punch_hole(self._file, extent.offset, extent.length)

    def extents(self, offset: int, length: int) -> Iterator[tuple[Extent, bool]]:
        """The range in order as (extent, is data)."""
        position, end = offset, offset + length
        while position < end:
            if self._data[0] <= position < self._data[1]:
                data = position
            else:
                data = min(self._seek(position, os.SEEK_DATA, end), end)
                if data > position:
                    yield Extent(position, data - position), False
                if data >= end:
                    return
                self._data = data, self._seek(data, os.SEEK_HOLE, end)
            position = min(self._data[1], end)
            yield Extent(data, position - data), True

    def _seek(self, offset: int, how: int, end: int) -> int:
        try:
            return os.lseek(self._file, offset, how)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return end
            raise

    def sync(self) -> None:
        """Make what was written durable."""
        if self._dirty:
            with atomic.space_errors(self.path):
                os.fsync(self._file)
            atomic.step("fsync base")
            self._dirty = False

    def close(self) -> None:
        os.close(self._file)


class Replica:
    """The bases of a group, opened when first needed."""

    def __init__(self, root: Path, disks: Sequence[GroupDisk], *, writer: bool = False) -> None:
        self._root = root
        self._disks = {disk.number: disk for disk in disks}
        self._writer = writer
        self._open: dict[int, Base] = {}

    def base(self, number: int) -> Base:
        """Raises IntegrityError for a disk that the group does not have, or whose base is gone."""
        if number not in self._open:
            disk = self._disks.get(number)
            if disk is None:
                raise IntegrityError(f"{self._root}: the group has no disk number {number}")
            self._open[number] = Base(self._root, disk, writer=self._writer)
        return self._open[number]

    def sync(self) -> None:
        for base in self._open.values():
            base.sync()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
