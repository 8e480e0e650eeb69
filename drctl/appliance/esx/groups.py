"""Groups of an ESX host's appliance in either role: each is asked of the half that it has here."""

from __future__ import annotations

import logging
from typing import Any

from drctl.appliance.config import Home
from drctl.appliance.control import Handler, Progress
from drctl.appliance.esx.recovery_side import RecoverySide
from drctl.appliance.esx.service import EsxService
from drctl.appliance.picture import Shown
from drctl.appliance.roles import RECOVERY, SOURCE, Roles, RoleView
from drctl.appliance.source.group_state import spec_from
from drctl.appliance.state_watch import States, group_states
from drctl.errors import DrctlError, WrongPhase

log = logging.getLogger(__name__)


class EsxGroups:
    """Methods may be called from any thread."""

    def __init__(self, home: Home, source: EsxService, side: RecoverySide) -> None:
        self._site = home.config.site
        self._source = source
        self._stores = side.stores
        self._side = side
        self._roles = Roles(source, side.stores)
        self.sources = RoleView(lambda: self._roles.names(SOURCE), source.status)
        self.recoveries = RoleView(lambda: self._roles.names(RECOVERY), self._stores.status)

    def handlers(self) -> dict[str, Handler]:
        return {
            "group.put": self._put,
            "group.remove": self._remove,
            "group.list": self._list,
            "group.status": lambda params, _progress: self._status(str(params.get("group"))),
            "replicate.stop": self._replicate_stop,
        }

    def _is_source(self, name: str) -> bool:
        """Raises NotFound."""
        return self._roles.of(name) == SOURCE

    def _put(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        spec = spec_from(dict(params.get("spec") or {}))
        if self._site == spec.source:
            return self._source.group_put(params, progress)
        if self._site == spec.recovery:
            return {"group": spec.name, "role": RECOVERY, "changed": self._stores.put(spec)}
        raise WrongPhase(f"{spec.name} goes from {spec.source} to {spec.recovery}; this appliance is of {self._site}")

    def _remove(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        name = str(params.get("group"))
        if self._is_source(name):
            return self._source.group_remove(params, progress)
        return {"group": name, "removed": True, "kept_until": self._stores.remove(name)}

    def _list(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        names = set(self.sources.names())
        found = [row for row in self._source.group_list(params, progress) if row["group"] in names]
        for name in self.recoveries.names():
            row = self._summary(name)
            if params.get("status") and "problem" not in row:
                row["status"] = self._stores.status(name)
            found.append(row)
        return found

    def _summary(self, name: str) -> dict[str, Any]:
        """A store that can't be opened must not hide the others; its `group.status` says what is wrong with it."""
        try:
            return {"group": name, "role": RECOVERY, **self._stores.summary(name)}
        except DrctlError as exc:
            log.warning("store %s: %s", name, exc.message)
            unknown = {"mode": "unreadable", "generation": 0, "spec": None}
            return {"group": name, "role": RECOVERY, **unknown, "problem": exc.message}

    def _status(self, name: str) -> dict[str, Any]:
        return self._source.status(name) if self._is_source(name) else self._stores.status(name)

    def _replicate_stop(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        half = self._source if self._is_source(str(params.get("group"))) else self._stores
        return half.replicate_stop(params, progress)

    def shown(self, name: str) -> Shown:
        """For a picture of the group."""
        if self._is_source(name):
            state = self._source.protection({"group": name}).state
            return Shown("source", state.phase.value, state.generation, state.spec.machines)
        summary = self._stores.summary(name)
        machines = tuple((summary.get("spec") or {}).get("machines") or ())
        return Shown("recovery", summary["mode"], summary["generation"], machines)

    def states(self) -> States:
        """For whoever is told of changes."""
        stores = self._stores.names()
        return group_states(
            [(one.state.spec.name, one.state.phase.value) for one in self._source.protections()],
            [(name, str(self._summary(name)["mode"])) for name in stores],
            [one for name in stores for one in self._side.recovery.recoveries(name)],
        )
