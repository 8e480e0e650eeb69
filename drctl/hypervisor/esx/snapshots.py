"""Snapshots of our own on an ESX host: made, found again by a name that nobody else can have, removed.

Others' are never touched, whatever they are called.

After HostUnreachable the outcome is not known; the same call again finds what is there and does nothing twice."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from drctl.errors import HypervisorRefused, NotFound
from drctl.hypervisor.esx import answers
from drctl.hypervisor.esx.answers import Snapshot
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.inventory import EsxMachine

#: What a name of ours is made of: a group, a number that grows, and a token.
_OURS = re.compile(r"drctl\.([A-Za-z0-9][A-Za-z0-9_-]{0,31})\.(\d+)\.([0-9a-f]{12})")
POLL_SECONDS = 0.5
#: A snapshot of a busy machine takes minutes at worst, the merging of a large redo log hours.
CREATE_SECONDS = 900.0
REMOVE_SECONDS = 6 * 3600.0


def new_name(group: str, number: int, token: Callable[[], str] = lambda: secrets.token_hex(6)) -> str:
    """A name for a group's snapshot. hostd wants `%` and others escaped: none is in it."""
    name = f"drctl.{group}.{number}.{token()}"
    assert _OURS.fullmatch(name), name
    return name


def owner(name: str) -> tuple[str, int] | None:
    """The group and number of a snapshot of ours; None of another's."""
    match = _OURS.fullmatch(name)
    return (match[1], int(match[2])) if match else None


class Snapshots:
    """The snapshots of one host's machines."""

    def __init__(self, host: EsxHost, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._host = host
        self._sleep = sleep

    def tree(self, machine: EsxMachine) -> list[Snapshot]:
        """The machine's tree of snapshots, root first."""
        (text,) = self._host.session.ask(["vim-cmd", "vmsvc/snapshot.get", machine.id])
        return answers.snapshots(text)

    def ours(self, machine: EsxMachine, group: str) -> list[Snapshot]:
        """Those of this group, oldest first."""
        found = [(known[1], one) for one in self.tree(machine) if (known := owner(one.name)) and known[0] == group]
        return [one for _, one in sorted(found, key=lambda pair: pair[0])]

    def foreign(self, machine: EsxMachine) -> list[Snapshot]:
        """Those that we did not make: of users, of backup products."""
        return [one for one in self.tree(machine) if owner(one.name) is None]

    def create(self, machine: EsxMachine, name: str, *, quiesce: bool = False, timeout: float = CREATE_SECONDS) -> None:
        """Make a snapshot without memory; nothing when one of this name is there. Waits until it is.

        Raises HypervisorRefused: then there is none, or it comes later and `remove` of the same name finds it."""
        if self._named(machine, name):
            return
        self._host.confirm(machine)
        # All five words: with one left out the others mean something else.
        command = ["vim-cmd", "vmsvc/snapshot.create", machine.id, name, "replication", "0", "1" if quiesce else "0"]
        (answer,) = self._host.session.run(command, timeout=timeout)
        if not self._named(machine, name):
            self._host.session.checked(answer)
        self._wait(machine, lambda: self._named(machine, name) is not None, timeout, f"snapshot {name} did not appear")

    def remove(self, machine: EsxMachine, name: str, *, timeout: float = REMOVE_SECONDS) -> None:
        """Remove a snapshot of ours and wait until its data is merged; nothing when it is gone.

        Raises HypervisorRefused for a name that is not ours, and when two have it."""
        if owner(name) is None:
            raise HypervisorRefused(f"{machine.name}: snapshot {name!r} is not ours: it stays", machine=machine.name)
        found = self._named(machine, name)
        if found is not None:
            self._host.confirm(machine)
            (answer,) = self._host.session.run(
                ["vim-cmd", "vmsvc/snapshot.remove", machine.id, found.id], timeout=timeout
            )
            if self._named(machine, name) is not None and not self._busy(machine):
                self._host.session.checked(answer)
        self._wait(machine, lambda: self._named(machine, name) is None, timeout, f"snapshot {name} is still there")

    def _wait(self, machine: EsxMachine, done: Callable[[], bool], timeout: float, problem: str) -> None:
        """Until it is so and no task of the machine runs: commands may return long before."""
        waited = 0.0
        while not done() or self._busy(machine):
            if waited >= timeout or (not done() and not self._busy(machine) and waited > 10):
                raise HypervisorRefused(f"{self._host.name}: {machine.name}: {problem}", machine=machine.name)
            self._sleep(POLL_SECONDS)
            waited += POLL_SECONDS

    def _busy(self, machine: EsxMachine) -> bool:
        (text,) = self._host.session.ask(["vim-cmd", "vmsvc/get.tasklist", machine.id])
        return any("napshot" in task for task in answers.tasks(text))

    def _named(self, machine: EsxMachine, name: str) -> Snapshot | None:
        found = [one for one in self.tree(machine) if one.name == name]
        if len(found) > 1:
            raise HypervisorRefused(
                f"{machine.name} has {len(found)} snapshots named {name!r}: none is touched",
                hint="somebody copied the name of ours; remove the copy there",
                machine=machine.name,
            )
        return found[0] if found else None


def remove_leftovers(host: EsxHost, group: str, *, keep: frozenset[str] = frozenset()) -> list[str]:
    """Remove the group's snapshots on all machines of the host but those to keep: what a crash left. Their names."""
    snapshots, removed = Snapshots(host), []
    for machine in host.inventory().machines:
        if not machine.has_snapshots:
            continue
        try:
            left = [one.name for one in snapshots.ours(machine, group) if one.name not in keep]
        except NotFound:
            continue  # gone since the inventory
        for name in left:
            snapshots.remove(machine, name)
            removed.append(name)
    return removed
