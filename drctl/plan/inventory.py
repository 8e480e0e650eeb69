"""What is true outside of a plan, as far as it is known: groups, their machines, and how far a run has come.

Frozen values that whoever asks the appliances fills in; `None` is unknown, never a no. Knows no appliance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Ability(StrEnum):
    """What a recovery site's appliance can do in a plan's run beyond booting a group at once."""

    STAGED_BOOT = "staged-boot"
    OVERRIDES = "overrides"
    GUEST_AGENT = "guest-agent"
    CONSOLE = "console"
    RE_IP = "re-ip"


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """A machine of a group. `exists` at the source; `refused` names disks that can't be replicated, and why;
    `uncovered` its disks that it has and its group does not replicate; `memory` in bytes."""

    name: str
    exists: bool | None = None
    uncovered: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """A group as its file or an appliance tells it. `phase` is that of its source, None when it did not answer.
    `applied`: the appliances have it, with the machines that its file names.

    `problems` are what the recovery site says would go wrong; `networks` and `test_networks` map source networks.
    `host` is the recovery host, and `room` the bytes of memory that it could give to machines now."""

    name: str
    machines: tuple[MachineFacts, ...]
    networks: tuple[tuple[str, str], ...] = ()
    test_networks: tuple[tuple[str, str], ...] = ()
    phase: str | None = None
    applied: bool | None = None
    restorable: bool | None = None
    abilities: frozenset[Ability] = frozenset(Ability)
    problems: tuple[tuple[str, str, str], ...] = ()
    host: str = ""
    room: int | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The groups that are known, by name. `complete`: every appliance answered, so what is not here is not there."""

    groups: Mapping[str, GroupFacts]
    complete: bool = False


class Ending(StrEnum):
    """How a run ends once nothing more is begun: by tidying up (a test), by undoing, or by leaving all as it is."""

    CLEAN_UP = "clean-up"
    UNDO = "undo"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: steps `begun` and `done` by its record, the rest by looking at the hosts: `recovered`
    groups, and machines that are `up`, as (group, name).

    `ending` is what the record says was decided (None while the run goes forward), and whether it was `flawed` or
    `interrupted` until then."""

    done: frozenset[str] = frozenset()
    begun: frozenset[str] = frozenset()
    recovered: frozenset[str] = frozenset()
    up: frozenset[tuple[str, str]] = field(default_factory=frozenset)
    ending: Ending | None = None
    flawed: bool = False
    interrupted: bool = False
