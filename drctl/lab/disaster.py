"""The end of a site: everything of it killed at once, its directory and the operator's configuration deleted."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from drctl.errors import NotFound, StepFailed
from drctl.lab import layout, process, site
from drctl.lab.layout import Layout, State
from drctl.lab.process import Process
from drctl.lab.teardown import appliance_children, remove

#: SIGKILL is not asked for; a process that is still there after this hangs in the kernel.
_GONE_SECONDS = 10.0


def destroy_site(directory: Path, name: str, progress: Callable[[str], None]) -> int:
    """Destroy one site of a lab without warning. Returns the host's time (ns) right before the first kill.

    SIGKILL to its QEMUs, libvirtd, appliance and all that the appliance started; nothing of them may say goodbye. Then
    the site's directories, drctl.toml and groups/ are deleted. Raises NotFound for a lab or site that is not there."""
    state = layout.load(directory)
    if state is None:
        raise NotFound("lab", str(directory))
    places = Layout(directory, Path(state.run))
    place = next((each for each in places.sites if each.name == name), None)
    if place is None:
        raise NotFound("site", name, known=[each.name for each in places.sites])
    victims = _victims(state, place)
    moment = time.time_ns()
    for victim in victims:
        if process.alive(victim):
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
    _await_end(victims)
    progress(f"killed {len(victims)} processes of {name}")
    for path in (place.root, place.run, directory / "groups"):
        if path.exists():
            remove(path)
    (directory / "drctl.toml").unlink(missing_ok=True)
    shutil.rmtree(directory / "ca", ignore_errors=True)
    progress(f"deleted {place.root}, drctl.toml and groups/")
    return moment


def _victims(state: State, place: layout.Site) -> list[Process]:
    """Machines first: what they write after the moment is nobody's."""
    daemons = [known for known in state.processes if known.name.startswith(f"{place.name}/")]
    return [*site.stray_machines(place), *daemons, *appliance_children(place)]


def _await_end(victims: list[Process]) -> None:
    deadline = time.monotonic() + _GONE_SECONDS
    while left := [victim for victim in victims if process.alive(victim)]:
        if time.monotonic() > deadline:
            raise StepFailed(f"still running: {', '.join(f'{v.name} ({v.pid})' for v in left)}")
        time.sleep(0.01)
