"""A memory model of lab guests: makes a legal history of writes and the disks at any point of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from drctl.lab.record import AREA_OFFSETS, VDA_SIZE, VDB_SIZE, Record, Superblock, Token, slot_of
from drctl.model.extent import BLOCK

LAB = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Write:
    guest: str
    chain: int
    number: int
    disk: int
    offset: int
    block: bytes
    #: What had completed before this write was issued: (guest, chain) to number.
    after: dict[tuple[str, int], int]


class MemoryDisk:
    """A sparse disk of 4 KiB blocks."""

    def __init__(self, size: int, blocks: dict[int, bytes] | None = None) -> None:
        self.size = size
        self.blocks = blocks or {}

    def read(self, offset: int, length: int) -> bytes:
        empty = bytes(BLOCK)
        return b"".join(self.blocks.get(at, empty) for at in range(offset, offset + length, BLOCK))

    def write(self, offset: int, block: bytes) -> None:
        self.blocks[offset] = block

    def flip(self, offset: int, bit: int = 0) -> None:
        """Turns one bit of a block."""
        block = bytearray(self.blocks[offset])
        block[bit // 8] ^= 1 << bit % 8
        self.blocks[offset] = bytes(block)


@dataclass
class World:
    """Guests and the writes that they completed, in order. Chain 0 passes tokens around as the relay does."""

    guests: tuple[str, ...] = ("web-1", "web-2")
    chains: int = 2
    slots: int = 256
    writes: list[Write] = field(default_factory=list)

    def superblock(self, guest: str) -> Superblock:
        return Superblock(lab=LAB, guest=guest, chains=self.chains, slots=self.slots, tokens=len(self.guests) > 1)

    def run(self, count: int, seed: int = 0) -> World:
        """Lets the guests complete `count` writes; every choice is the seed's."""
        choose = random.Random(seed)
        newest: dict[tuple[str, int], Record] = {}
        tokens: dict[str, Token] = {}
        for _ in range(count):
            guest, chain = choose.choice(self.guests), choose.randrange(self.chains)
            record = self._next(guest, chain, newest, tokens.get(guest))
            block = record.pack()
            newest[guest, chain] = Record(**{**_fields(record), "digest": block[-16:]})
            if chain == 0 and choose.random() < 0.7:
                following = self.guests[(self.guests.index(guest) + 1) % len(self.guests)]
                if following != guest:
                    tokens[following] = Token(guest, 0, record.number, block[-16:])
        return self

    def _next(self, guest: str, chain: int, newest: dict[tuple[str, int], Record], token: Token | None) -> Record:
        before = newest.get((guest, chain))
        number = before.number + 1 if before else 1
        seen = tuple(newest[guest, c].number if (guest, c) in newest else 0 for c in range(self.chains))
        record = Record(
            lab=LAB,
            guest=guest,
            chain=chain,
            number=number,
            seen=seen,
            previous=before.digest if before else bytes(16),
            token=token,
        )
        after = {(guest, c): seen[c] for c in range(self.chains)}
        if token:
            after[token.guest, token.chain] = token.number
        disk, offset = slot_of(self.superblock(guest), chain, number)
        self.writes.append(Write(guest, chain, number, disk, offset, record.pack(), after))
        return record

    def disks(self, writes: list[Write] | None = None) -> dict[str, list[MemoryDisk]]:
        """The guests' disks after these writes (default: all)."""
        pairs = {}
        for guest in self.guests:
            superblock = self.superblock(guest)
            pair = [MemoryDisk(VDA_SIZE), MemoryDisk(VDB_SIZE)]
            for index in (0, 1):
                pair[index].write(AREA_OFFSETS[index], superblock.on(index).pack())
            pairs[guest] = pair
        for write in self.writes if writes is None else writes:
            pairs[write.guest][write.disk].write(write.offset, write.block)
        return pairs


def _fields(record: Record) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__slots__}
