"""A machine left in order only when everything says so; any doubt costs a pass."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from drctl.appliance.source.departure import Clocks, stamp_at_end
from drctl.appliance.source.image_stamp import image_stamp
from drctl.model.machine import Disk

#: The wall clock is so far ahead of the monotonic one.
OFFSET = 1_700_000_000 * 10**9
SECOND = 10**9


@dataclass
class Ring:
    """What the tap wrote; `heard` is when (monotonic ns) it hears of the end."""

    clock: list[int]
    losses: int = 0
    goodbye: int = 0
    record: int = 0
    heard: int = 0
    looks: list[int] = field(default_factory=list)

    def lossless(self) -> bool:
        return self.losses == 0

    def connection(self, number: int) -> int:
        return 0 if self.clock[0] >= self.heard else 7

    def ended(self, number: int) -> int:
        return self.goodbye if self.clock[0] >= self.heard else 0

    def written(self, number: int) -> int:
        return self.record


class World:
    """An image that was written last at 100 s, a QEMU that said goodbye at 101 s, and a look at 102 s."""

    def __init__(self, path: Path) -> None:
        self.now = [102 * SECOND]
        self.image = path
        path.write_bytes(bytes(4096))
        self.modified(100.0)
        self.ring = Ring(self.now, goodbye=101 * SECOND, record=100 * SECOND)

    def modified(self, monotonic: float) -> None:
        moment = OFFSET + int(monotonic * SECOND)
        os.utime(self.image, ns=(moment, moment))

    def stamp(self, *, image_format: str = "raw", mirrored: bool = True) -> object:
        def sleep(seconds: float) -> None:
            self.now[0] += int(seconds * SECOND)

        clocks = Clocks(lambda: OFFSET + self.now[0], lambda: self.now[0], sleep)
        facts = Disk("vda", str(self.image), image_format, 4096)
        return stamp_at_end(3, facts, self.ring, mirrored=mirrored, clocks=clocks)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "web.raw")


def test_a_machine_that_left_in_order(world: World) -> None:
    assert world.stamp() == image_stamp(str(world.image))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_loss_since_order_was_proven(world: World, image_format: str) -> None:
    world.ring.losses = 1
    assert world.stamp(image_format=image_format) is None


def test_no_goodbye(world: World) -> None:
    """A killed QEMU, or a tap that was restarted since."""
    world.ring.goodbye = 0
    assert world.stamp() is None
    assert world.now[0] < 103 * SECOND, "it does not wait for long"


def test_the_tap_hears_of_the_end_a_little_later(world: World) -> None:
    world.ring.heard = 102 * SECOND + SECOND // 4
    assert world.stamp() is not None


def test_a_write_that_no_record_tells_of(world: World) -> None:
    """Somebody cancelled the mirror, or wrote to the image after QEMU let go of it."""
    world.modified(100.5)
    assert world.stamp() is None
    assert world.stamp(mirrored=False) is None


@pytest.mark.parametrize(
    ("modified", "mirrored", "left"), [(101.1, True, True), (101.1, False, False), (101.5, True, False)]
)
def test_a_qcow2_is_written_by_qemu_itself_at_its_end(
    world: World, modified: float, mirrored: bool, left: bool
) -> None:
    """So the newest record does not bound it, and only a look that saw the mirrors says that none was cancelled."""
    world.modified(modified)
    assert (world.stamp(image_format="qcow2", mirrored=mirrored) is not None) is left


def test_a_raw_image_never_written_in_this_epoch(world: World) -> None:
    world.ring.record = 0
    world.modified(3.0)
    assert world.stamp() is not None
    assert world.stamp(mirrored=False) is None, "no record that would bound it"


def test_a_stamp_younger_than_a_tick_is_taken_again(world: World) -> None:
    """Else a change within the same tick would not show."""
    world.ring.record = world.ring.goodbye = 102 * SECOND - 1
    world.modified(102 - 1e-9)
    before = world.now[0]
    assert world.stamp() is not None
    assert world.now[0] > before + SECOND // 100


def test_an_image_that_is_gone(world: World) -> None:
    world.image.unlink()
    assert world.stamp() is None
