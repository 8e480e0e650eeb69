"""Disks and small files of ours, written to an ESX host's datastore over SSH: whole under their names, or not there.

A disk is made beside (`X.part.vmdk`), filled from its start to its end, and renamed. What was written is noted on this
side, so that a copy that was broken off goes on. Holes stay holes: a disk is made thin, and zeroes are not sent."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from drctl.errors import HostUnreachable, HypervisorRefused, UnsupportedFormat
from drctl.hypervisor import vmdk
from drctl.hypervisor.esx.disks import Disks
from drctl.hypervisor.esx.session import Session
from drctl.model.extent import Extent, GiB, KiB, MiB
from drctl.model.ports import BlockSource

#: Written by one command, and read of the replica at once.
PIECE = 4 * MiB
#: A gap below this is written as zeroes: a VMFS block has 1 MiB, and a command costs more than the bytes.
GAP = MiB
#: Ends of pieces are multiples of it.
ALIGN = 4 * KiB
#: What may have to be written again after a crash of ours.
NOTED = 64 * MiB

#: (bytes done, bytes in total) of a disk; may raise to end the work.
Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CopyNote:
    """How far the copy of one disk is. `origin` names what it is a copy of; below `done` it is written. `taken` is what
    the disk took on its datastore when it was whole, 0 before."""

    path: str
    origin: str
    done: int = 0
    copied: int = 0
    taken: int = 0


class CopyNotes(Protocol):
    """Durable when `save` returns."""

    def load(self, path: str) -> CopyNote | None: ...

    def save(self, note: CopyNote) -> None: ...

    def remove(self, path: str) -> None: ...


def pieces(source: BlockSource, begin: int = 0) -> Iterator[Extent]:
    """What has to be written of a disk from `begin` on: ranges of at most PIECE, in order, that hold all its data."""
    waiting: Extent | None = None
    for extent in _data(source, begin):
        start, end = extent.offset // ALIGN * ALIGN, min(source.size, -(-extent.end // ALIGN) * ALIGN)
        if waiting is not None and start - waiting.end < GAP:
            waiting = Extent(waiting.offset, max(end, waiting.end) - waiting.offset)
        else:
            if waiting is not None:
                yield from _cut(waiting)
            waiting = Extent(start, end - start)
    if waiting is not None:
        yield from _cut(waiting)


def _data(source: BlockSource, begin: int) -> Iterator[Extent]:
    # In steps, because a list of all extents of a large disk would not be small.
    for offset in range(begin, source.size, GiB):
        for extent, is_data in source.extents(offset, min(GiB, source.size - offset)):
            if is_data:
                yield extent


def _cut(extent: Extent) -> Iterator[Extent]:
    for at in range(extent.offset, extent.end, PIECE):
        yield Extent(at, min(PIECE, extent.end - at))


def part_of(path: str) -> str:
    """Where a disk is made."""
    return f"{path.removesuffix('.vmdk')}.part.vmdk"


class ReplicaDisks:
    """Disks and files on one host. Any thread may use it; one at a time on one path."""

    def __init__(self, session: Session, disks: Disks, notes: CopyNotes) -> None:
        self._session = session
        self._disks = disks
        self._notes = notes

    def exists(self, path: str) -> bool:
        return self._session.run(["test", "-e", path])[0].code == 0

    def write(self, path: str, source: BlockSource, origin: str, told: Told) -> None:
        """The disk, whole, as `source` has it. Goes on where it was broken off, if that was of the same `origin`.

        Raises HostUnreachable, HypervisorRefused, OutOfSpace, UnsupportedFormat."""
        if self.exists(path):
            return
        note, part = self._begun(path, source, origin), part_of(path)
        flat, noted = self._flat(part, source.size), note.copied
        total = note.copied + sum(piece.length for piece in pieces(source, note.done))
        for piece in pieces(source, note.done):
            told(note.copied, total)
            data = bytes(source.read(piece.offset, piece.length))
            if data.count(0) < len(data):
                self._session.send(_writing(flat, piece.offset), data)
            note = replace(note, done=piece.end, copied=note.copied + piece.length)
            if note.copied - noted >= NOTED:
                self._notes.save(note)
                noted = note.copied
        self._notes.save(note)
        told(note.copied, total)
        self._disks.rename(part, path)
        self._notes.save(replace(note, taken=self.allocated(path)))

    def _begun(self, path: str, source: BlockSource, origin: str) -> CopyNote:
        """The disk beside is there; how far it is."""
        part, note = part_of(path), self._notes.load(path)
        if note is None or note.origin != origin or not self.exists(part):
            self._session.ask(["mkdir", "-p", posixpath.dirname(path)])
            self._disks.delete(part)
            note = CopyNote(path, origin)
            self._notes.save(note)
        self._disks.create(part, -(-source.size // 512) * 512)
        return note

    def _flat(self, path: str, size: int) -> str:
        """The file that has the disk's bytes. Raises UnsupportedFormat where a datastore keeps them in another way."""
        (text,) = self._session.ask(["cat", path])
        disk = vmdk.parse(text)
        if disk.kind != "vmfs" or len(disk.pieces) != 1 or disk.size < size:
            raise UnsupportedFormat(f"{path}: a new disk is {disk.kind} there, and can't be written by SSH")
        return posixpath.join(posixpath.dirname(path), disk.pieces[0].file)

    def grown(self, path: str) -> int:
        """Bytes that a disk takes more than when it was made."""
        note = self._notes.load(path)
        return max(0, self.allocated(path) - (note.taken or note.copied)) if note is not None else 0

    def allocated(self, path: str) -> int:
        """Bytes that a disk takes on its datastore; 0 when it is not there."""
        flat = f"{path.removesuffix('.vmdk')}-flat.vmdk"
        (answer,) = self._session.run(["stat", "-c", "%b", flat])
        return int(answer.out) * 512 if not answer.code and answer.out.strip().isdigit() else 0

    def delete(self, path: str) -> None:
        """The disk, and what is there of its making; no error when neither is."""
        for each in (part_of(path), path):
            self._disks.delete(each)
        self._notes.remove(path)

    def put(self, path: str, data: bytes) -> None:
        """A small file; its bytes are looked at before it gets its name: a lost connection would cut it."""
        beside = f"{path}.drctl-new"
        self._session.ask(["mkdir", "-p", posixpath.dirname(path)])
        self._session.send(["dd", f"of={beside}"], data)
        (told,) = self._session.ask(["md5sum", beside])
        if told.split()[:1] != [hashlib.md5(data, usedforsecurity=False).hexdigest()]:
            raise HostUnreachable(f"{self._session.name}: {path} was not written whole")
        self._session.ask(["mv", "-f", beside, path])

    def remove_directory(self, path: str) -> None:
        """With all that is in it; no error when it is gone."""
        (answer,) = self._session.run(["rm", "-rf", path])
        if answer.code or self.exists(path):
            raise HypervisorRefused(f"{self._session.name}: {path} can't be removed: {answer.told}")


def _writing(flat: str, offset: int) -> list[str]:
    """dd counts in blocks; short reads of its stdin are written as they come, one behind the other."""
    block = MiB
    while offset % block:
        block //= 2
    return ["dd", f"of={flat}", f"bs={block}", f"seek={offset // block}", "conv=notrunc"]
