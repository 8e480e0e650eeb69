"""A handover as a durable object: how far a switchover is at its source. Knows neither hypervisor nor stream."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from drctl.appliance.source.image_stamp import Stamp
from drctl.errors import IntegrityError
from drctl.model.move import OnTimeout
from drctl.store import atomic

FORMAT = 1
#: Longest wait for a guest to power off, unless told otherwise.
SHUTDOWN_SECONDS = 180.0


class HandoverPhase(StrEnum):
    STOPPING = "stopping"
    FINAL = "final"
    HANDED_OVER = "handed-over"
    TAKING_BACK = "taking-back"


class FinalMark(msgspec.Struct, frozen=True):
    """The last checkpoint of the source's reign. `time`: seconds since the epoch, at the recovery side's clock."""

    number: int
    time: float
    sequence: int
    epoch: str


class Handover(msgspec.Struct):
    """One group's handover. `machines`: those that ran when it began, in the order of the group; `suspended`: those of
    them that did not power off in time; `stamps`: each disk's image right after the final mark.

    Invariant: `final` is set from phase `final` on."""

    group: str
    phase: HandoverPhase
    generation: int
    machines: list[str]
    on_timeout: OnTimeout = OnTimeout.ABORT
    shutdown_seconds: float = SHUTDOWN_SECONDS
    suspended: list[str] = msgspec.field(default_factory=list)
    final: FinalMark | None = None
    stamps: dict[str, Stamp] = msgspec.field(default_factory=dict)
    times: dict[str, float] = msgspec.field(default_factory=dict)
    reason: str = ""
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = msgspec.to_builtins(self)
        del data["stamps"]
        return data


class HandoverFiles:
    """The records; each save is atomic and durable when it returns."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._directory.glob("[!.]*.json"))

    def load(self, group: str) -> Handover | None:
        """None when there is none. Raises IntegrityError."""
        data = atomic.read_json(self._directory / f"{group}.json")
        if data is None:
            return None
        try:
            return msgspec.convert(data, Handover)
        except msgspec.ValidationError as exc:
            raise IntegrityError(f"{self._directory / group}.json: {exc}") from exc

    def save(self, handover: Handover) -> None:
        atomic.make_directory(self._directory)
        atomic.write_json(self._directory / f"{handover.group}.json", msgspec.to_builtins(handover))

    def remove(self, group: str) -> None:
        atomic.remove(self._directory / f"{group}.json")
