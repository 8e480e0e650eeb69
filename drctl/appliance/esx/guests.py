"""The machines of an ESX host as the rest of an appliance sees machines: by name, disks by libvirt's names."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from drctl.errors import HypervisorRefused, NotFound
from drctl.hypervisor.esx import domain
from drctl.hypervisor.esx.disks import Disks
from drctl.hypervisor.esx.domain import Domain
from drctl.hypervisor.esx.host import EsxHost, describe
from drctl.hypervisor.esx.inventory import EsxMachine, Inventory
from drctl.hypervisor.esx.snapshots import Snapshots
from drctl.model.machine import Machine, MachineState

#: What several callers ask for within this is asked of the host once.
FRESH_SECONDS = 2.0
#: What is only told to people, or looked at over and over, may be so old: a look takes a real host seconds.
STATE_SECONDS, TOLD_SECONDS = 10.0, 120.0


class SerialSnapshots(Snapshots):
    """Snapshots of one host, taken and removed one at a time, whichever groups they are of: in parallel each second one
    fails with a lock there (16392)."""

    def __init__(self, host: EsxHost, lock: threading.Lock, *, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(host, sleep=sleep)
        self._serial = lock

    def create(self, machine: EsxMachine, name: str, **more: object) -> None:
        with self._serial:
            super().create(machine, name, **more)  # type: ignore[arg-type]

    def remove(self, machine: EsxMachine, name: str, **more: object) -> None:
        with self._serial:
            super().remove(machine, name, **more)  # type: ignore[arg-type]


class EsxGuests:
    """One host. Any thread may use it. Raises HostUnreachable, NotFound, HypervisorRefused, UnsupportedFormat."""

    def __init__(self, host: EsxHost, kind: str = "kvm", *, sleep: Callable[[float], None] = time.sleep) -> None:
        """`kind` is that of the definitions for libvirt."""
        self.host = host
        self.snapshots = SerialSnapshots(host, threading.Lock(), sleep=sleep)
        self.disks = Disks(host.session, sleep=sleep)
        self._kind = kind
        self._lock = threading.Lock()
        self._seen: tuple[float, Inventory] | None = None

    def inventory(self, age: float = FRESH_SECONDS) -> Inventory:
        """A look at the host that is so many seconds old at most."""
        seen = self._seen
        if seen is not None and time.monotonic() - seen[0] <= age:
            return seen[1]
        with self._lock:
            if self._seen is None or time.monotonic() - self._seen[0] > age:
                begun = time.monotonic()
                self._seen = (begun, self.host.inventory())
            return self._seen[1]

    def forget(self) -> None:
        """Something was changed: what was seen before is too old for anybody."""
        with self._lock:
            self._seen = None

    def find(self, name: str, age: float = FRESH_SECONDS) -> EsxMachine:
        """By its name. Raises NotFound; HypervisorRefused when two have it."""
        every = self.inventory(age).machines
        found = [one for one in every if one.name == name]
        if not found:
            text = f"no machine {name!r} on {self.host.name}"
            hint = "moved by vMotion, renamed, or unregistered? no checkpoint of its group is made without it"
            raise NotFound("machine", name, known=sorted({one.name for one in every}), message=text, hint=hint)
        if len(found) > 1:
            paths = ", ".join(one.vmx for one in found)
            raise HypervisorRefused(f"{self.host.name}: {len(found)} machines are named {name!r}: {paths}")
        return found[0]

    # -- as other hypervisors ---------------------------------------------------------------------------------------

    def version(self) -> str:
        return describe(self.inventory(TOLD_SECONDS).version)

    def machines(self) -> Sequence[Machine]:
        return [domain.machine(one) for one in self.inventory(TOLD_SECONDS).machines]

    def machine(self, name: str) -> Machine:
        """One that can be protected has a name that files can have."""
        if "/" in name or name.startswith("."):
            raise HypervisorRefused(f"{name!r}: no file can be named so, and its replica's would be", machine=name)
        return domain.machine(self.find(name))

    def state(self, name: str) -> MachineState:
        return self.find(name, STATE_SECONDS).machine.state

    def destroy(self, name: str) -> None:
        self.host.stop(self.find(name))

    def domain(self, name: str, age: float = FRESH_SECONDS) -> Domain:
        return domain.define(self.find(name, age), self._kind)

    def definition(self, name: str) -> str:
        """As libvirt would define it: the recovery site is libvirt's."""
        return self.domain(name).definition
