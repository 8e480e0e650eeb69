"""Redo logs of ESX snapshots: which grains they hold, and where. Pure: the caller reads, many ranges at a time.

seSparse (-sesparse.vmdk, on VMFS-6), all numbers little-endian u64, units of 512-byte sectors:

    0     constant header: [0] magic cafebabe  [1] version 2.1  [2] capacity  [3] grain 8  [4] table 64  [5] flags 0
          [10] volatile header  [16] [17] directory and its size  [18] [19] tables  [24] [25] grains
    ...   volatile header: magic cafecafe, …, [3] not 0 when a journal has to be replayed
    ...   directory: 0, or 0x1 in the top nibble and a table's index
    ...   tables: 4096 entries: top nibble 0 not here, 1 unmapped, 2 zero, 3 a grain with a rotated index

vmfsSparse (-delta.vmdk, on VMFS-5 and NFS), u32: "COWD", version 1, flags 3, capacity, grain, directory, its entries,
next free sector; directory and tables of 4096 entries hold sector numbers, 0: not here.

What is not here is what the layer below has. qemu-img is the judge of this reader in the tests."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drctl.errors import IntegrityError, UnsupportedFormat
from drctl.model.extent import SECTOR, Extent, MiB

Numbers = NDArray[np.int64]
#: Bytes at each of these ranges of the file, in order.
Read = Callable[[Sequence[Extent]], Sequence[bytes]]

TABLE_ENTRIES = 4096
#: ESXi's largest disk is 62 TiB.
CAPACITY_LIMIT = 64 << 40
#: One read of grains; what lies together in the file is read together.
READ = 4 * MiB
#: Place of a grain that reads as zeroes.
ZERO = -1
_SE_MAGIC, _SE_VERSION, _SE_VOLATILE = 0xCAFEBABE, 0x200000001, 0xCAFECAFE
_SE_GRAIN, _SE_TABLE = 8, 64
_COWD = struct.Struct("<4s7I")


@dataclass(frozen=True, slots=True)
class RedoLog:
    """The grains of one redo log: pairs of `offsets` (on the disk, ascending) and `places` (in the file, or ZERO).

    Invariant: offsets are multiples of `grain`, below `capacity`; no two places are the same. All in bytes."""

    kind: str
    capacity: int
    grain: int
    offsets: Numbers
    places: Numbers

    @property
    def data_bytes(self) -> int:
        return int((self.places != ZERO).sum()) * self.grain

    def extents(self) -> list[tuple[Extent, bool]]:
        """What differs from the layer below, in order, as (extent, is data); neighbours of one kind are one."""
        if not len(self.offsets):
            return []
        data = self.places != ZERO
        breaks = np.flatnonzero((np.diff(self.offsets) != self.grain) | (data[1:] != data[:-1])) + 1
        starts, ends = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(self.offsets)]))
        return [
            (
                Extent(int(self.offsets[a]), min(int(b - a) * self.grain, self.capacity - int(self.offsets[a]))),
                bool(data[a]),
            )
            for a, b in zip(starts, ends, strict=True)
        ]


def parse(read: Read, size: int) -> RedoLog:
    """Read the tables of a redo log of `size` bytes.

    Raises UnsupportedFormat; IntegrityError for one that is cut, contradicts itself, or has a journal to replay."""
    (head,) = read([Extent(0, SECTOR)])
    if head[:4] == b"COWD":
        return _parse_cowd(read, size, head)
    if len(head) == SECTOR and struct.unpack_from("<Q", head)[0] == _SE_MAGIC:
        return _parse_sesparse(read, size, head)
    raise UnsupportedFormat("not a redo log: neither seSparse nor vmfsSparse")


def _parse_sesparse(read: Read, size: int, head: bytes) -> RedoLog:
    words = struct.unpack("<64Q", head)
    if words[1] != _SE_VERSION or words[3:6] != (_SE_GRAIN, _SE_TABLE, 0):
        raise UnsupportedFormat(f"a seSparse redo log of version {words[1]:#x}, grain {words[3]}, table {words[4]}")
    capacity, grain = _capacity(words[2]), _SE_GRAIN * SECTOR
    tables = -(-capacity // (grain * TABLE_ENTRIES))
    directory = Extent(words[16] * SECTOR, tables * 8)
    if words[17] * SECTOR < directory.length or directory.end > size:
        raise IntegrityError("the directory of a seSparse redo log does not fit")
    volatile, entries = read([Extent(words[10] * SECTOR, SECTOR), directory])
    _check_volatile(volatile)
    found = np.frombuffer(_whole(entries, directory.length), "<u8")
    used = np.flatnonzero(found)
    if np.any(found[used] >> np.uint64(32) != np.uint64(0x10000000)):
        raise IntegrityError("the directory of a seSparse redo log has an entry of an unknown kind")
    indexes = (found[used] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    if np.any((indexes + 1) * _SE_TABLE > words[19]):
        raise IntegrityError("the directory of a seSparse redo log leads beyond its tables")
    data = _tables(read, words[18] * SECTOR + indexes * (_SE_TABLE * SECTOR), _SE_TABLE * SECTOR)
    table = np.frombuffer(data, "<u8").reshape(-1, TABLE_ENTRIES)
    row, slot = np.nonzero(table)
    offsets = (used[row].astype(np.int64) * TABLE_ENTRIES + slot) * grain
    places = _sesparse_places(table[row, slot], words[24] * SECTOR, grain)
    return _checked(RedoLog("seSparse", capacity, grain, offsets, places), size)


def _sesparse_places(entries: NDArray[np.uint64], base: int, grain: int) -> Numbers:
    """Where grains lie: an entry's low 12 bits of the index stand above its other 48."""
    kind = entries >> np.uint64(60)
    if np.any((kind == 0) | (kind > 3)):
        raise IntegrityError("a table of a seSparse redo log has an entry of an unknown kind")
    low = (entries >> np.uint64(48)) & np.uint64(0xFFF)
    index = (low | (entries & np.uint64(0xFFFFFFFFFFFF)) << np.uint64(12)) & np.uint64(0x7FFFFFFFFFFF)
    places = index.astype(np.int64) * grain + base
    places[kind != 3] = ZERO
    return places


def _check_volatile(volatile: bytes) -> None:
    words = struct.unpack_from("<4Q", _whole(volatile, SECTOR))
    if words[0] != _SE_VOLATILE:
        raise IntegrityError("the volatile header of a seSparse redo log is none")
    if words[3]:
        raise IntegrityError("a seSparse redo log has a journal to be replayed: its host stopped without closing it")


def _parse_cowd(read: Read, size: int, head: bytes) -> RedoLog:
    _, version, flags, sectors, grain_sectors, directory_at, count, _ = _COWD.unpack_from(head)
    if version != 1 or flags != 3 or not 0 < grain_sectors <= 128:
        raise UnsupportedFormat(f"a vmfsSparse redo log of version {version}, flags {flags}, grain {grain_sectors}")
    capacity, grain = _capacity(sectors), grain_sectors * SECTOR
    tables = -(-capacity // (grain * TABLE_ENTRIES))
    directory = Extent(directory_at * SECTOR, tables * 4)
    if count < tables or directory.end > size:
        raise IntegrityError("the directory of a vmfsSparse redo log does not fit")
    (entries,) = read([directory])
    found = np.frombuffer(_whole(entries, directory.length), "<u4").astype(np.int64)
    used = np.flatnonzero(found)
    if np.any(found[used] * SECTOR + TABLE_ENTRIES * 4 > size):
        raise IntegrityError("the directory of a vmfsSparse redo log leads beyond its end")
    table = np.frombuffer(_tables(read, found[used] * SECTOR, TABLE_ENTRIES * 4), "<u4").reshape(-1, TABLE_ENTRIES)
    row, slot = np.nonzero(table)
    offsets = (used[row].astype(np.int64) * TABLE_ENTRIES + slot) * grain
    places = table[row, slot].astype(np.int64) * SECTOR
    return _checked(RedoLog("vmfsSparse", capacity, grain, offsets, places), size)


def _capacity(sectors: int) -> int:
    if not 0 < sectors * SECTOR <= CAPACITY_LIMIT:
        raise UnsupportedFormat(f"a redo log of a disk of {sectors} sectors")
    return int(sectors) * SECTOR


def _tables(read: Read, places: Numbers, length: int) -> bytes:
    """The tables at these places, in this order; those that lie together are read together."""
    if not len(places):
        return b""
    breaks = np.flatnonzero(np.diff(places) != length) + 1
    starts, ends = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(places)]))
    wanted = [Extent(int(places[a]), int(b - a) * length) for a, b in zip(starts, ends, strict=True)]
    return b"".join(_whole(data, one.length) for data, one in zip(read(wanted), wanted, strict=True))


def _whole(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise IntegrityError(f"a redo log is cut: {len(data)} bytes of {length}")
    return data


def _checked(log: RedoLog, size: int) -> RedoLog:
    """The redo log, if it contradicts itself nowhere: a wrong grain would be a wrong byte at the other site."""
    order = np.argsort(log.offsets, kind="stable")
    offsets, places = log.offsets[order], log.places[order]
    data = places[places != ZERO]
    if len(offsets) and (offsets[-1] >= log.capacity or np.any(np.diff(offsets) <= 0)):
        raise IntegrityError(f"a {log.kind} redo log has a grain beyond the disk's end, or twice")
    # ESXi may not have written the last grain to its end.
    if len(data) and (data.min() < SECTOR or data.max() >= size or len(np.unique(data)) != len(data)):
        raise IntegrityError(f"a {log.kind} redo log has a grain beyond the file's end, or two in one place")
    return RedoLog(log.kind, log.capacity, log.grain, offsets, places)


def grains(log: RedoLog, read: Read, *, at_once: int = READ) -> Iterator[tuple[int, memoryview]]:
    """The data of the redo log as (offset on the disk, bytes), in the order of the file; neighbours are one piece.

    Zeroes are not in it: `extents` tells them. Raises IntegrityError when the file is shorter than it was."""
    some = np.flatnonzero(log.places != ZERO)
    order = some[np.argsort(log.places[some], kind="stable")]
    places, offsets = log.places[order], log.offsets[order]
    most = max(1, at_once // log.grain)
    for first, last in _spans(places, log.grain, most):
        start, length = int(places[first]), (last - first) * log.grain
        (data,) = read([Extent(start, length)])
        view = memoryview(
            data.ljust(length, b"\0") if length - log.grain < len(data) < length else _whole(data, length)
        )
        yield from _pieces(log, offsets[first:last], view)


def _spans(places: Numbers, grain: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of indexes whose places follow each other, of at most so many grains."""
    breaks = np.flatnonzero(np.diff(places) != grain) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(places)], strict=True):
        for begin in range(first, last, most):
            yield begin, min(begin + most, last)


def _pieces(log: RedoLog, offsets: Numbers, view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """A span of the file cut where the disk's offsets don't follow each other."""
    breaks = (np.flatnonzero(np.diff(offsets) != log.grain) + 1).tolist()
    starts = offsets[[0, *breaks]].tolist()
    for first, last, offset in zip([0, *breaks], [*breaks, len(offsets)], starts, strict=True):
        end = min((last - first) * log.grain, log.capacity - offset)
        yield offset, view[first * log.grain : first * log.grain + end]
