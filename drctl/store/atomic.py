"""Changes to files that survive a kill at any moment: whole writes, atomic replacement, holes. Knows no format.

Every call that changes the disk passes `step` afterwards; tests hang a killer there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drctl.errors import IntegrityError, Locked, OutOfSpace

_libc = ctypes.CDLL(None, use_errno=True)
#: linux/falloc.h
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
#: UIO_MAXIOV of Linux: buffers in one pwritev.
_IOV_MAX = 1024
_ZEROES = bytes(1024 * 1024)

_fault: Callable[[str], None] | None = None


def set_fault(fault: Callable[[str], None] | None) -> None:
    """Call `fault(name)` after each change of a file; what it raises ends the operation there (tests only)."""
    global _fault
    _fault = fault


def step(name: str) -> None:
    """A change of the disk called `name` has just been done."""
    if _fault is not None:
        _fault(name)


@contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """A full file system as OutOfSpace that names `path`."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutOfSpace(f"{path}: {os.strerror(exc.errno)}", hint="free space there", path=path) from exc
        raise


def write_at(file: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
    """Write all of `buffers` at `offset`; returns the offset after them. Raises OSError with part written."""
    pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while pending:
        count = os.pwritev(file, pending[:_IOV_MAX], offset)
        step("write")
        offset += count
        while pending and count >= len(pending[0]):
            count -= len(pending.pop(0))
        if pending and count:
            pending[0] = pending[0][count:]
    return offset


def read_at(file: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes at `offset`; shorter at the end of the file only."""
    data = os.pread(file, length, offset)
    while len(data) < length:
        more = os.pread(file, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def sync_data(file: int) -> None:
    os.fdatasync(file)
    step("fdatasync")


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
    step("fsync directory")


def make_directory(path: Path) -> None:
    """`path` and what is missing above it, each name durable."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def temporary(path: Path) -> Path:
    """Where `path` is written before it is renamed into place; removed by the next writer that opens the store."""
    return path.with_name(f".{path.name}.tmp")


def commit(temp: Path, path: Path) -> None:
    """Put the finished and synced file `temp` in the place of `path`, durably."""
    temp.replace(path)
    step("rename")
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file; no error when it is gone already."""
    path.unlink(missing_ok=True)
    step("unlink")


def write_json(path: Path, value: Any) -> None:
    """Replace the JSON file `path` atomically and durably. Raises OutOfSpace."""
    temp = temporary(path)
    with space_errors(path):
        file = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_at(file, [json.dumps(value, indent=1).encode()], 0)
            os.fsync(file)
            step("fsync")
        finally:
            os.close(file)
        commit(temp, path)


def read_json(path: Path) -> Any:
    """The value of a JSON file, None when there is no file. Raises IntegrityError when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as exc:
        raise IntegrityError(f"{path}: not JSON: {exc}") from exc


def punch_hole(file: int, offset: int, length: int) -> None:
    """Make a range read as zeroes, freeing its blocks where the file system can."""
    result = _libc.fallocate(
        ctypes.c_int(file), ctypes.c_int(_KEEP_SIZE_PUNCH_HOLE), ctypes.c_int64(offset), ctypes.c_int64(length)
    )
    if result == 0:
        step("punch hole")
        return
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    for start in range(0, length, len(_ZEROES)):
        write_at(file, [memoryview(_ZEROES)[: min(len(_ZEROES), length - start)]], offset + start)


@contextmanager
def lock(path: Path, *, wait: bool = True, what: str = "") -> Iterator[int]:
    """Hold an exclusive lock on the file `path`. Raises Locked when another holds it and `wait` is false."""
    file = acquire(path, wait=wait, what=what)
    try:
        yield file
    finally:
        os.close(file)


def acquire(path: Path, *, wait: bool, what: str = "") -> int:
    """A file descriptor that holds the lock until it is closed. Raises Locked."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(file)
        raise Locked(f"{path}: {what or 'another process'} holds it", path=path) from None
    except BaseException:
        os.close(file)
        raise
    return file
