"""The judge must tell a true prefix from every other state; most of these tests show it one that is damaged."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.lab.judge import Reason, judge, loss
from drctl.lab.protocol import AckLog
from drctl.lab.record import AREA_OFFSETS, Record, Token, slot_of, unpack_record

_spec = importlib.util.spec_from_file_location("lab_world", Path(__file__).with_name("world.py"))
assert _spec is not None
assert _spec.loader is not None
world = importlib.util.module_from_spec(_spec)
sys.modules["lab_world"] = world
_spec.loader.exec_module(world)
World = world.World


def only(verdict) -> Reason:
    assert len(verdict.reasons) == 1, str(verdict)
    return verdict.reasons[0]


@pytest.fixture(scope="module")
def long():
    """A history that goes around each ring more than once: 2 guests, 2 chains, 512 records in a chain's window."""
    return World().run(3000, seed=7)


def test_accepts_a_history_that_went_around_the_rings(long):
    verdict = judge(long.disks())
    assert verdict.true_prefix, str(verdict)
    for guest in ("web-1", "web-2"):
        assert min(verdict.guests[guest].newest) > 512
        newest, oldest = verdict.guests[guest].newest, verdict.guests[guest].oldest
        assert [a - b for a, b in zip(newest, oldest, strict=True)] == [511, 511]


def test_accepts_disks_on_which_nothing_was_written_yet():
    assert judge(World().disks()).true_prefix


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 5), cut=st.integers(0, 200))
def test_accepts_every_prefix(seed, cut):
    made = World().run(200, seed)
    assert judge(made.disks(made.writes[:cut])).true_prefix


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 5), cut=st.integers(1, 200), where=st.integers(0, 10**6))
def test_a_lost_write_is_found_exactly_when_something_depends_on_it(seed, cut, where):
    made = World().run(200, seed)
    prefix = made.writes[:cut]
    lost = prefix.pop(where % cut)
    depended = any(write.after.get((lost.guest, lost.chain), 0) >= lost.number for write in prefix)
    assert judge(made.disks(prefix)).true_prefix is not depended


def test_names_the_missing_record(long):
    pairs = long.disks()
    lost = long.writes[-400]
    pairs[lost.guest][lost.disk].blocks.pop(lost.offset)
    reason = only(judge(pairs))
    assert (reason.guest, reason.chain, reason.number) == (lost.guest, lost.chain, lost.number)
    assert (reason.disk, reason.offset) == (("vda", "vdb")[lost.disk], lost.offset)
    assert "missing" in str(reason)


def test_names_an_older_record_in_a_slot(long):
    """What a lost write leaves behind in a ring: the record of one turn before."""
    lost = long.writes[-400]
    older = next(w for w in long.writes if (w.guest, w.chain, w.number) == (lost.guest, lost.chain, lost.number - 512))
    pairs = long.disks()
    pairs[lost.guest][lost.disk].write(lost.offset, older.block)
    reason = only(judge(pairs))
    assert reason.number == lost.number
    assert f"holds record {older.number}" in reason.problem


def test_finds_a_disk_that_is_one_write_behind_the_other(long):
    """vda at one moment, vdb at a later one: each disk alone is whole."""
    early, late = long.disks(long.writes[:-30]), long.disks()
    mixed = {guest: [early[guest][0], late[guest][1]] for guest in early}
    assert not judge(mixed).true_prefix


def test_finds_a_guest_that_is_behind_what_the_other_knew(long):
    early, late = long.disks(long.writes[:-60]), long.disks()
    verdict = judge({"web-1": early["web-1"], "web-2": late["web-2"]})
    assert verdict.reasons
    assert {reason.guest for reason in verdict.reasons} == {"web-2"}
    assert "web-1's chain 0 record" in str(verdict.reasons[0])
    assert judge({"web-1": early["web-1"]}).true_prefix
    assert judge({"web-2": late["web-2"]}).true_prefix


@settings(max_examples=60, deadline=None)
@given(which=st.integers(1, 400), bit=st.integers(0, 4096 * 8 - 1))
def test_finds_any_flipped_bit(which, bit):
    made = World().run(400, seed=3)
    pairs = made.disks()
    hit = made.writes[-which]
    pairs[hit.guest][hit.disk].flip(hit.offset, bit)
    newest_of_chain = not any(w.after.get((hit.guest, hit.chain), 0) >= hit.number for w in made.writes)
    verdict = judge(pairs)
    if newest_of_chain and bit >= 64:
        assert "torn" in verdict.guests[hit.guest].notes[0]  # as an unfinished write would look
    else:
        assert not verdict.true_prefix


def test_lets_only_the_next_record_be_torn(long):
    last = long.writes[-1]
    pairs = long.disks()
    torn = last.block[:2048] + bytes(2048)
    pairs[last.guest][last.disk].write(last.offset, torn)
    verdict = judge(pairs)
    assert verdict.true_prefix, str(verdict)
    assert "torn" in verdict.guests[last.guest].notes[0]
    before = next(w for w in reversed(long.writes[:-1]) if (w.guest, w.chain) == (last.guest, last.chain))
    pairs[before.guest][before.disk].write(before.offset, before.block[:2048] + bytes(2048))
    assert not judge(pairs).true_prefix


def test_finds_a_record_in_the_wrong_slot(long):
    pairs = long.disks()
    one, other = (w for w in long.writes[-400:-300] if (w.guest, w.chain, w.disk) == ("web-1", 1, 0)), None
    one, other = next(one), next(one)
    pairs["web-1"][0].write(one.offset, other.block)
    pairs["web-1"][0].write(other.offset, one.block)
    assert {reason.number for reason in judge(pairs).reasons} == {one.number, other.number}


def test_finds_a_history_that_branched(long):
    """A guest that went on from an older state writes the same numbers again, with other contents."""
    made = World().run(300, seed=1)
    target = next(w for w in reversed(made.writes[:-60]) if w.guest == "web-1" and w.chain == 1)
    old = unpack_record(target.block)
    branched = Record(**{**{n: getattr(old, n) for n in old.__slots__}, "wall_ns": 1})
    pairs = made.disks()
    pairs["web-1"][target.disk].write(target.offset, branched.pack())
    assert "another history" in str(only(judge(pairs)))


def test_finds_a_token_of_another_history(long):
    made = World().run(300, seed=1)
    pairs = made.disks()
    user = next(w for w in reversed(made.writes) if unpack_record(w.block).token and w.chain == 1)
    old = unpack_record(user.block)
    token = Token(old.token.guest, 0, old.token.number, bytes(16))
    changed = Record(**{**{n: getattr(old, n) for n in old.__slots__}, "token": token})
    newest = not any(w.after.get((user.guest, user.chain), 0) >= user.number for w in made.writes)
    assert newest, "the record must be its chain's last, or its successor's link breaks too"
    pairs[user.guest][user.disk].write(user.offset, changed.pack())
    assert "of another history" in str(only(judge(pairs)))


def test_finds_foreign_records_of_another_lab(long):
    pairs = long.disks()
    hit = long.writes[-100]
    old = unpack_record(hit.block)
    foreign = Record(**{**{n: getattr(old, n) for n in old.__slots__}, "lab": "f" * 32})
    pairs[hit.guest][hit.disk].write(hit.offset, foreign.pack())
    assert only(judge(pairs)).number == hit.number


def test_finds_swapped_and_foreign_disks(long):
    pairs = long.disks()
    assert not judge({"web-1": [pairs["web-1"][0], pairs["web-2"][1]], "web-2": pairs["web-2"]}).true_prefix
    assert not judge({"web-1": pairs["web-1"][::-1]}).true_prefix


def test_finds_a_destroyed_superblock(long):
    pairs = long.disks()
    pairs["web-1"][1].flip(AREA_OFFSETS[1], 999)
    reason = only(judge({"web-1": pairs["web-1"]}))
    assert (reason.disk, reason.offset) == ("vdb", AREA_OFFSETS[1])


def test_finds_garbage_behind_the_newest_record():
    """Slots that no record has reached must be as they were made."""
    made = World().run(20, seed=2)
    pairs = made.disks()
    superblock = made.superblock("web-1")
    disk, offset = slot_of(superblock, 0, 101)
    pairs["web-1"][disk].write(offset, b"\xaa" * 4096)
    assert "must be empty" in str(only(judge(pairs)))


def test_loss_is_counted_from_the_first_missing_acknowledgement():
    made = World(guests=("web-1",), chains=1).run(10)
    log = AckLog()
    for number in range(1, 11):
        log.add(number * 10**9, (number,))
    verdict = judge(made.disks(made.writes[:6]))
    lost = loss(verdict, {"web-1": log}, moment_ns=9_500_000_000)["web-1"]
    assert lost.missing == (3,)
    assert lost.first_missing_ns == 7 * 10**9
    assert lost.rpo_seconds == pytest.approx(2.5)
    assert 6 * 10**9 <= lost.proven_until_ns < 7 * 10**9


def test_nothing_is_lost_when_all_acknowledged_records_are_there():
    made = World(guests=("web-1",), chains=1).run(10)
    log = AckLog()
    for number in range(1, 10):
        log.add(number * 10**9, (number,))
    lost = loss(judge(made.disks()), {"web-1": log}, moment_ns=60 * 10**9)["web-1"]
    assert (lost.rpo_seconds, lost.missing, lost.first_missing_ns) == (0.0, (0,), None)
    assert lost.proven_until_ns == 9 * 10**9
