"""Which inodes of an ext4 file system are used. Reads superblock, group descriptors and bitmaps alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

from drctl.errors import UnsupportedFormat

_SUPERBLOCK = 1024
_MAGIC = 0xEF53
_64BIT = 0x80
_INODE_UNINIT = 0x1


def used_inodes(file: IO[bytes], offset: int = 0) -> list[int]:
    """The numbers of the inodes that are in use, in order; `offset` is where the file system begins in the file.

    Raises UnsupportedFormat."""
    head = _read(file, offset + _SUPERBLOCK, 1024)
    if struct.unpack_from("<H", head, 0x38)[0] != _MAGIC:
        raise UnsupportedFormat("no ext4 file system")
    inodes, block, per_group = (struct.unpack_from("<I", head, at)[0] for at in (0, 0x18, 0x28))
    size = 1024 << block
    wide = struct.unpack_from("<I", head, 0x60)[0] & _64BIT
    length = struct.unpack_from("<H", head, 0xFE)[0] if wide else 32
    groups = -(-inodes // per_group)
    table = _read(file, offset + size * (1 if size > _SUPERBLOCK else 2), groups * length)
    found: list[int] = []
    for group in range(groups):
        descriptor = table[group * length : (group + 1) * length]
        if struct.unpack_from("<H", descriptor, 0x12)[0] & _INODE_UNINIT:
            continue
        place = struct.unpack_from("<I", descriptor, 4)[0]
        if length >= 64:
            place |= struct.unpack_from("<I", descriptor, 0x24)[0] << 32
        bitmap = _read(file, offset + place * size, -(-per_group // 8))
        found += (group * per_group + bit + 1 for bit in _bits(bitmap, per_group))
    return found


def _bits(bitmap: bytes, count: int) -> Iterator[int]:
    return (bit for bit in range(count) if bitmap[bit // 8] >> bit % 8 & 1)


def _read(file: IO[bytes], at: int, length: int) -> bytes:
    file.seek(at)
    data = file.read(length)
    if len(data) != length:
        raise UnsupportedFormat("an ext4 file system that is cut")
    return data
