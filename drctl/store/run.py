"""Runs: sorted indexes of sealed segments. A cache made of the segments, each part checked when it is read.

    runs/FIRST-LAST.run

All integers little-endian. Layout (also in docs/formats.md): header, entries, fences, log, controls.

    offset size  header (128 bytes)
         0    4  magic "DRIX"
         4    1  version, 1
         5    3  zero
         8    8  first log number
        16    8  last log number
        24    8  entries: sorted, not overlapping (extent_map.py), in blocks of 256
        32    8  fences: one per block of entries
        40    8  log: the same extents in log order, unresolved; only in the run of a single segment
        48    8  length of controls: JSON, only in the run of a single segment
        56   16  tile: blake2b of names and sizes of the segments that it was made of
        72    4  CRC-32 of the fences
        76    4  CRC-32 of the log
        80    4  CRC-32 of the controls
        84   40  zero
       124    4  CRC-32 of the 124 bytes before

    offset size  fence (16 bytes)
         0    8  key after the last entry of its block
         8    4  CRC-32 of its block
        12    4  zero
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drctl.errors import IntegrityError
from drctl.store import atomic
from drctl.store.content import Content, Control
from drctl.store.extent_map import ENTRY, ENTRY_SIZE, Entries, Keys, clip, empty, ends, resolve
from drctl.store.segment import Segment
from drctl.wire.frame import FrameKind

MAGIC = b"DRIX"
VERSION = 1
HEADER = struct.Struct("<4sB3sQQQQQQ16sIII40sI")
HEADER_SIZE = HEADER.size
FENCE = np.dtype([("key", "<u8"), ("checksum", "<u4"), ("zero", "<u4")])
#: Entries per block: 6 KiB are read and checked for a look-up, and 100 million entries have 6 MB of fences.
BLOCK = 256


def run_path(root: Path, first: int, last: int) -> Path:
    return root / "runs" / f"{first:012d}-{last:012d}.run"


def _temporary(path: Path) -> Path:
    """Receiver and maintenance, two processes, may make the same run at once: each writes a file of its own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(root: Path) -> None:
    """Remove what processes that have ended left of unfinished runs; what another that lives is writing stays.

    Only for who holds the maintenance lock: one's own, too, are then left over."""
    for temp in (root / "runs").glob(".*.run.*tmp"):
        pid = temp.name.split(".")[-2]
        if pid == str(os.getpid()) or not Path(f"/proc/{pid}").exists():
            atomic.remove(temp)


def tile_of(segments: Iterable[Segment]) -> bytes:
    """Identifies exactly these segments: a merge makes the runs of its inputs worthless."""
    names = ",".join(f"{segment.first}-{segment.last}:{segment.size}" for segment in segments)
    return hashlib.blake2b(names.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class _Header:
    first: int
    last: int
    entries: int
    fences: int
    log: int
    controls: int
    tile: bytes
    checksums: tuple[int, int, int]

    def pack(self) -> bytes:
        counts = (self.first, self.last, self.entries, self.fences, self.log, self.controls)
        head = HEADER.pack(MAGIC, VERSION, b"", *counts, self.tile, *self.checksums, b"", 0)[:-4]
        return head + zlib.crc32(head).to_bytes(4, "little")


def _unpack(data: bytes, path: Path) -> _Header:
    if len(data) < HEADER_SIZE or data[:4] != MAGIC or data[4] != VERSION:
        raise IntegrityError(f"{path}+0: no run begins here", path=path, offset=0)
    if zlib.crc32(data[: HEADER_SIZE - 4]) != int.from_bytes(data[HEADER_SIZE - 4 :], "little"):
        raise IntegrityError(f"{path}+0: run header checksum does not match", path=path, offset=0)
    _, _, _, first, last, entries, fences, log, controls, tile, *checksums, _, _ = HEADER.unpack(data)
    return _Header(first, last, entries, fences, log, controls, tile, (checksums[0], checksums[1], checksums[2]))


class RunWriter:
    """Makes a run from sorted pieces. A cache: renamed whole into place, but not synced."""

    def __init__(self, path: Path, segments: Sequence[Segment]) -> None:
        self._path = path
        self._segments = segments
        self._temp = _temporary(path)
        self._file = os.open(self._temp, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._fences: list[Any] = []
        self._count = 0
        self._offset = HEADER_SIZE
        self._rest = empty()

    def add(self, entries: Entries) -> None:
        """The next entries in order."""
        ready = np.concatenate((self._rest, entries)) if len(self._rest) else entries
        whole = len(ready) - len(ready) % BLOCK
        self._write(ready[:whole])
        self._rest = ready[whole:].copy()

    def _write(self, entries: Entries) -> None:
        if not len(entries):
            return
        data = memoryview(np.ascontiguousarray(entries).view(np.uint8).data)
        self._offset = atomic.write_at(self._file, [data], self._offset)
        fences = np.zeros((len(entries) + BLOCK - 1) // BLOCK, FENCE)
        after = ends(entries)
        fences["key"] = after[np.minimum(np.arange(BLOCK - 1, len(entries) + BLOCK - 1, BLOCK), len(entries) - 1)]
        step = BLOCK * ENTRY_SIZE
        fences["checksum"] = [zlib.crc32(data[at : at + step]) for at in range(0, len(data), step)]
        self._fences.append(fences)
        self._count += len(entries)

    def finish(self, log: Entries | None = None, controls: Sequence[Control] = ()) -> None:
        """Write the rest and put the file in its place."""
        self._write(self._rest)
        fences = np.concatenate(self._fences).tobytes() if self._fences else b""
        order = b"" if log is None else log.tobytes()
        text = json.dumps([_control_json(control) for control in controls]).encode() if log is not None else b""
        atomic.write_at(self._file, [fences, order, text], self._offset)
        header = _Header(
            *(self._segments[0].first, self._segments[-1].last, self._count, len(fences) // FENCE.itemsize),
            *(len(order) // ENTRY_SIZE, len(text), tile_of(self._segments)),
            (zlib.crc32(fences), zlib.crc32(order), zlib.crc32(text)),
        )
        atomic.write_at(self._file, [header.pack()], 0)
        self._close()
        self._temp.replace(self._path)
        atomic.step("rename run")

    def abandon(self) -> None:
        """Nothing is left of it; also after a `finish` that failed."""
        self._close()
        atomic.remove(self._temp)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _control_json(control: Control) -> list[Any]:
    return [int(control.kind), control.offset, control.end, control.generation, control.epoch, control.fields]


def write_segment_run(root: Path, segment: Segment, content: Content) -> None:
    """The run of one sealed segment, of which `content` holds all. Raises OutOfSpace."""
    path = run_path(root, segment.first, segment.last)
    with atomic.space_errors(path):
        atomic.make_directory(path.parent)
        writer = RunWriter(path, [segment])
        try:
            log = content.entries()
            writer.add(resolve(log))
            writer.finish(log, content.controls)
        except BaseException:
            writer.abandon()
            raise


class Run:
    """An open run. Reads are checked; IntegrityError means: make it anew from its segments. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._header = _unpack(atomic.read_at(self._file, HEADER_SIZE, 0), path)
            self.first, self.last = self._header.first, self._header.last
            self._fences_at = HEADER_SIZE + self._header.entries * ENTRY_SIZE
            data = self._part(self._fences_at, self._header.fences * FENCE.itemsize, 0, "fences")
            fences = np.frombuffer(data, FENCE)
            self._keys = np.ascontiguousarray(fences["key"])
            self._checksums = np.ascontiguousarray(fences["checksum"])
        except BaseException:
            os.close(self._file)
            raise

    @property
    def count(self) -> int:
        return self._header.entries

    def is_of(self, segments: Sequence[Segment]) -> bool:
        return self._header.tile == tile_of(segments)

    def _part(self, offset: int, length: int, checksum: int, what: str) -> bytes:
        data = atomic.read_at(self._file, length, offset)
        if len(data) != length or zlib.crc32(data) != self._header.checksums[checksum]:
            raise self._damaged(offset, what)
        return data

    def _damaged(self, offset: int, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self.path}+{offset}: checksum of the run's {what} does not match", path=self.path, offset=offset
        )

    def entries(self, low: int, high: int) -> Entries:
        """The parts of the sorted entries between two keys."""
        first = int(np.searchsorted(self._keys, np.uint64(low), "right"))
        last = min(int(np.searchsorted(self._keys, np.uint64(high), "left")), len(self._keys) - 1)
        return clip(self._blocks(first, last + 1), low, high) if first <= last else empty()

    def _blocks(self, first: int, last: int) -> Entries:
        step = BLOCK * ENTRY_SIZE
        start = first * BLOCK
        count = min(last * BLOCK, self._header.entries) - start
        offset = HEADER_SIZE + start * ENTRY_SIZE
        data = atomic.read_at(self._file, count * ENTRY_SIZE, offset)
        view = memoryview(data)
        for index in range(first, last):
            at = (index - first) * step
            if zlib.crc32(view[at : at + step]) != self._checksums[index]:
                raise self._damaged(offset + at, "entries")
        return np.frombuffer(data, ENTRY, count) if len(data) == count * ENTRY_SIZE else self._cut(offset)

    def _cut(self, offset: int) -> Entries:
        raise self._damaged(offset, "entries")

    def fences(self) -> Keys:
        """The key after each block."""
        return self._keys

    def log(self) -> Entries:
        """The extents in log order (runs of a single segment only)."""
        offset = self._fences_at + self._header.fences * FENCE.itemsize
        return np.frombuffer(self._part(offset, self._header.log * ENTRY_SIZE, 1, "log"), ENTRY)

    def controls(self) -> list[Control]:
        """The listed control frames (runs of a single segment only)."""
        offset = self._fences_at + self._header.fences * FENCE.itemsize + self._header.log * ENTRY_SIZE
        listed = json.loads(self._part(offset, self._header.controls, 2, "controls") or b"[]")
        return [Control(FrameKind(kind), *rest) for kind, *rest in listed]

    def close(self) -> None:
        os.close(self._file)


def has_run(root: Path, segments: Sequence[Segment]) -> bool:
    """There is a run of exactly these segments, as far as its header tells."""
    path = run_path(root, segments[0].first, segments[-1].last)
    try:
        with path.open("rb") as file:
            return _unpack(file.read(HEADER_SIZE), path).tile == tile_of(segments)
    except (FileNotFoundError, IntegrityError):
        return False


def open_run(path: Path, segments: Sequence[Segment]) -> Run | None:
    """The run at `path` if there is a sound one of exactly these segments."""
    try:
        run = Run(path)
    except (FileNotFoundError, IntegrityError):
        return None
    if run.is_of(segments):
        return run
    run.close()
    return None
