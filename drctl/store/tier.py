"""Tiers of runs: every 16 segments, 256, 4096, … one run, so that a view looks into few of them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from drctl.errors import IntegrityError
from drctl.store import atomic
from drctl.store.content import Content
from drctl.store.layer import Layer, RunDirectory, close_all, cover, merged
from drctl.store.run import RunWriter, has_run, run_path, write_segment_run
from drctl.store.segment import HEADER_SIZE, Segment, SegmentList, list_segments, scan

#: Segments or runs that become one: a view of n segments looks into at most 15 × log16(n) runs.
WIDTH = 16


class Indexer:
    """Makes the runs that are missing. Remembers which it has seen; one thread at a time."""

    def __init__(self, root: Path, group: str) -> None:
        self._root = root
        self._group = group
        # What the last build saw, and what this one has seen so far: what is gone is forgotten.
        self._before: set[tuple[Segment, ...] | Segment] = set()
        self._seen: set[tuple[Segment, ...] | Segment] = set()
        self._runs = RunDirectory(root)

    def build(self, base_position: int) -> int:
        """Make all missing runs of sealed segments after `base_position`; returns how many were made.

        A damaged segment gets none: it is reported by who reads it. Raises OutOfSpace."""
        segments, _ = list_segments(self._root)
        self._runs = RunDirectory(self._root)
        self._before, self._seen = self._seen, set()
        made = 0
        for segment in segments.sealed:
            if segment.first > base_position and not self._is_known(segment, segment):
                made += self._index(segment)
        size = WIDTH
        while segments.sealed and size <= segments.sealed[-1].last:
            made += self._build_tier(segments, base_position, size)
            size *= WIDTH
        return made

    def _is_known(self, key: tuple[Segment, ...] | Segment, first: Segment, *others: Segment) -> bool:
        last = others[-1] if others else first
        known = key in self._before and self._runs.has(first.first, last.last)
        if known:
            self._seen.add(key)
        return known

    def _has_run(self, segments: tuple[Segment, ...]) -> bool:
        return self._runs.has(segments[0].first, segments[-1].last) and has_run(self._root, segments)

    def _index(self, segment: Segment) -> int:
        made = 0
        if not self._has_run((segment,)):
            try:
                content = Content(segment.header(self._group), HEADER_SIZE)
                content.add_all(scan(segment.path))
            except (IntegrityError, FileNotFoundError):
                return 0
            write_segment_run(self._root, segment, content)
            self._runs.add(segment.first, segment.last)
            made = 1
        self._seen.add(segment)
        return made

    def _build_tier(self, segments: SegmentList, base_position: int, size: int) -> int:
        made = 0
        start = base_position // size * size
        for first in range(start + 1, segments.sealed[-1].last + 2 - size, size):
            last = first + size - 1
            inside = tuple(segments.between(first, last)) if first > base_position else ()
            if len(inside) < 2 or inside[0].first != first or inside[-1].last != last:
                continue
            if self._is_known(inside, *inside):
                continue
            if not self._has_run(inside):
                if not self._merge(segments, inside):
                    continue
                made += 1
            self._seen.add(inside)
        return made

    def _merge(self, segments: SegmentList, inside: tuple[Segment, ...]) -> bool:
        first, last = inside[0].first, inside[-1].last
        path = run_path(self._root, first, last)
        layers: list[Layer] = []
        try:
            layers = cover(self._runs, segments, first, last)
            self._write(layers, path, inside)
            self._runs.add(first, last)
            return True
        except (IntegrityError, FileNotFoundError) as exc:
            damaged = exc.fields.get("path") if isinstance(exc, IntegrityError) else None
            if isinstance(damaged, Path) and damaged.suffix == ".run":
                # Make it anew from its segments next time.
                atomic.remove(damaged)
                self._seen.clear()
            return False
        finally:
            close_all(layers)

    def _write(self, layers: list[Layer], path: Path, inside: tuple[Segment, ...]) -> None:
        with atomic.space_errors(path):
            writer = RunWriter(path, inside)
            try:
                for entries in merged(layers):
                    writer.add(entries)
                writer.finish()
            except BaseException:
                with suppress(OSError):
                    writer.abandon()
                raise


def remove_runs(root: Path, first: int, last: int, *, but: Path | None = None) -> None:
    """Remove the runs that touch the logs `first` to `last`: their segments are gone or merged."""
    for path in (root / "runs").glob("[0-9]*-[0-9]*.run"):
        low, high = (int(part) for part in path.stem.split("-"))
        if low <= last and high >= first and path != but:
            atomic.remove(path)
