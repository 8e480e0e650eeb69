"""A sample is the same for the same blocks, small for large disks, and tells how much differs."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from drctl.errors import HypervisorRefused
from drctl.replication import sample as module
from drctl.replication.sample import BLOCKS, DIGEST, Sampled, differing, sample, stride_of

BLOCK = 65536
KEY = bytes(range(32))


@pytest.fixture
def take(monkeypatch):
    disks = {}

    @asynccontextmanager
    async def connected(name):
        async def read(offset, length):
            return bytearray(disks[name][offset : offset + length])

        try:
            async with asyncio.TaskGroup() as tasks:
                yield SimpleNamespace(ready=SimpleNamespace(size=len(disks[name])), read=read), tasks
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    monkeypatch.setattr(module, "connected", connected)

    def one(data, stride=1, size=0):
        disks["a"] = data
        return asyncio.run(sample([Sampled("a", size or len(data), "a")], KEY, stride))["a"]

    return one


def test_what_differs_is_counted(take):
    data = bytearray(random.Random(1).randbytes(40 * BLOCK + 512))
    before = take(bytes(data))
    assert len(before) == 41 * DIGEST
    data[3 * BLOCK + 7] ^= 1
    data[-1] ^= 1
    assert differing(before, take(bytes(data))) == 2
    assert differing(before, before) == 0
    assert differing(before, b"") == 41


def test_every_so_many_blocks(take):
    data = random.Random(2).randbytes(10 * BLOCK)
    whole = take(data)
    assert take(data, stride=4) == b"".join(whole[at * DIGEST : (at + 1) * DIGEST] for at in (0, 4, 8))


def test_a_disk_that_is_too_small_is_refused(take):
    with pytest.raises(HypervisorRefused):
        take(bytes(BLOCK), size=2 * BLOCK)


@pytest.mark.parametrize("size", [1, BLOCK, 2**32, 2**45])
def test_a_sample_is_small(size):
    stride = stride_of({"a": size, "b": BLOCK})
    assert (size // BLOCK) // stride <= BLOCKS
    assert stride == 1 or size >= BLOCKS * BLOCK
