"""Parts of the recovery host in memory that know nothing of the others: its clock, its link, its definitions."""

from __future__ import annotations

from drctl.appliance.recovery.ports import Beside, Heard, Recoverable, Rewritten
from drctl.appliance.recovery.state import RecoveredMachine, RecoveryRecord


class MemoryClock:
    """Time passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class MemorySources:
    """What the link would tell of the source: silent unless told otherwise."""

    def __init__(self) -> None:
        self.told: Heard | None = Heard(connected=False)

    def heard(self, group: str) -> Heard | None:
        del group
        return self.told


class MemoryDefinitions:
    """Definitions as MemoryHypervisor reads them."""

    def rewrite(self, recovery: RecoveryRecord, machine: RecoveredMachine, source: Recoverable) -> Rewritten:
        disks = "".join(f"{disk.overlay}<view>;" for disk in machine.disks)
        definition = f"name={machine.recovery_name};uuid={machine.uuid};{disks}"
        return Rewritten(definition, ("cdrom dropped",), ((f"52:54:00:00:00:{len(machine.disks):02x}", "lan"),))

    def lay(self, machine: RecoveredMachine, beside: Beside) -> list[str]:
        return []

    def clear(self, machine: RecoveredMachine) -> None:
        pass

    def settled(self, definition: str) -> str:
        return definition.replace("<view>", "")

    def unmet(self, definition: str, capabilities: str) -> tuple[str, ...]:
        return ()
