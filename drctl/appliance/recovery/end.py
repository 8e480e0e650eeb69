"""Taking a test down until nothing of it is left. Each removal looks first, so it may be repeated after a crash."""

from __future__ import annotations

from pathlib import Path

from drctl.appliance.recovery.address import release
from drctl.appliance.recovery.ports import Tools
from drctl.appliance.recovery.state import RecoveredMachine, RecoveryPhase
from drctl.appliance.recovery.steps import UP, Steps, is_ours
from drctl.errors import DrctlError, NotFound, StepFailed
from drctl.model.machine import MachineState


def take_down(tools: Tools, steps: Steps) -> None:
    """Machines first (they read the view), then the view, the pin, the overlays; the record stays as `ended`.

    Raises StepFailed when a machine can't be stopped: then all that it stands on is left in place."""
    recovery = steps.recovery
    recovery.phase = RecoveryPhase.STOPPING
    steps.save()
    failures = [failure for machine in recovery.machines if (failure := stop_machine(tools, machine))]
    if failures:
        raise StepFailed(f"{recovery.id} can't be taken down: {'; '.join(failures)}", hint="stop it by hand and retry")
    for machine in recovery.machines:
        tools.definitions.clear(machine)
    tools.views.end(recovery)
    tools.stores.unpin(recovery.group, recovery.id)
    for _, disk in recovery.disks():
        tools.images.remove(Path(disk.overlay))
    tools.images.remove(tools.room.scratch / recovery.id)
    recovery.phase = RecoveryPhase.ENDED
    recovery.times["ended"] = tools.clock.time()
    steps.save()


def stop_machine(tools: Tools, machine: RecoveredMachine) -> str:
    """Pull its plug, if it is ours, and take back its addresses; what went wrong, or nothing."""
    try:
        if is_ours(tools, machine):
            tools.hypervisor.destroy(machine.recovery_name)
            if state_of(tools, machine) in UP:
                return f"{machine.recovery_name} still runs"
    except DrctlError as exc:
        return f"{machine.recovery_name}: {exc.message}"
    return release(tools, machine)


def state_of(tools: Tools, machine: RecoveredMachine) -> MachineState:
    """The machine's state at the host; SHUT_OFF when the host doesn't know it (a transient one that has ended)."""
    try:
        return tools.hypervisor.state(machine.recovery_name)
    except NotFound:
        return MachineState.SHUT_OFF
