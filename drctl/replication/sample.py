"""A sample of disks, hashed: two sites that know each other's samples know about how much differs. Sends nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from drctl.errors import HypervisorRefused
from drctl.replication.disk_connection import DiskConnection, Export, connected
from drctl.wire.signature import SIGNED, blocks_of

#: Of a block's hash so much is told: enough to count what differs, worth nothing as a proof that it is equal.
DIGEST = 8
#: Blocks of all disks together that are read at most: 4 GiB.
BLOCKS = 65536
#: Reads in flight.
AHEAD = 16


@dataclass(frozen=True, slots=True)
class Sampled:
    """A disk to take a sample of: every `stride`-th block of it. `size` in bytes."""

    name: str
    size: int
    export: Export


def stride_of(sizes: Mapping[str, int]) -> int:
    """Every how many blocks are read so that the group's sample stays small."""
    return max(1, -(-sum(blocks_of(size) for size in sizes.values()) // BLOCKS))


async def sample(
    disks: list[Sampled], key: bytes, stride: int, tell: Callable[[int], None] = lambda _: None
) -> dict[str, bytes]:
    """{disk: hashes of its blocks 0, stride, 2 * stride…}. `tell` hears how many bytes were read."""
    found: dict[str, bytes] = {}
    done = 0
    for disk in disks:
        hashes: list[bytes] = []
        async with connected(disk.export) as (connection, tasks):
            if connection.ready.size < disk.size:
                raise HypervisorRefused(f"{disk.name} has {connection.ready.size} bytes, expected {disk.size}")
            waiting: deque[asyncio.Task[bytes]] = deque()
            for block in range(0, blocks_of(disk.size), stride):
                if len(waiting) >= AHEAD:
                    hashes.append(await waiting.popleft())
                    done += SIGNED
                    tell(done)
                waiting.append(tasks.create_task(_hash(connection, disk, key, block)))
            hashes += [await each for each in waiting]
        found[disk.name] = b"".join(hashes)
    return found


async def _hash(connection: DiskConnection, disk: Sampled, key: bytes, block: int) -> bytes:
    offset = block * SIGNED
    data = await connection.read(offset, min(SIGNED, disk.size - offset))
    return blake3(data, key=key).digest(DIGEST)


def differing(one: bytes, other: bytes) -> int:
    """How many of two samples' blocks differ; what one of them lacks does."""
    pairs = max(len(one), len(other)) // DIGEST
    return sum(one[at * DIGEST : (at + 1) * DIGEST] != other[at * DIGEST : (at + 1) * DIGEST] for at in range(pairs))
