"""Images of machines that are off: attested only while what was seen of them still holds."""

from pathlib import Path

import pytest

from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.appliance.source.image_stamp import image_stamp, stamps_of_images, untold, why_not_in_order
from drctl.model.group import GroupSpec
from drctl.model.machine import Disk, Machine, MachineState


def machine(name: str, image: Path, state: MachineState = MachineState.SHUT_OFF) -> Machine:
    disk = Disk(target="vda", source=str(image), format="raw", size=4096, bus="virtio", refusal="")
    return Machine(name, "u", state, (disk,), 1, 1, persistent=True, autostart=False)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "web.raw"
    path.write_bytes(bytes(4096))
    return path


def group(*disks: DiskState, moved: tuple[str, ...] = ()) -> GroupState:
    return GroupState(GroupSpec("g", "a", "b", ("web",)), disks=disks, moved=moved)


def test_an_image_whose_machine_ended_unseen_has_to_be_read(image: Path) -> None:
    unseen = DiskState(1, "web", "vda", 4096, pass_needed=False)
    assert untold(group(unseen), [machine("web", image)]) == [1]
    assert why_not_in_order(machine("web", image), [unseen])


def test_an_image_that_was_left_in_order_need_not_be_read(image: Path) -> None:
    left = DiskState(1, "web", "vda", 4096, pass_needed=False, left=image_stamp(str(image)))
    assert stamps_of_images(group(left), [machine("web", image)]) == {1: left.left}
    assert untold(group(left), [machine("web", image)]) == []
    assert why_not_in_order(machine("web", image), [left]) == ""


def test_an_image_that_changed_while_its_machine_was_off_has_to_be_read(image: Path) -> None:
    left = DiskState(1, "web", "vda", 4096, pass_needed=False, left=image_stamp(str(image)))
    image.write_bytes(bytes(8192))
    assert untold(group(left), [machine("web", image)]) == [1]


def test_a_running_and_a_moved_machine_are_not_read_here(image: Path) -> None:
    disk = DiskState(1, "web", "vda", 4096, pass_needed=False)
    assert untold(group(disk), [machine("web", image, MachineState.RUNNING)]) == []
    assert untold(group(disk, moved=("web",)), [machine("web", image)]) == []
