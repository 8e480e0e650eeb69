"""What runs of a lab, as a value to print."""

from __future__ import annotations

from pathlib import Path

import msgspec

from drctl.errors import StepFailed
from drctl.lab import layout, process, site
from drctl.lab.layout import Layout
from drctl.lab.observer import Observer


class GuestReport(msgspec.Struct, frozen=True):
    """A guest as one site sees it. `numbers`: newest acknowledged record per chain."""

    name: str
    site: str
    state: str
    up_ns: int = 0
    numbers: list[int] = []
    trouble: str = ""


class Report(msgspec.Struct, frozen=True):
    """What `lab up` made and `lab status` sees. `processes`: name to whether it runs."""

    directory: str
    running: bool
    user: str = ""
    accelerator: str = ""
    config: str = ""
    run: str = ""
    witness_log: str = ""
    sites: dict[str, str] = {}
    processes: dict[str, bool] = {}
    guests: list[GuestReport] = []


def report(directory: Path) -> Report:
    """What runs of the lab. Works for root and for the lab user."""
    state = layout.load(directory)
    if state is None:
        return Report(str(directory), running=False)
    places = Layout(directory, Path(state.run))
    return Report(
        directory=str(directory),
        running=any(process.alive(known) for known in state.processes),
        user=state.user,
        accelerator=state.accelerator,
        config=str(directory / "drctl.toml"),
        run=state.run,
        witness_log=str(places.witness_log),
        sites={place.name: place.uri for place in places.sites},
        processes={known.name: process.alive(known) for known in state.processes},
        guests=_guests(places),
    )


def _guests(places: Layout) -> list[GuestReport]:
    try:
        channels = {(seen.site, seen.domain): seen for seen in Observer(places.directory).seen()}
    except StepFailed:
        channels = {}
    found = []
    for place in places.sites:
        try:
            states = site.domain_states(place)
        except StepFailed:
            continue
        for name, words in states.items():
            seen = channels.get((place.name, name))
            found.append(
                GuestReport(name, place.name, words, seen.up_ns, seen.numbers, seen.trouble)
                if seen
                else GuestReport(name, place.name, words)
            )
    return found
