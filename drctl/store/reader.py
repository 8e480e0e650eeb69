"""Reading a store, in any process, beside its writer: checkpoints, definitions, views."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from drctl.errors import IntegrityError, NotFound
from drctl.model.checkpoint import Checkpoint, CheckpointKind, checkpoint_moment, checkpoint_number, resolve
from drctl.model.group import GroupDisk
from drctl.store import atomic
from drctl.store.catalog import Catalog, Mark, Moment, Place, discard
from drctl.store.content import Content, Control, control_fields
from drctl.store.group_info import GroupInfo, StoreMode, read_info
from drctl.store.journal import read_claim
from drctl.store.label import CheckpointKey, Tags, read_pins, read_tags
from drctl.store.layer import Distrust, RunDirectory, cover, prefix
from drctl.store.retention import Forecast, forecast
from drctl.store.run import Run
from drctl.store.segment import HEADER_SIZE, Segment, SegmentList, list_segments, read_frame, scan
from drctl.store.verify import VerifyReport, verify_segment
from drctl.store.view import Layout, View
from drctl.wire.frame import FrameKind

T = TypeVar("T")
#: Attempts to see one state of files that merges and promotions keep moving.
_ATTEMPTS = 5
#: Seconds between looks at a catalog that its writer may be about to bring up to date.
_CATCH_UP = (0.005, 0.02, 0.05)


class StoreReader:
    """The reading half of a store. One thread at a time; any number of processes.

    `writer`: the catalog on disk is kept, made anew when it is damaged; else it is only read, and what it lacks is
    read from the segments into memory."""

    def __init__(self, root: Path, *, writer: bool = False) -> None:
        self.root = root
        self._writer = writer
        self._catalog: Catalog | None = None
        info = read_info(root)
        self._group = info.group

    @property
    def info(self) -> GroupInfo:
        """group.json as it is now."""
        return read_info(self.root)

    # Catalog

    def with_catalog(self, use: Callable[[Catalog], T]) -> T:
        """`use(catalog)` with a catalog that knows all durable marks; a damaged one is replaced."""
        try:
            return use(self._current())
        except sqlite3.OperationalError:
            # Locked for long, or no space for it.
            self._drop_catalog()
        except sqlite3.DatabaseError:
            self._drop_catalog()
            if self._writer:
                discard(self.root / "catalog.sqlite")
                return use(self._current())
        self._catalog = Catalog(None)
        return use(self._current())

    def _drop_catalog(self) -> None:
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def _current(self) -> Catalog:
        path = self.root / "catalog.sqlite"
        if self._catalog is None:
            if not self._writer and not path.exists():
                self._catalog = Catalog(None)
            else:
                self._catalog = Catalog(path, writer=self._writer)
        segments, _ = list_segments(self.root)
        sizes = self._sizes(segments)
        if self._is_stale(self._catalog, segments, sizes):
            if not self._writer and self._catalog.path is not None:
                copy = self._catalog.copy()
                self._drop_catalog()
                self._catalog = copy
            self._reconcile(self._catalog)
        return self._catalog

    def _is_stale(self, catalog: Catalog, segments: SegmentList, sizes: dict[int, int]) -> bool:
        # A writer claims before it records; a copy of a large catalog costs more than the moment between the two.
        for wait in _CATCH_UP if not self._writer and catalog.path is not None else ():
            if not catalog.is_stale(list(segments), sizes):
                return False
            time.sleep(wait)
        return catalog.is_stale(list(segments), sizes)

    def _reconcile(self, catalog: Catalog) -> None:
        segments, _ = list_segments(self.root)
        sizes = self._sizes(segments)
        runs = RunDirectory(self.root)
        tail = segments.tail

        def read(segment: Segment, start: int) -> tuple[Sequence[Control], int]:
            run = runs.of_segment(segment) if segment is not tail else None
            return self._read_controls(segment, run, start, sizes[segment.last])

        catalog.reconcile(list(segments), sizes, read)

    def _sizes(self, segments: SegmentList) -> dict[int, int]:
        """Up to where each segment is durable."""
        sizes = {segment.last: segment.size for segment in segments}
        log, offset = read_claim(self.root)
        if segments.tail is not None and segments.tail.last == log:
            sizes[log] = offset
        return sizes

    def _read_controls(
        self, segment: Segment, run: Run | None, start: int, durable: int
    ) -> tuple[Sequence[Control], int]:
        if run is not None:
            try:
                return run.controls(), segment.size
            except IntegrityError:
                pass
            finally:
                run.close()
        return self._scan_controls(segment, start, durable)

    def _scan_controls(self, segment: Segment, start: int, durable: int) -> tuple[Sequence[Control], int]:
        """The controls between; those before the first damaged frame when there is one."""
        try:
            content = Content(segment.header(self._group), max(start, HEADER_SIZE))
            content.add_all(scan(segment.path, content.end, durable))
        except IntegrityError as exc:
            if exc.fields.get("offset") == 0:
                return (), durable
        return content.controls, durable

    # Checkpoints

    def _restorable(self, use: Callable[[Catalog, int], T], nothing: T) -> T:
        """`use(catalog, log)` where checkpoints beyond that log can be restored; `nothing` while none can."""
        info = self.info
        if info.mode is StoreMode.INITIAL:
            return nothing
        return self.with_catalog(lambda catalog: use(catalog, info.promoting))

    def marks(self) -> list[Mark]:
        """The proven marks that can be restored, in log order."""
        return self._restorable(lambda catalog, after: catalog.marks(after), [])

    def moments(self) -> list[Moment]:
        """The same in short, for who needs all of them."""
        return self._restorable(lambda catalog, after: catalog.moments(after), [])

    def oldest(self) -> Mark | None:
        """The first restorable mark."""
        return self._restorable(lambda catalog, after: catalog.oldest(after), None)

    def newest(self, until: float = math.inf) -> Mark | None:
        """The newest restorable mark at or before a moment (seconds since the epoch)."""
        return self._restorable(lambda catalog, after: catalog.newest(after, until), None)

    def count(self) -> int:
        """How many checkpoints can be restored."""
        return self._restorable(lambda catalog, after: catalog.count(after), 0)

    def checkpoints(self, last: int = -1) -> list[Checkpoint]:
        """The restorable checkpoints, in log order; the newest `last` of them, -1: all."""
        marks: list[Mark] = self._restorable(lambda catalog, after: catalog.marks(after, last), [])
        return self._as_checkpoints(marks)

    def checkpoint(self, number: int) -> Checkpoint:
        """Raises NotFound."""
        return self._as_checkpoints([self.find(number)])[0]

    def _as_checkpoints(self, marks: Sequence[Mark]) -> list[Checkpoint]:
        tags, held = read_tags(self.root).by_checkpoint(), set(read_pins(self.root).values())
        return [_checkpoint(mark, tags.get(label_of(mark)), held) for mark in marks]

    def choose(self, selector: str, now: float) -> Checkpoint:
        """What `model.checkpoint.resolve` says of all checkpoints, from a look at a few of them.

        Raises NotFound (no such checkpoint) or ValueError (not a selector)."""
        found = [mark for mark in (*self._chosen(selector, now), self.oldest(), self.newest()) if mark is not None]
        unique = {mark.place: mark for mark in found}
        return resolve(selector, self._as_checkpoints([unique[place] for place in sorted(unique)]), now)

    def _chosen(self, selector: str, now: float) -> list[Mark | None]:
        """Marks among which the answer is, if there is one."""
        if (number := checkpoint_number(selector)) is not None:
            with suppress(NotFound):
                return [self.find(number)]
        elif selector.startswith("tag:"):
            return [*self._tagged(selector[4:])]
        elif selector != "latest":
            return [self.newest(checkpoint_moment(selector, now))]
        return []

    def _tagged(self, tag: str) -> list[Mark]:
        """The restorable marks with a tag, in no order."""
        tags = read_tags(self.root)
        found: list[Mark] = self._restorable(
            lambda catalog, after: [mark for mark in catalog.with_own_tags() if mark.place.log > after], []
        )
        for label, each in tags.added:
            if each == tag:
                with suppress(NotFound):
                    found.append(self.find(label.number, label.epoch))
        return [mark for mark in found if tag in tags.of(label_of(mark), mark.own_tags)]

    def find(self, number: int, epoch: str = "") -> Mark:
        """The mark of a restorable checkpoint, the newest of that number. Raises NotFound."""
        mark = self.with_catalog(lambda catalog: catalog.mark(number, epoch))
        if mark.place.log <= self.info.promoting:
            raise NotFound("checkpoint", f"#{number}", hint="it is older than the bases; see: drctl checkpoint list")
        return mark

    # Definitions

    def definition(self, checkpoint: int | None = None) -> dict[str, Any] | None:
        """The newest DEFINITION's payload, or the newest one in a checkpoint. None when there was never any."""
        return self._definition_at(self.find(checkpoint) if checkpoint is not None else None)

    def _definition_at(self, mark: Mark | None) -> dict[str, Any] | None:
        return self.definition_before((mark.place.log, mark.place.offset) if mark else None)

    def definition_before(self, before: tuple[int, int] | None) -> dict[str, Any] | None:
        """The newest DEFINITION's payload before (log, offset), or of all."""
        for _ in range(_ATTEMPTS):
            found = self.with_catalog(lambda catalog: catalog.newest_definition(before))
            if found is None:
                break
            try:
                return self._fields_at(found, FrameKind.DEFINITION)
            except FileNotFoundError:
                continue
        fields: dict[str, Any] | None = atomic.read_json(self.root / "definition.json")
        return fields

    def _fields_at(self, place: Place, kind: FrameKind) -> dict[str, Any]:
        segment = list_segments(self.root)[0].holding(place.log)
        if segment is None:
            raise FileNotFoundError(f"segment of log {place.log}")
        with segment.path.open("rb") as file:
            frame = read_frame(file.fileno(), segment.path, place.offset)
        if frame.header.kind is not kind:
            raise IntegrityError(f"{segment.path}+{place.offset}: not the {kind.name} that the catalog names")
        return control_fields(frame)

    def disks(self, checkpoint: int | None = None) -> tuple[GroupDisk, ...]:
        """The group's disks, with the sizes that they had at the checkpoint."""
        return self._disks_at(self.find(checkpoint) if checkpoint is not None else None)

    def _disks_at(self, mark: Mark | None) -> tuple[GroupDisk, ...]:
        definition = self._definition_at(mark)
        return disks_of(definition) if definition and definition.get("disks") else self.info.disks

    # Views

    def open_view(self, number: int, epoch: str = "") -> View:
        """A view of a checkpoint without a pin: it fails once the checkpoint is merged or promoted away."""
        mark = self.find(number, epoch)
        disks = self._disks_at(mark)
        return View(self.root, disks, lambda distrust: self._layout(number, mark.epoch, distrust), lambda: None)

    def _layout(self, number: int, epoch: str, distrust: Distrust) -> Layout:
        for attempt in range(_ATTEMPTS):
            try:
                return self._layout_now(number, epoch, distrust)
            except (FileNotFoundError, IntegrityError):
                # Files may have moved between two looks; a real damage is still there at the next.
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _layout_now(self, number: int, epoch: str, distrust: Distrust) -> Layout:
        base = self.info.base_position
        mark = self.find(number, epoch)
        segments, _ = list_segments(self.root)
        fields = self._fields_at(mark.place, FrameKind.MARK)
        if fields.get("number") != number:
            raise IntegrityError(f"log {mark.place.log}+{mark.place.offset}: not the mark of checkpoint #{number}")
        holding = segments.holding(mark.place.log)
        if holding is None:
            raise FileNotFoundError(f"segment of log {mark.place.log}")
        runs = RunDirectory(self.root, distrust)
        layers = cover(runs, segments, base + 1, holding.first - 1)
        try:
            layers.append(prefix(runs, segments, mark.place))
        except BaseException:
            for layer in layers:
                layer.close()
            raise
        return Layout(mark, segments, layers)

    # Health

    def verify(self, checkpoint: int | None = None) -> VerifyReport:
        """Read all frames again, of the whole journal or of what a checkpoint needs, and say what is damaged."""
        report = VerifyReport()
        marks, base = self.marks(), self.info.base_position
        segments, _ = list_segments(self.root)
        place = self.find(checkpoint).place if checkpoint is not None else None
        for segment in segments:
            if segment.last <= base or (place is not None and segment.last > place.log):
                continue
            end = self._sizes(segments)[segment.last]
            if place is not None and segment.last == place.log:
                end = place.end
            # FileNotFoundError: merged or promoted meanwhile; what became of it was checked then.
            with suppress(FileNotFoundError):
                verify_segment(segment, self._group, end, marks, report)
        return report

    def used(self) -> int:
        """Bytes of the journal on disk: segments and runs."""
        total = sum(segment.size for segment in list_segments(self.root)[0])
        for path in (self.root / "runs").glob("*.run"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def forecast(self, now: float) -> Forecast:
        """How long history is and will be. `now`: seconds since the epoch."""
        oldest = self.oldest()
        retention = self.info.retention
        # The ladder keeps none beyond the target; promotion follows it, at the pace at which segments are sealed.
        target = max(retention.history, retention.lock)
        held = oldest is not None and now - oldest.time > target + max(target / 4, 3600)
        return forecast(oldest.time if oldest else None, self.used(), retention, now, held_back=held)

    def close(self) -> None:
        self._drop_catalog()


def disks_of(definition: dict[str, Any]) -> tuple[GroupDisk, ...]:
    """The disks that a DEFINITION names. Raises IntegrityError when it is malformed."""
    try:
        return tuple(
            GroupDisk(int(d["number"]), str(d["machine"]), str(d["target"]), int(d["size"]))
            for d in definition["disks"]
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise IntegrityError(f"DEFINITION: disks: {exc!r}") from exc


def label_of(mark: Mark) -> CheckpointKey:
    return CheckpointKey(mark.epoch, mark.number)


def _checkpoint(mark: Mark, tags: Tags | None, held: set[CheckpointKey]) -> Checkpoint:
    """`tags`: those that operators gave to it or took away."""
    label = label_of(mark)
    fields = mark.fields
    return Checkpoint(
        mark.number,
        mark.time,
        CheckpointKind(fields.get("kind", CheckpointKind.CRASH)),
        mark.epoch,
        mark.generation,
        int(fields["sequence"]),
        tags.of(label, mark.own_tags) if tags else mark.own_tags,
        label in held,
    )
