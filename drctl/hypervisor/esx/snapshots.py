"""Snapshots of our own on an ESX host: made, found again by a name that nobody else can have, removed.

Others' are never touched, whatever they are called.

After HostUnreachable the outcome is not known; the same call again finds what is there and does nothing twice."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence

from drctl.errors import HypervisorRefused, NotFound
from drctl.hypervisor.esx import answers
from drctl.hypervisor.esx.answers import Snapshot
from drctl.hypervisor.esx.batch import Answer
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.inventory import EsxMachine

#: What a name of ours is made of: a group, a number that grows, and a token.
_OURS = re.compile(r"drctl\.([A-Za-z0-9][A-Za-z0-9_-]{0,31})\.(\d+)\.([0-9a-f]{12})")
POLL_SECONDS = 0.5
#: A snapshot of a busy machine takes minutes at worst, the merging of a large redo log hours.
CREATE_SECONDS = 900.0
REMOVE_SECONDS = 6 * 3600.0
#: A command that returned and left neither its effect nor a task has not done it.
IDLE_SECONDS = 10.0


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
        return _ours(self.tree(machine), group)

    def ours_of_all(self, machines: Sequence[EsxMachine], group: str) -> list[list[Snapshot]]:
        """As ours, of many machines in one round trip."""
        if not machines:
            return []
        told = self._host.session.ask(*(_tree(machine) for machine in machines))
        return [_ours(answers.snapshots(text), group) for text in told]

    def foreign(self, machine: EsxMachine) -> list[Snapshot]:
        """Those that we did not make: of users, of backup products."""
        return [one for one in self.tree(machine) if owner(one.name) is None]

    def create(self, machine: EsxMachine, name: str, *, quiesce: bool = False, timeout: float = CREATE_SECONDS) -> None:
        """Make a snapshot without memory; nothing when one of this name is there. Waits until it is.

        Raises HypervisorRefused: then there is none, or it comes later and `remove` of the same name finds it."""
        if self._settled(machine, name, timeout) is not None:
            return
        # All five words: with one left out the others mean something else.
        command = ["vim-cmd", "vmsvc/snapshot.create", machine.id, name, "replication", "0", "1" if quiesce else "0"]
        answer, found, busy = self._change(machine, name, command, timeout)
        if found is None and not busy:
            self._host.session.checked(answer)
        if found is None or busy:
            self._wait(machine, name, True, timeout)

    def remove(self, machine: EsxMachine, name: str, *, timeout: float = REMOVE_SECONDS) -> None:
        """Remove a snapshot of ours and wait until its data is merged; nothing when it is gone.

        Raises HypervisorRefused for a name that is not ours, and when two have it."""
        if owner(name) is None:
            raise HypervisorRefused(f"{machine.name}: snapshot {name!r} is not ours: it stays", machine=machine.name)
        found = self._settled(machine, name, timeout)
        if found is None:
            return
        command = ["vim-cmd", "vmsvc/snapshot.remove", machine.id, found.id]
        answer, left, busy = self._change(machine, name, command, timeout)
        if left is not None and not busy:
            self._host.session.checked(answer)
        if left is not None or busy:
            self._wait(machine, name, False, timeout)

    def _settled(self, machine: EsxMachine, name: str, timeout: float) -> Snapshot | None:
        """The snapshot of this name, of a machine that still has its number, when no task of it runs any more.

        One that was begun before a connection was lost may still be on its way: a second would have the same name."""
        waited = 0.0
        while True:
            told = self._host.session.run(_summary(machine), _tasks(machine), _tree(machine))
            self._host.confirm(machine, told[0])
            if not self._is_busy(told[1]):
                return self._pick(machine, name, told[2])
            if waited >= timeout:
                raise HypervisorRefused(
                    f"{self._host.name}: a snapshot of {machine.name} is being made or merged since {waited:.0f} s",
                    machine=machine.name,
                )
            self._sleep(POLL_SECONDS)
            waited += POLL_SECONDS

    def _change(
        self, machine: EsxMachine, name: str, command: Sequence[str], timeout: float
    ) -> tuple[Answer, Snapshot | None, bool]:
        """Carry a command out and look, in one round trip."""
        answer, tree, tasks = self._host.session.run(command, _tree(machine), _tasks(machine), timeout=timeout)
        return answer, self._pick(machine, name, tree), self._is_busy(tasks)

    def _wait(self, machine: EsxMachine, name: str, there: bool, timeout: float) -> None:
        """Until it is there (or not) and no task of the machine runs: commands may return long before."""
        waited = 0.0
        while True:
            tree, tasks = self._host.session.run(_tree(machine), _tasks(machine))
            done, busy = (self._pick(machine, name, tree) is not None) == there, self._is_busy(tasks)
            if done and not busy:
                return
            if waited >= timeout or (not done and not busy and waited > IDLE_SECONDS):
                problem = "did not appear" if there else "is still there"
                raise HypervisorRefused(
                    f"{self._host.name}: {machine.name}: snapshot {name} {problem}", machine=machine.name
                )
            self._sleep(POLL_SECONDS)
            waited += POLL_SECONDS

    def _is_busy(self, tasks: Answer) -> bool:
        return any("napshot" in task for task in answers.tasks(self._host.session.checked(tasks).out))

    def _pick(self, machine: EsxMachine, name: str, tree: Answer) -> Snapshot | None:
        found = [one for one in answers.snapshots(self._host.session.checked(tree).out) if one.name == name]
        if len(found) > 1:
            raise HypervisorRefused(
                f"{machine.name} has {len(found)} snapshots named {name!r}: none is touched",
                hint="somebody copied the name of ours; remove the copy there",
                machine=machine.name,
            )
        return found[0] if found else None


def _ours(tree: Sequence[Snapshot], group: str) -> list[Snapshot]:
    found = [(known[1], one) for one in tree if (known := owner(one.name)) and known[0] == group]
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _summary(machine: EsxMachine) -> Sequence[str]:
    return ["vim-cmd", "vmsvc/get.summary", machine.id]


def _tree(machine: EsxMachine) -> Sequence[str]:
    return ["vim-cmd", "vmsvc/snapshot.get", machine.id]


def _tasks(machine: EsxMachine) -> Sequence[str]:
    return ["vim-cmd", "vmsvc/get.tasklist", machine.id]


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
