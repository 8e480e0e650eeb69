"""Maintenance of a store: runs, merges, promotions. Beside the writer, in a thread or process of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from drctl.errors import IntegrityError, OutOfSpace
from drctl.store import atomic
from drctl.store.catalog import Catalog, Moment
from drctl.store.group_info import GroupInfo, StoreMode, commit_lock, read_info
from drctl.store.label import CheckpointKey, read_pins, read_tags
from drctl.store.merge import Candidate, Merge, MergePolicy, plan
from drctl.store.promote import announce, check_segments, conclude, remove_promoted, write_bases
from drctl.store.reader import StoreReader, label_of
from drctl.store.retention import keep
from drctl.store.run import remove_leftovers, write_segment_run
from drctl.store.segment import Segment, SegmentList, list_segments
from drctl.store.signatures import note_promotion
from drctl.store.tier import Indexer, remove_runs

#: Parts of the journal limit: above the first, history is shortened until the second is reached.
_HIGH, _LOW = 0.9, 0.8


@dataclass(frozen=True, slots=True)
class Done:
    """What one round did: runs made, segments merged away, segments promoted."""

    indexed: int
    merged: int
    promoted: int


class Maintenance:
    """Holds the maintenance lock while open. Raises Locked when another does. Times are seconds since the epoch."""

    def __init__(self, root: Path, policy: MergePolicy | None = None, indexer: Indexer | None = None) -> None:
        """`indexer`: that of an earlier maintenance of this store, which knows what runs there are."""
        self._root = root
        self._policy = policy or MergePolicy()
        self._lock = atomic.acquire(root / "maintenance.lock", wait=False, what="another maintenance")
        try:
            self._group = read_info(root).group
            self._reader = StoreReader(root, writer=True)
            self.indexer = indexer or Indexer(root, self._group)
            for temp in root.glob("streams/*/*/.*-*.seg.tmp"):
                atomic.remove(temp)
            remove_leftovers(root)
        except BaseException:
            os.close(self._lock)
            raise

    def run(self, now: float) -> Done:
        """One round. Raises OutOfSpace, or IntegrityError when a damaged segment is in the way."""
        promoted = self.promote(now)
        indexed = self.index()
        merged = self.merge(now)
        return Done(indexed + (self.index() if merged else 0), merged, promoted)

    def index(self) -> int:
        """Make missing runs; returns how many."""
        return self.indexer.build(self._reader.info.base_position)

    # What must stay

    def _held(self) -> set[CheckpointKey]:
        """Pinned and tagged checkpoints: never dropped."""
        tags = read_tags(self._root)
        own = self._reader.with_catalog(Catalog.with_own_tags)
        tagged = {label_of(mark) for mark in own if tags.of(label_of(mark), mark.own_tags)}
        return tagged | {label for label, _ in tags.added} | set(read_pins(self._root).values())

    def _kept(self, marks: list[Moment], info: GroupInfo, now: float) -> set[CheckpointKey]:
        moments = [(CheckpointKey(mark.epoch, mark.number), mark.time) for mark in marks]
        return keep(moments, info.retention, now, self._held())

    # Merging

    def merge(self, now: float) -> int:
        """Fold segments whose checkpoints the ladder does not want any more; returns how many went."""
        self._remove_leftovers()
        marks, info = self._reader.moments(), self._reader.info
        if not marks:
            return 0
        kept = self._kept(marks, info, now)
        done = 0
        for inputs in plan(self._candidates(marks[-1], info), kept, self._policy):
            done += self._merge(inputs, kept)
        return done

    def _candidates(self, newest: Moment, info: GroupInfo) -> list[Candidate]:
        """Sealed segments after the bases and before the newest checkpoint: no proof can come any more for theirs."""
        segments, _ = list_segments(self._root)
        by_log: dict[int, list[CheckpointKey]] = {}
        for log, epoch, number in self._reader.with_catalog(Catalog.all_marks):
            by_log.setdefault(log, []).append(CheckpointKey(epoch, number))
        return [
            Candidate(segment, tuple(by_log.get(segment.last, ())))
            for segment in segments.sealed
            if segment.first > info.promoting and segment.last < newest.log
        ]

    def _merge(self, inputs: list[Segment], kept: set[CheckpointKey]) -> int:
        merge = Merge(self._root, self._group, inputs, kept)
        try:
            merge.write()
        except OutOfSpace:
            merge.abandon()
            raise
        with commit_lock(self._root):
            # A tag or pin that came meanwhile wins.
            if merge.dropped & self._held():
                merge.abandon()
                return 0
            merged = merge.commit()
        gone = [segment.last for segment in inputs]
        content = merge.content
        self._reader.with_catalog(lambda catalog: catalog.replace(gone, merged, content.controls, content.end))
        remove_runs(self._root, merged.first, merged.last)
        for segment in inputs:
            atomic.remove(segment.path)
        write_segment_run(self._root, merged, content)
        return len(inputs)

    def _remove_leftovers(self) -> None:
        """Finish merges that became true but did not get to clean up."""
        _, leftover = list_segments(self._root)
        for segment in leftover:
            remove_runs(self._root, segment.first, segment.last)
        for segment in leftover:
            atomic.remove(segment.path)

    # Promotion

    def promote(self, now: float) -> int:
        """Fold what is beyond history or over the limit into the bases; returns how many segments went."""
        info = self._reader.info
        if info.mode is StoreMode.INITIAL:
            return 0
        self._remove_leftovers()
        self._clean_promoted(info)
        if info.promoting > info.base_position:
            return self._promote(info)
        segments, _ = list_segments(self._root)
        marks = self._reader.moments()
        target = self._target(segments, marks, info, now)
        if target <= info.base_position:
            return 0
        check_segments(segments, info.base_position + 1, target)
        with commit_lock(self._root):
            info = read_info(self._root)
            if target > self._most(segments, marks):
                return 0
            info = announce(self._root, info, target)
        return self._promote(info)

    def _target(self, segments: SegmentList, marks: list[Moment], info: GroupInfo, now: float) -> int:
        """The log up to which to promote."""
        if not marks:
            return 0
        kept = self._kept(marks, info, now)
        target = _before(segments, next(mark for mark in marks if CheckpointKey(mark.epoch, mark.number) in kept))
        used, limit = self._reader.used(), info.retention.journal_limit
        if used > _HIGH * limit:
            most = min(self._most(segments, marks), _unlocked(segments, marks, info, now))
            for segment in segments.between(info.base_position + 1, most):
                if used <= _LOW * limit and segment.last > target:
                    break
                used -= segment.size
                target = max(target, segment.last)
        return target

    def _most(self, segments: SegmentList, marks: list[Moment]) -> int:
        """The log that no promotion may pass: the newest checkpoint and what is held stay."""
        held = self._held()
        oldest = next((mark for mark in marks if CheckpointKey(mark.epoch, mark.number) in held), marks[-1])
        return _before(segments, oldest)

    def _promote(self, info: GroupInfo) -> int:
        segments, _ = list_segments(self._root)
        self._save_definition(info.promoting)
        write_bases(self._root, info, segments)
        note_promotion(self._root, info)
        return self._clean_promoted(conclude(self._root, info.promoting))

    def _save_definition(self, target: int) -> None:
        """The newest definition outlives its segment."""
        definition = self._reader.definition_before((target + 1, 0))
        if definition is not None:
            atomic.write_json(self._root / "definition.json", definition)

    def _clean_promoted(self, info: GroupInfo) -> int:
        segments, _ = list_segments(self._root)
        gone = remove_promoted(self._root, segments, info.base_position)
        if gone:
            self._reader.with_catalog(lambda catalog: catalog.replace(gone, None, (), 0))
        return len(gone)

    def close(self) -> None:
        self._reader.close()
        os.close(self._lock)


def _unlocked(segments: SegmentList, marks: list[Moment], info: GroupInfo, now: float) -> int:
    """The log that no promotion for want of room may pass: what is younger than the retention lock stays."""
    lock = info.retention.lock
    young = next((mark for mark in marks if now - mark.time <= lock), marks[-1]) if lock else marks[-1]
    return _before(segments, young)


def _before(segments: SegmentList, mark: Moment) -> int:
    """The log before the segment of a mark."""
    holding = segments.holding(mark.log)
    if holding is None:
        raise IntegrityError(f"the segment of log {mark.log} is missing")
    return holding.first - 1
