"""Extents of the log as numpy arrays, and who wins where they overlap. Knows no files.

An entry (24 bytes, also in docs/formats.md) says where the bytes of a range of a disk are:

    offset size
         0    8  start: disk number << 48 | first sector
         8    4  length, in sectors
        12    4  log: number of the segment (its last one, when merged)
        16    4  frame: offset of the frame in the segment
        20    4  payload: where its bytes begin in the frame's raw payload; bit 31: zeroes, no bytes
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from drctl.model.extent import SECTOR
from drctl.wire.frame import EXTENT_ZERO, Extents

ENTRY = np.dtype([("start", "<u8"), ("length", "<u4"), ("log", "<u4"), ("frame", "<u4"), ("payload", "<u4")])
ENTRY_SIZE = ENTRY.itemsize
#: Bit of `payload` that says: reads as zeroes.
ZERO = 1 << 31
DISK_SHIFT = 48
SECTOR_MASK = (1 << DISK_SHIFT) - 1

Entries = npt.NDArray[np.void]
Keys = npt.NDArray[np.uint64]
Indexes = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def empty() -> Entries:
    return np.empty(0, ENTRY)


def key(disk: int, sector: int) -> int:
    """A place on a disk as one number; the places of a disk are adjacent."""
    return disk << DISK_SHIFT | sector


def entries_of(tables: Sequence[Extents], frames: Sequence[int], log: int) -> Entries:
    """The extent tables of frames, in log order, as entries."""
    if not tables:
        return empty()
    table = np.concatenate(tables)
    result = np.empty(len(table), ENTRY)
    result["start"] = table["disk"].astype(np.uint64) << np.uint64(DISK_SHIFT) | table["offset"]
    result["length"] = table["length"]
    result["log"] = log
    result["frame"] = np.repeat(np.array(frames, np.uint32), [len(each) for each in tables])
    result["payload"] = np.where(table["kind"] == EXTENT_ZERO, np.uint32(ZERO), table["payload_offset"])
    return result[result["length"] > 0]


def ends(entries: Entries) -> Keys:
    """The key after each entry."""
    end: Keys = entries["start"] + entries["length"].astype(np.uint64)
    return end


def resolve(entries: Entries) -> Entries:
    """Sorted entries that don't overlap: where several of `entries` did, the last of them."""
    if not len(entries):
        return entries
    # Stable: of those with one start the last written comes last. Layers are sorted already, a merge sort sees that.
    order = np.argsort(np.ascontiguousarray(entries["start"]), kind="stable")
    start = entries["start"][order]
    end = ends(entries)[order]
    begins = np.append(True, start[1:] >= np.maximum.accumulate(end)[:-1])
    if begins.all():
        return entries[order]
    cluster = np.cumsum(begins) - 1
    return _of_clusters(entries, order, cluster, np.append((start[1:] != start[:-1]) | (end[1:] != end[:-1]), True))


def _of_clusters(entries: Entries, order: Indexes, cluster: Indexes, last: Flags) -> Entries:
    """`order` sorts `entries`, `cluster` numbers those (sorted) that hang together by overlaps; `last`: the next one
    is another range. Where a guest writes the same blocks again, all of a cluster are one range, and one index does."""
    ranges = np.bincount(cluster, last)
    simple = ranges[cluster] == 1
    alike: Entries = entries[order[simple & last]]
    if len(alike) == len(ranges):
        return alike
    # The others in the order in which they were written.
    mixed = _overlaid(entries[np.sort(order[~simple])])
    both = np.concatenate((alike, mixed))
    result: Entries = both[np.argsort(np.ascontiguousarray(both["start"]), kind="stable")]
    return result


def _overlaid(entries: Entries) -> Entries:
    """`resolve` for entries that overlap in any way."""
    start, end = entries["start"], ends(entries)
    edges = np.sort(np.concatenate((start, end)))
    # Not np.unique: it hashes, which is ten times slower here.
    edges = edges[np.append(True, edges[1:] != edges[:-1])]
    owner = _paint(np.searchsorted(edges, start), np.searchsorted(edges, end), len(edges) - 1)
    first = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    after = np.append(first[1:], len(owner))
    taken = owner[first] >= 0
    return cut(entries[owner[first][taken]], edges[first[taken]], edges[after[taken]])


def _paint(left: Indexes, right: Indexes, count: int) -> Indexes:
    """Owner of each of `count` cells when index i paints left[i]..right[i] after all smaller indexes; -1: none.

    A sparse table run backwards: each range is two blocks of a power of two cells, and blocks are halved level by
    level. O((n + cells) × levels) whatever the overlaps; painting one by one is quadratic for a guest that zeroes
    its whole disk over and over."""
    level = np.frexp((right - left).astype(np.float64))[1] - 1
    owner = np.full(count, -1, np.int64)
    for height in range(int(level.max()), -1, -1):
        chosen = np.flatnonzero(level == height)
        np.maximum.at(owner, left[chosen], chosen)
        if height:
            np.maximum.at(owner, right[chosen] - (1 << height), chosen)
            half = 1 << (height - 1)
            owner[half:] = np.maximum(owner[half:], owner[:-half].copy())
    return owner


def cut(entries: Entries, start: Keys, end: Keys) -> Entries:
    """Each entry reduced to its part from `start` to `end`. `entries` must be a copy; it is changed."""
    skipped = (start - entries["start"]).astype(np.uint32) * np.uint32(SECTOR)
    entries["payload"] += np.where(entries["payload"] & ZERO, np.uint32(0), skipped)
    entries["start"] = start
    entries["length"] = end - start
    return entries


def clip(entries: Entries, low: int, high: int) -> Entries:
    """The parts of sorted, non-overlapping entries between two keys. A copy."""
    end = ends(entries)
    first = int(np.searchsorted(end, np.uint64(low), "right"))
    last = int(np.searchsorted(entries["start"], np.uint64(high), "left"))
    chosen = entries[first:last].copy()
    if not len(chosen):
        return chosen
    start = np.maximum(chosen["start"], np.uint64(low))
    return cut(chosen, start, np.minimum(ends(chosen), np.uint64(high)))
