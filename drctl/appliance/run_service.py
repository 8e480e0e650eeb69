"""Control methods about runs of plans: their records are kept and signed here, or their heads for another site."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drctl.appliance.config import Home
from drctl.appliance.control import Handler, Progress
from drctl.errors import SetupFailed
from drctl.plan.record import read_record
from drctl.replication.statement import sign_statement
from drctl.store.run_archive import RunArchive

SIGNATURE_FORMAT = 1
#: A list's rows are made by reading records; whoever wants more names them.
MOST_LISTED = 500


def open_runs(home: Home) -> RunService:
    """The runs that this appliance keeps."""
    config = home.config
    place = {"site": config.site, "host": config.host, "appliance": config.uuid}
    return RunService(RunArchive(home.path / "runs", time.time), home.path / "tls", place, time.time)


class RunService:
    """Methods may be called from any thread. `place` is {site, host, appliance} of this appliance."""

    def __init__(self, archive: RunArchive, tls: Path, place: Mapping[str, str], clock: Callable[[], float]) -> None:
        self._archive = archive
        self._tls = tls
        self._place = dict(place)
        self._clock = clock

    def handlers(self) -> dict[str, Handler]:
        return {
            "run.begin": self.begin,
            "run.renew": self.renew,
            "run.append": self.append,
            "run.end": self.end,
            "run.list": self.list_,
            "run.read": self.read,
            "run.anchor": self.anchor,
            "run.anchored": self.anchored,
        }

    def begin(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        holder = str(params.get("holder") or params.get("by") or "somebody")
        run, plan = str(params["run"]), str(params["plan"])
        return self._archive.begin(run, plan, holder, float(params.get("seconds") or 0)) | self._place

    def renew(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        self._archive.renew(str(params["plan"]), str(params["token"]), float(params.get("seconds") or 0))
        return {}

    def append(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Durable when it answers; signed up to the last of the lines, where this appliance has a certificate."""
        del progress
        lines = [str(line) for line in params.get("lines") or ()]
        done = self._archive.append(str(params["plan"]), str(params["token"]), int(params["first"]), lines)
        told = {"format": SIGNATURE_FORMAT, **done, "time": round(self._clock(), 3), **self._place}
        try:
            told |= sign_statement(self._tls, signed_text(told))
        except SetupFailed as exc:
            return done | {"unsigned": exc.message}
        self._archive.sign(done["run"], told, durable=bool(params.get("last")))
        return done

    def end(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        return {"ended": self._archive.end(str(params["plan"]), str(params["token"]))}

    def list_(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        """The newest so many, oldest first."""
        del progress
        last = min(int(params.get("last") or MOST_LISTED), MOST_LISTED)
        return [self._row(name) for name in self._archive.names()[-last:]]

    def _row(self, name: str) -> dict[str, Any]:
        events = self._archive.events(name)
        try:
            record = read_record(events)
        except (KeyError, TypeError, ValueError):
            record = None
        row: dict[str, Any] = {"run": name, "lines": len(events), "plan": None}
        if record is None:
            return row
        failed = sum(step.outcome == "failed" for step in record.steps.values())
        return row | {
            "plan": record.plan,
            "mode": record.mode,
            "verdict": record.verdict,
            "began": record.began,
            "ended": record.ended,
            "operator": record.facts.get("operator"),
            "failed": failed,
        }

    def read(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        run = str(params["run"])
        signature = self._archive.signature(run)  # before: it then covers no line that is not in the text
        return self._archive.read(run, int(params.get("offset") or 0)) | {"signature": signature} | self._place

    def anchor(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        by = str(params.get("by") or "")
        self._archive.anchor(str(params["run"]), int(params["lines"]), str(params["head"]), by)
        return dict(self._place)

    def anchored(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        del progress
        return self._archive.anchors(str(params["run"]))


def signed_text(told: Mapping[str, Any]) -> bytes:
    """What of a signature's fields is signed: which record, how far, when and by whom."""
    fields = ("format", "run", "lines", "head", "time", "site", "host", "appliance")
    return b"".join(f"{name}={told.get(name)}\n".encode() for name in fields)
