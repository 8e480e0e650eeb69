"""The newest durable state of a group's disks: bases and journal up to its end, marks or not. What a resync compares
with. It is read beside the writer, as a view is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from drctl.store.catalog import Mark, Place
from drctl.store.extent_map import Entries, empty
from drctl.store.group_info import GroupInfo
from drctl.store.layer import Distrust, Layer, MemoryLayer, RunDirectory, close_all, cover, merged, prefix
from drctl.store.reader import StoreReader
from drctl.store.segment import Segment, SegmentList, list_segments
from drctl.store.view import Layout, View

#: Attempts to see one state of files that merges and promotions keep moving.
_ATTEMPTS = 5

LayersFrom = Callable[[int], list[Layer]]


class Tip(StoreReader):
    """The end of the log as it was when this was made. One thread at a time.

    Every byte that it gives is as it was at some place of the log between then and now: a promotion that goes on
    meanwhile may show some of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        info = self.info
        self.group_disks = info.disks
        self.generation = info.generation
        segments, _ = list_segments(root)
        tail = segments.tail
        #: Where the log ended; log 0: there was none yet.
        self.place = Place(tail.last, 0, self._sizes(segments)[tail.last]) if tail else Place(0, 0, 0)
        #: The last log number before the segment that the log ended in.
        self.sealed = tail.first - 1 if tail else 0

    def open(self) -> View:
        """All disks. Raises IntegrityError, also when what the log ended in was merged or promoted meanwhile."""
        return View(self.root, self.group_disks, self._find, lambda: None)

    def _find(self, distrust: Distrust) -> Layout:
        for attempt in range(_ATTEMPTS):
            try:
                info = self.info
                segments, _ = list_segments(self.root)
                layers = self._layers(segments, info.base_position + 1, distrust)
                return Layout(Mark(self.place, self.generation, "", {"number": 0}), segments, layers)
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _layers(self, segments: SegmentList, first: int, distrust: Distrust | None) -> list[Layer]:
        """What the log says from number `first`, where a segment begins, up to its end."""
        if not self.place.log:
            return [MemoryLayer(empty())]
        last = self._holding(segments)
        runs = RunDirectory(self.root, distrust)
        layers = cover(runs, segments, first, last.first - 1)
        try:
            layers.append(prefix(runs, segments, self.place))
        except BaseException:
            close_all(layers)
            raise
        return layers

    def _holding(self, segments: SegmentList) -> Segment:
        holding = segments.holding(self.place.log)
        if holding is None or holding.first != holding.last:
            raise FileNotFoundError(f"the segment of log {self.place.log}, as it was written")
        return holding

    def written_after(self, log: int) -> Iterator[Entries]:
        """What the log says after number `log`, and maybe a little before, sorted. Raises IntegrityError or
        FileNotFoundError when that is gone."""
        segments, _ = list_segments(self.root)
        yield from merged_after(segments, log, lambda first: self._layers(segments, first, None))


def promoted_after(root: Path, info: GroupInfo, log: int) -> Iterator[Entries]:
    """What the segments after number `log` say that are about to be promoted, and maybe a little before."""
    segments, _ = list_segments(root)
    yield from merged_after(segments, log, lambda first: cover(RunDirectory(root), segments, first, info.promoting))


def merged_after(segments: SegmentList, log: int, layers_from: LayersFrom) -> Iterator[Entries]:
    """The entries of `layers_from`, called with where the segment begins that holds log number `log` + 1."""
    layers = layers_from(next((segment.first for segment in segments if segment.last > log), log + 1))
    try:
        if layers:
            yield from merged(layers)
    finally:
        close_all(layers)
