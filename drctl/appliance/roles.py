"""Which role this host plays for a group that it knows twice: as its old source, and as where it is replicated to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from drctl.errors import DrctlError, NotFound

SOURCE, RECOVERY = "source", "recovery"


class Role(Protocol):
    """One half of an appliance: the groups that it knows in this role."""

    def names(self) -> list[str]: ...

    def generation(self, name: str) -> int: ...

    def status(self, name: str) -> dict[str, Any]: ...


class Roles:
    """A group has one role at a host: that of the higher generation. The other is history: a source that was
    superseded, or a store that the group has left. While they are equal it is the source.

    Methods may be called from any thread."""

    def __init__(self, source: Role, recovery: Role) -> None:
        self._source = source
        self._recovery = recovery

    def of(self, group: str) -> str:
        """Raises NotFound for a group that this host does not know."""
        if group not in self._source.names():
            if group not in self._recovery.names():
                raise NotFound("group", group, known=sorted({*self._source.names(), *self._recovery.names()}))
            return RECOVERY
        if group not in self._recovery.names():
            return SOURCE
        try:
            left = self._recovery.generation(group)
        except DrctlError:  # a store that can't be read must not hide the source
            return SOURCE
        return RECOVERY if left > self._source.generation(group) else SOURCE

    def names(self, role: str) -> list[str]:
        """The groups that have this role here."""
        every = self._source.names() if role == SOURCE else self._recovery.names()
        return [name for name in every if self.of(name) == role]


@dataclass(frozen=True, slots=True)
class RoleView:
    """The groups of one role, for those who go through them all."""

    names: Callable[[], Sequence[str]]
    status: Callable[[str], dict[str, Any]]
