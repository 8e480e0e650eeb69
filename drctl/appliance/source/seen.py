"""What the last look at a group saw, for the status and for the next look."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from drctl.appliance.source.host import SourceHost
from drctl.appliance.source.image_stamp import Stamp
from drctl.appliance.source.side_by_side import each
from drctl.model.machine import Machine, MachineState

#: The machines' disks are asked for this often without an event (sizes and new disks; states are asked each look).
MACHINES_SECONDS = 2.0
#: While all seems well it is asked this often whether marks would be attested: the status must not say so alone.
ATTEST_SECONDS = 1.0


@dataclass(slots=True)
class Seen:
    """What the last look saw, for status and for the next look. Owned by the protection's thread."""

    machines: list[Machine] = field(default_factory=list)
    machines_at: float = 0.0
    #: Images of machines that are off, as they were when the pass began.
    stamps: dict[int, Stamp | None] = field(default_factory=dict)
    #: When attestation may be asked for again.
    attest_due: float = 0.0
    attested: str = ""

    def look(self, host: SourceHost, names: Iterable[str], *, anew: bool) -> list[Machine]:
        """The machines; their disks may be some seconds old, unless `anew`."""
        old = time.monotonic() - self.machines_at > MACHINES_SECONDS
        if anew or old or not self.machines or self._half_seen():
            self.machines = each(lambda name: self._one(host, name), list(names))
            self.machines_at = time.monotonic()
        else:
            self.machines = [replace(machine, state=host.state(machine.name)) for machine in self.machines]
        return self.machines

    def _half_seen(self) -> bool:
        """A machine that powers off while it is asked has disks of unknown size, and with these nothing can be said of
        how it left: it is asked again at once."""
        return any(disk.source and not disk.size for machine in self.machines for disk in machine.disks)

    def _one(self, host: SourceHost, name: str) -> Machine:
        """A machine that starts has the disks that it had: libvirt would answer when it has started, and until then
        those that run already would have no mirrors."""
        if host.state(name) is MachineState.STARTING:
            for known in self.machines:
                if known.name == name:
                    return replace(known, state=MachineState.STARTING)
        return host.machine(name)

    def unattested(self, attest: Callable[[], str]) -> str:
        """Why a mark would not be attested now. The shipper hears it at each mark; this is for people."""
        if time.monotonic() >= self.attest_due or self.attested:
            self.attest_due = time.monotonic() + ATTEST_SECONDS
            self.attested = attest()
        return self.attested
