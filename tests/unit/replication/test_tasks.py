"""Groups of tasks: a failure is told once, and leaves the owner able to go on."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import drctl
from drctl.replication.tasks import TaskGroup


async def fails(seconds=0.0):
    await asyncio.sleep(seconds)
    raise ValueError("the link broke")


@pytest.mark.parametrize("body", ["waits for the end", "works on"])
def test_a_timeout_after_a_failure_is_a_timeout(body):
    others = []

    async def group():
        async with TaskGroup() as tasks:
            tasks.create_task(fails(0.01))
            others.append(tasks.create_task(asyncio.sleep(60)))
            if body == "works on":
                await asyncio.sleep(60)

    async def owner():
        with pytest.raises(BaseExceptionGroup) as told:
            await group()
        assert [str(each) for each in told.value.exceptions] == ["the link broke"]
        assert others[0].cancelled()
        assert asyncio.current_task().cancelling() == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        return "goes on"

    async def main():
        task = asyncio.create_task(owner())
        await asyncio.wait([task])
        assert not task.cancelled(), "its end was told to nobody"
        return task.result()

    assert asyncio.run(main()) == "goes on"


def test_all_are_waited_for_also_what_they_begin():
    done = []

    async def child(tasks, depth):
        await asyncio.sleep(0)
        if depth:
            tasks.create_task(child(tasks, depth - 1))
        done.append(depth)

    async def main():
        async with TaskGroup() as tasks:
            tasks.create_task(child(tasks, 3))

    asyncio.run(main())
    assert done == [3, 2, 1, 0]


def test_a_cancellation_from_outside_passes():
    children = []

    async def owner():
        async with TaskGroup() as tasks:
            children.append(tasks.create_task(asyncio.sleep(60)))

    async def main():
        task = asyncio.create_task(owner())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert children[0].cancelled()

    asyncio.run(main())


def test_the_block_s_own_error_passes():
    async def main():
        async with TaskGroup() as tasks:
            tasks.create_task(asyncio.sleep(60))
            raise KeyError("mine")

    with pytest.raises(BaseExceptionGroup) as told:
        asyncio.run(main())
    assert [type(each) for each in told.value.exceptions] == [KeyError]


def test_the_stream_s_processes_have_no_other_groups():
    room = Path(drctl.__file__).parent / "replication"
    found = [path.name for path in room.rglob("*.py") if re.search(r"asyncio\.TaskGroup\(\)", path.read_text())]
    assert not found, "use drctl.replication.tasks.TaskGroup"
