"""The pure core of the snapshot cycle: which act is due, and what is not believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drctl.hypervisor.esx import cycle
from drctl.hypervisor.esx.cycle import Abandon, Begin, Create, CycleState, Mark, Note, Remove, SeenMachine, Ship

A = "a.vmx"
DISK = (A, "scsi0:0")


def seen(*ours: str, chain: tuple[str, ...] = ("base",)) -> dict[str, SeenMachine]:
    return {A: SeenMachine(ours, {"scsi0:0": chain})}


def due(state: CycleState, now: dict[str, SeenMachine], *, begin: bool = False) -> cycle.Act:
    return cycle.next_act(state, now, [A], begin=begin)


PENDING = cycle.begun(CycleState("web"), 1, {A: "s1"})
NOTED = cycle.noted(PENDING, Mark(1, {A: "s1"}, {DISK: ("d1", "base")}))


def test_the_acts_of_a_first_cycle() -> None:
    state = CycleState("web")
    assert due(state, seen()) is None
    assert due(state, seen(), begin=True) == Begin(1)
    assert due(PENDING, seen()) == Create(A, "s1")
    act = due(PENDING, seen("s1", chain=("d1", "base")))
    assert act == Note(Mark(1, {A: "s1"}, {DISK: ("d1", "base")}))
    act = due(NOTED, seen("s1", chain=("d1", "base")))
    assert isinstance(act, Ship)
    assert (act.changes[0].whole, act.changes[0].layers) == (True, ("base",))
    after = cycle.done(NOTED, act)
    assert after.baseline is not None
    assert due(after, seen("s1", chain=("d1", "base")), begin=True) == Begin(2)


def second() -> tuple[CycleState, dict[str, SeenMachine]]:
    """A cycle whose pending snapshot is noted, over a baseline."""
    base = CycleState("web", Mark(1, {A: "s1"}, {DISK: ("d1", "base")}), Mark(2, {A: "s2"}, {DISK: ("d2", "d1")}), 2)
    return base, seen("s1", "s2", chain=("d2", "d1", "base"))


def test_only_what_lies_between_is_shipped_and_the_older_one_removed() -> None:
    state, now = second()
    act = due(state, now)
    assert isinstance(act, Ship)
    assert (act.changes[0].whole, act.changes[0].layers) == (False, ("d1",))
    state = cycle.done(state, act)
    assert due(state, now) == Remove(A, "s1")
    # Its layer is merged into the base: the baseline's now lies on that.
    state = cycle.noted(cycle.begun(state, 3, {A: "s3"}), Mark(3, {A: "s3"}, {DISK: ("d3", "d2")}))
    act = due(state, seen("s2", "s3", chain=("d3", "d2", "base")))
    assert isinstance(act, Ship)
    assert (act.changes[0].whole, act.changes[0].layers) == (False, ("d2",))


def test_layers_of_others_between_are_taken_along_oldest_first() -> None:
    state, _ = second()
    state = replace(state, pending=Mark(2, {A: "s2"}, {DISK: ("d9", "d5")}))
    act = due(state, seen("s1", "s2", chain=("d9", "d5", "d1", "base")))
    assert isinstance(act, Ship)
    assert act.changes[0].layers == ("d1", "d5")


@pytest.mark.parametrize(
    "now",
    [
        seen("s2", chain=("d2", "d1", "base")),  # our older snapshot is gone
        seen("s1", "s2", chain=("d2", "d1", "other")),  # a revert to another branch gave the name anew
        seen("s1", "s2", chain=("d2", "d1")),  # nothing below
    ],
)
def test_what_the_baseline_can_not_vouch_for_is_read_whole(now: dict[str, SeenMachine]) -> None:
    state, _ = second()
    act = due(state, now)
    assert isinstance(act, Ship)
    assert act.changes[0].whole
    assert act.changes[0].reason


def test_a_disk_that_was_added_is_read_whole() -> None:
    state, now = second()
    assert state.pending is not None
    layers = {**state.pending.layers, (A, "scsi0:1"): ("e1", "e")}
    now = {A: replace(now[A], disks={**now[A].disks, "scsi0:1": ("e1", "e")})}
    act = due(replace(state, pending=replace(state.pending, layers=layers)), now)
    assert isinstance(act, Ship)
    assert [change.whole for change in act.changes] == [False, True]


@pytest.mark.parametrize(
    "now",
    [
        {},  # the machine left
        seen("s1", chain=("d2", "d1", "base")),  # the pending snapshot is gone
        seen("s1", "s2", chain=("d7", "d1", "base")),  # something else is written since
    ],
)
def test_a_pending_mark_that_is_gone_is_given_up(now: dict[str, SeenMachine]) -> None:
    state, _ = second()
    assert isinstance(due(state, now), Abandon)


def test_a_snapshot_without_a_redo_log_is_given_up() -> None:
    assert isinstance(due(PENDING, seen("s1", chain=("base",))), Abandon)


def test_what_is_in_no_record_goes_first() -> None:
    state, now = second()
    assert due(state, {A: replace(now[A], ours=("s0", "s1", "s2"))}) == Remove(A, "s0")
    assert due(cycle.abandoned(state), now) == Remove(A, "s2")
    assert due(cycle.ended(state), now) == Remove(A, "s1")
    assert cycle.ended(state).last == 2
