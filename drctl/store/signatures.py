"""Signature maps: for each block of each disk the signature of its newest content, kept beside the bases.

    signatures/key                 32 bytes: the group's key
    signatures/MACHINE.TARGET.sig  16 bytes per block of 64 KiB, in order
    signatures/MACHINE.TARGET.map  which of them hold (little-endian; also in docs/formats.md):

    offset size
         0    4  magic "DRSM"
         4    1  version, 1
         5    1  zero
         6    2  disk number
         8    8  key: the first 8 bytes of its BLAKE3
        16    8  the disk's size, bytes
        24    8  log number
        32    4  n, bytes of the bits
        36    n  a bit per block, lowest first: its signature holds
      36+n    4  CRC-32 of all before

Law: a signature that holds is that of the block as it is at the end of log number `log`, and still is unless a later
record touches the block. So the data path never touches a map: who opens one reads from the journal's indexes what was
written since, and a promotion does that before it deletes segments. A map that does not check, or is of another key,
size or history, holds nothing; what does not hold is made anew from the data when it is asked for.

Signatures are durable before the map that says that they hold; never the other way round."""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from drctl.errors import IntegrityError, OutOfSpace
from drctl.model.extent import MiB
from drctl.model.group import GroupDisk
from drctl.store import atomic
from drctl.store.extent_map import DISK_SHIFT, SECTOR_MASK, Entries
from drctl.store.group_info import GroupInfo, read_info
from drctl.store.segment import safe_name
from drctl.store.tip import Tip, promoted_after
from drctl.store.view import ViewDisk
from drctl.wire.signature import (
    KEY_SIZE,
    SIGNATURE_SIZE,
    SIGNED,
    blocks_of,
    signatures,
    signatures_of_zeroes,
)

MAGIC = b"DRSM"
VERSION = 1
_HEAD = struct.Struct("<4sBBH8sQQI")
_SECTORS = np.uint64(SIGNED // 512)
#: New signatures are made durable after so many (4 GiB of a disk), and at the end.
FLUSH_EVERY = 65536
#: Read at once to be hashed.
_PIECE = MiB
#: What is told of a block that can't be read: nobody has it, so the source sends its own.
UNKNOWN = b"\xff" * SIGNATURE_SIZE

Bits = npt.NDArray[np.bool_]


def group_key(root: Path) -> bytes:
    """The group's key, made when there is none. Raises OutOfSpace."""
    path = root / "signatures" / "key"
    with suppress(FileNotFoundError):
        if len(key := path.read_bytes()) == KEY_SIZE:
            return key
    atomic.make_directory(path.parent)
    with _locked(root):
        with suppress(FileNotFoundError):
            if len(key := path.read_bytes()) == KEY_SIZE:
                return key
        key = secrets.token_bytes(KEY_SIZE)
        _replace(path, key)
        return key


def _locked(root: Path) -> AbstractContextManager[int]:
    return atomic.lock(root / "signatures" / "lock")


def _replace(path: Path, data: bytes) -> None:
    temp = atomic.temporary(path)
    with atomic.space_errors(path):
        file = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            atomic.write_at(file, [data], 0)
            os.fsync(file)
            atomic.step("fsync map")
        finally:
            os.close(file)
        atomic.commit(temp, path)


class SignatureMap:
    """One disk's signatures. Invariant: `valid` is what may be told; on disk no more than that was ever said."""

    def __init__(self, root: Path, disk: GroupDisk, key: bytes) -> None:
        self.disk = disk
        self.key = key
        name = safe_name(disk.name)
        self._path = root / "signatures" / f"{name}.map"
        self._signatures = root / "signatures" / f"{name}.sig"
        self.count = blocks_of(disk.size)
        self.log, self.valid = self._load()
        self._file = os.open(self._signatures, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, self.count * SIGNATURE_SIZE)
        self._memory = mmap.mmap(self._file, self.count * SIGNATURE_SIZE, access=mmap.ACCESS_READ)
        self.fresh = 0

    def _load(self) -> tuple[int, Bits]:
        """(log, which hold); (0, none) when the file is not what it should be."""
        nothing = 0, np.zeros(self.count, np.bool_)
        try:
            data = self._path.read_bytes()
            fields = _HEAD.unpack_from(data)
        except (FileNotFoundError, struct.error):
            return nothing
        expected = (MAGIC, VERSION, 0, self.disk.number, self._key_id(), self.disk.size)
        whole = len(data) == _HEAD.size + fields[7] + 4 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
        if fields[:6] != expected or not whole or fields[7] != (self.count + 7) // 8:
            return nothing
        bits = np.frombuffer(data, np.uint8, fields[7], _HEAD.size)
        return int(fields[6]), np.unpackbits(bits, count=self.count, bitorder="little").astype(np.bool_)

    def _key_id(self) -> bytes:
        return blake3(self.key).digest(8)

    def forget(self, entries: Entries) -> None:
        """What these entries touch does not hold any more. They are sorted."""
        mine = entries[entries["start"] >> np.uint64(DISK_SHIFT) == self.disk.number]
        if not len(mine):
            return
        sectors = mine["start"] & np.uint64(SECTOR_MASK)
        first = (sectors // _SECTORS).astype(np.int64)
        after = ((sectors + mine["length"] - np.uint64(1)) // _SECTORS).astype(np.int64) + 1
        low, high = int(first.min()), min(int(after.max()), self.count)
        edges = np.zeros(int(after.max()) - low + 1, np.int32)
        np.add.at(edges, first - low, 1)
        np.add.at(edges, after - low, -1)
        self.valid[low:high] &= np.cumsum(edges[: high - low]) == 0

    def get(self, first: int, count: int) -> bytes:
        return self._memory[first * SIGNATURE_SIZE : (first + count) * SIGNATURE_SIZE]

    def put(self, first: int, made: bytes) -> None:
        """Take signatures that were made of the newest content. Raises OutOfSpace."""
        with atomic.space_errors(self._signatures):
            atomic.write_at(self._file, [made], first * SIGNATURE_SIZE)
        count = len(made) // SIGNATURE_SIZE
        self.valid[first : first + count] = True
        self.fresh += count

    def flush(self, tip_log: int) -> None:
        """Make it durable. `tip_log`: where the log ended whose content was signed. Call it under the lock.

        A promotion may have gone on beyond our log number meanwhile; what was signed holds there too, unless it went
        beyond all that we have seen."""
        log = self._load()[0]
        if log > tip_log:
            return
        self.log = max(self.log, log)
        atomic.sync_data(self._file)
        self.save()
        self.fresh = 0

    def save(self) -> None:
        """Write which signatures hold."""
        bits = np.packbits(self.valid, bitorder="little").tobytes()
        number, size = self.disk.number, self.disk.size
        head = _HEAD.pack(MAGIC, VERSION, 0, number, self._key_id(), size, self.log, len(bits))
        _replace(self._path, head + bits + zlib.crc32(head + bits).to_bytes(4, "little"))

    def close(self) -> None:
        self._memory.close()
        os.close(self._file)


class SignatureStore:
    """The maps of a group at the end of its log, and the data that they are made from. One thread at a time."""

    def __init__(self, root: Path) -> None:
        """Raises IntegrityError when the newest state can't be read."""
        self._root = root
        self.key = group_key(root)
        self._tip = Tip(root)
        self._view = self._tip.open()
        self._disks = {disk.number: disk for disk in self._tip.group_disks}
        self._maps: dict[int, SignatureMap] = {}
        #: Blocks that were hashed, and that were known already.
        self.hashed = 0
        self.known = 0

    @property
    def sizes(self) -> dict[int, int]:
        """Of the disks, by number."""
        return {number: disk.size for number, disk in self._disks.items()}

    def signatures(self, disk: int, first: int, count: int, *, fresh: bool = False) -> bytes:
        """Of blocks that the disk has; UNKNOWN for one that can't be read. `fresh`: whatever the map says, which tells
        the truth afterwards."""
        found = self._map(disk)
        if fresh:
            found.valid[first : first + count] = False
        stale = np.flatnonzero(~found.valid[first : first + count]) + first
        self.known += count - len(stale)
        unreadable = [block for low, high in _runs(stale) for block in self._sign(found, low, high)]
        if found.fresh >= FLUSH_EVERY:
            self.flush()
        answer = bytearray(found.get(first, count))
        for block in unreadable:
            at = (block - first) * SIGNATURE_SIZE
            answer[at : at + SIGNATURE_SIZE] = UNKNOWN
        return bytes(answer)

    def _map(self, number: int) -> SignatureMap:
        if number not in self._maps:
            found = SignatureMap(self._root, self._disks[number], self.key)
            self._catch_up(found)
            self._maps[number] = found
        return self._maps[number]

    def _catch_up(self, found: SignatureMap) -> None:
        """Forget what was written since the map was made, and let it stand at the newest sealed segment."""
        try:
            if not read_info(self._root).base_position <= found.log <= self._tip.place.log:
                found.valid[:] = False
            if found.valid.any():
                for entries in self._tip.written_after(found.log):
                    found.forget(entries)
        except (IntegrityError, FileNotFoundError):
            found.valid[:] = False
        found.log = self._tip.sealed

    def _sign(self, found: SignatureMap, first: int, after: int) -> list[int]:
        """Make the signatures of blocks; those that could not be read are returned."""
        unreadable: list[int] = []
        step = _PIECE // SIGNED
        for block in range(first, after, step):
            count = min(step, after - block)
            try:
                found.put(block, self._made(found, block, count))
                self.hashed += count
            except IntegrityError:
                if count == 1:
                    unreadable.append(block)
                for each in range(block, block + count) if count > 1 else ():
                    unreadable += self._sign(found, each, each + 1)
        return unreadable

    def _made(self, found: SignatureMap, first: int, count: int) -> bytes:
        source = self._source(found.disk)
        offset = first * SIGNED
        length = min(count * SIGNED, source.size - offset)
        if not any(data for _, data in source.extents(offset, length)):
            return signatures_of_zeroes(self.key, length)
        return signatures(self.key, source.read(offset, length))

    def _source(self, disk: GroupDisk) -> ViewDisk:
        return self._view.disk(disk.name)

    def contents(self, disk: int, blocks: Sequence[int]) -> list[bytes | memoryview]:
        """The blocks as they are here. Raises IntegrityError."""
        source = self._source(self._disks[disk])
        found: dict[int, bytes | memoryview] = {}
        for low, high in _runs(np.unique(np.asarray(blocks, np.int64))):
            for first in range(low, high, _PIECE // SIGNED):
                begin = first * SIGNED
                data = source.read(begin, min(min(high * SIGNED, begin + _PIECE), source.size) - begin)
                for at in range(0, len(data), SIGNED):
                    found[first + at // SIGNED] = data[at : at + SIGNED]
        return [found[block] for block in blocks]

    def verify(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Compare all signatures that hold with the data: (bytes read, [(disk, block)] that are not as signed)."""
        for number, disk in self._disks.items():
            if not (self._root / "signatures" / f"{safe_name(disk.name)}.map").exists():
                continue
            found = self._map(number)
            step = _PIECE // SIGNED
            for low, high in _runs(np.flatnonzero(found.valid)):
                for first in range(low, high, step):
                    count = min(step, high - first)
                    same = self._made(found, first, count) == found.get(first, count)
                    yield count * SIGNED, [] if same else [(number, at) for at in self._unlike(found, first, count)]

    def _unlike(self, found: SignatureMap, first: int, count: int) -> list[int]:
        return [at for at in range(first, first + count) if self._made(found, at, 1) != found.get(at, 1)]

    def problem(self, number: int, block: int) -> str:
        """What is wrong with a block; empty when its data is as signed, or it is not signed any more."""
        found = self._map(number)
        if not found.valid[block] or self._made(found, block, 1) == found.get(block, 1):
            return ""
        return f"{found.disk.name}+{block * SIGNED}: the data is not what was signed"

    def flush(self) -> None:
        """Make durable what was made. A full disk costs no more than that."""
        with suppress(OutOfSpace), _locked(self._root):
            for found in self._maps.values():
                if found.fresh:
                    found.flush(self._tip.place.log)

    def close(self) -> None:
        self.flush()
        while self._maps:
            self._maps.popitem()[1].close()
        self._view.close()
        self._tip.close()


def _runs(numbers: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Runs of neighbours in sorted numbers, as (first, one past the last)."""
    if not len(numbers):
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    first = numbers[np.append(0, breaks + 1)].tolist()
    last = numbers[np.append(breaks, len(numbers) - 1)].tolist()
    return [(low, high + 1) for low, high in zip(first, last, strict=True)]


def note_promotion(root: Path, info: GroupInfo) -> None:
    """Let the maps stand at the end of log number `info.promoting`, whose segments are about to be deleted.

    A map that this fails for holds nothing any more once the bases have gone beyond it."""
    if not any((root / "signatures").glob("*.map")):
        return
    key = group_key(root)
    with suppress(OutOfSpace), _locked(root):
        for disk in info.disks:
            if (root / "signatures" / f"{safe_name(disk.name)}.map").exists():
                _advance(root, SignatureMap(root, disk, key), info)


def _advance(root: Path, found: SignatureMap, info: GroupInfo) -> None:
    try:
        if info.base_position <= found.log < info.promoting:
            for entries in promoted_after(root, info, found.log):
                found.forget(entries)
            found.log = info.promoting
            found.save()
    finally:
        found.close()


def verify_signatures(root: Path) -> Iterator[tuple[int, list[str]]]:
    """Compare the newest content with its signatures: (bytes read, what is wrong) piece by piece. It is for the bases,
    which have no checksums."""
    if not any((root / "signatures").glob("*.map")):
        return
    try:
        with closing(SignatureStore(root)) as store:
            for count, wrong in store.verify():
                yield count, _still_wrong(root, wrong) if wrong else []
    except IntegrityError as exc:
        yield 0, [exc.message]


def _still_wrong(root: Path, wrong: list[tuple[int, int]]) -> list[str]:
    """What is newer than the look that found it may have reached the bases since: look anew."""
    with closing(SignatureStore(root)) as fresh:
        return [text for number, block in wrong if (text := fresh.problem(number, block))]
