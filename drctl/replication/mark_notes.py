"""Notes about marks that wait for the link, so that a shipper that dies takes no point in time with it. Pure.

A note is a JSON object with `note` and `number`:

    mark      a mark was planned: all that Mark has, but for what a new connection makes of it
    attested  the supervisor has said yes to it, so its PROOF may be sent
    failed    it can never become a checkpoint
    base      all was whole at the other side, and marks up to this number have been planned
    void      nothing that was noted before counts any more: the other side needs a pass
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from drctl.replication.marks import Mark, Marks

Note = dict[str, Any]
_FIELDS = ("number", "kind", "sequence", "wall_ns", "monotonic_ns", "order_stamp")


@dataclass(slots=True)
class MarkNotes:
    """What was noted so far. `due` says what is to be noted now, and counts it as noted."""

    _noted: dict[int, bool] = field(default_factory=dict)
    _base: int = -1

    @property
    def any(self) -> bool:
        return bool(self._noted) or self._base >= 0

    def due(self, marks: Marks) -> list[Note]:
        """All was whole when the pending marks were planned."""
        notes = []
        newest = marks.newest.number if marks.newest is not None else 0
        pending = {mark.number for mark in marks.pending}
        for number in [number for number in self._noted if number not in pending]:
            del self._noted[number]
            if number > newest:
                notes.append({"note": "failed", "number": number})
        for mark in marks.pending:
            if mark.number not in self._noted:
                notes.append(_of(mark))
                self._noted[mark.number] = False
            if mark.attested and not self._noted[mark.number]:
                notes.append({"note": "attested", "number": mark.number})
                self._noted[mark.number] = True
        if marks.last_number > max(self._noted, default=self._base) and marks.last_number > self._base:
            self._base = marks.last_number
            notes.append({"note": "base", "number": self._base})
        return notes

    def void(self) -> list[Note]:
        """Nothing counts any more."""
        if not self.any:
            return []
        number = max(self._noted, default=max(self._base, 0))
        self.forget()
        return [{"note": "void", "number": number}]

    def forget(self) -> None:
        """Nothing is noted any more."""
        self._noted.clear()
        self._base = -1


def _of(mark: Mark) -> Note:
    note: Note = {"note": "mark", **{name: getattr(mark, name) for name in _FIELDS}}
    return note | {"connections": list(mark.connections), "tags": list(mark.tags)}


@dataclass(slots=True)
class Restored:
    """What notes tell: the marks that wait still, oldest first, and the largest number that was planned."""

    marks: list[Mark] = field(default_factory=list)
    last_number: int = 0
    #: All was whole at the other side at the last note.
    whole: bool = False


def restore(notes: Iterable[Note]) -> Restored:
    """What an earlier shipper knew. Whether a mark was sent, the next WELCOME tells: until then it counts as sent and
    proven, so that one that is a checkpoint already is dropped, and not placed behind its place."""
    marks: dict[int, Mark] = {}
    last, whole = 0, False
    for note in notes:
        number = int(note["number"])
        last, whole = max(last, number), note["note"] != "void"
        match note["note"]:
            case "mark":
                marks[number] = _mark(note)
            case "attested" if number in marks:
                marks[number].attested = True
            case "failed":
                marks.pop(number, None)
            case "void":
                marks.clear()
    return Restored([marks[number] for number in sorted(marks)], last, whole)


def _mark(note: Note) -> Mark:
    return Mark(
        **{name: note[name] for name in _FIELDS},
        connections=tuple(note["connections"]),
        tags=tuple(note["tags"]),
        sent=True,
        proof_sent=True,
    )
