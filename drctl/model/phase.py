"""The life of a group as one transition table. Everything that moves a group from phase to phase is in this file."""

from __future__ import annotations

from enum import StrEnum

from drctl.errors import WrongPhase


class Phase(StrEnum):
    """What the *source* side of a group is doing.

    unprotected   defined, nothing attached
    syncing       first full pass of the reader; nothing is recoverable yet
    live          ordered; marks are cut and proven
    catching-up   order or data was lost; the reader fetches what is missing; older checkpoints stay restorable
    paused        detached on request; checkpoints so far stay restorable
    broken        it can't go on by itself; the reason is in the status
    failed-over   the group reigns at the other site now; this side may neither run nor replicate
    """

    UNPROTECTED = "unprotected"
    SYNCING = "syncing"
    LIVE = "live"
    CATCHING_UP = "catching-up"
    PAUSED = "paused"
    BROKEN = "broken"
    FAILED_OVER = "failed-over"


class Event(StrEnum):
    START = "start"
    SYNCED = "synced"
    ORDER_LOST = "order-lost"
    RING_LOST = "ring-lost"
    PAUSE = "pause"
    RESUME = "resume"
    FAULT = "fault"
    STOP = "stop"
    SUPERSEDED = "superseded"
    TAKEN_BACK = "taken-back"


_TABLE: dict[Phase, dict[Event, Phase]] = {
    Phase.UNPROTECTED: {Event.START: Phase.SYNCING},
    Phase.SYNCING: {
        Event.SYNCED: Phase.LIVE,
        Event.ORDER_LOST: Phase.SYNCING,
        Event.RING_LOST: Phase.SYNCING,
        Event.PAUSE: Phase.PAUSED,
    },
    Phase.LIVE: {
        Event.ORDER_LOST: Phase.CATCHING_UP,
        Event.RING_LOST: Phase.CATCHING_UP,
        Event.PAUSE: Phase.PAUSED,
    },
    Phase.CATCHING_UP: {
        Event.SYNCED: Phase.LIVE,
        Event.ORDER_LOST: Phase.CATCHING_UP,
        Event.RING_LOST: Phase.CATCHING_UP,
        Event.PAUSE: Phase.PAUSED,
    },
    Phase.PAUSED: {Event.RESUME: Phase.CATCHING_UP, Event.PAUSE: Phase.PAUSED},
    Phase.BROKEN: {Event.RESUME: Phase.CATCHING_UP, Event.START: Phase.SYNCING},
    # Only after the other side has given the reign back, under a generation higher than both had.
    Phase.FAILED_OVER: {Event.TAKEN_BACK: Phase.CATCHING_UP},
}


def advance(group: str, phase: Phase, event: Event) -> Phase:
    """The phase after `event`. Raises WrongPhase when the event is not allowed now."""
    if event is Event.STOP and phase is not Phase.FAILED_OVER:
        return Phase.UNPROTECTED
    if event is Event.SUPERSEDED:
        return Phase.FAILED_OVER
    if event is Event.FAULT and phase is not Phase.FAILED_OVER:
        return Phase.BROKEN
    try:
        return _TABLE[phase][event]
    except KeyError:
        allowed = ", ".join(p.value for p, row in _TABLE.items() if event in row)
        raise WrongPhase(
            f"{group} is {phase}; {event} needs {allowed or 'another phase'}",
            hint=f"drctl replicate start {group}" if phase is Phase.UNPROTECTED else f"see: drctl status {group}",
            group=group,
            phase=phase.value,
        ) from None
