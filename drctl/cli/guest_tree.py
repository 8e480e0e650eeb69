"""A guest's files below a directory, looked at and copied as what they are: somebody else's, perhaps hostile.

Nothing outside of the directory is reached by any link in it; devices, pipes and sockets are passed over; no program
that is copied runs as another user (set-user-ID bits are dropped)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from drctl.errors import AlreadyExists, NotFound, OutOfSpace, StepFailed

Made = TypeVar("Made")

#: Links that are followed until it is taken for a circle; Linux has the same.
MAXIMUM_LINKS = 40
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory. `kind` is `file`, `directory`, `link` or `special`; `target` of a link."""

    name: str
    kind: str
    size: int
    modified: float
    mode: int
    owner: int
    target: str = ""


@dataclass(slots=True)
class Copied:
    """What was copied, and what was passed over and why."""

    files: int = 0
    bytes: int = 0
    passed: list[tuple[str, str]] = field(default_factory=list)


def resolve(root: Path, path: str) -> Path:
    """Where a path of the guest is below `root`, its links followed as the guest would. Raises NotFound, StepFailed."""
    left = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    here: list[str] = []
    links = 0
    while left:
        part = left.pop()
        if part == "..":
            here = here[:-1]
            continue
        place = root.joinpath(*here, part)
        try:
            status = place.lstat()
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise NotFound("file", path, hint="see what is there: --list /") from exc
        except OSError as exc:
            raise StepFailed(f"{path}: {exc.strerror}") from exc
        if not stat.S_ISLNK(status.st_mode):
            here.append(part)
            continue
        links += 1
        if links > MAXIMUM_LINKS:
            raise StepFailed(f"{path}: too many links, one after the other")
        target = str(place.readlink())
        if target.startswith("/"):
            here = []
        left += [piece for piece in reversed(target.split("/")) if piece not in ("", ".")]
    return root.joinpath(*here)


def entries(directory: Path) -> Iterator[Entry]:
    """What is in a directory, by name; a file is told as itself."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode):
        yield _entry(directory, status)
        return
    for place in sorted(directory.iterdir()):
        with suppress(OSError):  # a damaged one must not hide the others
            yield _entry(place, place.lstat())


def _entry(place: Path, status: os.stat_result) -> Entry:
    mode = status.st_mode
    kinds = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISLNK, "link"))
    kind = next((word for test, word in kinds if test(mode)), "special")
    target = str(place.readlink()) if kind == "link" else ""
    return Entry(place.name, kind, status.st_size, status.st_mtime, stat.S_IMODE(mode), status.st_uid, target)


def copy(source: Path, target: Path) -> Copied:
    """Copy a file, or a directory with all in it, to `target`, which must not be there.

    Raises AlreadyExists, OutOfSpace, StepFailed when it can't be written there; what can't be read is passed over."""
    if os.path.lexists(target):
        raise AlreadyExists(f"{target} is there already", hint="it is not overwritten: another --output DIR")
    copied = Copied()
    pending = [(source, target)]
    directories: list[tuple[Path, os.stat_result]] = []
    while pending:
        place, wanted = pending.pop()
        status = place.lstat()
        if stat.S_ISDIR(status.st_mode):
            _make_directory(wanted)
            directories.append((wanted, status))
            try:
                pending += [(inner, wanted / inner.name) for inner in place.iterdir()]
            except OSError as exc:
                copied.passed.append((str(place), exc.strerror or "can't be read"))
        else:
            _copy_one(place, wanted, status, copied)
    for wanted, status in reversed(directories):  # last, since what is put into one changes its time
        _dress(wanted, status)
    return copied


def _make_directory(wanted: Path) -> None:
    _writing(wanted, lambda: wanted.mkdir(mode=0o700))


def _copy_one(place: Path, wanted: Path, status: os.stat_result, copied: Copied) -> None:
    if stat.S_ISLNK(status.st_mode):
        link = place.readlink()
        _writing(wanted, lambda: wanted.symlink_to(link))
        _own(wanted, status)
    elif stat.S_ISREG(status.st_mode):
        try:
            file = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            copied.passed.append((str(place), exc.strerror or "can't be read"))
            return
        try:
            copied.bytes += _writing(wanted, lambda: _copy_data(file, wanted))
        except _Unreadable as exc:
            wanted.unlink(missing_ok=True)
            copied.passed.append((str(place), str(exc)))
            return
        finally:
            os.close(file)
        _dress(wanted, status)
    else:
        copied.passed.append((str(place), "a device, pipe or socket"))
        return
    copied.files += 1


class _Unreadable(Exception):
    """The source can't be read to its end."""


def _copy_data(file: int, wanted: Path) -> int:
    """Holes stay holes."""
    made = os.open(wanted, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(file).st_size
        at = 0
        while at < size:
            data = _read(file, at)
            if not data:
                break
            if data.count(0) != len(data):
                os.pwrite(made, data, at)
            at += len(data)
        os.ftruncate(made, at)
        return at
    finally:
        os.close(made)


def _read(file: int, at: int) -> bytes:
    try:
        return os.pread(file, _CHUNK, at)
    except OSError as exc:
        raise _Unreadable(exc.strerror or "can't be read") from exc


def _writing(wanted: Path, act: Callable[[], Made]) -> Made:
    """What `act` makes at `wanted`. Raises OutOfSpace, StepFailed."""
    try:
        return act()
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(f"{wanted}: {exc.strerror}", hint="another --output DIR") from exc
        raise StepFailed(f"{wanted}: {exc.strerror}") from exc


def _dress(wanted: Path, status: os.stat_result) -> None:
    """Owner, mode and time as they were, as far as we may."""
    _own(wanted, status)
    with suppress(OSError):
        wanted.chmod(stat.S_IMODE(status.st_mode) & 0o1777)
    with suppress(OSError):
        os.utime(wanted, ns=(status.st_atime_ns, status.st_mtime_ns))


def _own(wanted: Path, status: os.stat_result) -> None:
    if os.geteuid() == 0:
        with suppress(OSError):
            os.lchown(wanted, status.st_uid, status.st_gid)
