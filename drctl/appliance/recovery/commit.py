"""Making a failover final: every disk is localized under its running guest until it needs no view.

Resumable by nature: a disk whose overlay still has a backing file is pulled again, and QEMU copies what is missing."""

from __future__ import annotations

from pathlib import Path

from drctl.appliance.recovery.end import state_of
from drctl.appliance.recovery.ports import Progress, Tools
from drctl.appliance.recovery.state import RecoveredDisk, RecoveredMachine, RecoveryPhase
from drctl.appliance.recovery.steps import UP, Steps, is_ours
from drctl.errors import DrctlError, Interrupted, OutOfSpace, StepFailed
from drctl.model.extent import format_bytes

POLL_SECONDS = 0.25
#: A pull ends early when the guest is stopped or the view died under it; more often than this is another trouble.
MAX_PULLS = 20


def space_needed(tools: Tools, steps: Steps) -> int:
    """Bytes that localizing can still write: what the view holds of each disk, less what its overlay has already.

    An upper bound of what is missing unless the guest wrote over none of it; the guest's own growth comes on top."""
    recovery = steps.recovery
    held = tools.stores.allocated(recovery.group, recovery.checkpoint)
    return sum(held.get(disk.export, disk.size) for _, disk in recovery.disks() if not disk.localized)


def localize(tools: Tools, steps: Steps, progress: Progress) -> None:
    """From a running failover to one that stands alone. Raises OutOfSpace before anything is copied."""
    recovery = steps.recovery
    if recovery.phase is not RecoveryPhase.COMMITTING:
        _check_space(tools, steps)
        recovery.phase = RecoveryPhase.COMMITTING
        recovery.times["committing"] = tools.clock.time()
        steps.save()
    for machine, disk in recovery.disks():
        if not disk.localized:
            _Localizing(tools, steps, machine, disk, progress).run()
            disk.localized = True
            steps.save()
    for machine in recovery.machines:
        _settle(tools, machine)
    tools.views.end(recovery)
    tools.stores.unpin(recovery.group, recovery.id)
    recovery.phase = RecoveryPhase.COMMITTED
    recovery.times["committed"] = tools.clock.time()
    steps.save()


def _settle(tools: Tools, machine: RecoveredMachine) -> None:
    """Take the view out of the persistent definition, or the next start would look for it."""
    if not is_ours(tools, machine):
        return
    definition = tools.hypervisor.definition(machine.recovery_name)
    settled = tools.definitions.settled(definition)
    if settled != definition:
        tools.hypervisor.define(settled)


def _check_space(tools: Tools, steps: Steps) -> None:
    needed, free = space_needed(tools, steps), tools.images.free(tools.room.images)
    if needed > free:
        raise OutOfSpace(
            f"localizing {steps.recovery.group} may need {format_bytes(needed)}, {tools.room.images} has "
            f"{format_bytes(free)}",
            hint="free space there and commit again; the machines run on meanwhile",
            needed=needed,
            free=free,
        )


class _Localizing:
    """One disk on its way to standing alone."""

    def __init__(
        self, tools: Tools, steps: Steps, machine: RecoveredMachine, disk: RecoveredDisk, progress: Progress
    ) -> None:
        self._tools = tools
        self._steps = steps
        self._machine = machine
        self._disk = disk
        self._progress = progress

    def run(self) -> None:
        tools, path = self._tools, Path(self._disk.overlay)
        if not tools.images.exists(path):
            backing = tools.views.backing(self._steps.recovery, self._disk.export)
            tools.images.create(path, backing, self._disk.size, self._tell)
        trouble = ""
        for _ in range(MAX_PULLS):
            if tools.images.backing(path) is None:
                self._tell(self._disk.size, self._disk.size)
                return
            trouble = self._once(path) or trouble
        raise StepFailed(
            f"{self._disk.export} could not be localized in {MAX_PULLS} tries{trouble and f' ({trouble})'}",
            hint="its machine runs on the view; see the appliance's log, then commit again",
        )

    def _once(self, path: Path) -> str:
        if state_of(self._tools, self._machine) in UP:
            return self._pull()
        # A machine that doesn't run has nobody to pull for it; nobody can start it in between and be hurt,
        # because qemu-img and QEMU lock the image against each other.
        self._tools.images.localize(path)
        return ""

    def _pull(self) -> str:
        hypervisor, name, target = self._tools.hypervisor, self._machine.recovery_name, self._disk.target
        try:
            if hypervisor.block_progress(name, target) is None:
                hypervisor.block_pull(name, target)
            while (job := hypervisor.block_progress(name, target)) is not None:
                self._tell(job.done, job.total)
                self._stop_if_asked()
                self._tools.sleep(POLL_SECONDS)
        except Interrupted:
            raise
        except DrctlError as exc:
            # The guest may just have been stopped: look again, the number of tries is bounded.
            self._tools.sleep(POLL_SECONDS)
            return exc.message
        return ""

    def _stop_if_asked(self) -> None:
        if self._steps.cancelled.is_set():
            raise Interrupted(f"commit of {self._steps.recovery.group} was interrupted; commit again to go on")

    def _tell(self, done: int, total: int) -> None:
        self._progress(
            {
                "step": "localize",
                "machine": self._machine.name,
                "disk": self._disk.target,
                "done_bytes": done,
                "total_bytes": total,
            }
        )
