"""Signatures: what two sides compare to find where their disks differ. Pure: bytes in, bytes out.

A disk is looked at in blocks of 64 KiB, the last one may be shorter. Each has a signature: BLAKE3 with a key of the
group, cut to 16 bytes; the key keeps a guest from making two blocks that look alike. Where two signatures differ, the
source sends digests of the block's 4 KiB parts, 12 bytes each, and the receiver answers with a mask: bit n is set when
part n differs. Layouts of the messages (the bodies of wire/link.py's, also in docs/formats.md), little-endian:

    SIGNATURES  4  id
                n  zstd of 16 bytes for each block

    DIGESTS     4  id
                2  disk number
                4  count of blocks
                n  4 bytes each: number of the block
                n  192 bytes each: digests of its parts; zeroes for parts beyond the disk's end

    MASKS       4  id
                n  2 bytes for each block
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from drctl.errors import ProtocolViolation
from drctl.model.extent import BLOCK, KiB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Bytes of a disk that have one signature.
SIGNED = 64 * KiB
SIGNATURE_SIZE = 16
#: Parts of a block, and the size of the digest of one. With a secret key 96 bits are beyond chance: 2**-58 for a
#: petabyte of parts that are compared.
PARTS = SIGNED // BLOCK
DIGEST_SIZE = 12
DIGESTS_SIZE = PARTS * DIGEST_SIZE
KEY_SIZE = 32
#: Blocks that may be asked about in one message: 256 MiB of a disk, 64 KiB of signatures.
MAX_ASKED = 4096
MAX_DIGESTS = 1024

_ID = struct.Struct("<I")
_DIGESTS = struct.Struct("<IHI")

Buffer = bytes | bytearray | memoryview
Masks = npt.NDArray[np.uint16]


class Compare(msgspec.Struct, frozen=True):
    """The source asks for the signatures of `count` blocks of a disk, from number `first` on, as they are after the
    SYNC_BEGIN of the pass `sync`, which the receiver has acknowledged. `fresh`: made of the data now, whatever a map
    says of them; a pass whose id was never begun looks at the end of the log then."""

    id: int
    sync: str
    disk: int
    first: int
    count: int
    fresh: bool = False


class Signatures(msgspec.Struct, frozen=True):
    """The receiver's answer: SIGNATURE_SIZE bytes for each block."""

    id: int
    data: bytes


class Digests(msgspec.Struct, frozen=True):
    """Blocks that differ, and the digests of their parts at the source: DIGESTS_SIZE bytes for each block."""

    id: int
    disk: int
    blocks: tuple[int, ...]
    data: bytes


class PartMasks(msgspec.Struct, frozen=True):
    """The receiver's answer: which parts of each block differ there."""

    id: int
    masks: tuple[int, ...]


def blocks_of(size: int) -> int:
    """How many signatures a disk of `size` bytes has."""
    return -(-size // SIGNED)


def signatures(key: bytes, data: Buffer) -> bytes:
    """The signatures of the blocks of `data`, which begins at a block's border."""
    whole = memoryview(data)
    return b"".join(
        blake3(whole[at : at + SIGNED], key=key).digest(SIGNATURE_SIZE) for at in range(0, len(whole), SIGNED)
    )


@lru_cache(64)
def zero_signature(key: bytes, length: int = SIGNED) -> bytes:
    """The signature of a block of zeroes."""
    return blake3(bytes(length), key=key).digest(SIGNATURE_SIZE)


def signatures_of_zeroes(key: bytes, length: int) -> bytes:
    """The signatures of `length` bytes of zeroes that begin at a block's border."""
    whole, rest = divmod(length, SIGNED)
    made = zero_signature(key) * whole if whole else b""
    return made + (zero_signature(key, rest) if rest else b"")


def digests(key: bytes, block: Buffer) -> bytes:
    """DIGESTS_SIZE bytes: a digest of each 4 KiB part of one block."""
    whole = memoryview(block)
    found = b"".join(blake3(whole[at : at + BLOCK], key=key).digest(DIGEST_SIZE) for at in range(0, len(whole), BLOCK))
    return found.ljust(DIGESTS_SIZE, b"\0")


def differing(ours: Buffer, theirs: Buffer) -> list[int]:
    """The numbers of the blocks whose signatures differ. Raises ValueError when they are not equally many."""
    left, right = (np.frombuffer(each, np.uint64).reshape(-1, 2) for each in (ours, theirs))
    if len(left) != len(right):
        raise ValueError(f"{len(left)} signatures against {len(right)}")
    found: list[int] = np.flatnonzero((left != right).any(axis=1)).tolist()
    return found


@lru_cache(8192)
def runs_of(mask: int) -> tuple[tuple[int, int], ...]:
    """The runs of set bits in a mask, as (first, one past the last)."""
    bits = [bool(mask >> part & 1) for part in range(PARTS)] + [False]
    runs: list[tuple[int, int]] = []
    start = -1
    for part, differs in enumerate(bits):
        if differs and start < 0:
            start = part
        elif not differs and start >= 0:
            runs.append((start, part))
            start = -1
    return tuple(runs)


# Bodies of messages


def pack_signatures(message: Signatures) -> bytes:
    return _ID.pack(message.id) + zstd.compress(message.data, 1)


def unpack_signatures(body: memoryview) -> Signatures:
    """Raises ProtocolViolation."""
    try:
        number = _ID.unpack_from(body)[0]
        unpacker = zstd.ZstdDecompressor()
        data = unpacker.decompress(body[_ID.size :], MAX_ASKED * SIGNATURE_SIZE + 1)
    except (struct.error, zstd.ZstdError) as exc:
        raise ProtocolViolation(f"SIGNATURES that can't be understood: {exc}") from exc
    if len(data) % SIGNATURE_SIZE or len(data) > MAX_ASKED * SIGNATURE_SIZE or not unpacker.eof:
        raise ProtocolViolation(f"SIGNATURES of {len(data)} bytes or more")
    return Signatures(number, data)


def pack_digests(message: Digests) -> bytes:
    count = len(message.blocks)
    return _DIGESTS.pack(message.id, message.disk, count) + struct.pack(f"<{count}I", *message.blocks) + message.data


def unpack_digests(body: memoryview) -> Digests:
    """Raises ProtocolViolation."""
    if len(body) < _DIGESTS.size:
        raise ProtocolViolation("DIGESTS that can't be understood")
    number, disk, count = _DIGESTS.unpack_from(body)
    if not 1 <= count <= MAX_DIGESTS or len(body) != _DIGESTS.size + count * (4 + DIGESTS_SIZE):
        raise ProtocolViolation(f"DIGESTS of {count} blocks in {len(body)} bytes")
    blocks = struct.unpack_from(f"<{count}I", body, _DIGESTS.size)
    return Digests(number, disk, blocks, bytes(body[_DIGESTS.size + 4 * count :]))


def pack_masks(message: PartMasks) -> bytes:
    return _ID.pack(message.id) + struct.pack(f"<{len(message.masks)}H", *message.masks)


def unpack_masks(body: memoryview) -> PartMasks:
    """Raises ProtocolViolation."""
    if len(body) < _ID.size or len(body) % 2:
        raise ProtocolViolation("MASKS that can't be understood")
    number, *masks = struct.unpack(f"<I{(len(body) - _ID.size) // 2}H", body)
    return PartMasks(number, tuple(masks))


def check_asked(message: Compare | Digests, sizes: dict[int, int]) -> None:
    """Raises ProtocolViolation for blocks that no disk has. `sizes`: of the disks, in bytes."""
    count = blocks_of(sizes.get(message.disk, 0))
    if isinstance(message, Compare):
        outside = not 0 <= message.first < message.first + message.count <= count or message.count > MAX_ASKED
    else:
        outside = any(block >= count for block in message.blocks)
    if outside:
        raise ProtocolViolation(f"signatures of blocks that disk {message.disk} does not have")


def parts_that_differ(key: bytes, asked: Digests, contents: Sequence[Buffer]) -> PartMasks:
    """The answer to DIGESTS. `contents`: the blocks as they are here."""
    ours = np.frombuffer(b"".join(digests(key, block) for block in contents), np.uint32)
    differs = (ours != np.frombuffer(asked.data, np.uint32)).reshape(-1, PARTS, DIGEST_SIZE // 4).any(axis=2)
    masks: list[int] = np.packbits(differs, axis=1, bitorder="little").view("<u2").reshape(-1).tolist()
    return PartMasks(asked.id, tuple(masks))
