"""Promotion: the oldest segments become part of the bases.

First announced (group.json: promoting), so that no checkpoint that the bases pass is offered any more; then written,
synced, made true (base_position), and only then deleted. Killed anywhere, it is done again from the segments."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from drctl.errors import IntegrityError
from drctl.model.extent import SECTOR
from drctl.store import atomic
from drctl.store.extent_map import DISK_SHIFT, SECTOR_MASK, ZERO, Entries
from drctl.store.group_info import GroupInfo, change_info, write_info
from drctl.store.layer import RunDirectory, close_all, cover, merged
from drctl.store.replica import Replica
from drctl.store.segment import SegmentList, read_frame, scan
from drctl.store.tier import remove_runs
from drctl.wire.frame import payload_of


def check_segments(segments: SegmentList, first: int, last: int) -> None:
    """Raises IntegrityError when one of the segments is damaged: before anything is announced."""
    for segment in segments.between(first, last):
        for _ in scan(segment.path):
            pass


def announce(root: Path, info: GroupInfo, target: int) -> GroupInfo:
    """No checkpoint up to the end of log `target` is restorable from now on. Call it under the commit lock."""
    announced = replace(info, promoting=max(info.promoting, target))
    write_info(root, announced)
    return announced


def write_bases(root: Path, info: GroupInfo, segments: SegmentList) -> None:
    """Write what the announced segments hold into the bases, durably. Raises OutOfSpace, IntegrityError."""
    layers = cover(RunDirectory(root), segments, info.base_position + 1, info.promoting)
    replica = Replica(root, info.disks, writer=True)
    files = _Files(segments)
    try:
        for entries in merged(layers):
            _write_entries(replica, entries[np.lexsort((entries["frame"], entries["log"]))], files)
        replica.sync()
    finally:
        close_all(layers)
        files.close()
        replica.close()


class _Files:
    """Open segments, few at a time."""

    def __init__(self, segments: SegmentList) -> None:
        self._segments = segments
        self._log = -1
        self._file = -1
        self._path = Path()
        self._frame = -1
        self._payload = memoryview(b"")

    def payload(self, log: int, frame: int) -> memoryview:
        if (log, frame) != (self._log, self._frame):
            if log != self._log:
                self._switch(log)
            found = read_frame(self._file, self._path, frame)
            self._payload = memoryview(payload_of(found.header, found.body, f"{self._path}+{frame}"))
            self._frame = frame
        return self._payload

    def _switch(self, log: int) -> None:
        segment = self._segments.holding(log)
        if segment is None:
            raise IntegrityError(f"the index names log {log}, which no segment has")
        self.close()
        self._file, self._path, self._log = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC), segment.path, log

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _write_entries(replica: Replica, entries: Entries, files: _Files) -> None:
    disks = (entries["start"] >> np.uint64(DISK_SHIFT)).tolist()
    offsets = ((entries["start"] & np.uint64(SECTOR_MASK)) * np.uint64(SECTOR)).tolist()
    lengths = (entries["length"].astype(np.int64) * SECTOR).tolist()
    columns = (entries[name].tolist() for name in ("log", "frame", "payload"))
    for disk, offset, length, log, frame, start in zip(disks, offsets, lengths, *columns, strict=True):
        base = replica.base(disk)
        if start & ZERO:
            base.zero(offset, length)
            continue
        data = files.payload(log, frame)[start : start + length]
        if len(data) != length:
            raise IntegrityError(f"log {log}+{frame}: the frame has fewer bytes than its index says")
        base.write([data], offset)


def conclude(root: Path, target: int) -> GroupInfo:
    """The bases hold all up to the end of log `target`."""
    return change_info(root, lambda info: replace(info, base_position=target))


def remove_promoted(root: Path, segments: SegmentList, base_position: int) -> list[int]:
    """Delete the segments that the bases hold, oldest first; returns their last log numbers."""
    gone = segments.between(0, base_position)
    for segment in gone:
        atomic.remove(segment.path)
    remove_runs(root, 0, base_position)
    return [segment.last for segment in gone]
