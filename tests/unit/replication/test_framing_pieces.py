"""Scattered pieces of a disk as SYNC frames: every byte at its place, few frames, compressed where that helps."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.model.extent import FRAME_PAYLOAD, SECTOR
from drctl.replication import framing
from drctl.replication.framing import Stamp
from drctl.wire import frame
from drctl.wire.frame import EXTENT_ZERO, FrameKind

STAMP = Stamp(3, "ab" * 16)
SIZE = 512 * 1024


def applied(frames):
    """What the frames make of a disk of 0xee."""
    disk = bytearray(b"\xee" * SIZE)
    for parts in frames:
        header = frame.unpack_header(parts[0], "")
        assert header.kind is FrameKind.SYNC
        assert (header.first_sequence, header.last_sequence) == (9, 9)
        assert header.raw_length <= FRAME_PAYLOAD
        body = parts[0][frame.HEADER_SIZE :] + bytes(parts[1])
        frame.check_body(header, body, "")
        payload = frame.payload_of(header, body, "")
        for extent in frame.extents_of(header, body):
            begin, length = int(extent["offset"]) * SECTOR, int(extent["length"]) * SECTOR
            start = int(extent["payload_offset"])
            data = bytes(length) if extent["kind"] == EXTENT_ZERO else payload[start : start + length]
            assert len(data) == length
            assert extent["disk"] == 5
            disk[begin : begin + length] = data
    return disk


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 127), st.tuples(st.sampled_from([512, 4096, 65536]), st.integers(0, 3))))
def test_every_byte_is_at_its_place(choice):
    expected, pieces = bytearray(b"\xee" * SIZE), []
    for block, (length, kind) in sorted(choice.items()):
        begin = block * 4096
        length = min(length, SIZE - begin)
        data = bytes(length) if kind == 0 else random.Random(block).randbytes(length)
        expected[begin : begin + length] = data
        pieces.append((begin, memoryview(data)))
    assert applied(framing.frames_of_pieces(STAMP, 9, 5, pieces)) == expected


def test_random_neighbours_do_not_keep_text_from_being_packed():
    text = b"all work and no play " * 200
    pieces = [(n * 8192, memoryview(random.Random(n).randbytes(4096) if n % 2 else text[:4096])) for n in range(16)]
    frames = framing.frames_of_pieces(STAMP, 9, 5, pieces)
    assert len(frames) == 1
    assert sum(len(part) for part in frames[0]) < 9 * 4096
