"""Files put onto an ESX host's datastores over the shell: what SFTP would do, which not every version has.

A file grows beside its name and takes it when it is whole, by its SHA-256. A lost connection costs nothing of what had
arrived: the same call goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from drctl.errors import HypervisorRefused, IntegrityError, OutOfSpace
from drctl.hypervisor.esx.batch import appending
from drctl.hypervisor.esx.session import Runner, Session
from drctl.model.extent import MiB

#: Sent in one round trip; the host's answer to it is what is known to have arrived.
CHUNK = 8 * MiB
CHUNK_SECONDS = 600.0
DIGEST_SECONDS = 3600.0


class Uploads:
    """Files by their paths (by the datastore's UUID) there."""

    def __init__(self, session: Session, shell: Runner) -> None:
        self._session = session
        self._shell = shell

    def put(self, path: str, source: Path, *, on_progress: Callable[[int], None] | None = None) -> bool:
        """Send a file, unless it is there; whether it was sent. `on_progress` is told the bytes that are there.

        Raises OutOfSpace, HypervisorRefused, IntegrityError (what arrived is another file: it is gone, send anew)."""
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if self.digest(path) == sha256:
            return False
        part = f"{path}.part"
        size = source.stat().st_size
        there = self._size(part)
        if there > size:
            self._session.ask(["rm", "-f", part])
            there = 0
        with source.open("rb") as file:
            file.seek(there)
            while there < size:
                data = file.read(CHUNK)
                self._append(part, there, data)
                there += len(data)
                if on_progress:
                    on_progress(there)
        self._finish(path, part, sha256)
        return True

    def put_text(self, path: str, text: bytes) -> bool:
        """A small file, replaced in one step; whether it was another before."""
        sha256 = hashlib.sha256(text).hexdigest()
        if self.digest(path) == sha256:
            return False
        part = f"{path}.part"
        self._session.ask(["rm", "-f", part])
        self._append(part, 0, text)
        self._finish(path, part, sha256)
        return True

    def digest(self, path: str) -> str:
        """The SHA-256 of a file there; empty when there is none."""
        (answer,) = self._session.run(["sha256sum", path], timeout=DIGEST_SECONDS)
        word = answer.out.partition(" ")[0]
        return word if answer.code == 0 and len(word) == 64 else ""

    def _size(self, path: str) -> int:
        (answer,) = self._session.run(["stat", "-c", "%s", path])
        return int(answer.out) if answer.code == 0 and answer.out.strip().isdigit() else 0

    def _append(self, path: str, at: int, data: bytes) -> None:
        done = self._shell.run(appending(path, at), stdin=data, timeout=CHUNK_SECONDS)
        if done.code or self._size(path) != at + len(data):
            told = done.err.decode("utf-8", "replace").strip().rpartition("\n")[2]
            kind = OutOfSpace if "No space left" in told else HypervisorRefused
            name = self._session.name
            raise kind(f"{name}: {path} can't be written: {told or 'it is not as long as what was sent'}", host=name)

    def _finish(self, path: str, part: str, sha256: str) -> None:
        if self.digest(part) != sha256:
            self._session.ask(["rm", "-f", part])
            raise IntegrityError(f"{self._session.name}: {path} arrived damaged", hint="give the same command again")
        self._session.ask(["mv", "-f", part, path])
