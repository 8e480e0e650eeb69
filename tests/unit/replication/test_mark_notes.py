"""What a successor knows of marks is what its predecessor knew, at every moment."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import example, given, settings
from hypothesis import strategies as st

from drctl.replication.mark_notes import MarkNotes, restore
from drctl.replication.marks import Mark, Marks, RingView


def view(published: int, stamp: int = 1) -> RingView:
    return RingView(stamp, stamp, 0, (4, 5), False, 0, 0, 0, published)


def known(marks: Iterable[Mark]) -> list[tuple[object, ...]]:
    return [(m.number, m.kind, m.sequence, m.wall_ns, m.order_stamp, m.connections, m.tags, m.attested) for m in marks]


ACTIONS = st.lists(st.sampled_from(["plan", "plan", "yes", "no", "settle", "note", "void", "stamp"]), max_size=40)


@settings(max_examples=100, deadline=None)
@given(ACTIONS)
@example(["plan", "yes", "note", "settle"])
def test_notes_say_what_is_pending(actions):
    marks, notes, written, stamp = Marks(), MarkNotes(), [], 1
    for at, action in enumerate([*actions, "note"]):
        match action:
            case "plan":
                marks.plan(view(at, stamp), "crash-consistent", at, at, ("x",))
            case "yes" | "no" if (mark := marks.to_attest()) is not None:
                marks.attested(mark.number, "" if action == "yes" else "gone", view(at, stamp))
            case "settle" if marks.pending and marks.pending[0].attested:
                marks.pending[0].sent = marks.pending[0].proof_sent = True
                marks.durable(marks.pending[0].number)
            case "stamp":
                stamp += 1
            case "void":
                marks.fail_all("the receiver lost acknowledged records")
                written += notes.void()
            case "note":
                written += notes.due(marks)
                found = restore(written)
                # One that has become a checkpoint since may be among them: the next WELCOME says so.
                newest = marks.newest.number if marks.newest is not None else 0
                assert known(m for m in found.marks if m.number > newest) == known(marks.pending)
                assert all(m.sent and m.proof_sent for m in found.marks)
                assert found.last_number == marks.last_number
                assert found.whole
                assert notes.due(marks) == [], "nothing is noted twice"


def test_after_void_nothing_is_known():
    marks, notes = Marks(), MarkNotes()
    assert notes.void() == []
    marks.plan(view(3), "quiesced", 1, 1, ())
    written = [*notes.due(marks), *notes.void()]
    found = restore(written)
    assert not found.whole
    assert not found.marks


def test_what_was_a_checkpoint_already_is_dropped_at_the_next_connection():
    """Whether a mark was sent, only the receiver knows: it is not placed a second time."""
    marks, notes = Marks(), MarkNotes()
    for at in (3, 5, 9):
        marks.plan(view(at), "crash-consistent", at, at, ())
    marks.attested(3, "", view(9))
    again = Marks()
    again.pending.extend(restore(notes.due(marks)).marks)
    again.rewind(5, last_mark=2, proven=1)
    assert [(mark.number, mark.sent, mark.failure) for mark in again.pending] == [(2, True, ""), (3, False, "")]
