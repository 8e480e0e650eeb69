"""`home/evacuation.json`: this host is evacuated for a maintenance; what has to be taken up again afterwards."""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from drctl.errors import IntegrityError

log = logging.getLogger(__name__)

_FILE = "evacuation.json"


class EvacuationPhase(StrEnum):
    """leaving: under way, or broken off. evacuated: all is done. returning: being taken up again."""

    LEAVING = "leaving"
    EVACUATED = "evacuated"
    RETURNING = "returning"


class Evacuation(msgspec.Struct):
    """`sources` maps the groups that were protected here and are paused by it to the machines that it has shut down;
    `recoveries` those whose replicas lie here to their sources (`SITE/HOST`), where the command line pauses them."""

    since: float
    by: str = ""
    phase: EvacuationPhase = EvacuationPhase.LEAVING
    sources: dict[str, list[str]] = {}
    recoveries: dict[str, str] = {}

    def as_dict(self) -> dict[str, Any]:
        return dict(msgspec.to_builtins(self))


class EvacuationFile:
    """The record of one appliance; each change is whole on disk before what it announces is done."""

    def __init__(self, home: Path) -> None:
        self._path = home / _FILE

    def load(self) -> Evacuation | None:
        """Raises IntegrityError, naming the file: what is not known must not be taken for nothing."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Evacuation)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, ValueError) as exc:
            raise IntegrityError(
                f"{self._path}: {exc}", hint="remove it, and resume the groups by hand: drctl replicate resume"
            ) from exc

    def shut_down(self) -> set[str]:
        """The groups whose guests the evacuation has shut down; none where the file can't be read: an appliance has to
        start all the same, and its guests with it."""
        try:
            record = self.load()
        except IntegrityError as exc:
            log.error("%s", exc.message)
            return set()
        return {name for name, machines in record.sources.items() if machines} if record else set()

    def save(self, record: Evacuation) -> None:
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as out:
            out.write(msgspec.json.encode(record))
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
