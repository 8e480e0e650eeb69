"""Takes an appliance off a host, so that nothing of it is left. Refuses while it protects, or keeps history."""

from __future__ import annotations

import json
from dataclasses import dataclass

from drctl.appliance.install.installation import APPARMOR, PROGRAM, SELINUX, SERVICE, UNIT, USER, Outcome, Progress
from drctl.appliance.install.preflight import Place
from drctl.appliance.install.session import LOCK, Remote, run_program
from drctl.appliance.libvirt_hook import HOOK_PATH
from drctl.errors import Refused, StepFailed

#: Phases of a group at its source in which nothing is attached.
_DETACHED = ("unprotected", "failed-over")
#: A receiver and a shipper end at once; a view with a reader on it takes longer.
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Holdings:
    """What would be lost with the appliance: groups that it protects, stores with history (those of them that are under
    a retention lock), recoveries."""

    protected: tuple[str, ...]
    stores: tuple[str, ...]
    recoveries: tuple[str, ...]
    locked: tuple[str, ...] = ()


def holdings(remote: Remote, place: Place) -> Holdings:
    """Read from the appliance's own files: it need not run."""
    protected = []
    for name in remote.ask("names", path=f"{place.home}/groups"):
        if name.endswith(".json"):
            state = json.loads(remote.ask("read", path=f"{place.home}/groups/{name}") or "{}")
            if state.get("phase") not in _DETACHED:
                protected.append(name.removesuffix(".json"))
    stores = [name for name in remote.ask("names", path=f"{place.home}/store") if not name.startswith(".")]
    recoveries = [
        name.removesuffix(".json")
        for name in remote.ask("names", path=f"{place.home}/recoveries")
        if name.endswith(".json") and not name.startswith(".")
    ]
    locked = [name for name in stores if _lock(remote.ask("read", path=f"{place.home}/store/{name}/group.json"))]
    return Holdings(tuple(protected), tuple(stores), tuple(recoveries), tuple(locked))


def _lock(info: str | None) -> bool:
    """Whether a store's group.json tells of a retention lock."""
    try:
        return bool((json.loads(info or "{}").get("retention") or {}).get("lock"))
    except (ValueError, AttributeError):
        return False  # no store that could be read: nobody could recover from it either


def demand_empty(host: str, held: Holdings, *, delete_history: bool) -> None:
    """Raise Refused while guests hang on the appliance, or while history would be lost without being told."""
    if held.protected:
        names = ", ".join(held.protected)
        hint = "; ".join(f"drctl replicate stop {name}" for name in held.protected)
        raise Refused(f"{host} protects {names}", hint=hint)
    if held.recoveries:
        raise Refused(
            f"{host} has tests or failovers: {', '.join(held.recoveries)}",
            hint="drctl test list; drctl test stop ID; drctl commit GROUP",
        )
    if held.stores and not delete_history:
        names = ", ".join(held.stores)
        raise Refused(f"{host} keeps the history of {names}", hint="to delete it with the appliance: --delete-history")


class Removal:
    """Removes what an installation made, in the order in which nothing is used any more."""

    def __init__(self, remote: Remote, host: str, place: Place) -> None:
        self._remote = remote
        self._host = host
        self._place = place
        self.outcome = Outcome()

    def run(self, progress: Progress) -> Outcome:
        steps = [
            ("service", self._service),
            ("processes", self._processes),
            ("policy", self._policy),
            ("files", self._files),
        ]
        for number, (name, step) in enumerate(steps, 1):
            progress(number, len(steps), name)
            step()
        return self.outcome

    def _service(self) -> None:
        if self._remote.ask("read", path=UNIT) is None:
            return
        run_program(self._remote, self._host, ["systemctl", "disable", "--now", "--quiet", SERVICE])
        self._gone(UNIT, f"{UNIT}.d")
        run_program(self._remote, self._host, ["systemctl", "daemon-reload"])

    def _processes(self) -> None:
        found = self._remote.ask("processes", needle=f"{self._place.prefix}/versions/")
        left = self._remote.ask("end", pids=[pid for pid, _ in found], seconds=_END_SECONDS)
        if left:
            raise StepFailed(f"{self._host}: processes {left} don't end", hint="kill them there, then give it again")
        if found:
            self.outcome.changes.append(f"{len(found)} processes ended")

    def _policy(self) -> None:
        if self._remote.ask("block", path=APPARMOR, name="drctl", text=""):
            self.outcome.changes.append("AppArmor's rules")
        if self._remote.ask("read", path=SELINUX) is not None:
            run_program(self._remote, self._host, ["semodule", "-r", "drctl"])
        self._gone(SELINUX, str(HOOK_PATH))
        self._remote.ask("run", argv=["rmdir", "--ignore-fail-on-non-empty", str(HOOK_PATH.parent)])

    def _files(self) -> None:
        # The home last: as long as it is there the same command knows what it has to do.
        self._gone(PROGRAM, self._place.run, self._place.prefix)
        if self._remote.ask("user_gone", name=USER):
            self.outcome.changes.append(f"user {USER}")
        self._gone(self._place.home, LOCK)

    def _gone(self, *paths: str) -> None:
        self.outcome.changes += [path for path in paths if self._remote.ask("remove", path=path) and path != LOCK]
