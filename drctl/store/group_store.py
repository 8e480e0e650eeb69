"""A group's store at the recovery side: what the receiver writes, and what all others read. Blocking, one thread.

The receiver opens it with `writer=True`; the appliance, view servers and the CLI read beside it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from drctl.errors import AlreadyExists, IntegrityError, NotFound, OutOfSpace, ProtocolViolation, Refused, WrongPhase
from drctl.model.group import GroupDisk, Retention
from drctl.store import atomic
from drctl.store.check import check_batch
from drctl.store.content import Control, StreamState, control_fields
from drctl.store.group_info import (
    GroupInfo,
    StoreMode,
    change_info,
    commit_lock,
    retention_from,
    with_disks,
    write_info,
)
from drctl.store.initial import InitialNote, apply_frame, read_note, write_note
from drctl.store.journal import FrameList, Journal, SealPolicy
from drctl.store.label import CheckpointKey, read_pins, read_tags, remove_pin, write_pin, write_tags
from drctl.store.reader import StoreReader, disks_of, label_of
from drctl.store.replica import Replica, create_base
from drctl.store.retention_lock import allowed, locked_until, strengthened
from drctl.store.segment import PlacedFrame, Segment, StreamKey, SyncProgress
from drctl.store.view import View
from drctl.wire.frame import FrameHeader, FrameKind


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """From where a stream goes on. `sequence`: the last whole record that is durable, 0 for an epoch never seen.
    `needs`: `initial` (first sync), `full` (unknown epoch: what was lost is unknown), `nothing`."""

    epoch: str
    sequence: int
    last_mark: int
    sync: SyncProgress | None
    definition_version: int
    needs: str


@dataclass(frozen=True, slots=True)
class Durable:
    """What may be acknowledged. `mark`: the newest proven checkpoint of the stream, 0 for none."""

    epoch: str
    sequence: int
    mark: int
    sync: SyncProgress | None


class GroupStore(StoreReader):
    """One group's store. With `writer`, the only one in the world that appends; maintenance is another object."""

    def __init__(self, root: Path, *, writer: bool, policy: SealPolicy | None = None) -> None:
        self._lock = -1
        self._journal: Journal | None = None
        self._replica: Replica | None = None
        self._initial = StreamState()
        self._stream: StreamKey | None = None
        super().__init__(root, writer=writer)
        if not writer:
            return
        self._lock = atomic.acquire(root / "lock", wait=False, what="another receiver")
        try:
            self._open_writer(policy or SealPolicy())
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls, root: Path, group: str, generation: int, disks: Sequence[GroupDisk], retention: Retention | None = None
    ) -> GroupStore:
        """Make an empty store in mode `initial` and open it for writing. Raises AlreadyExists."""
        atomic.make_directory(root)
        if (root / "group.json").exists():
            raise AlreadyExists(f"{root} has a store already")
        for disk in disks:
            create_base(root, disk)
        info = GroupInfo(group, generation, StoreMode.INITIAL, tuple(disks), retention=retention or Retention())
        write_info(root, info)
        return cls(root, writer=True)

    @classmethod
    def open(cls, root: Path, *, writer: bool = False, policy: SealPolicy | None = None) -> GroupStore:
        """Raises NotFound, Locked (another writer), IntegrityError (the newest segment is damaged, not just torn)."""
        return cls(root, writer=writer, policy=policy)

    def _open_writer(self, policy: SealPolicy) -> None:
        for temp in self.root.glob("streams/*/*/." + "[0-9]" * 12 + ".seg.tmp"):
            temp.unlink()
        self._written_info = self.info
        self._info_stamp = self._stamp()
        base = self._written_info.base_position
        self._journal = Journal(self.root, self._group, base, self._durable_controls, policy)
        note = read_note(self.root)
        if note is not None and note.done:
            self._leave_initial()
        self.with_catalog(self._reconcile)

    def _durable_controls(self, segment: Segment, controls: Sequence[Control], end: int, anew: bool) -> None:
        """Told by the journal. Without a catalog the next look at it reads the segments."""
        if self._catalog is None:
            return
        try:
            self._catalog.record(segment, controls, end, anew=anew)
        except sqlite3.DatabaseError:
            self._drop_catalog()

    # State

    @property
    def journal(self) -> Journal:
        if self._journal is None:
            raise Refused(f"{self.root} is open for reading")
        return self._journal

    @property
    def torn_bytes(self) -> int:
        """Bytes that were cut from the newest segment at opening: written, never acknowledged."""
        return self.journal.torn_bytes

    @property
    def in_first_sync(self) -> bool:
        """Nothing is recoverable yet: what is appended goes to the bases."""
        return self._current_info().mode is StoreMode.INITIAL

    def _stamp(self) -> tuple[int, int]:
        stat = (self.root / "group.json").stat()
        return stat.st_ino, stat.st_mtime_ns

    def _current_info(self) -> GroupInfo:
        """group.json, read again only when another process changed it."""
        stamp = self._stamp()
        if stamp != self._info_stamp:
            self._written_info, self._info_stamp = self.info, stamp
        return self._written_info

    def set_generation(self, generation: int) -> None:
        """Let the store take streams of `generation` only. Raises Refused when that is older than the store's."""

        def change(info: GroupInfo) -> GroupInfo:
            if generation < info.generation:
                raise Refused(f"{info.group}: generation {generation} is superseded by {info.generation}")
            return replace(info, generation=generation)

        change_info(self.root, change)

    def set_mode(self, mode: StoreMode) -> None:
        """`failed-over` stops all appending, in any process, before the next batch."""
        change_info(self.root, lambda info: replace(info, mode=mode))

    def set_retention(self, retention: Retention) -> None:
        """Raises RetentionLocked when that would shorten what is under a lock (retention_lock.py)."""
        until = self.locked_until()
        change_info(
            self.root, lambda info: replace(info, retention=allowed(info.group, info.retention, retention, until))
        )

    def locked_until(self) -> float:
        """The moment from which the store may be deleted, as far as its lock is concerned; 0.0: at once."""
        newest = self.newest()
        return locked_until(self.info.retention, newest.time if newest else None)

    # Writing

    def begin_stream(self, host: str, generation: int, epoch: str) -> StreamPosition:
        """Take up a stream where it is durable. Raises Refused (older generation, failed over)."""
        stream = StreamKey(host, generation, epoch)
        info = self.info
        self._admit(info, stream)
        if info.mode is StoreMode.INITIAL:
            note = read_note(self.root)
            self._initial = note.state if note and note.stream == stream else StreamState()
            self._open_replica(info)
            self._stream = stream
            return self._position(stream, self._initial, "initial")
        state = self._known_state(stream)
        self.journal.begin(stream, state or StreamState())
        self._stream = stream
        return self._position(stream, state or StreamState(), "nothing" if state else "full")

    def _known_state(self, stream: StreamKey) -> StreamState | None:
        state = self.journal.state_of(stream)
        if state is None:
            note = read_note(self.root)
            state = note.state if note and note.stream == stream else None
        return state

    def _admit(self, info: GroupInfo, stream: StreamKey) -> None:
        if info.mode is StoreMode.FAILED_OVER:
            raise Refused(f"{info.group} has failed over to this site; it takes no stream", group=info.group)
        if stream.generation < info.generation:
            raise Refused(
                f"{info.group}: generation {stream.generation} is superseded by {info.generation}", group=info.group
            )
        if stream.generation > info.generation:
            raise Refused(
                f"{info.group}: generation {stream.generation} is not known here, the store is at {info.generation}"
            )

    def _position(self, stream: StreamKey, state: StreamState, needs: str) -> StreamPosition:
        version = int((self.definition() or {}).get("version") or 0)
        return StreamPosition(stream.epoch, state.sequence, state.mark, state.sync, version, needs)

    def append(self, frames: FrameList) -> None:
        """Take whole, checked frames of the stream that was begun. Nothing is durable before `sync`.

        Raises Refused (failed over or superseded meanwhile), ProtocolViolation (foreign or malformed frames; nothing
        of the batch was written), OutOfSpace (the limit: nothing was written; the disk: part may have been)."""
        if self._stream is None:
            raise WrongPhase("no stream was begun")
        info = self._current_info()
        self._admit(info, self._stream)
        initial = info.mode is StoreMode.INITIAL
        info = self._define(info, frames)
        check_batch(self._stream, self._initial if initial else self.journal.state, frames, info.disks)
        if initial:
            frames = self._append_initial(frames)
        if frames:
            self._check_limit(info, sum(header.size for header, _ in frames))
            self.journal.append(frames)

    def _define(self, info: GroupInfo, frames: FrameList) -> GroupInfo:
        """Take disks and retention from DEFINITION frames, before data names the disks."""
        for header, whole in frames:
            if header.kind is FrameKind.DEFINITION:
                info = self._take_definition(header, whole)
        return info

    def _take_definition(self, header: FrameHeader, whole: memoryview) -> GroupInfo:
        try:
            definition = control_fields(PlacedFrame(0, header, whole))
            disks = disks_of(definition)
            retention = (definition.get("spec") or {}).get("retention")
            wanted = retention_from(retention) if retention else None
        except (IntegrityError, AttributeError, TypeError, ValueError) as exc:
            raise ProtocolViolation(f"malformed DEFINITION frame: {exc}") from exc
        for disk in disks:
            create_base(self.root, disk)
        # What comes from the source may not shorten what is locked here: it may be the attacker's.
        changed = change_info(
            self.root, lambda info: replace(with_disks(info, disks), retention=strengthened(info.retention, wanted))
        )
        if changed.mode is StoreMode.INITIAL:
            atomic.write_json(self.root / "definition.json", definition)
            self._open_replica(changed)
        return changed

    def _open_replica(self, info: GroupInfo) -> None:
        if self._replica is not None:
            self._replica.sync()
            self._replica.close()
        self._replica = Replica(self.root, info.disks, writer=True)

    def _check_limit(self, info: GroupInfo, size: int) -> None:
        limit = info.retention.journal_limit
        if self.journal.size + size > limit:
            self.journal.refresh_size()
        if self.journal.size + size > limit:
            raise OutOfSpace(
                f"{info.group}: the journal is at its limit of {limit} bytes",
                hint="raise journal_limit, shorten the history, or remove tags and pins"
                + ("; what is younger than its retention lock gives no way" if info.retention.lock else ""),
                group=info.group,
            )

    def _append_initial(self, frames: FrameList) -> FrameList:
        """Apply frames to the bases; returns those after SYNC_END, which belong into the journal."""
        assert self._replica is not None
        for index, (header, whole) in enumerate(frames):
            if header.is_data:
                apply_frame(self._replica, header, whole)
            fields = control_fields(PlacedFrame(0, header, whole))
            self._initial = self._initial.after(header, fields)
            if header.kind is FrameKind.SYNC_END:
                self._end_initial()
                return frames[index + 1 :]
        return []

    def _end_initial(self) -> None:
        assert self._stream is not None
        self._sync_initial(done=True)
        self._leave_initial()
        self.journal.begin(self._stream, self._initial)

    def _leave_initial(self) -> None:
        change_info(
            self.root,
            lambda info: replace(info, mode=StoreMode.JOURNAL) if info.mode is StoreMode.INITIAL else info,
        )

    def _sync_initial(self, *, done: bool = False) -> None:
        assert self._replica is not None
        assert self._stream is not None
        self._replica.sync()
        note = InitialNote(self._stream, self._initial, done)
        if read_note(self.root) != note:
            write_note(self.root, note)

    def sync(self) -> Durable:
        """Make all appended frames durable; what is returned may be acknowledged. Raises OutOfSpace, IntegrityError."""
        if self._stream is None:
            raise WrongPhase("no stream was begun")
        if self.in_first_sync:
            self._sync_initial()
            state = self._initial
        else:
            self.journal.sync()
            state = self.journal.state
        return Durable(self._stream.epoch, state.sequence, state.mark, state.sync)

    def seal(self) -> None:
        """Close the newest segment now, e.g. before a failover; appending goes on in a new one."""
        self.journal.roll()

    # Tags and pins (any process)

    def tag(self, number: int, tag: str) -> None:
        """Name a checkpoint; it is never dropped while it has a tag. No error when it has it already."""
        with commit_lock(self.root):
            mark = self.find(number)
            tags = read_tags(self.root)
            if tag not in tags.of(label_of(mark), mark.own_tags):
                write_tags(self.root, tags.with_tag(label_of(mark), tag))

    def untag(self, tag: str) -> None:
        """Remove a tag from all checkpoints. Raises NotFound."""
        with commit_lock(self.root):
            tags = read_tags(self.root)
            labels = [label_of(mark) for mark in self._tagged(tag)]
            if not labels:
                raise NotFound("tag", tag)
            for label in labels:
                tags = tags.without(label, tag)
            write_tags(self.root, tags)

    def pin(self, name: str, number: int, epoch: str = "") -> None:
        """Hold a checkpoint for `name` until `unpin`. Idempotent. Raises NotFound when it is gone."""
        with commit_lock(self.root):
            mark = self.find(number, epoch)
            write_pin(self.root, name, label_of(mark))

    def unpin(self, name: str) -> None:
        """No error when there is no such pin."""
        with commit_lock(self.root):
            remove_pin(self.root, name)

    def pins(self) -> dict[str, CheckpointKey]:
        return read_pins(self.root)

    def view(self, number: int, pin: str, epoch: str = "") -> View:
        """The disks at a checkpoint, held by pin `pin` until `unpin(pin)`: also over a crash of who reads it."""
        self.pin(pin, number, epoch)
        return self.open_view(number, epoch)

    def close(self) -> None:
        super().close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._replica is not None:
            self._replica.close()
            self._replica = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
