"""Disks of a simulated host: flat extents, seSparse and vmfsSparse redo logs, and chains of them, written in place.

qemu-img is the judge of these formats (test_formats.py); drctl's own reader is not used here."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

SECTOR = 512
GRAIN = 4096


#: offset, length, what is there (None: what the parent has)
Piece = tuple[int, int, "bytes | None"]


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind made one."""
    found: list[tuple[int, list[Piece]]] = []
    for piece in pieces:
        if found and (found[-1][1][-1][2] is None) == (piece[2] is None):
            found[-1][1].append(piece)
        else:
            found.append((piece[0], [piece]))
    made: list[Piece] = []
    for offset, run in found:
        data = None if run[0][2] is None else b"".join(piece[2] or b"" for piece in run)
        made.append((offset, sum(piece[1] for piece in run), data))
    return made


class Flat:
    """A -flat.vmdk: byte for byte the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, offset: int, length: int) -> list[Piece]:
        with self.path.open("rb") as file:
            file.seek(offset)
            return [(offset, length, file.read(length).ljust(length, b"\0"))]

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)


class SeSparse:
    """QEMU block/vmdk.c `VMDKSESparseConstHeader` (facts 5.2): grains of 4 KiB, tables of 4096 entries of 64 bits."""

    grain = GRAIN
    TABLE = 4096

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            header = struct.unpack("<64Q", file.read(SECTOR))
        assert header[:2] == (0xCAFEBABE, 0x200000001), f"{path} is not seSparse"
        self.capacity = header[2] * SECTOR
        self._directory, self._tables, self._grains = (header[index] * SECTOR for index in (16, 18, 24))

    @classmethod
    def create(cls, path: Path, capacity: int) -> SeSparse:
        tables = -(-capacity // (GRAIN * cls.TABLE))
        directory_sectors = -(-tables * 8 // SECTOR)
        directory = 2048
        places = [directory, directory_sectors]
        at = directory + directory_sectors
        grains = -(-(at + tables * 64) // 8) * 8
        header = [0xCAFEBABE, 0x200000001, capacity // SECTOR, 8, 64, 0, 0, 0, 0, 0]
        header += [1, 1, 2, 2, 4, 2044, *places, at, tables * 64, 0, 0, 0, 0, grains, -(-capacity // SECTOR)]
        with path.open("wb") as file:
            file.write(struct.pack("<26Q", *header).ljust(SECTOR, b"\0"))
            file.write(struct.pack("<4Q", 0xCAFECAFE, 0, 1, 0).ljust(SECTOR, b"\0"))
            file.truncate(grains * SECTOR)
        return cls(path)

    def set_dirty(self, dirty: bool) -> None:
        """A journal that has to be replayed: what a crash leaves."""
        with self.path.open("r+b") as file:
            file.seek(SECTOR + 24)
            file.write(struct.pack("<Q", int(dirty)))

    def read(self, offset: int, length: int) -> list[Piece]:
        """Whole grains, in order; what the parent has as None."""
        found: list[Piece] = []
        with self.path.open("rb") as file:
            for at, entry in self._entries(file, offset, length):
                kind = entry >> 60
                if kind in (1, 2):
                    found.append((at, GRAIN, bytes(GRAIN)))
                elif kind == 3:
                    file.seek(self._grains + self._index(entry) * GRAIN)
                    found.append((at, GRAIN, file.read(GRAIN)))
                else:
                    found.append((at, GRAIN, None))
        return joined(found)

    def _entries(self, file, offset: int, length: int) -> list[tuple[int, int]]:
        found = []
        first, last = offset // GRAIN, -(-(offset + length) // GRAIN)
        for table in range(first // self.TABLE, -(-last // self.TABLE)):
            begin, end = max(first, table * self.TABLE), min(last, (table + 1) * self.TABLE)
            file.seek(self._directory + table * 8)
            where = struct.unpack("<Q", file.read(8))[0]
            entries: Sequence[int] = (0,) * (end - begin)
            if where:
                file.seek(self._tables + ((where & 0xFFFFFFFF) * self.TABLE + begin % self.TABLE) * 8)
                entries = struct.unpack(f"<{end - begin}Q", file.read((end - begin) * 8))
            found += [(index * GRAIN, entry) for index, entry in zip(range(begin, end), entries, strict=True)]
        return found

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            for at in range(0, len(data), GRAIN):
                self._put(file, offset + at, data[at : at + GRAIN])

    def mark(self, offset: int, kind: int) -> None:
        """Make a grain unmapped (1) or zero (2)."""
        with self.path.open("r+b") as file:
            self._set(file, offset, kind << 60)

    def _put(self, file, offset: int, grain: bytes) -> None:
        entry = self._entry(file, offset)
        if entry >> 60 == 3:
            file.seek(self._grains + self._index(entry) * GRAIN)
        else:
            file.seek(0, os.SEEK_END)
            index = max(0, -(-(file.tell() - self._grains) // GRAIN))
            self._set(file, offset, 3 << 60 | (index & 0xFFF) << 48 | index >> 12)
            file.seek(self._grains + index * GRAIN)
        file.write(grain)

    @staticmethod
    def _index(entry: int) -> int:
        return (entry & 0x0FFF000000000000) >> 48 | (entry & 0xFFFFFFFFFFFF) << 12

    def _entry(self, file, offset: int) -> int:
        table, slot = divmod(offset // GRAIN, self.TABLE)
        file.seek(self._directory + table * 8)
        where = struct.unpack("<Q", file.read(8))[0]
        if not where:
            return 0
        file.seek(self._tables + (where & 0xFFFFFFFF) * self.TABLE * 8 + slot * 8)
        return int(struct.unpack("<Q", file.read(8))[0])

    def _set(self, file, offset: int, entry: int) -> None:
        table, slot = divmod(offset // GRAIN, self.TABLE)
        file.seek(self._directory + table * 8)
        file.write(struct.pack("<Q", 1 << 60 | table))
        file.seek(self._tables + (table * self.TABLE + slot) * 8)
        file.write(struct.pack("<Q", entry))


class VmfsSparse:
    """COWD (facts 5.2): grains of one sector, tables of 4096 entries of 32 bits that hold sector numbers."""

    grain = SECTOR
    TABLE = 4096

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            magic, _, _, sectors, grain, directory, self._tables = struct.unpack("<4s6I", file.read(28))
        assert magic == b"COWD", f"{path} is not COWD"
        self.capacity, self.grain, self._directory = sectors * SECTOR, grain * SECTOR, directory * SECTOR

    @classmethod
    def create(cls, path: Path, capacity: int, grain_sectors: int = 1) -> VmfsSparse:
        tables = -(-capacity // (grain_sectors * SECTOR * cls.TABLE))
        first = -(-(2048 + tables * 4) // SECTOR)
        with path.open("wb") as file:
            header = (b"COWD", 1, 3, capacity // SECTOR, grain_sectors, 4, tables, first)
            file.write(struct.pack("<4s7I", *header).ljust(2048, b"\0"))
            file.truncate(first * SECTOR)
        return cls(path)

    def read(self, offset: int, length: int) -> list[Piece]:
        """Whole grains, in order; what the parent has as None."""
        found: list[Piece] = []
        first, last = offset // self.grain, -(-(offset + length) // self.grain)
        with self.path.open("rb") as file:
            for table in range(first // self.TABLE, -(-last // self.TABLE)):
                begin, end = max(first, table * self.TABLE), min(last, (table + 1) * self.TABLE)
                file.seek(self._directory + table * 4)
                where = struct.unpack("<I", file.read(4))[0]
                if not where:
                    found.append((begin * self.grain, (end - begin) * self.grain, None))
                    continue
                file.seek(where * SECTOR + begin % self.TABLE * 4)
                entries = struct.unpack(f"<{end - begin}I", file.read((end - begin) * 4))
                for index, sector in zip(range(begin, end), entries, strict=True):
                    data = None
                    if sector:
                        file.seek(sector * SECTOR)
                        data = file.read(self.grain).ljust(self.grain, b"\0")
                    found.append((index * self.grain, self.grain, data))
        return joined(found)

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            for at in range(0, len(data), self.grain):
                sector = self._sector(file, offset + at) or self._allocate(file, offset + at)
                file.seek(sector * SECTOR)
                file.write(data[at : at + self.grain])

    def _end(self, file) -> int:
        file.seek(0, os.SEEK_END)
        return -(-file.tell() // SECTOR)

    def _sector(self, file, offset: int) -> int:
        table, slot = divmod(offset // self.grain, self.TABLE)
        file.seek(self._directory + table * 4)
        where = struct.unpack("<I", file.read(4))[0]
        if not where:
            return 0
        file.seek(where * SECTOR + slot * 4)
        return int(struct.unpack("<I", file.read(4))[0])

    def _allocate(self, file, offset: int) -> int:
        table, slot = divmod(offset // self.grain, self.TABLE)
        file.seek(self._directory + table * 4)
        where = struct.unpack("<I", file.read(4))[0]
        if not where:
            where = self._end(file)
            file.seek(where * SECTOR)
            file.write(bytes(self.TABLE * 4))
            file.seek(self._directory + table * 4)
            file.write(struct.pack("<I", where))
        sector = self._end(file)
        file.seek(where * SECTOR + slot * 4)
        file.write(struct.pack("<I", sector))
        file.seek(28)
        file.write(struct.pack("<I", sector + self.grain // SECTOR))
        return sector


def descriptor(
    kind: str, sectors: int, extent: str, *, parent: tuple[str, str] = ("ffffffff", ""), thin: bool = False, **ddb: str
) -> str:
    """The text of a .vmdk (facts 5.1). `parent` is the parent's CID and name."""
    keyword = {"vmfs": "VMFS", "seSparse": "SESPARSE", "vmfsSparse": "VMFSSPARSE"}.get(kind, "VMFSRDM")
    cid = os.urandom(4).hex() if kind != "vmfs" else "fffffffe"
    hint = f'parentFileNameHint="{parent[1]}"\n' if parent[1] else ""
    facts = {"adapterType": "lsilogic", **({"thinProvisioned": "1"} if thin else {}), "virtualHWVersion": "14", **ddb}
    lines = "".join(f'ddb.{key} = "{value}"\n' for key, value in facts.items())
    return (
        f'# Disk DescriptorFile\nversion=1\nencoding="UTF-8"\nCID={cid}\nparentCID={parent[0]}\n'
        f'createType="{kind}"\n{hint}\n# Extent description\nRW {sectors} {keyword} "{extent}"\n\n'
        f"# The Disk Data Base \n#DDB\n\n{lines}"
    )


def field(text: str, key: str) -> str:
    found = re.search(rf'^{re.escape(key)}\s*=\s*"?([^"\n]*)"?', text, re.MULTILINE)
    return found[1] if found else ""


def extent(path: Path) -> Path:
    """The extent's file that a descriptor names."""
    found = re.search(r'^RW \d+ \w+ "([^"]+)"', path.read_text(), re.MULTILINE)
    assert found, f"{path} names no extent"
    return path.parent / found[1]


def sectors(path: Path) -> int:
    found = re.search(r"^RW (\d+) ", path.read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def layer(path: Path) -> Flat | SeSparse | VmfsSparse:
    kind = field(path.read_text(), "createType")
    return {"seSparse": SeSparse, "vmfsSparse": VmfsSparse}.get(kind, Flat)(extent(path))


def chain(path: Path) -> list[Path]:
    """The descriptors from this one down to the base."""
    found = [path]
    while hint := field(found[-1].read_text(), "parentFileNameHint"):
        found.append(found[-1].parent / hint)
    return found


def read(layers: Sequence[Flat | SeSparse | VmfsSparse], offset: int, length: int) -> bytes:
    """What a chain (top first) shows. `offset` and `length` are multiples of 4096."""
    top, below = layers[0], layers[1:]
    parts = []
    for at, size, data in top.read(offset, length):
        parts.append(data if data is not None else _below(below, at, size))
    return b"".join(parts)


def _below(layers: Sequence[Flat | SeSparse | VmfsSparse], offset: int, length: int) -> bytes:
    start = offset // GRAIN * GRAIN
    size = -(-(offset + length - start) // GRAIN) * GRAIN
    whole = read(layers, start, size)
    return whole[offset - start : offset - start + length]


def write(path: Path, offset: int, data: bytes) -> None:
    """What a guest does to the disk whose newest layer is `path`; whole sectors."""
    layers = [layer(each) for each in chain(path)]
    start = offset // GRAIN * GRAIN
    if getattr(layers[0], "grain", SECTOR) > SECTOR:
        end = -(-(offset + len(data)) // GRAIN) * GRAIN
        whole = bytearray(read(layers, start, end - start))
        whole[offset - start : offset - start + len(data)] = data
        layers[0].write(start, bytes(whole))
    else:
        layers[0].write(offset, data)
