"""Rolling a failover or switchover back: its machines go, the group no longer reigns here, what they wrote is kept.

Each step looks at what is true before it acts, so any prefix of them may be repeated. Order, and why: machines first,
for nothing may be given back while they run; then the view; then the reign, which lets the source replicate again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drctl.appliance.recovery.address import seed_path
from drctl.appliance.recovery.end import stop_machine
from drctl.appliance.recovery.ports import Progress, Tools
from drctl.appliance.recovery.state import RecoveredMachine, RecoveryPhase, RecoveryRecord
from drctl.appliance.recovery.steps import Steps, is_ours
from drctl.errors import StepFailed


def discarded(tools: Tools, record: RecoveryRecord) -> list[dict[str, Any]]:
    """What a rollback takes out of use: what the machines have written here since they were started, by disk."""
    return [
        {
            "machine": machine.name,
            "target": disk.target,
            "written_bytes": tools.images.allocated(Path(disk.overlay)),
            "overlay": disk.overlay,
        }
        for machine, disk in record.disks()
        if tools.images.exists(Path(disk.overlay))
    ]


def roll_back(tools: Tools, steps: Steps, progress: Progress) -> None:
    """From whatever a failover has come to, to a group that is ready to be replicated or failed over again.

    Raises StepFailed when a machine can't be stopped: then the group reigns here still, and it may be tried again."""
    record = steps.recovery
    if record.phase is not RecoveryPhase.ROLLING_BACK:
        record.phase = RecoveryPhase.ROLLING_BACK
        record.times["rolling-back"] = tools.clock.time()
    # Not below what is there: what was raised meanwhile by somebody else must not be taken back.
    record.given_back = max(record.given_back, record.generation + 1)
    steps.save()
    _stop_all(tools, record, progress)
    tools.views.end(record)
    tools.stores.unpin(record.group, record.id)
    tools.stores.give_back(record.group, record.given_back)
    progress({"step": "give-back", "machine": "", "state": "done"})
    record.phase = RecoveryPhase.ROLLED_BACK
    record.times["rolled-back"] = tools.clock.time()
    steps.save()


def _stop_all(tools: Tools, record: RecoveryRecord, progress: Progress) -> None:
    failures = []
    for machine in record.machines:
        if failure := stop_machine(tools, machine):
            failures.append(failure)
            continue
        _undefine(tools, machine)
        progress({"step": "machine", "machine": machine.name, "state": "stopped"})
    if failures:
        raise StepFailed(
            f"{record.group} can't be rolled back yet: {'; '.join(failures)}",
            hint=f"stop it by hand, then: drctl rollback {record.group}",
        )


def _undefine(tools: Tools, machine: RecoveredMachine) -> None:
    """The host must not know it any more: the next failover brings a definition with disks of its own."""
    if is_ours(tools, machine):
        tools.hypervisor.undefine(machine.recovery_name)


def remove_kept(tools: Tools, record: RecoveryRecord) -> None:
    """The overlays that a rollback kept, when their time is over."""
    for _, disk in record.disks():
        tools.images.remove(Path(disk.overlay))
    for path in (path for machine in record.machines for path in machine.laid if path.startswith("/")):
        tools.images.remove(Path(path))
    for seed in filter(None, (seed_path(record, machine) for machine in record.machines)):
        tools.images.remove(Path(seed))
