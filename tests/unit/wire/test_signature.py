"""Signatures: copying what they say differs makes two disks equal; messages as the link carries them."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import ProtocolViolation
from drctl.wire import link, signature
from drctl.wire.signature import BLOCK, PARTS, SIGNED, Compare, Digests, PartMasks, Signatures

KEY = bytes(range(32))
SIZE = 3 * SIGNED + 5 * 512


def image(seed: int) -> bytearray:
    return bytearray(random.Random(seed).randbytes(SIZE))


def blocks(data):
    return [data[at : at + SIGNED] for at in range(0, len(data), SIGNED)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 9000), st.booleans()), max_size=12))
def test_copying_what_differs_makes_two_disks_equal(changes):
    theirs = image(1)
    ours = bytearray(theirs)
    for offset, length, zero in changes:
        end = min(SIZE, offset + length)
        ours[offset:end] = bytes(end - offset) if zero else random.Random(offset).randbytes(end - offset)
    numbers = signature.differing(signature.signatures(KEY, ours), signature.signatures(KEY, theirs))
    made = b"".join(signature.digests(KEY, blocks(ours)[number]) for number in numbers)
    asked = Digests(1, 1, tuple(numbers), made)
    masks = signature.parts_that_differ(KEY, asked, [blocks(theirs)[number] for number in numbers]).masks
    copied = 0
    for number, mask in zip(numbers, masks, strict=True):
        assert mask, "the signatures differ, and no part does"
        for first, after in signature.runs_of(mask):
            start, end = number * SIGNED + first * BLOCK, min(number * SIGNED + after * BLOCK, SIZE)
            theirs[start:end] = ours[start:end]
            copied += end - start
    assert theirs == ours
    touched = {at for o, n, _ in changes for at in range(o // BLOCK, (min(SIZE, o + n) - 1) // BLOCK + 1)}
    assert copied <= len(touched) * BLOCK, "more was copied than the blocks that were touched"


def test_a_key_changes_all():
    other = bytes(32)
    data = image(2)
    assert len(signature.differing(signature.signatures(KEY, data), signature.signatures(other, data))) == 4
    assert signature.digests(KEY, data[:SIGNED]) != signature.digests(other, data[:SIGNED])


def test_a_flipped_bit_is_one_part():
    ours, theirs = image(3), image(3)
    ours[SIGNED + 7 * BLOCK + 11] ^= 4
    assert signature.differing(signature.signatures(KEY, ours), signature.signatures(KEY, theirs)) == [1]
    asked = Digests(1, 1, (1,), signature.digests(KEY, blocks(ours)[1]))
    assert signature.parts_that_differ(KEY, asked, [blocks(theirs)[1]]).masks == (1 << 7,)


def test_zeroes_are_known_without_reading():
    assert signature.signatures(KEY, bytes(SIGNED)) == signature.zero_signature(KEY)
    assert signature.signatures(KEY, bytes(512)) == signature.zero_signature(KEY, 512)


@pytest.mark.parametrize(
    ("mask", "runs"),
    [(0, []), (1, [(0, 1)]), (0b1101, [(0, 1), (2, 4)]), (2**16 - 1, [(0, 16)]), (1 << 15, [(15, 16)])],
)
def test_runs(mask, runs):
    assert list(signature.runs_of(mask)) == runs


MESSAGES = [
    Compare(7, "ab" * 16, 3, 10, 4096),
    Signatures(8, bytes(signature.signatures(KEY, image(1)))),
    Signatures(8, signature.zero_signature(KEY) * 4096),
    Digests(9, 2, (5, 7), bytes(range(192)) * 2),
    PartMasks(10, (1, 65535)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: type(each).__name__)
def test_messages_travel(message):
    assert link.Decoder().feed(link.encode(message)) == [message]


def test_equal_signatures_are_packed():
    assert len(link.encode(MESSAGES[2])) < 200


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([8, 9, 10, 11]), st.binary(max_size=400))
def test_any_bytes_are_understood_or_refused(number, body):
    data = (len(body) + 1).to_bytes(4, "little") + bytes([number]) + body
    with suppress(ProtocolViolation):
        link.Decoder().feed(data)


def test_a_bomb_is_refused():
    packed = signature.pack_signatures(Signatures(1, bytes(16 * 5000)))
    with pytest.raises(ProtocolViolation):
        signature.unpack_signatures(memoryview(packed))


@pytest.mark.parametrize(
    "asked",
    [
        Compare(1, "", 1, 0, 5),
        Compare(1, "", 1, 4, 1),
        Compare(1, "", 1, -1, 1),
        Compare(1, "", 1, 0, 0),
        Compare(1, "", 2, 0, 1),
        Digests(1, 1, (4,), bytes(192)),
        Digests(1, 3, (0,), bytes(192)),
    ],
)
def test_blocks_that_no_disk_has_are_refused(asked):
    signature.check_asked(Compare(1, "", 1, 0, 4), {1: SIZE})
    with pytest.raises(ProtocolViolation):
        signature.check_asked(asked, {1: SIZE})


def test_parts_of_a_short_block():
    assert PARTS == 16
    assert len(signature.digests(KEY, bytes(512))) == len(signature.digests(KEY, bytes(SIGNED)))


@pytest.mark.parametrize("role", [link.Role.SOURCE, link.Role.RECEIVER])
def test_questions_go_one_way(role):
    session = link.Session(role)
    wrong = MESSAGES[1] if role is link.Role.SOURCE else MESSAGES[0]
    with pytest.raises(ProtocolViolation):
        session.send(wrong)
