"""The retention lock: what it keeps, against the operator's file, the source's stream, a full journal and a deletion."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drctl.appliance.replica.expiry import StoreExpiry
from drctl.errors import OutOfSpace, RetentionLocked
from drctl.model.group import Retention, Rung
from drctl.store.journal import SealPolicy
from drctl.store.maintenance import Maintenance
from drctl.store.retention import interval_at, keep
from drctl.store.retention_lock import strengthened, weakened
from drctl.wire.frame import FrameKind

DAY = 86400.0
EVERY = (Rung(1e9, 0),)
OLD = Retention(history=30 * DAY, ladder=(Rung(3600, 0), Rung(DAY, 60), Rung(7 * DAY, 3600)), lock=7 * DAY)


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (Retention(history=30 * DAY, ladder=OLD.ladder, lock=6 * DAY), "lengthened only: 7d -> 6d"),
        (Retention(history=30 * DAY, ladder=OLD.ladder), "lengthened only: 7d -> none"),
        (Retention(history=6 * DAY, ladder=OLD.ladder, lock=7 * DAY), "history of 6d is shorter"),
        (Retention(history=30 * DAY, ladder=(Rung(1800, 0), *OLD.ladder[1:]), lock=7 * DAY), "keep less"),
        (Retention(history=30 * DAY, ladder=(Rung(3600, 0), Rung(DAY, 60), Rung(2 * DAY, 7200)), lock=7 * DAY), "less"),
        (Retention(history=30 * DAY, ladder=(Rung(3600, 0), Rung(7 * DAY, 61)), lock=7 * DAY), "keep less"),
    ],
)
def test_what_shortens_is_named(new, why) -> None:
    (found,) = weakened(OLD, new)
    assert why in found


@pytest.mark.parametrize(
    "new",
    [
        OLD,
        Retention(history=60 * DAY, ladder=OLD.ladder, lock=8 * DAY),
        Retention(history=7 * DAY, ladder=OLD.ladder, lock=7 * DAY, journal_limit=1 << 28),
        Retention(history=30 * DAY, ladder=EVERY, lock=7 * DAY),
        # Coarser beyond the lock only.
        Retention(history=30 * DAY, ladder=(*OLD.ladder, Rung(30 * DAY, 7200)), lock=7 * DAY),
    ],
)
def test_what_shortens_nothing_is_allowed(new) -> None:
    assert weakened(OLD, new) == []
    assert weakened(Retention(), Retention(history=60)) == []


RUNGS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)), max_size=3).map(
    lambda rows: tuple(Rung(float(within), float(every)) for within, every in sorted(rows))
)
RETENTIONS = st.builds(
    Retention, history=st.floats(1, 60), ladder=RUNGS, lock=st.sampled_from([0.0, 5.0, 20.0, 40.0])
).filter(lambda r: r.lock <= r.history)


@given(RETENTIONS, RETENTIONS)
def test_what_comes_from_the_source_never_weakens_nor_sets_a_lock(old, new) -> None:
    taken = strengthened(old, new)
    assert weakened(old, taken) == []
    assert taken.lock == old.lock
    if not weakened(old, new):
        assert (taken.history, taken.ladder) == (new.history, new.ladder)


@given(RETENTIONS, RETENTIONS, st.lists(st.integers(0, 60), min_size=1, unique=True))
def test_an_allowed_change_keeps_as_dense_a_history_within_the_lock(old, new, ages) -> None:
    if not old.lock or weakened(old, new):
        return
    for age in [*ages, old.lock]:
        if age <= old.lock:
            assert interval_at(new, age) <= interval_at(old, age), age


def test_history_never_ends_within_the_lock() -> None:
    odd = Retention(history=10, ladder=EVERY, lock=50)
    assert keep([(t, float(t)) for t in (0, 60, 99)], odd, 100.0) == {60, 99}


# -- the store ------------------------------------------------------------------------------------------------------


@pytest.fixture
def h(harness, tmp_path):
    h = harness(tmp_path / "shop", policy=SealPolicy(size=8000), start_time=time.time() - 160)
    h.end_sync()
    yield h
    h.close()


def write_marks(h, count) -> None:
    for index in range(count):
        h.write(1, index * 5 % 500, random.Random(index).randbytes(2048))
        h.mark()
        h.sync()


def maintain(h) -> None:
    maintenance = Maintenance(h.root)
    try:
        maintenance.run(h.now)
    finally:
        maintenance.close()


def flood(h) -> None:
    """An attacker writes as fast as the source can."""
    for _ in range(60):
        write_marks(h, 1)
        maintain(h)
        h.now -= 5


def test_at_the_limit_the_source_waits_and_locked_history_stays(h) -> None:
    write_marks(h, 30)  # one each 5 s
    h.store.set_retention(Retention(journal_limit=h.store.used() + 100, ladder=EVERY, history=1e9, lock=100))
    maintain(h)
    numbers = [number for _, number in h.listed()]
    assert set(range(10, 31)) <= set(numbers), "younger than 100 s"
    assert 1 not in numbers, "what is older made room"
    h.check_views()
    with pytest.raises(OutOfSpace) as caught:
        flood(h)
    assert "retention lock" in caught.value.hint
    assert set(range(10, 31)) <= {number for _, number in h.listed()}
    h.check_views()


def test_a_definition_from_the_source_can_not_shorten_it(h) -> None:
    write_marks(h, 10)
    h.store.set_retention(Retention(history=DAY, ladder=EVERY, lock=3600))
    disks = [{"number": d.number, "machine": d.machine, "target": d.target, "size": d.size} for d in h.disks]
    evil = {"history": 60, "ladder": [{"within": 60, "every": 60}], "journal_limit": 1 << 28, "lock": 0}
    for lock in (0, 1e12):
        h.send(
            h.control(
                FrameKind.DEFINITION, version=2, disks=disks, machines=[], spec={"retention": evil | {"lock": lock}}
            )
        )
        h.sync()
        kept = h.store.info.retention
        assert (kept.history, kept.ladder, kept.lock) == (3600, EVERY, 3600)
    maintain(h)
    assert len(h.listed()) == 10


def test_an_operator_lengthens_it_and_is_refused_else_with_the_date(h) -> None:
    write_marks(h, 3)
    h.store.set_retention(Retention(history=DAY, ladder=EVERY, lock=3600))
    h.store.set_retention(Retention(history=DAY, ladder=EVERY, lock=7200))
    with pytest.raises(RetentionLocked) as caught:
        h.store.set_retention(Retention(history=DAY, ladder=EVERY, lock=3600))
    assert caught.value.exit_code == 16
    assert str(caught.value.fields["until"]) in caught.value.message
    assert h.reopen()
    assert h.store.info.retention.lock == 7200
    assert json.loads((h.root / "group.json").read_text())["retention"]["lock"] == 7200


def test_a_store_is_not_deleted_before_its_time(h) -> None:
    write_marks(h, 3)
    h.store.set_retention(Retention(history=DAY, ladder=EVERY, lock=3600))
    expiry = StoreExpiry(h.root.parent, h.root.parent / "no-receiver.sock")
    with pytest.raises(RetentionLocked, match="can't be deleted in 30m"):
        expiry.keep("shop", 1800, "stopped")
    assert expiry.until("shop") is None
    assert expiry.keep("shop", 3700, "stopped") > time.time() + 3600
    # Neither does a file that somebody wrote by hand.
    (h.root / "expiry.json").write_text(json.dumps({"until": 1.0}))
    assert expiry.sweep() == []
    assert (h.root / "group.json").exists()


def test_a_lock_that_has_passed_keeps_nothing(harness, tmp_path) -> None:
    h = harness(tmp_path / "shop", start_time=time.time() - 7200)
    h.end_sync()
    write_marks(h, 1)
    h.store.set_retention(Retention(history=DAY, ladder=EVERY, lock=3600))
    h.close()
    expiry = StoreExpiry(tmp_path, tmp_path / "no-receiver.sock")
    expiry.keep("shop", -1, "stopped")
    assert expiry.sweep() == ["shop"]
