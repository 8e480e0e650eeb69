"""Bitmaps of a paused group: begun before the checkpoint, trusted only while nothing was missed, else all is compared."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from drctl.appliance.source.change_tracking import ChangeTracking, with_tracked
from drctl.appliance.source.group_state import DiskState, GroupState
from drctl.appliance.source.passes import pass_wanted
from drctl.errors import ApplianceUnreachable, HypervisorRefused
from drctl.hypervisor.change_bitmap import PREFIX
from drctl.model.group import GroupSpec
from drctl.model.machine import Machine, MachineState
from drctl.model.phase import Phase

EPOCH = "e" * 32


class Qemus:
    """Monitors of machines: the bitmaps of their nodes. `log` has the commands in order."""

    def __init__(self) -> None:
        self.bitmaps: dict[str, dict[str, bool]] = {}
        self.log: list[str] = []
        self.refuse = ""

    def source_node(self, name: str, target: str) -> str:
        return f"{name}-{target}"

    def monitor(self, name: str, sent: dict[str, Any]) -> Any:
        verb, given = sent["execute"], sent.get("arguments", {})
        self.log.append(f"{name} {verb}")
        if verb == self.refuse:
            raise HypervisorRefused(f"{verb} is refused")
        if verb == "query-named-block-nodes":
            return [
                {"node-name": node, "dirty-bitmaps": [{"name": n, "recording": r} for n, r in found.items()]}
                for node, found in self.bitmaps.items()
            ]
        if verb == "transaction":
            for action in given["actions"]:
                self.bitmaps.setdefault(action["data"]["node"], {})[action["data"]["name"]] = True
        elif verb == "block-dirty-bitmap-disable":
            self.bitmaps[given["node"]][given["name"]] = False
        elif verb == "block-dirty-bitmap-remove":
            del self.bitmaps[given["node"]][given["name"]]
        return {}


class Group:
    """A live group's protection, as the tracking sees it."""

    def __init__(self) -> None:
        disks = tuple(
            DiskState(n, m, t, 1 << 30, pass_needed=False) for n, m, t in ((0, "db", "vda"), (1, "web", "vda"))
        )
        spec = GroupSpec("web", "alpha", "beta", ("db", "web"))
        self.state = GroupState(spec, phase=Phase.LIVE, epoch=EPOCH, disks=disks)
        self.machines = [Machine("db", "u1", MachineState.RUNNING, ()), Machine("web", "u2", MachineState.RUNNING, ())]

    def change(self, change) -> None:
        self.state = change(self.state)


@pytest.fixture
def paused() -> tuple[Group, Qemus, ChangeTracking]:
    group, qemus = Group(), Qemus()
    tracking = ChangeTracking(qemus)
    tracking.pause(group, lambda: 41)
    return group, qemus, tracking


def after_the_ring(group: Group) -> None:
    disks = tuple(disk.after_epoch() for disk in group.state.disks)
    group.state = msgspec.structs.replace(group.state, disks=disks, epoch="f" * 32)


def test_the_checkpoint_is_cut_when_all_bitmaps_record() -> None:
    group, qemus = Group(), Qemus()

    def mark() -> int:
        assert all(all(found.values()) and found for found in qemus.bitmaps.values())
        assert len(qemus.bitmaps) == 2
        return 41

    ChangeTracking(qemus).pause(group, mark)
    assert [(d.tracked, d.tracked_since) for d in group.state.disks] == [
        (f"{PREFIX}{EPOCH[:12]}-0", 41),
        (f"{PREFIX}{EPOCH[:12]}-1", 41),
    ]


def test_without_a_checkpoint_nothing_is_trusted_and_nothing_left() -> None:
    group, qemus = Group(), Qemus()

    def mark() -> int:
        raise ApplianceUnreachable("the link is down")

    ChangeTracking(qemus).pause(group, mark)
    assert [disk.tracked for disk in group.state.disks] == ["", ""]
    assert not any(qemus.bitmaps.values())


def test_a_qemu_that_refuses_costs_a_pass_and_no_more() -> None:
    group, qemus = Group(), Qemus()
    qemus.refuse = "transaction"
    ChangeTracking(qemus).pause(group, lambda: 41)
    assert [disk.tracked for disk in group.state.disks] == ["", ""]


def test_a_group_that_is_not_live_is_not_tracked() -> None:
    group, qemus = Group(), Qemus()
    group.state = msgspec.structs.replace(group.state, phase=Phase.SYNCING)
    ChangeTracking(qemus).pause(group, lambda: 41)
    assert qemus.log == []


def test_resume_reads_what_changed(paused) -> None:
    group, qemus, tracking = paused
    after_the_ring(group)
    assert all(disk.pass_needed for disk in group.state.disks)
    wanted = pass_wanted("full", 41, group.state, dropping=False)
    assert (wanted.numbers, wanted.changed, wanted.missed) == ((0, 1), (0, 1), [])
    names = {disk.number: disk.tracked for disk in group.state.disks}
    assert tracking.stop(group.state, group.machines, wanted.changed) == names
    assert not any(records for found in qemus.bitmaps.values() for records in found.values())
    assert tracking.stop(group.state, group.machines, wanted.changed) == names, "a pass that is begun again"


def test_a_receiver_that_lost_the_checkpoint_gets_all(paused) -> None:
    group, _, _ = paused
    after_the_ring(group)
    assert pass_wanted("full", 40, group.state, dropping=False).changed == ()
    assert pass_wanted("initial", 41, group.state, dropping=False).changed == ()


def test_a_guest_that_was_restarted_is_compared_as_a_whole(paused) -> None:
    group, qemus, tracking = paused
    after_the_ring(group)
    qemus.bitmaps["db-vda"].clear()
    assert tracking.recording(group.state, group.machines) == {1}
    assert set(tracking.stop(group.state, group.machines, (0, 1))) == {1}


def test_writes_before_the_mirror_is_back_are_no_loss_while_the_bitmap_records(paused) -> None:
    group, _, tracking = paused
    after_the_ring(group)
    recorded = tracking.recording(group.state, group.machines)
    group.change(lambda state: state.with_missed({0, 1} - recorded).with_recorded(recorded))
    assert pass_wanted("full", 41, group.state, dropping=False).changed == (0, 1)


def test_writes_that_are_missed_after_it_was_stopped_are_a_loss(paused) -> None:
    group, _, tracking = paused
    after_the_ring(group)
    tracking.stop(group.state, group.machines, (0, 1))
    recorded = tracking.recording(group.state, group.machines)
    assert recorded == set()
    group.change(lambda state: state.with_missed({0} - recorded).with_recorded(recorded))
    assert pass_wanted("full", 41, group.state, dropping=False).changed == (1,)


def test_after_the_pass_nothing_is_left_of_it(paused) -> None:
    group, qemus, tracking = paused
    after_the_ring(group)
    tracking.stop(group.state, group.machines, (0, 1))
    tracking.forget(group.state, group.machines)
    group.state = msgspec.structs.replace(group.state, disks=group.state.after_pass((0, 1)))
    assert not any(qemus.bitmaps.values())
    assert [(d.pass_needed, d.tracked, d.tracked_since, d.held) for d in group.state.disks] == [(False, "", 0, 0)] * 2
    # A ring that is lost now is one of a disk that was written since.
    after_the_ring(group)
    assert pass_wanted("full", 99, group.state, dropping=False).changed == ()
    assert pass_wanted("full", 99, group.state, dropping=False).equal == ()


def test_giving_up_removes_it(paused) -> None:
    group, qemus, tracking = paused
    tracking.give_up(group)
    assert not any(qemus.bitmaps.values())
    assert [disk.tracked for disk in group.state.disks] == ["", ""]


def test_a_disk_of_another_size_is_another_disk(paused) -> None:
    group, _, _ = paused
    assert with_tracked(group.state, {}).disk(0).missed().tracked == ""
