"""Frames made of ring records and of blocks say exactly what was in them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import IntegrityError, ProtocolViolation
from drctl.model.extent import FRAME_PAYLOAD
from drctl.replication import framing
from drctl.replication.framing import Stamp
from drctl.store.ring_reader import DESCRIPTOR_DTYPE, Batch
from drctl.wire import frame
from drctl.wire.frame import EXTENT_ZERO, FrameKind
from drctl.wire.link import Decoder

STAMP = Stamp(3, "ab" * 16)
DISK = 1 << 20

records = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 1000), st.integers(1, 200), st.booleans(), st.binary(min_size=1, max_size=4)
    ),
    min_size=1,
    max_size=40,
)


def batch_of(written, first=100):
    descriptors = np.zeros(len(written), DESCRIPTOR_DTYPE)
    starts, data = [], b""
    for index, (disk, offset, sectors, zero, seed) in enumerate(written):
        starts.append(len(data))
        descriptors[index] = (first + index, 0, offset, sectors, disk, 2 if zero else 1, 0, 0, 0, 0)
        if not zero:
            data += (seed * (sectors * 512))[: sectors * 512]
    return Batch(first, first + len(written) - 1, descriptors, np.array(starts, np.uint64), memoryview(data))


def sent(frames):
    """The frames as the receiver gets them: what is in their messages."""
    return b"".join(message.data for message in Decoder().feed(b"".join(framing.messages_of(frames))))


def replay(frames, size=DISK):
    """What the frames do to disks of bytes, and their headers."""
    disks = {}
    headers = []
    for header, whole in frame.split(memoryview(sent(frames)), "test"):
        headers.append(header)
        body = whole[frame.HEADER_SIZE :]
        payload = bytes(frame.payload_of(header, body, "test"))
        for extent in frame.extents_of(header, body):
            disk = disks.setdefault(int(extent["disk"]), bytearray(b"\xee" * size))
            offset, length = int(extent["offset"]) * 512, int(extent["length"]) * 512
            start = int(extent["payload_offset"])
            disk[offset : offset + length] = (
                bytes(length) if extent["kind"] == EXTENT_ZERO else payload[start : start + length]
            )
    return disks, headers


@settings(max_examples=60, deadline=None)
@given(records)
def test_records_come_out_as_they_went_in(written):
    batch = batch_of(written)
    expected = {}
    for index, (disk, offset, sectors, _, _) in enumerate(written):
        data = bytes(batch.payload(index)) or bytes(sectors * 512)
        expected.setdefault(disk, bytearray(b"\xee" * DISK))[offset * 512 : offset * 512 + len(data)] = data
    disks, headers = replay(framing.frames_of_batch(STAMP, batch))
    assert disks == expected
    assert headers[0].first_sequence == batch.first
    assert headers[-1].last_sequence == batch.last
    assert not headers[-1].partial
    position = batch.first - 1
    for header in headers:
        assert header.raw_length <= FRAME_PAYLOAD
        assert (header.generation, header.epoch) == (3, "ab" * 16)
        assert header.first_sequence in (position, position + 1)
        position = header.last_sequence


def test_a_large_record_is_split_and_only_its_end_is_whole():
    _, headers = replay(framing.frames_of_batch(STAMP, batch_of([(1, 0, 300, False, b"abc")])))
    assert [header.partial for header in headers] == [True, True, False]
    assert {header.last_sequence for header in headers} == {100}


def test_many_zeroes_need_no_payload():
    frames = framing.frames_of_batch(STAMP, batch_of([(1, n, 1, True, b"x") for n in range(1500)]))
    _, headers = replay(frames)
    assert [header.extent_count for header in headers] == [1024, 476]
    assert sum(header.raw_length for header in headers) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([b"\0", b"a", b"\0" * 4095 + b"b"]), min_size=1, max_size=40), st.integers(0, 3))
def test_blocks_come_out_as_they_were_read(parts, tail):
    data = b"".join((part * 4096)[:4096] for part in parts) + b"z" * 512 * tail
    disks, headers = replay(framing.frames_of_blocks(STAMP, 7, 2, 8192, data))
    assert disks[2][8192 : 8192 + len(data)] == data
    assert all(header.kind is FrameKind.SYNC for header in headers)
    assert {(header.first_sequence, header.last_sequence) for header in headers} == {(7, 7)}
    stored = sum(header.raw_length for header in headers)
    assert stored <= len(data) - 4096 * sum(part == b"\0" for part in parts)


def test_a_huge_hole_is_a_few_bytes():
    frames = framing.frames_of_zeroes(STAMP, 1, 1, 0, 3 << 40)
    assert len(sent(frames)) < 1000
    total = 0
    for header, whole in frame.split(memoryview(sent(frames)), "test"):
        total += int(frame.extents_of(header, whole[frame.HEADER_SIZE :])["length"][0]) * 512
    assert total == 3 << 40


def test_random_data_is_stored_and_text_is_not(tmp_path):
    noise = np.random.default_rng(1).bytes(FRAME_PAYLOAD)
    assert not framing.compressible(noise)
    assert framing.compressible(b"lorem ipsum " * 5000)
    frames = framing.frames_of_blocks(STAMP, 1, 1, 0, noise)
    assert FRAME_PAYLOAD < len(sent(frames)) < FRAME_PAYLOAD + 200


def test_a_definition_that_can_not_pass_is_refused():
    noise = np.random.default_rng(1).bytes(3 << 20).hex()
    with pytest.raises(ProtocolViolation, match="too large for the link"):
        framing.control_frame(STAMP, FrameKind.DEFINITION, 0, {"files": [noise, noise[::-1], noise[1:]]})


def test_messages_stay_small_and_in_order():
    frames = [(bytes([n]) * 100, bytes([n]) * 59900) for n in range(40)]
    messages = framing.messages_of(frames, 200_000)
    assert sent(frames) == b"".join(head + payload for head, payload in frames)
    assert len(messages) == 14
    assert all(len(message) <= 200_005 for message in messages)
    assert framing.messages_of([]) == []


@pytest.mark.parametrize("level", [1, -1, -5, None])
def test_every_level_is_unpacked_to_the_same(level):
    data = b"".join(f"{n} lorem ipsum ".encode() for n in range(8000))[:FRAME_PAYLOAD]
    disks, headers = replay(framing.frames_of_blocks(STAMP, 1, 1, 0, data, level))
    assert disks[1][: len(data)] == data
    assert (headers[0].stored_length < len(data)) == (level is not None)


@settings(max_examples=60, deadline=None)
@given(records, st.integers(99, 141), st.integers(99, 141))
def test_frames_between_hold_exactly_those_records(written, one, other):
    """As if only those had been framed, whatever the boundaries of the frames were."""
    after, upto = min(one, other), max(one, other)
    first, last = max(100, after + 1), min(99 + len(written), upto)
    whole = sent(framing.frames_of_batch(STAMP, batch_of(written)))
    control = sent([framing.control_frame(STAMP, FrameKind.MARK, 0, {"number": 1})])
    found = framing.frames_between(memoryview(whole + control), after, upto, "test")
    if first > last:
        assert found == []
        return
    disks, headers = replay(found)
    wanted, _ = replay(framing.frames_of_batch(STAMP, batch_of(written[first - 100 : last - 99], first)))
    assert disks == wanted
    assert headers[0].first_sequence == first
    assert headers[-1].last_sequence == last
    for before, behind in pairwise(headers):
        assert behind.first_sequence == before.last_sequence + (0 if before.partial else 1)


def test_frames_between_checks_what_it_hands_on():
    whole = bytearray(sent(framing.frames_of_batch(STAMP, batch_of([(1, 0, 8, False, b"ab")]))))
    whole[-1] ^= 1
    with pytest.raises(IntegrityError):
        framing.frames_between(memoryview(whole), 0, 1000, "test")
