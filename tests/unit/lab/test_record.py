"""The format of superblock and record, and that the C witness agrees with it (its own writes: integration tests)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import drctl.lab
from drctl.errors import IntegrityError
from drctl.lab.record import (
    AREA_OFFSETS,
    AREA_SIZES,
    BOOT_OFFSET,
    BOOT_SIZE,
    DATA_OFFSET,
    DATA_SIZE,
    PAYLOAD_OFFSET,
    PAYLOAD_SIZE,
    VDA_SIZE,
    VDB_SIZE,
    Record,
    Superblock,
    Token,
    payload_sum,
    slot_of,
    unpack_record,
    unpack_superblock,
)

LAB = "00112233445566778899aabbccddeeff"


def test_the_parts_of_the_disks_do_not_overlap():
    assert BOOT_OFFSET + BOOT_SIZE <= PAYLOAD_OFFSET
    assert PAYLOAD_OFFSET + PAYLOAD_SIZE <= DATA_OFFSET
    assert AREA_OFFSETS[0] >= DATA_OFFSET + DATA_SIZE
    assert AREA_OFFSETS[0] + AREA_SIZES[0] <= VDA_SIZE
    assert AREA_OFFSETS[1] + AREA_SIZES[1] <= VDB_SIZE
    assert PAYLOAD_SIZE >= 64 * 1024 * 1024


def test_superblock_survives_packing():
    block = Superblock(lab=LAB, guest="web-1", payload_sum=2**64 - 1, rate=7, sync_every=3, tokens=True)
    for disk in (0, 1):
        assert unpack_superblock(block.on(disk).pack(), "x") == block.on(disk)


def test_damaged_superblock_is_refused_by_name():
    block = bytearray(Superblock(lab=LAB, guest="web-1").pack())
    block[4000] ^= 1
    with pytest.raises(IntegrityError, match=r"web-1\.vda"):
        unpack_superblock(block, "web-1.vda")


def test_record_survives_packing():
    record = Record(LAB, "web-2", 3, 77, (1, 2, 3, 76, 0, 0, 0, 0), b"p" * 16, Token("web-1", 0, 9, b"d" * 16), 5, 6)
    block = record.pack()
    assert unpack_record(block) == replace(record, digest=block[-16:])
    assert unpack_record(block[:-1] + bytes([block[-1] ^ 1])) is None


def test_records_alternate_over_both_disks_and_never_share_a_slot():
    superblock = Superblock(lab=LAB, guest="web-1", chains=3, slots=256)
    places = {slot_of(superblock, chain, number) for chain in range(3) for number in range(1, 513)}
    assert len(places) == 3 * 512
    assert {slot_of(superblock, 0, n)[0] for n in (1, 3, 5)} == {1}
    for disk, offset in places:
        assert AREA_OFFSETS[disk] < offset < AREA_OFFSETS[disk] + AREA_SIZES[disk]


@pytest.mark.parametrize(
    "change", [{"chains": 9}, {"chains": 0}, {"slots": 100}, {"slots": 65536}, {"guest": "x" * 16}]
)
def test_impossible_geometry_is_refused(change):
    with pytest.raises(ValueError, match=r"chains|name"):
        Superblock(**{"lab": LAB, "guest": "web-1", **change})


def test_payload_sum_depends_on_every_word_and_its_place():
    data = bytes(range(256)) * 16
    assert payload_sum(data) != payload_sum(data[8:] + data[:8])
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    assert payload_sum(data) == sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64


def test_the_witness_in_c_has_the_same_layout():
    """Field offsets of the C structs, added up by hand, are those of the Python structs."""
    source = (Path(drctl.lab.__file__).parent / "guest_files" / "witness.c").read_text()
    sizes = {"char magic[8]": 8, "uint8_t lab[16]": 16, "char guest[NAME]": 16}
    body = re.search(r"struct record \{(.*?)\};", source, re.S)[1]
    order = re.findall(r"(?:char|uint\w+) [^;]+", body)
    assert [sizes[name] for name in order[:3]] == [8, 16, 16]
    names = re.findall(r"\w+(?=[,;\[])", body)
    wanted = "magic lab guest chain boot number wall_ns seen token_guest token_chain zero token_number token_digest"
    assert [n for n in names if n not in ("MAX_CHAINS", "NAME", "DIGEST", "BLOCK")][:13] == wanted.split()
