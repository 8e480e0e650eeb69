"""Asks many appliances at once, and finds which one plays which role for a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from drctl.cli.context import Context
from drctl.errors import (
    ApplianceUnreachable,
    DrctlError,
    HostKeyRejected,
    HostUnreachable,
    LoginRefused,
    NotFound,
    PrivilegeMissing,
)
from drctl.model.site import Host

#: A status is wanted within 3 s, also when one appliance hangs.
READ_TIMEOUT = 2.5
#: Calls at a time: as many as sixty appliances need to be asked in one go.
WORKERS = 64

#: What can be asked of an ESX host that no appliance serves (esx_client).
ESX_METHODS = ("host.info", "machine.list")

#: Errors of the way to an appliance; each has an exit code of its own.
_UNHEARD: tuple[type[DrctlError], ...] = (HostUnreachable, HostKeyRejected, LoginRefused, PrivilegeMissing)

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Answer:
    """One appliance's answer: `result`, or `error`."""

    host: Host
    result: Any = None
    error: DrctlError | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None


@dataclass(frozen=True, slots=True)
class Place:
    """A group's role at one host, as the appliance there tells it. `state` is the phase or the store's mode, `status`
    its `group.status` where that was asked for and told."""

    group: str
    role: str
    host: Host
    generation: int
    state: str
    spec: dict[str, Any]
    status: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """All places of all groups, and the answers of appliances that could not tell."""

    places: tuple[Place, ...]
    silent: tuple[Answer, ...]

    @property
    def groups(self) -> list[str]:
        return sorted({place.group for place in self.places})

    def find(self, group: str, role: str) -> Place | None:
        """The place of the highest generation."""
        found = [place for place in self.places if place.group == group and place.role == role]
        return max(found, key=lambda place: place.generation, default=None)


def ask(context: Context, host: Host, method: str, **params: Any) -> Answer:
    """One appliance's answer, within READ_TIMEOUT; never raises DrctlError."""
    try:
        return Answer(host, context.call(host, method, timeout=READ_TIMEOUT, **params))
    except DrctlError as exc:
        return Answer(host, error=exc)


def ask_all(context: Context, method: str, **params: Any) -> list[Answer]:
    """Every appliance's answer, asked in parallel, in the order of the hosts; where none is, what an ESX host tells."""
    hosts = [host for host in context.config.hosts if host.served or method in ESX_METHODS]
    return in_parallel(lambda host: ask(context, host, method, **params), hosts)


def info_method(host: Host) -> str:
    """What tells about the host: its appliance, or what stands in for one of an ESX host that has none."""
    return "appliance.info" if host.served else "host.info"


def in_parallel(function: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """The function's results in the order of the items. With one item no thread is made."""
    if len(items) < 2:
        return [function(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=min(WORKERS, len(items))) as pool:
        return list(pool.map(function, items))


def take_inventory(context: Context, *, status: bool = False) -> Inventory:
    """What every appliance says about every group; with `status` how each group is, too, in the same answer: over SSH
    a second question per group would cost a program's start at the other end each."""
    answers = ask_all(context, "group.list", **({"status": True} if status else {}))
    places = [_place(answer.host, row) for answer in answers if not answer.failed for row in answer.result]
    return Inventory(tuple(places), tuple(answer for answer in answers if answer.failed))


def _place(host: Host, row: dict[str, Any]) -> Place:
    state = row.get("phase") if row["role"] == "source" else row.get("mode")
    return Place(
        row["group"],
        row["role"],
        host,
        int(row.get("generation") or 0),
        str(state),
        row.get("spec") or {},
        row.get("status"),
    )


def side(context: Context, group: str, role: str, inventory: Inventory | None = None) -> Host:
    """The host that plays `role` (`source`, `recovery`) for the group.

    Raises NotFound, or ApplianceUnreachable when an appliance that may know did not answer."""
    inventory = inventory or take_inventory(context)
    if place := inventory.find(group, role):
        return place.host
    if inventory.silent:
        names = ", ".join(answer.host.name for answer in inventory.silent)
        raise _silence(inventory.silent)(
            f"the {role} side of group {group!r} was not found; no answer from {names}",
            hint=f"{_reason(inventory.silent)}; see: drctl doctor",
            group=group,
        )
    if group in inventory.groups:
        raise NotFound(
            f"{role} side of group",
            group,
            message=f"no appliance that was asked is the {role} side of group {group!r}",
            hint=f"{context.config.origin} was read; another configuration: --config DIR",
        )
    raise NotFound(
        "group", group, known=inventory.groups, hint="" if inventory.groups else "drctl apply sends groups out"
    )


def _silence(silent: Sequence[Answer]) -> type[DrctlError]:
    """What kept them silent, when it was the same with all; else that they can't be reached."""
    kinds = {type(answer.error) for answer in silent}
    kind = kinds.pop() if len(kinds) == 1 else ApplianceUnreachable
    return kind if kind in _UNHEARD else ApplianceUnreachable


def _reason(silent: Sequence[Answer]) -> str:
    return silent[0].error.message if silent[0].error else ""
