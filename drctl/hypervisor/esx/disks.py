"""Disks on an ESX host's datastores, by vmkfstools: made, cloned by a worker that outlives the connection, deleted,
grown; raw device mappings and locks told."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from drctl.errors import HypervisorRefused, NotFound, OutOfSpace
from drctl.hypervisor.esx.batch import Answer, Command, worker
from drctl.hypervisor.esx.session import Session

POLL_SECONDS = 1.0
CLONE_SECONDS = 24 * 3600.0
#: A clone tells its progress by the percent; one of 10 TiB at 100 MB/s takes 18 minutes for it.
STALL_SECONDS = 3600.0
_CODE = re.compile(r"\((\d+)\)\.?\s*$")
#: DiskLib's own numbers; others are errno << 16 | 9, or | 2 from the object layer.
_NO_SPACE, _LOCKED = 13, 16392
_RDM = re.compile(r"Disk .* is (?:a )?(Passthrough|Non-passthrough) Raw Device Mapping\nMaps to: (\S+)")
_LOCK = re.compile(r"^gen \d+, mode (\d), owner ([0-9a-f-]+)", re.MULTILINE)


class LockMode(StrEnum):
    """How a file is held, by the host that holds it."""

    FREE = "free"
    EXCLUSIVE = "exclusive"
    SHARED = "shared"
    MULTI_WRITER = "multi-writer"


@dataclass(frozen=True, slots=True)
class RawMapping:
    physical: bool
    device: str


class Disks:
    """Disks by the paths (by UUID) of their descriptors."""

    def __init__(self, session: Session, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._session = session
        self._sleep = sleep

    def create(self, path: str, size: int) -> None:
        """A thin disk of `size` bytes; no error when one is there that was made so. Raises OutOfSpace."""
        if not self.exists(path):
            self._run(["vmkfstools", "-c", str(size), "-d", "thin", path])

    def exists(self, path: str) -> bool:
        return self._session.run(["test", "-e", path])[0].code == 0

    def delete(self, path: str) -> None:
        """The descriptor and its data; no error when they are gone."""
        if self.exists(path):
            self._run(["vmkfstools", "-U", path])

    def rename(self, path: str, name: str) -> None:
        """No error when it was done before."""
        if self.exists(path) or not self.exists(name):
            self._run(["vmkfstools", "-E", path, name])

    def grow(self, path: str, size: int) -> None:
        self._run(["vmkfstools", "-X", str(size), path])

    def mapping(self, path: str) -> RawMapping | None:
        """Where a raw device mapping leads; None of another disk."""
        (answer,) = self._session.run(["vmkfstools", "-q", path])
        if match := _RDM.search(answer.out):
            return RawMapping(match[1] == "Passthrough", match[2])
        if "is not an rdm" in answer.out + answer.err:
            return None
        raise self._failure(answer)

    def lock(self, path: str) -> LockMode:
        """Who holds a file."""
        answer = self._run(["vmkfstools", "-D", path])
        match = _LOCK.search(answer.out)
        if match is None or int(match[1]) > 3:
            raise HypervisorRefused(f"{self._session.name}: the lock of {path} is not told as it is known")
        return tuple(LockMode)[int(match[1])]

    def can_read(self, path: str) -> bool:
        """Whether a file's bytes can be had: a host may refuse it for what a running machine holds."""
        (answer,) = self._session.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "count=1"])
        return answer.code == 0

    def clone(
        self,
        source: str,
        target: str,
        *,
        on_progress: Callable[[int], None] | None = None,
        timeout: float = CLONE_SECONDS,
    ) -> None:
        """Flatten a disk's chain into a new thin disk, by a worker of its own that a lost connection does not end.

        The same call again joins the worker, or does nothing when the clone is there. What a failed one left is
        deleted. Raises OutOfSpace, HypervisorRefused."""
        log = f"{target}.drctl-clone"
        self._session.ask(worker(["vmkfstools", "-i", source, "-d", "thin", target], target, log))
        waited, still, last = 0.0, 0.0, ""
        while (state := self._progress(log, on_progress))[0] is None:
            still = still + POLL_SECONDS if state[1] == last else 0.0
            last = state[1]
            if waited > timeout or still > STALL_SECONDS:
                problem = f"the clone of {source} does not come on; whether its worker lives is not known"
                hint = f"when no vmkfstools runs there: rm '{log}'"
                raise HypervisorRefused(f"{self._session.name}: {problem}", hint=hint)
            self._sleep(POLL_SECONDS)
            waited += POLL_SECONDS
        code = state[0]
        (said,) = self._session.run(["cat", log])
        if code:
            self.delete(target)
        self._session.run(["rm", "-f", f"{log}.code", log])
        if code:
            raise self._failure(Answer(("vmkfstools", "-i"), code, said.out, said.err))

    def _progress(self, log: str, on_progress: Callable[[int], None] | None) -> tuple[int | None, str]:
        """The worker's exit code, None while it runs; and its last words."""
        said, code = self._session.run(["tail", "-c", "400", log], ["cat", f"{log}.code"])
        shares = re.findall(r"Clone: (\d+)% done\.", said.out)
        if shares and on_progress:
            on_progress(int(shares[-1]))
        return (int(code.out) if code.code == 0 and code.out.strip().isdigit() else None), said.out

    def _run(self, command: Command) -> Answer:
        (answer,) = self._session.run(command)
        if answer.code:
            raise self._failure(answer)
        return answer

    def _failure(self, answer: Answer) -> HypervisorRefused | OutOfSpace | NotFound:
        """vmkfstools' last words, behind its last progress, and what their number means."""
        words = re.split(r"[\r\n]|% done\.", (answer.out + answer.err).strip())[-1].strip()
        text = f"{self._session.name}: vmkfstools: {words or f'exit code {answer.code}'}"
        match = _CODE.search(words)
        number = int(match[1]) if match else 0
        if number == _NO_SPACE or _errno(number) == errno.ENOSPC:
            return OutOfSpace(text, hint="free space on the datastore")
        if number == _LOCKED or _errno(number) == errno.EBUSY:
            return HypervisorRefused(text, hint="another machine or program holds the file: vmkfstools -D tells who")
        meaning = os.strerror(_errno(number)) if _errno(number) else ""
        return HypervisorRefused(text + (f": {meaning}" if meaning and meaning not in text else ""))


def _errno(number: int) -> int:
    """The errno in one of vmkfstools' numbers; 0 when there is none."""
    return number >> 16 if number & 0xFFFF in (2, 9) else 0
