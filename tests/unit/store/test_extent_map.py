import random
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.store.extent_map import ENTRY, ZERO, clip, ends, key, resolve

rows = st.lists(
    st.tuples(st.integers(1, 2), st.integers(0, 60), st.integers(1, 30), st.booleans()), min_size=1, max_size=60
)


def entries(rows):
    result = np.zeros(len(rows), ENTRY)
    for index, (disk, sector, length, zero) in enumerate(rows):
        result[index] = (key(disk, sector), length, 1, index, ZERO if zero else 4096)
    return result


def painted(entries):
    """Sector by sector: (frame, payload) of who wrote it."""
    cells = {}
    for start, length, _, frame, payload in entries.tolist():
        for sector in range(length):
            cells[start + sector] = (frame, payload if payload & ZERO else payload + sector * 512)
    return cells


@given(rows)
def test_resolve_is_painting_one_by_one(rows):
    written = entries(rows)
    before = written.copy()
    resolved = resolve(written)
    assert (written == before).all()
    assert painted(resolved) == painted(written)
    assert (ends(resolved)[:-1] <= resolved["start"][1:]).all()


@given(rows, st.integers(0, 100), st.integers(0, 100))
def test_clip_is_what_lies_between(rows, low, length):
    resolved = resolve(entries(rows))
    low = key(1, 0) + low
    clipped = clip(resolved, low, low + length)
    assert painted(clipped) == {cell: v for cell, v in painted(resolved).items() if low <= cell < low + length}


@settings(max_examples=20)
@given(rows, st.integers(0, 60))
def test_resolving_in_parts_is_resolving_at_once(rows, cut):
    written = entries(rows)
    parts = np.concatenate((resolve(written[:cut]), resolve(written[cut:])))
    assert painted(resolve(parts)) == painted(written)


def test_a_guest_that_zeroes_its_disk_over_and_over_does_not_stall_the_store():
    dice = random.Random(1)
    rows = [(1, dice.randrange(1 << 20), 8, False) for _ in range(20_000)]
    for index in range(0, 20_000, 2):
        rows[index] = (1, 0, 1 << 20, True)
    written = entries(rows)
    begin = time.process_time()
    assert len(resolve(written)) < 20_000
    # Painting one by one would touch 2·10^8 cells.
    assert time.process_time() - begin < 2


places = st.sampled_from([(1, 0, 8), (1, 8, 8), (1, 16, 8), (1, 12, 8), (1, 40, 4), (2, 0, 8)])


@given(st.lists(places, min_size=1, max_size=30))
def test_blocks_written_again_beside_blocks_that_overlap(rows):
    written = entries([(*place, False) for place in rows])
    resolved = resolve(written)
    assert painted(resolved) == painted(written)
    assert (ends(resolved)[:-1] <= resolved["start"][1:]).all()
