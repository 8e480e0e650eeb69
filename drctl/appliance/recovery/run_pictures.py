"""Control methods that a run's report is illustrated by: recovered machines' screens, and the ages of checkpoints."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.control import Handler, Progress
from drctl.appliance.recovery.guest import RecoveredGuests
from drctl.appliance.recovery.state import MachinePhase, RecoveredMachine, RecoveryFiles
from drctl.appliance.recovery.store import GroupStores
from drctl.errors import DrctlError, IntegrityError, NotFound, WrongPhase
from drctl.hypervisor.picture import small_png
from drctl.model.ages import worst_ages
from drctl.model.ports import Hypervisor

#: A larger picture is left out, and the console's text told instead.
LARGEST = 256 * 1024
#: Of a console's text its end, in characters.
TEXT = 4096
DAY = 86400.0
PARTS = 288
#: At an interval of 5 s two days have that many.
MOST_CHECKPOINTS = 40_000


class ScreenHost(Hypervisor, Protocol):
    """A hypervisor that shows its machines' screens."""

    def screenshot(self, name: str) -> bytes: ...


class RunPictures:
    """Methods may be called from any thread."""

    def __init__(self, host: ScreenHost, home: Path, clock: Callable[[], float] = time.time) -> None:
        self._host = host
        self._files = RecoveryFiles(home / "recoveries")
        self._guests = RecoveredGuests(host, self._files)
        self._stores = GroupStores(home / "store")
        self._clock = clock

    def handlers(self) -> dict[str, Handler]:
        return {"recovery.screen": self.screen, "checkpoint.ages": self.ages}

    def screen(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{recovery, machine} → {png (base64) or ""; text: of its console, where it has no display}."""
        machine = self._machine(str(params["recovery"]), str(params.get("machine")))
        try:
            png = small_png(self._host.screenshot(machine.recovery_name))
        except (DrctlError, IntegrityError) as exc:
            return {"png": "", **self._text(params, progress, exc.message)}
        if len(png) > LARGEST:
            return {"png": "", **self._text(params, progress, f"a picture of {len(png)} bytes")}
        return {"png": base64.b64encode(png).decode(), "text": "", "reason": ""}

    def _text(self, params: dict[str, Any], progress: Progress, reason: str) -> dict[str, str]:
        try:
            return {"text": str(self._guests.console(params, progress)["text"])[-TEXT:], "reason": reason}
        except DrctlError as exc:
            return {"text": "", "reason": f"{reason}; {exc.message}"}

    def _machine(self, recovery: str, name: str) -> RecoveredMachine:
        record = self._files.load(recovery)
        found = next((one for one in record.machines if one.name == name), None)
        if found is None:
            raise NotFound("machine", name, known=[one.name for one in record.machines])
        if found.phase not in (MachinePhase.RUNNING, MachinePhase.STARTED):
            raise WrongPhase(f"{name} does not run in {recovery}: {found.phase}")
        return found

    def ages(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, seconds (86400), parts (288)} → {begin, end, worst: [seconds or null]}."""
        del progress
        end = self._clock()
        begin = end - min(float(params.get("seconds") or DAY), 30 * DAY)
        parts = min(max(1, int(params.get("parts") or PARTS)), 2000)
        with self._stores.open(str(params.get("group"))) as store:
            times = sorted(one.time for one in store.checkpoints(MOST_CHECKPOINTS))
        worst = worst_ages(times, begin, end, parts)
        return {"begin": begin, "end": end, "worst": [None if age is None else round(age, 1) for age in worst]}
