"""What the witness writes on the lab guests' disks: geometry, superblock, record. Knows no files and no guests.

Both disks of a guest hold a witness area: vda behind its boot, payload and ext4 parts, vdb from 1 MiB on. An area
begins with a superblock; at `slots_offset` follow `chains` rings of `slots` records each. Record n of chain c lies on
disk n % 2 (0: vda, 1: vdb) in slot n // 2 % slots of that chain's ring. Records count from 1. Little-endian.

    offset size  superblock (4096 bytes)          offset size  record (4096 bytes)
         0    8  magic "DRWITSUP"                      0    8  magic "DRWITREC"
         8    4  version, 1                            8   16  lab, a UUID
        12    4  disk, 0 or 1                         24   16  guest's name, NUL padded
        16    4  chains, 1..8                         40    4  chain
        20    4  slots, per chain and disk            44    4  boot: random number of the guest's boot
        24   16  lab, a UUID                          48    8  number
        40   16  guest's name, NUL padded             56    8  guest's wall clock, ns
        56    8  slots_offset on the disk             64   64  seen: per chain, newest completed record
        64    8  payload_offset                      128   16  token: guest's name; NUL: no token
        72    8  payload_length                      144    4  token: chain
        80    8  payload_sum                         148    4  zero
        88    4  rate, records/s and chain; 0: max   152    8  token: number
        92    4  sync_every: fdatasync after each    160   16  token: that record's digest
                 n-th record; 0: never               176   16  digest of the record before; 1: zero
        96    4  tokens: 1: chain 0 waits for them   192 3888  body
       100    4  zero                               4080   16  digest
      4080   16  digest

A digest is the first 16 bytes of SHA-256 of the 4080 bytes before it. A payload's sum is that of its 64-bit words, each
times 2 * index + 1, modulo 2^64.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace

import numpy as np

from drctl.errors import IntegrityError
from drctl.model.extent import BLOCK, MiB

MAX_CHAINS = 8
DIGEST_SIZE = 16
NAME_SIZE = 16
VERSION = 1

#: Sizes of a guest's two disks, and the places of what vda holds.
VDA_SIZE = 256 * MiB
VDB_SIZE = 128 * MiB
BOOT_OFFSET, BOOT_SIZE = 1 * MiB, 47 * MiB
PAYLOAD_OFFSET, PAYLOAD_SIZE = 48 * MiB, 64 * MiB
DATA_OFFSET, DATA_SIZE = 112 * MiB, 64 * MiB
#: Where the witness areas begin, and how long they are, on vda and vdb.
AREA_OFFSETS = (176 * MiB, 1 * MiB)
AREA_SIZES = (80 * MiB, 127 * MiB)
#: From an area's begin to its first slot.
SLOTS_DISTANCE = 1 * MiB

_SUPERBLOCK = struct.Struct("<8sIIII16s16sQQQQIIII")
_RECORD = struct.Struct("<8s16s16sIIQQ8Q16sIIQ16s16s")
_SUPERBLOCK_MAGIC = b"DRWITSUP"
_RECORD_MAGIC = b"DRWITREC"


@dataclass(frozen=True, slots=True)
class Superblock:
    """The geometry of one guest's witness, as each of its disks tells it. `lab` is 32 hex digits."""

    lab: str
    guest: str
    disk: int = 0
    chains: int = 4
    slots: int = 2048
    slots_offset: int = AREA_OFFSETS[0] + SLOTS_DISTANCE
    payload_offset: int = PAYLOAD_OFFSET
    payload_length: int = PAYLOAD_SIZE
    payload_sum: int = 0
    rate: int = 50
    sync_every: int = 0
    tokens: bool = False

    def __post_init__(self) -> None:
        room = (AREA_SIZES[self.disk] - SLOTS_DISTANCE) // BLOCK
        if not 1 <= self.chains <= MAX_CHAINS or not 256 <= self.slots * self.chains <= room or self.slots % 256:
            raise ValueError(
                f"{self.chains} chains of {self.slots} slots: chains must be 1..{MAX_CHAINS}, slots a multiple of 256, "
                f"and at most {room} slots in all"
            )
        if not 0 < len(self.guest.encode()) < NAME_SIZE:
            raise ValueError(f"a lab guest's name has 1..{NAME_SIZE - 1} bytes, not {self.guest!r}")

    def on(self, disk: int) -> Superblock:
        """The same superblock as it stands on the other disk."""
        return replace(self, disk=disk, slots_offset=AREA_OFFSETS[disk] + SLOTS_DISTANCE)

    def pack(self) -> bytes:
        head = _SUPERBLOCK.pack(
            _SUPERBLOCK_MAGIC,
            VERSION,
            self.disk,
            self.chains,
            self.slots,
            bytes.fromhex(self.lab),
            self.guest.encode(),
            self.slots_offset,
            self.payload_offset,
            self.payload_length,
            self.payload_sum,
            self.rate,
            self.sync_every,
            int(self.tokens),
            0,
        )
        return _sealed(head)


@dataclass(frozen=True, slots=True)
class Token:
    """A record of another guest, acknowledged to the host before the record that carries this was written."""

    guest: str
    chain: int
    number: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One record. Invariant: number >= 1; the digests are DIGEST_SIZE bytes."""

    lab: str
    guest: str
    chain: int
    number: int
    seen: tuple[int, ...]
    previous: bytes = bytes(DIGEST_SIZE)
    token: Token | None = None
    boot: int = 0
    wall_ns: int = 0
    digest: bytes = b""

    def pack(self) -> bytes:
        """The record as the witness writes it (with an empty body); its digest is made anew."""
        token = self.token or Token("", 0, 0, bytes(DIGEST_SIZE))
        head = _RECORD.pack(
            _RECORD_MAGIC,
            bytes.fromhex(self.lab),
            self.guest.encode(),
            self.chain,
            self.boot,
            self.number,
            self.wall_ns,
            *(self.seen + (0,) * MAX_CHAINS)[:MAX_CHAINS],
            token.guest.encode(),
            token.chain,
            0,
            token.number,
            token.digest,
            self.previous,
        )
        return _sealed(head)


def digest(block: bytes | memoryview) -> bytes:
    """The digest that belongs at the end of a block."""
    return hashlib.sha256(memoryview(block)[: BLOCK - DIGEST_SIZE]).digest()[:DIGEST_SIZE]


def payload_sum(data: bytes | memoryview) -> int:
    """The sum that a superblock holds of its payload."""
    words = np.frombuffer(data, "<u8")
    weights = np.arange(len(words), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return int((words * weights).sum(dtype=np.uint64))


def _sealed(head: bytes) -> bytes:
    block = head.ljust(BLOCK - DIGEST_SIZE, b"\0")
    return block + digest(block + bytes(DIGEST_SIZE))


def _name(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")


def unpack_superblock(block: bytes | memoryview, place: str) -> Superblock:
    """The superblock in `block`. Raises IntegrityError that names `place`."""
    if len(block) != BLOCK or bytes(block[:8]) != _SUPERBLOCK_MAGIC or digest(block) != bytes(block[-DIGEST_SIZE:]):
        raise IntegrityError(f"{place}: no witness superblock there")
    fields = _SUPERBLOCK.unpack_from(block)
    if fields[1] != VERSION:
        raise IntegrityError(f"{place}: witness superblock of version {fields[1]}, known: {VERSION}")
    try:
        return Superblock(
            lab=fields[5].hex(),
            guest=_name(fields[6]),
            disk=fields[2],
            chains=fields[3],
            slots=fields[4],
            slots_offset=fields[7],
            payload_offset=fields[8],
            payload_length=fields[9],
            payload_sum=fields[10],
            rate=fields[11],
            sync_every=fields[12],
            tokens=bool(fields[13]),
        )
    except (ValueError, IndexError) as exc:
        raise IntegrityError(f"{place}: witness superblock makes no sense: {exc}") from exc


def unpack_record(block: bytes | memoryview) -> Record | None:
    """The record in `block`, or None when there is none: another magic, or the digest does not match."""
    if len(block) != BLOCK or bytes(block[:8]) != _RECORD_MAGIC or digest(block) != bytes(block[-DIGEST_SIZE:]):
        return None
    fields = _RECORD.unpack_from(block)
    token_guest = _name(fields[15])
    token = Token(token_guest, fields[16], fields[18], fields[19]) if token_guest else None
    return Record(
        lab=fields[1].hex(),
        guest=_name(fields[2]),
        chain=fields[3],
        number=fields[5],
        seen=fields[7:15],
        previous=fields[20],
        token=token,
        boot=fields[4],
        wall_ns=fields[6],
        digest=bytes(block[-DIGEST_SIZE:]),
    )


def slot_of(superblock: Superblock, chain: int, number: int) -> tuple[int, int]:
    """Where record `number` of `chain` lies, as (disk, offset)."""
    disk = number % 2
    slot = chain * superblock.slots + number // 2 % superblock.slots
    return disk, AREA_OFFSETS[disk] + SLOTS_DISTANCE + slot * BLOCK
