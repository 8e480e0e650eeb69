"""Where a group is, before and after a change: what each of its appliances sees, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.inventory import Answer, Inventory, Place, ask, in_parallel

#: A machine in one of these states can write.
ALIVE = ("running", "paused")


def take(context: Context, inventory: Inventory, group: str) -> list[dict[str, Any]]:
    """The group's pictures, source first: {site, host, role, state, generation, machines}; `problem` instead of the
    last three where an appliance did not answer."""
    places = [place for role in ("source", "recovery") if (place := inventory.find(group, role)) is not None]
    answers = in_parallel(lambda place: ask(context, place.host, "group.picture", group=group), places)
    return [_picture(place, answer) for place, answer in zip(places, answers, strict=True)]


def _picture(place: Place, answer: Answer) -> dict[str, Any]:
    if isinstance(answer.result, dict):
        return answer.result
    return {
        "site": place.host.site,
        "host": place.host.name,
        "role": place.role,
        "problem": answer.error.message if answer.error else "no picture",
    }


def show(context: Context, moment: str, pictures: Sequence[dict[str, Any]]) -> None:
    """Say them; `moment` is `before` or `after`."""
    for picture in pictures:
        place = f"{picture['site']}/{picture['host']} ({picture['role']})"
        if "problem" in picture:
            context.screen.say(f"{moment}: {place}: {picture['problem']}")
            continue
        machines = ", ".join(f"{machine['name']} {machine['state']}" for machine in picture.get("machines") or [])
        generation = render.word(picture.get("generation"))
        context.screen.say(
            f"{moment}: {place}: {picture['state']}, generation {generation}; {machines or 'no machines known'}"
        )


def running_at_source(pictures: Sequence[dict[str, Any]]) -> list[str]:
    """The group's machines that run, or could go on, at a source that reigns."""
    return [
        str(machine["name"])
        for picture in pictures
        if picture["role"] == "source" and picture.get("state") != "failed-over"
        for machine in picture.get("machines") or []
        if machine.get("state") in ALIVE
    ]
