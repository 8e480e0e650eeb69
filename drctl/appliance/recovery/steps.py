"""The steps that bring a recovery up. Each looks at what is true before it acts, so any prefix of them may be repeated.

Order, and why: the record first (so that nothing is ever done that no file knows of); then, for a failover, the reign
(so that no newer checkpoint can arrive after one was chosen); then the choice, the pin, the view, the machines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from drctl.appliance.recovery import address as recovery_address
from drctl.appliance.recovery.ports import Progress, Recoverable, RecoverableMachine, Rewritten, Tools
from drctl.appliance.recovery.state import (
    MachinePhase,
    RecoveredCard,
    RecoveredDisk,
    RecoveredMachine,
    RecoveryFiles,
    RecoveryPhase,
    RecoveryRecord,
)
from drctl.errors import DrctlError, Interrupted, NotFound, OutOfSpace, StepFailed
from drctl.model.extent import format_bytes
from drctl.model.machine import MachineState

#: Machines brought up at once: enough to hide each one's wait, few enough not to swamp a host in a disaster.
PARALLEL = 8
#: A domain that was created is running or gone at once; this bounds a hypervisor that is slow to say so.
START_SECONDS = 30.0
UP = (MachineState.RUNNING, MachineState.PAUSED, MachineState.STARTING)


class Steps:
    """Does the steps of one recovery; several threads may save it, one at a time."""

    def __init__(self, tools: Tools, files: RecoveryFiles, recovery: RecoveryRecord) -> None:
        self._tools = tools
        self._files = files
        self._lock = threading.Lock()
        self.recovery = recovery
        self.progress: Progress = lambda _: None
        #: Set to end a start between two steps.
        self.cancelled = threading.Event()

    def save(self) -> None:
        with self._lock:
            self._files.save(self.recovery)

    def start(self, *, parallel: int = PARALLEL, only: Collection[str] | None = None) -> None:
        """From a written record to running machines, but those that are held: they are made ready. `only` these, if
        some are named. Raises the error of a step that concerns them all."""
        source = self._choose()
        recovery, tools = self.recovery, self._tools
        self._step("pin", lambda: tools.stores.pin(recovery.group, recovery.id, recovery.checkpoint, recovery.epoch))
        self._step("view", lambda: tools.views.ensure(recovery))
        if tools.images.copies:
            demand_room(tools, recovery)
        ready = MachinePhase.OVERLAY if recovery.test else MachinePhase.DEFINED
        held = [m for m in recovery.machines if m.name in recovery.held and m.phase is not ready]
        self._each(held if only is None else [], lambda machine: self._make_ready(machine, source), parallel)
        waiting = [m for m in recovery.machines if m.name not in recovery.held and m.phase is not MachinePhase.RUNNING]
        waiting = [m for m in waiting if only is None or m.name in only]
        self._each(waiting, lambda machine: self._bring_up(machine, source), parallel)
        self.recovery.phase = RecoveryPhase.RUNNING
        self.recovery.times["machines"] = self._tools.clock.time()
        self.save()

    def _choose(self) -> Recoverable:
        """Settle the checkpoint, under a raised generation for a failover. Once settled it never changes."""
        recovery, stores = self.recovery, self._tools.stores
        if not recovery.test:
            self._step("reign", lambda: stores.reign(recovery.group, recovery.generation))
        if "chosen" not in recovery.times:
            recovery.choose(stores.choose(recovery.group, recovery.selector, recovery.times["ordered"]))
        source = stores.recoverable(recovery.group, recovery.checkpoint)
        if "chosen" not in recovery.times:
            self._plan_machines(source)
            recovery.times["chosen"] = self._tools.clock.time()
            self.save()
        return source

    def _plan_machines(self, source: Recoverable) -> None:
        wanted = {machine.name for machine in self.recovery.machines}
        self.recovery.machines = [
            plan_machine(self._tools, self.recovery, machine) for machine in source.machines if machine.name in wanted
        ]

    def _step(self, name: str, action: Callable[[], object]) -> None:
        if self.cancelled.is_set():
            raise Interrupted(f"{self.recovery.id} is being stopped")
        action()
        self.progress({"step": name, "machine": "", "state": "done"})
        self.recovery.times.setdefault(name, self._tools.clock.time())

    def _each(
        self, machines: list[RecoveredMachine], action: Callable[[RecoveredMachine], None], parallel: int
    ) -> None:
        if parallel <= 1 or len(machines) <= 1:
            for machine in machines:
                action(machine)
            return
        with ThreadPoolExecutor(min(parallel, len(machines)), thread_name_prefix="recovery") as pool:
            for future in [pool.submit(action, machine) for machine in machines]:
                future.result()

    def _bring_up(self, machine: RecoveredMachine, source: Recoverable) -> None:
        """One machine, or its reason why not: the others go on."""
        self._attempt(machine, lambda: self._boot(machine, source))

    def _make_ready(self, machine: RecoveredMachine, source: Recoverable) -> None:
        """All but its start, or its reason why not. A test's machine is transient: the host can't know it yet."""
        self._attempt(machine, lambda: self._lay(machine, source))

    def _boot(self, machine: RecoveredMachine, source: Recoverable) -> None:
        self._overlays(machine)
        self._domain(machine, source)
        self._wait(machine)

    def _lay(self, machine: RecoveredMachine, source: Recoverable) -> None:
        self._overlays(machine)
        if not self.recovery.test:
            self._define(machine, source)

    def _attempt(self, machine: RecoveredMachine, act: Callable[[], None]) -> None:
        try:
            act()
        except Interrupted:
            raise
        except DrctlError as exc:
            machine.reason = exc.message
            self._reached(machine, MachinePhase.FAILED)

    def _reached(self, machine: RecoveredMachine, phase: MachinePhase) -> None:
        machine.phase = phase
        machine.times[phase.value] = self._tools.clock.time()
        if phase is not MachinePhase.FAILED:
            machine.reason = ""
        self.save()
        self.progress({"step": "machine", "machine": machine.name, "state": phase.value, "reason": machine.reason})
        if self.cancelled.is_set():
            raise Interrupted(f"{self.recovery.id} is being stopped")

    def _overlays(self, machine: RecoveredMachine) -> None:
        tools = self._tools
        for disk in machine.disks:
            if not tools.images.exists(Path(disk.overlay)):
                backing = tools.views.backing(self.recovery, disk.export)
                tools.images.create(Path(disk.overlay), backing, disk.size, partial(self._copied, machine, disk))
            disk.localized = disk.localized or tools.images.copies
        self._reached(machine, MachinePhase.OVERLAY)

    def _copied(self, machine: RecoveredMachine, disk: RecoveredDisk, done: int, total: int) -> None:
        told = {"step": "copy", "machine": machine.name, "state": "copying", "disk": disk.target}
        self.progress(told | {"done_bytes": done, "total_bytes": total})
        if self.cancelled.is_set():
            raise Interrupted(f"{self.recovery.id} is being stopped")

    def _domain(self, machine: RecoveredMachine, source: Recoverable) -> None:
        """Make the host know and run the machine."""
        tools, name = self._tools, machine.recovery_name
        if self.recovery.test:
            definition, known = self._definition(machine, source)
            if not known or tools.hypervisor.state(name) not in UP:
                tools.hypervisor.create(definition)
        else:
            self._define(machine, source)
            if tools.hypervisor.state(name) not in UP:
                tools.hypervisor.start(name)
        self._reached(machine, MachinePhase.STARTED)

    def _define(self, machine: RecoveredMachine, source: Recoverable) -> None:
        definition, known = self._definition(machine, source)
        if not known:
            self._tools.hypervisor.define(definition)
        self._reached(machine, MachinePhase.DEFINED)

    def _definition(self, machine: RecoveredMachine, source: Recoverable) -> tuple[str, bool]:
        """The definition for this host, and whether the host has it. Raises StepFailed: a machine of that name which
        is not ours is left alone."""
        known = is_ours(self._tools, machine)
        if known is False:
            raise StepFailed(f"the host has a machine named {machine.recovery_name} already, with disks of its own")
        rewritten = self._tools.definitions.rewrite(self.recovery, machine, source)
        machine.notes = list(rewritten.notes)
        if known is None and (laid := self._tools.definitions.lay(machine, rewritten.beside)):
            machine.laid += laid
            self.save()
        self._address(machine, rewritten)
        return rewritten.definition, known is True

    def _address(self, machine: RecoveredMachine, rewritten: Rewritten) -> None:
        before = {(card.mac, card.network): card.reserved for card in machine.cards}
        machine.cards = [RecoveredCard(*card, before.get(card, "")) for card in rewritten.cards]
        recovery_address.prepare(self._tools, self.recovery, machine, self.save)

    def _wait(self, machine: RecoveredMachine) -> None:
        tools = self._tools
        deadline = tools.clock.monotonic() + START_SECONDS
        while (state := tools.hypervisor.state(machine.recovery_name)) not in UP:
            if state in (MachineState.SHUT_OFF, MachineState.CRASHED) or tools.clock.monotonic() > deadline:
                raise StepFailed(f"{machine.recovery_name} is {state} right after its start")
            tools.sleep(0.1)
        self._reached(machine, MachinePhase.RUNNING)


def plan_machine(tools: Tools, recovery: RecoveryRecord, machine: RecoverableMachine) -> RecoveredMachine:
    """What the machine will be here: a test gets a name and an identity of its own, a failover keeps both."""
    name = f"{machine.name}-test-{recovery.id}" if recovery.test else machine.name
    directory = tools.room.scratch / recovery.id if recovery.test else tools.room.images / recovery.group
    # The generation keeps apart the files of failovers of one group; it rises with each.
    suffix = "" if recovery.test else f"-g{recovery.generation}"
    disks = [
        RecoveredDisk(
            disk.target,
            disk.name,
            str(tools.room.overlay(directory, f"{machine.name}{suffix}", f"{disk.name}{suffix}")),
            disk.size,
        )
        for disk in machine.disks
    ]
    identity = tools.new_uuid() if recovery.test else machine.uuid
    return RecoveredMachine(machine.name, name, identity, disks)


def demand_room(tools: Tools, recovery: RecoveryRecord) -> None:
    """Raises OutOfSpace unless all that is still to be copied fits, so that nothing is begun in vain."""
    missing = [disk for _, disk in recovery.disks() if not tools.images.exists(Path(disk.overlay))]
    if not missing:
        return
    held = tools.stores.allocated(recovery.group, recovery.checkpoint)
    needed = sum(held.get(disk.export, disk.size) for disk in missing)
    where = tools.room.scratch if recovery.test else tools.room.images
    free = tools.images.free(where) - (tools.room.reserve if recovery.test else 0)
    if needed > free:
        raise OutOfSpace(
            f"the disks of {recovery.group} take {format_bytes(needed)}, {where} has {format_bytes(max(free, 0))}",
            hint="free space there; nothing was copied",
            needed=needed,
            free=free,
        )


def is_ours(tools: Tools, machine: RecoveredMachine) -> bool | None:
    """Whether the host's machine of that name stands on our overlays; None when there is no such machine."""
    try:
        definition = tools.hypervisor.definition(machine.recovery_name)
    except NotFound:
        return None
    return all(disk.overlay in definition for disk in machine.disks)
