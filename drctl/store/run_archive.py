"""Records of runs that a site keeps, and heads of records that it keeps for another. Knows no event's meaning.

RUN.jsonl      the record, line by line as whoever conducts the run wrote it (run_log.py)
RUN.sig        what this appliance signs of it: up to which line, and that line's hash
PLAN.lease     who may run a plan now
anchors.log    {run, lines, head, time, by}: heads of records that are kept at another site"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from drctl.errors import AlreadyExists, IntegrityError, Locked, NotFound, Refused
from drctl.model.duration import format_duration
from drctl.store import atomic
from drctl.store.run_log import RunLog, list_runs, read_run, run_path

#: What is not renewed ends by itself; seconds.
LEASE_SECONDS = 30.0
LONGEST_SECONDS = 600.0
#: One record so large is no run any more.
MAXIMUM_RECORD = 256 * 1024 * 1024
#: One piece that is read; below a control message's bound, also when every byte is escaped.
PIECE = 2 * 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}")


class RunArchive:
    """One appliance's. Methods may be called from any thread.

    Invariant: what `append` returned from is durable, and follows what was there."""

    def __init__(self, directory: Path, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, RunLog] = {}

    # -- who may run a plan -------------------------------------------------------------------------------------------

    def begin(self, run: str, plan: str, holder: str, seconds: float) -> dict[str, Any]:
        """Take the plan for a run: its lease, and how far the run's record is here. Raises Locked."""
        for name in (run, plan):
            _check(name)
        with self._lock:
            now = self._clock()
            before = self._lease(plan)
            if before is not None and before["taken"] <= now + 1.0 and now < before["expires"]:
                left = format_duration(max(0.0, before["expires"] - now))
                raise Locked(
                    f"plan {plan} is run by {before['holder']} as {before['run']}; its lease ends in {left}",
                    hint="wait for it; what is not renewed ends by itself at that time",
                    plan=plan,
                )
            atomic.make_directory(self._directory)
            lease = {"run": run, "plan": plan, "holder": holder, "taken": now, "token": secrets.token_hex(16)}
            lease["expires"] = now + _bounded(seconds)
            atomic.write_json(self._directory / f"{plan}.lease", lease)
            log = self._log(run, create=False)
            told = {"lines": log.count, "head": log.head} if log else {"lines": 0, "head": ""}
            return {"token": lease["token"], **told}

    def renew(self, plan: str, token: str, seconds: float) -> None:
        """Raises Locked when the lease was lost."""
        with self._lock:
            lease = self._own(plan, token)
            lease["expires"] = self._clock() + _bounded(seconds)
            atomic.write_json(self._directory / f"{plan}.lease", lease)

    def end(self, plan: str, token: str) -> bool:
        """Give the plan back; one that was lost is no error."""
        with self._lock:
            lease = self._lease(plan)
            if lease is None or lease["token"] != token:
                return False
            if log := self._open.pop(str(lease["run"]), None):
                log.close()
            (self._directory / f"{plan}.lease").unlink(missing_ok=True)
            return True

    def _own(self, plan: str, token: str) -> dict[str, Any]:
        _check(plan)
        lease = self._lease(plan)
        if lease is None or lease["token"] != token:
            raise Locked(f"the lease on plan {plan} is lost", hint="somebody else runs it: drctl run list", plan=plan)
        return lease

    def _lease(self, plan: str) -> dict[str, Any] | None:
        """A file that can't be read binds nobody: it would bind for ever."""
        with suppress(IntegrityError, ValueError, KeyError, TypeError):
            lease: dict[str, Any] | None = atomic.read_json(self._directory / f"{plan}.lease")
            if lease is not None:
                return {**lease, "expires": float(lease["expires"]), "taken": float(lease["taken"])}
        return None

    # -- records ------------------------------------------------------------------------------------------------------

    def append(self, plan: str, token: str, first: int, lines: Sequence[str]) -> dict[str, Any]:
        """Add lines from number `first` on; what is here already, by an answer that was lost, has to be the same.

        Raises Locked without the plan's lease, IntegrityError when they don't follow, OutOfSpace."""
        with self._lock:
            run = str(self._own(plan, token)["run"])
            log = self._log(run, create=True)
            assert log is not None, "it was made"
            if first > log.count + 1:
                raise IntegrityError(f"{run}: lines {log.count + 1} to {first - 1} are missing here")
            known = log.count + 1 - first
            log.extend([line.encode() for line in lines[known:]])
            if log.path.stat().st_size > MAXIMUM_RECORD:
                raise Refused(f"the record of {run} is larger than any run's")
            return {"run": run, "lines": log.count, "head": log.head}

    def _log(self, run: str, *, create: bool) -> RunLog | None:
        if run in self._open:
            return self._open[run]
        path = run_path(self._directory, run)
        try:
            log = RunLog.create(path) if create and not path.exists() else RunLog.open(path)[0]
        except NotFound:
            return None
        except AlreadyExists:
            log = RunLog.open(path)[0]
        self._open[run] = log
        return log

    def names(self) -> list[str]:
        return list_runs(self._directory)

    def events(self, run: str) -> list[dict[str, Any]]:
        """Those of the sound lines. Raises NotFound."""
        return read_run(self._path(run))[0]

    def read(self, run: str, offset: int) -> dict[str, Any]:
        """A piece of a record, whole lines but for what may be torn. Raises NotFound."""
        path = self._path(run)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, offset))
            data = file.read(PIECE)
        return {"text": data.decode("ascii", "replace"), "size": size}

    def signature(self, run: str) -> dict[str, Any] | None:
        with suppress(IntegrityError, ValueError):
            found: dict[str, Any] | None = atomic.read_json(self._path(run).with_suffix(".sig"))
            return found
        return None

    def sign(self, run: str, told: Mapping[str, Any], *, durable: bool) -> None:
        """Put a signature beside the record, in place of the one before."""
        path = self._path(run).with_suffix(".sig")
        if durable:
            atomic.write_json(path, dict(told))
            return
        fresh = path.with_suffix(".sig.new")
        fresh.write_text(json.dumps(told))
        fresh.replace(path)

    def _path(self, run: str) -> Path:
        _check(run)
        path = run_path(self._directory, run)
        if not path.exists():
            raise NotFound("run", run, known=self.names()[-12:])
        return path

    # -- heads of others' records -------------------------------------------------------------------------------------

    def anchor(self, run: str, lines: int, head: str, by: str) -> None:
        """Note a head, durably. Lines are only ever added."""
        _check(run)
        if not re.fullmatch(r"[0-9a-f]{64}", head) or lines < 1:
            raise Refused(f"{head!r} at line {lines} is no head of a record")
        row = {"run": run, "lines": lines, "head": head, "time": self._clock(), "by": by}
        with self._lock:
            atomic.make_directory(self._directory)
            path = self._directory / "anchors.log"
            with atomic.space_errors(path), path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                atomic.sync_data(file.fileno())

    def anchors(self, run: str) -> list[dict[str, Any]]:
        """The heads that were noted of a run, oldest first; of torn lines nothing."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self._directory / "anchors.log").read_bytes().splitlines():
                with suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict) and row.get("run") == run:
                        found.append(row)
        return found

    def close(self) -> None:
        with self._lock:
            for log in self._open.values():
                log.close()
            self._open.clear()


def _check(name: str) -> None:
    """Names become those of files. Raises Refused."""
    if not _NAME.fullmatch(name):
        raise Refused(f"{name!r} names no run and no plan")


def _bounded(seconds: float) -> float:
    return min(max(1.0, seconds or LEASE_SECONDS), LONGEST_SECONDS)
