"""The far end of an installation: small changes of one host, as root, each done once. Knows nothing of drctl.

Its text is sent to the host's own Python (3.11 or newer) and nothing of it stays there, so it imports the standard
library alone. Requests are JSON lines on stdin, an answer each on stdout; after a `put` the file's bytes follow. Every
operation says whether it changed anything; files are replaced atomically. It holds the installer's lock."""

from __future__ import annotations

import errno
import fcntl
import grp
import hashlib
import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_CHUNK = 1024 * 1024
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class _Failure(Exception):
    """An operation that did not succeed: `kind` is one word for the operator's side."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Agent:
    """One operation per method. `root` stands in front of every path: a test's own place, `/` on a host."""

    def __init__(self, source: IO[bytes], root: Path = Path("/")) -> None:
        self._source = source
        self._root = root
        self._lock: int | None = None

    # -- who is here, and what is there ------------------------------------------------------------------------------

    def lock(self, path: str, who: str) -> bool:
        """Hold the installer's lock until this process ends."""
        file = self._at(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise _Failure("locked", f"{holder or 'another drctl'} is at work there") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{who}, since {time.strftime('%H:%M:%S')}\n".encode(), 0)
        self._lock = descriptor
        return True

    def read(self, path: str) -> str | None:
        """A file's text; None when there is none."""
        file = self._at(path)
        return file.read_text("utf-8", "replace") if file.is_file() else None

    def names(self, path: str) -> list[str]:
        """What is in a directory; nothing when there is none."""
        directory = self._at(path)
        return sorted(child.name for child in directory.iterdir()) if directory.is_dir() else []

    def target(self, path: str) -> str:
        """Where a symbolic link points; empty when it is none."""
        link = self._at(path)
        return str(link.readlink()) if link.is_symlink() else ""

    def have(self, path: str, sha256: str) -> bool:
        """Whether a file is there and whole."""
        return self._at(path).is_file() and _digest(self._at(path)) == sha256

    # -- changes -----------------------------------------------------------------------------------------------------

    def user(self, name: str, home: str, groups: list[str]) -> bool:
        """A system user with a group of its name, in those of `groups` that exist."""
        changed = False
        try:
            pwd.getpwnam(name)
        except KeyError:
            shell = "/usr/sbin/nologin"
            _run(
                ["useradd", "--system", "--user-group", "--home-dir", home, "--no-create-home", "--shell", shell, name]
            )
            changed = True
        there = {group.gr_name: group.gr_mem for group in grp.getgrall()}
        missing = [group for group in groups if group in there and name not in there[group]]
        if missing:
            _run(["usermod", "--append", "--groups", ",".join(missing), name])
        return changed or bool(missing)

    def user_gone(self, name: str) -> bool:
        """No such user, and no group of its name."""
        try:
            pwd.getpwnam(name)
        except KeyError:
            return False
        _run(["userdel", name])
        if any(group.gr_name == name for group in grp.getgrall()):
            _run(["groupdel", name])
        return True

    def directory(self, path: str, mode: int, owner: str = "root", group: str = "") -> bool:
        """A directory of that mode and owner."""
        place = self._at(path)
        changed = not place.is_dir()
        place.mkdir(parents=True, exist_ok=True)
        return _own(place, mode, owner, group) or changed

    def file(self, path: str, text: str, mode: int, owner: str = "root", group: str = "") -> bool:
        """A file with exactly that text."""
        place = self._at(path)
        if place.is_file() and place.read_bytes() == text.encode():
            return _own(place, mode, owner, group)
        place.parent.mkdir(parents=True, exist_ok=True)
        _replace(place, text.encode(), mode, owner, group)
        return True

    def block(self, path: str, name: str, text: str) -> bool:
        """A marked part of somebody else's file; an empty `text` takes it out, and the file with it if it is empty."""
        place = self._at(path)
        old = place.read_text("utf-8") if place.is_file() else ""
        begin, end = f"# {name} begin\n", f"# {name} end\n"
        before, found, rest = old.partition(begin)
        after = rest.partition(end)[2] if found else ""
        new = before + (begin + text + end if text else "") + after
        if new == old:
            return False
        if not new:
            place.unlink()
            return True
        place.parent.mkdir(parents=True, exist_ok=True)
        mode = place.stat().st_mode & 0o777 if place.is_file() else 0o644
        _replace(place, new.encode(), mode, "root", "")
        return True

    def link(self, path: str, target: str) -> bool:
        """A symbolic link, switched in one step."""
        place = self._at(path)
        if place.is_symlink() and str(place.readlink()) == target:
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(place)
        return True

    def remove(self, path: str) -> bool:
        """Nothing at that path. Mounts below it are not crossed, links not followed."""
        place = self._at(path)
        if place.is_dir() and not place.is_symlink():
            _run(["rm", "-rf", "--one-file-system", str(place)])
            return True
        if place.is_symlink() or place.exists():
            place.unlink()
            return True
        return False

    def put(self, path: str, size: int, sha256: str) -> bool:
        """A file from the bytes that follow; nothing of it stays when they are not what was announced."""
        place = self._at(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.part")
        left, failure = size, None
        digest = hashlib.sha256()
        try:
            with fresh.open("wb") as file:
                while left and (data := self._source.read(min(left, _CHUNK))):
                    left -= len(data)
                    digest.update(data)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            failure = exc
        while left and (data := self._source.read(min(left, _CHUNK))):
            left -= len(data)  # the next request comes after all of them
        if failure is not None or digest.hexdigest() != sha256:
            fresh.unlink(missing_ok=True)
            raise failure or _Failure("damaged", f"{place.name} arrived damaged")
        fresh.replace(place)
        return True

    # -- programs ----------------------------------------------------------------------------------------------------

    def run(self, argv: list[str], user: str = "", stdin: str = "", timeout: float = 120) -> dict[str, Any]:
        """A program, to its end; as another user, with that user's groups, if one is named."""
        options: dict[str, Any] = {}
        if user:
            entry = pwd.getpwnam(user)
            groups = os.getgrouplist(user, entry.pw_gid)
            options = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups, "umask": 0o077}
        done = subprocess.run(
            argv,
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
            cwd="/",
            env=_ENVIRONMENT,
            **options,
        )
        return {"code": done.returncode, "out": _text(done.stdout), "err": _text(done.stderr)}

    def processes(self, needle: str) -> list[list[Any]]:
        """[pid, command line] of all that name `needle` in their command line, but this one."""
        found: list[list[Any]] = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                words = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended meanwhile
            if needle in words and int(directory.name) != os.getpid():
                found.append([int(directory.name), words.strip()])
        return found

    def end(self, pids: list[int], seconds: float) -> list[int]:
        """End processes: SIGTERM, SIGKILL after `seconds`. Returns those that are still there."""
        for number, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, 2.0)):
            for pid in pids:
                _signal(pid, number)
            deadline = time.monotonic() + wait
            while (pids := [pid for pid in pids if _lives(pid)]) and time.monotonic() < deadline:
                time.sleep(0.02)
        return pids

    def _at(self, path: str) -> Path:
        return self._root / path.lstrip("/")


_ENVIRONMENT = {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": "/", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, check=False, env=_ENVIRONMENT, cwd="/")
    if done.returncode:
        raise _Failure("failed", f"{argv[0]}: {_text(done.stderr).strip() or f'exit code {done.returncode}'}")


def _text(data: bytes) -> str:
    return data[-65536:].decode(errors="replace")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own(place: Path, mode: int, owner: str, group: str) -> bool:
    uid = pwd.getpwnam(owner).pw_uid
    gid = grp.getgrnam(group).gr_gid if group else pwd.getpwnam(owner).pw_gid
    status = place.stat()
    if (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (mode, uid, gid):
        return False
    os.chown(place, uid, gid)
    place.chmod(mode)
    return True


def _replace(place: Path, data: bytes, mode: int, owner: str, group: str) -> None:
    fresh = place.with_name(f".{place.name}.new")
    try:
        with fresh.open("wb") as file:
            fresh.chmod(0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _own(fresh, mode, owner, group)
        fresh.replace(place)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def answer(agent: Agent, request: dict[str, Any]) -> dict[str, Any]:
    """One request's answer; what an operation refuses is in it."""
    method: Callable[..., Any] = getattr(agent, str(request.pop("op")))
    try:
        return {"result": method(**request)}
    except _Failure as exc:
        return {"error": exc.kind, "message": str(exc)}
    except subprocess.TimeoutExpired as exc:
        return {"error": "failed", "message": f"{exc.cmd[0]} did not end within {exc.timeout:.0f} s"}
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        place = f"{exc.filename}: " if exc.filename else ""
        return {"error": "full" if full else "failed", "message": f"{place}{exc.strerror or exc}"}


def serve(source: IO[bytes], sink: IO[bytes]) -> int:
    """Answer until the operator's side hangs up."""
    os.umask(0o022)
    agent = Agent(source)
    while line := source.readline():
        sink.write(json.dumps(answer(agent, json.loads(line))).encode() + b"\n")
        sink.flush()
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.stdin.buffer, sys.stdout.buffer))
