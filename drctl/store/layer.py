"""Layers: the log from the bases up to a checkpoint, as few sorted indexes, oldest first."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from drctl.errors import IntegrityError
from drctl.store.catalog import Place
from drctl.store.content import Content
from drctl.store.extent_map import Entries, Keys, clip, ends, resolve
from drctl.store.run import BLOCK, Run, open_run, run_path
from drctl.store.segment import HEADER_SIZE, Segment, SegmentHeader, SegmentList, StreamKey, scan

#: Fences per slice of a merge: half a million entries, 12 MB.
_SLICE = 2048
_NAME = re.compile(r"(\d+)-(\d+)\.run$")


class Layer(Protocol):
    """Sorted entries of a part of the log. `entries` gives their parts between two keys."""

    def entries(self, low: int, high: int) -> Entries: ...

    def fences(self) -> Keys:
        """Keys in order, one after each block of entries."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class MemoryLayer:
    """A layer made by resolving extents here and now."""

    sorted_entries: Entries

    def entries(self, low: int, high: int) -> Entries:
        return clip(self.sorted_entries, low, high)

    def fences(self) -> Keys:
        after = ends(self.sorted_entries)
        return np.append(after[BLOCK - 1 :: BLOCK], after[-1:])

    def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True)
class Distrust:
    """Runs whose checksum failed, to be left out from now on."""

    paths: set[Path] = field(default_factory=set)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208 - names are enough, a Path for each of 10,000 is not
    except FileNotFoundError:
        return []


class RunDirectory:
    """Which runs there are, by their first log number."""

    def __init__(self, root: Path, distrust: Distrust | None = None) -> None:
        self._root = root
        self._lasts: dict[int, set[int]] = {}
        distrusted = {path.name for path in distrust.paths} if distrust else set()
        for name in _names(root / "runs"):
            if (match := _NAME.match(name)) and name not in distrusted:
                self.add(int(match[1]), int(match[2]))

    def add(self, first: int, last: int) -> None:
        """A run was made."""
        self._lasts.setdefault(first, set()).add(last)

    def has(self, first: int, last: int) -> bool:
        """There is a file of that name."""
        return last in self._lasts.get(first, ())

    def longest(self, segments: SegmentList, first: int, last: int) -> Run | None:
        """The longest sound run that begins at log `first` and ends at `last` or before."""
        for end in sorted(self._lasts.get(first, ()), reverse=True):
            if end <= last:
                run = open_run(run_path(self._root, first, end), segments.between(first, end))
                if run is not None:
                    return run
        return None

    def of_segment(self, segment: Segment) -> Run | None:
        """The run of one sealed segment, which has its log order too."""
        if segment.last not in self._lasts.get(segment.first, ()):
            return None
        return open_run(run_path(self._root, segment.first, segment.last), [segment])


def cover(runs: RunDirectory, segments: SegmentList, first: int, last: int) -> list[Layer]:
    """Layers of the sealed segments from log `first` to `last`. Raises IntegrityError when a segment is missing."""
    layers: list[Layer] = []
    try:
        for layer, _ in _steps(runs, segments, first, last):
            layers.append(layer)
    except BaseException:
        close_all(layers)
        raise
    return layers


def _steps(runs: RunDirectory, segments: SegmentList, first: int, last: int) -> Iterator[tuple[Layer, int]]:
    by_first = {segment.first: segment for segment in segments.between(first, last)}
    position = first
    while position <= last:
        run = runs.longest(segments, position, last)
        if run is not None:
            yield run, run.last
            position = run.last + 1
            continue
        segment = by_first.get(position)
        if segment is None:
            raise IntegrityError(f"the segment of log {position} is missing", log=position)
        yield MemoryLayer(resolve(_scanned(segment, None))), segment.last
        position = segment.last + 1


def prefix(runs: RunDirectory, segments: SegmentList, place: Place) -> Layer:
    """The layer of the segment that a mark lies in, up to the mark's end."""
    segment = segments.holding(place.log)
    if segment is None:
        raise FileNotFoundError(f"segment of log {place.log}")
    run = runs.of_segment(segment) if segment is not segments.tail else None
    if run is None:
        return MemoryLayer(resolve(_scanned(segment, place.end)))
    try:
        log = run.log()
    except IntegrityError:
        log = _scanned(segment, place.end)
    finally:
        run.close()
    return MemoryLayer(resolve(log[log["frame"] < np.uint32(place.end)]))


def _scanned(segment: Segment, end: int | None) -> Entries:
    """The extents of a segment in log order, read from it."""
    # Only the number of the header matters here; identity was checked by who listed it.
    header = SegmentHeader(StreamKey(segment.host, 0, segment.epoch), segment.first, segment.last, 0)
    content = Content(header, HEADER_SIZE)
    content.add_all(scan(segment.path, end=end))
    return content.entries()


def merged(layers: Sequence[Layer]) -> Iterator[Entries]:
    """All that several layers say, oldest first, as sorted entries; a bounded number at a time."""
    fences = np.sort(np.concatenate([layer.fences() for layer in layers]))
    low = 0
    for high in [*fences[_SLICE - 1 :: _SLICE].tolist(), (1 << 64) - 1]:
        if high > low:
            found = resolve(np.concatenate([layer.entries(low, high) for layer in layers]))
            if len(found):
                yield found
        low = high


def close_all(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.close()
