"""A group at one host in one picture: generation, who reigns, which machines run. Shown before and after a change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from drctl.errors import DrctlError, NotFound
from drctl.model.machine import MachineState


class PictureHost(Protocol):
    def state(self, name: str) -> MachineState: ...


@dataclass(frozen=True, slots=True)
class Shown:
    """What is known of the group here without asking the hypervisor. `state` is the phase or the store's mode."""

    role: str
    state: str
    generation: int
    machines: Sequence[str]


#: A group's Shown. Raises NotFound.
Look = Callable[[str], Shown]


class Pictures:
    """Takes them. May be called from any thread."""

    def __init__(self, site: str, host_name: str, host: PictureHost, look: Look) -> None:
        self._site = site
        self._host_name = host_name
        self._host = host
        self._look = look

    def take(self, group: str) -> dict[str, Any]:
        """{site, host, role, state, generation, machines [{name, state}]}. Raises NotFound for a group not known here.

        A machine that the host does not know is `absent`, one that can't be asked about `unknown`."""
        shown = self._look(group)
        return {
            "site": self._site,
            "host": self._host_name,
            "role": shown.role,
            "state": shown.state,
            "generation": shown.generation,
            "machines": [{"name": name, "state": self._state(name)} for name in shown.machines],
        }

    def take_quietly(self, group: str) -> dict[str, Any] | None:
        """The same for the history, where a change must not fail because its picture did."""
        try:
            return self.take(group)
        except DrctlError:
            return None

    def _state(self, name: str) -> str:
        try:
            return self._host.state(name).value
        except NotFound:
            return "absent"
        except DrctlError:
            return "unknown"
