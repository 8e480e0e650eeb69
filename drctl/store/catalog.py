"""The catalog: which marks, proofs and definitions lie where. A cache in SQLite, made of the segments at any time.

Rows belong to a segment, named by its last log number; `complete` says up to which offset its frames are in. A mark's
`checkpoint` is 1 once its proof is in too, so that a million checkpoints are counted and searched by an index."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drctl.errors import NotFound
from drctl.store.content import Control
from drctl.store.segment import Segment
from drctl.wire.frame import FrameKind

#: Raised when the schema changes; an older catalog is thrown away.
_VERSION = 2
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS segments (last INTEGER PRIMARY KEY, first INTEGER NOT NULL, complete INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS controls (
    log INTEGER NOT NULL, "offset" INTEGER NOT NULL, "end" INTEGER NOT NULL, kind INTEGER NOT NULL,
    generation INTEGER NOT NULL, epoch TEXT NOT NULL, number INTEGER NOT NULL, fields TEXT NOT NULL,
    time REAL NOT NULL, tagged INTEGER NOT NULL, checkpoint INTEGER NOT NULL,
    PRIMARY KEY (log, "offset")
);
CREATE INDEX IF NOT EXISTS controls_number ON controls (kind, epoch, number);
CREATE INDEX IF NOT EXISTS controls_kind ON controls (kind, log, "offset", epoch, number);
CREATE INDEX IF NOT EXISTS checkpoints ON controls (log, "offset", time, epoch, number, tagged) WHERE checkpoint = 1;
CREATE INDEX IF NOT EXISTS tagged ON controls (log, "offset") WHERE checkpoint = 1 AND tagged = 1;
PRAGMA user_version = {_VERSION};
"""
_COLUMNS = 'log, "offset", "end", generation, epoch, fields'
_CHECKPOINTS = f"SELECT {_COLUMNS} FROM controls WHERE checkpoint = 1"
_NEWEST_FIRST = 'ORDER BY log DESC, "offset" DESC'
#: The epochs that have marks, each found by one step in an index; few, while their marks may be a million.
_EPOCHS = f"""
WITH RECURSIVE epochs(epoch) AS (
    SELECT min(epoch) FROM controls WHERE kind = {int(FrameKind.MARK)}
    UNION ALL SELECT (SELECT min(epoch) FROM controls WHERE kind = {int(FrameKind.MARK)} AND epoch > epochs.epoch)
    FROM epochs WHERE epochs.epoch IS NOT NULL
) SELECT epoch FROM epochs WHERE epoch IS NOT NULL
"""
#: Whether a mark is a checkpoint: its proof comes later in the log.
_PROVE = f"""
UPDATE controls AS m SET checkpoint = EXISTS (
    SELECT 1 FROM controls p INDEXED BY controls_number
    WHERE p.kind = {int(FrameKind.PROOF)} AND p.epoch = m.epoch AND p.number = m.number
    AND (p.log, p."offset") > (m.log, m."offset")
) WHERE kind = {int(FrameKind.MARK)} AND epoch = ? AND number = ?
"""

#: Reads what a segment holds: its controls from an offset on, and the offset up to which that was done.
ReadControls = Callable[[Segment, int], tuple[Sequence[Control], int]]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A control frame in the log: the segment's last log number, and offsets there. Ordered as the log is."""

    log: int
    offset: int
    end: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A proven mark and where it lies. Its checkpoint is the log up to `place.end`."""

    place: Place
    generation: int
    epoch: str
    fields: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.fields["number"])

    @property
    def own_tags(self) -> tuple[str, ...]:
        """The tags that it was cut with."""
        return tuple(str(tag) for tag in self.fields.get("tags") or ())

    @property
    def time(self) -> float:
        """The mark's moment by *this* site's clock, seconds: the source's wall clock corrected by the measured offset.

        An RPO must not subtract two machines' clocks."""
        return _time(self.fields)


@dataclass(frozen=True, slots=True)
class Moment:
    """A checkpoint as retention sees it. `own_tags`: the mark was cut with tags."""

    log: int
    time: float
    epoch: str
    number: int
    own_tags: bool


class Catalog:
    """One connection to catalog.sqlite, or to a catalog in memory. Methods raise sqlite3.DatabaseError when the file
    is damaged."""

    def __init__(self, path: Path | None, *, writer: bool = True) -> None:
        self.path = path
        if path is None:
            self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        elif writer:
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
        else:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            self._db = sqlite3.connect(uri, timeout=10, isolation_level=None, check_same_thread=False, uri=True)
        try:
            self._prepare(writer or path is None)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, writer: bool) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION) or (version == 0 and not writer):
            raise sqlite3.DatabaseError(f"catalog version {version}")
        if writer:
            # A cache: what a power failure takes from it is read from the segments again.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.executescript(_SCHEMA)

    def copy(self) -> Catalog:
        """The same in memory."""
        other = Catalog(None)
        self._db.backup(other._db)
        return other

    def known(self) -> dict[int, tuple[int, int]]:
        """{last: (first, complete)} of the segments in the catalog."""
        rows = self._db.execute("SELECT last, first, complete FROM segments")
        return {last: (first, complete) for last, first, complete in rows}

    def record(self, segment: Segment, controls: Iterable[Control], complete: int, *, anew: bool = False) -> None:
        """Take a segment's controls up to `complete`; `anew`: forget what was known of it."""
        self.replace([segment.last] if anew else [], segment, controls, complete)

    def replace(self, gone: Iterable[int], segment: Segment | None, controls: Iterable[Control], complete: int) -> None:
        """In one transaction: forget the segments `gone`, take `segment`."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._replace(gone, segment, controls, complete)
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _replace(
        self, gone: Iterable[int], segment: Segment | None, controls: Iterable[Control], complete: int
    ) -> None:
        touched: set[tuple[str, int]] = set()
        for last in gone:
            touched.update(self._db.execute("SELECT epoch, number FROM controls WHERE log = ?", (last,)))
            self._db.execute("DELETE FROM controls WHERE log = ?", (last,))
            self._db.execute("DELETE FROM segments WHERE last = ?", (last,))
        if segment is not None:
            rows = [_row(segment.last, control) for control in controls]
            touched.update((epoch, number) for _, _, _, _, _, epoch, number, *_ in rows)
            self._db.executemany(f"INSERT OR REPLACE INTO controls VALUES ({'?, ' * 10}0)", rows)
            values = (segment.last, segment.first, complete)
            self._db.execute("INSERT OR REPLACE INTO segments VALUES (?, ?, ?)", values)
        # In order, so that neighbours in the index are looked up one after the other.
        self._db.executemany(_PROVE, sorted(touched))

    def is_stale(self, segments: Sequence[Segment], sizes: dict[int, int]) -> bool:
        """The catalog lacks a segment in whole or in part, or has one that is gone. `sizes`: how long each must be."""
        known = self.known()
        lacking = [s for s in segments if known.get(s.last, (0, 0))[0] != s.first or known[s.last][1] < sizes[s.last]]
        return bool(lacking) or len(known) != len(segments)

    def reconcile(self, segments: Sequence[Segment], sizes: dict[int, int], read: ReadControls) -> None:
        """Make the catalog say what the segments say."""
        known = self.known()
        lasts = {segment.last for segment in segments}
        if gone := [last for last in known if last not in lasts]:
            self.replace(gone, None, (), 0)
        for segment in segments:
            first, complete = known.get(segment.last, (-1, 0))
            same = first == segment.first and complete <= sizes[segment.last]
            if not same or complete < sizes[segment.last]:
                controls, complete = read(segment, complete if same else 0)
                self.record(segment, controls, complete, anew=not same)

    def marks(self, after: int = 0, last: int = -1) -> list[Mark]:
        """The proven marks in log order, of logs beyond `after`; the newest `last` of them, -1: all."""
        rows = self._db.execute(f"{_CHECKPOINTS} AND log > ? {_NEWEST_FIRST} LIMIT ?", (after, last)).fetchall()
        return [_mark(row) for row in reversed(rows)]

    def moments(self, after: int = 0) -> list[Moment]:
        """The same in short: 500,000 of them in a second or two, without a look at their fields."""
        rows = self._db.execute(
            "SELECT log, time, epoch, number, tagged FROM controls INDEXED BY checkpoints"
            ' WHERE checkpoint = 1 AND log > ? ORDER BY log, "offset"',
            (after,),
        )
        return [Moment(log, time, epoch, number, bool(tagged)) for log, time, epoch, number, tagged in rows]

    def count(self, after: int = 0) -> int:
        """How many proven marks there are in logs beyond `after`."""
        query = "SELECT count(*) FROM controls INDEXED BY checkpoints WHERE checkpoint = 1 AND log > ?"
        return int(self._db.execute(query, (after,)).fetchone()[0])

    def oldest(self, after: int = 0) -> Mark | None:
        """The first proven mark of the logs beyond `after`."""
        return self._one(f'{_CHECKPOINTS} AND log > ? ORDER BY log, "offset" LIMIT 1', after)

    def newest(self, after: int = 0, until: float = math.inf) -> Mark | None:
        """The newest proven mark of the logs beyond `after` whose time is at or before `until` (seconds)."""
        return self._one(f"{_CHECKPOINTS} AND log > ? AND time <= ? {_NEWEST_FIRST} LIMIT 1", after, until)

    def with_own_tags(self) -> list[Mark]:
        """The proven marks that were cut with tags, in log order."""
        return [_mark(row) for row in self._db.execute(f'{_CHECKPOINTS} AND tagged = 1 ORDER BY log, "offset"')]

    def mark(self, number: int, epoch: str = "") -> Mark:
        """The proven mark `number`, the newest when several epochs have one. Raises NotFound."""
        found = self._one(
            f"SELECT {_COLUMNS} FROM controls WHERE kind = {int(FrameKind.MARK)} AND number = ?"
            f" AND checkpoint = 1 AND epoch IN ({'?' if epoch else _EPOCHS}) {_NEWEST_FIRST} LIMIT 1",
            *((number, epoch) if epoch else (number,)),
        )
        if found is None:
            raise NotFound("checkpoint", f"#{number}", hint="see: drctl checkpoint list")
        return found

    def _one(self, query: str, *values: object) -> Mark | None:
        row = self._db.execute(query, values).fetchone()
        return _mark(row) if row else None

    def newest_number(self, epoch: str = "") -> int:
        """The largest number of any durable MARK, proven or not, of `epoch` or of all; 0 for none."""
        values = (epoch,) if epoch else ()
        query = (
            "SELECT max((SELECT max(number) FROM controls c WHERE c.epoch = e.epoch AND"
            f" kind = {int(FrameKind.MARK)})) FROM ({'SELECT ? AS epoch' if epoch else _EPOCHS}) e"
        )
        return int(self._db.execute(query, values).fetchone()[0] or 0)

    def all_marks(self) -> list[tuple[int, str, int]]:
        """(log, epoch, number) of every mark, proven or not, in log order."""
        query = 'SELECT log, epoch, number FROM controls WHERE kind = ? ORDER BY log, "offset"'
        return list(self._db.execute(query, (int(FrameKind.MARK),)))

    def newest_definition(self, before: tuple[int, int] | None = None) -> Place | None:
        """Where the newest DEFINITION lies, optionally before (log, offset)."""
        row = self._db.execute(
            'SELECT log, "offset", "end" FROM controls WHERE kind = ? AND (? OR (log, "offset") < (?, ?))'
            ' ORDER BY log DESC, "offset" DESC LIMIT 1',
            (int(FrameKind.DEFINITION), before is None, *(before or (0, 0))),
        ).fetchone()
        return Place(*row) if row else None

    def close(self) -> None:
        self._db.close()


def _row(log: int, control: Control) -> tuple[Any, ...]:
    fields = control.fields
    number = int(fields.get("number", 0) or 0)
    is_mark = control.kind is FrameKind.MARK
    return (
        *(log, control.offset, control.end, int(control.kind), control.generation),
        *(control.epoch, number, json.dumps(fields)),
        *(_time(fields) if is_mark else 0.0, int(is_mark and bool(fields.get("tags")))),
    )


def _time(fields: dict[str, Any]) -> float:
    return (int(fields.get("wall_ns") or 0) + int(fields.get("offset_ns") or 0)) / 1e9


def _mark(row: Sequence[Any]) -> Mark:
    log, offset, end, generation, epoch, fields = row
    try:
        return Mark(Place(log, offset, end), generation, epoch, json.loads(fields))
    except ValueError as exc:
        raise sqlite3.DatabaseError(f"catalog row: {exc}") from exc


def discard(path: Path) -> None:
    """Remove a catalog that can't be used."""
    for each in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        each.unlink(missing_ok=True)
