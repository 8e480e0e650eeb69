"""`lab down`, done as the lab user: ends what lab.json and libvirt's pid files name, removes the directories."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from drctl.errors import StepFailed
from drctl.lab import layout, process, site
from drctl.lab.layout import Layout, State
from drctl.lab.process import Process

Progress = Callable[[str], None]


def tear_down(directory: Path, progress: Progress) -> None:
    """Ends the lab, also one whose `up` broke off. Raises StepFailed when something survives."""
    state = layout.load(directory)
    if state is None:
        return
    places = Layout(directory, Path(state.run))
    _stop(state, lambda name: name.endswith("/appliance"), progress)
    strays = [child for place in places.sites for child in appliance_children(place)]
    left = process.stop(strays)
    for place in places.sites:
        progress(f"pulling the plug of the machines at {place.name}")
        site.destroy_all(place)
    _stop(state, lambda name: True, progress)
    left += process.stop([stray for place in places.sites for stray in site.stray_machines(place)], patience=5)
    left += [known for known in state.processes if process.alive(known)]
    if left:
        raise StepFailed(f"still running: {', '.join(f'{known.name} ({known.pid})' for known in left)}")
    progress("removing the lab's directories")
    # It may be gone already: an earlier `down` that broke off here has to be able to end.
    if places.run.name.startswith(layout.RUN_PREFIX) and places.run.exists():
        remove(places.run)
    remove(directory)


def _stop(state: State, chosen: Callable[[str], bool], progress: Progress) -> None:
    running = [known for known in state.processes if chosen(known.name) and process.alive(known)]
    for known in running:
        progress(f"stopping {known.name}")
    process.stop(running)


def appliance_children(place: layout.Site) -> list[Process]:
    """Taps, shippers, receivers and views of the site's appliance, by its pid files; they outlive it by design."""
    found = []
    for path in (place.appliance_run / "pids").glob("*.json"):
        try:
            facts = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
        except (OSError, msgspec.DecodeError):
            continue
        pid, start = facts.get("pid"), facts.get("start_time", facts.get("start"))
        if isinstance(pid, int) and isinstance(start, int):
            found.append(Process(f"{place.name}/{path.stem}", pid, start))
    return found


def remove(directory: Path) -> None:
    """Removes a directory; its own entry stays when its parent belongs to somebody else and is sticky."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    try:
        directory.rmdir()
    except PermissionError:
        return
