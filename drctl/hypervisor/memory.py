"""A hypervisor in memory, for tests: machines as definitions and states, `memory_qemu` beneath each that runs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from drctl.errors import HypervisorRefused, NotFound
from drctl.hypervisor import domain_xml
from drctl.hypervisor.memory_qemu import MemoryQemu, MemoryTap
from drctl.model.extent import GiB
from drctl.model.machine import Disk, Machine, MachineState
from drctl.model.ports import BlockProgress

#: Size of a disk that nobody gave another.
_DISK_SIZE = GiB
_RUNNING = (MachineState.RUNNING, MachineState.PAUSED)


@dataclass
class _Guest:
    definition: str
    persistent: bool
    state: MachineState = MachineState.SHUT_OFF
    autostart: bool = False
    qemu: MemoryQemu | None = None
    pulls: dict[str, BlockProgress] = field(default_factory=dict)


class MemoryHypervisor:
    """A host in memory. `taps` (socket → tap) is shared by all its machines; `sizes` source → bytes.

    Guests obey at once: `shutdown` powers off, unless the machine's name is in `deaf`. Not thread-safe."""

    def __init__(self) -> None:
        self.taps: dict[str, MemoryTap] = {}
        self.sizes: dict[str, int] = {}
        self.deaf: set[str] = set()
        self.agents: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self._guests: dict[str, _Guest] = {}
        self._callbacks: list[Callable[[str, str], None]] = []

    def version(self) -> str:
        return "memory 1.0"

    def capabilities(self) -> str:
        return (
            "<capabilities><guest><arch name='x86_64'><machine>pc</machine><machine>q35</machine>"
            "<domain type='qemu'/><domain type='kvm'/></arch></guest></capabilities>"
        )

    def machines(self) -> Sequence[Machine]:
        return [self.machine(name) for name in sorted(self._guests)]

    def machine(self, name: str) -> Machine:
        guest = self._guest(name)
        root = domain_xml.parse(guest.definition)
        return Machine(
            name=name,
            uuid=root.findtext("uuid") or "",
            state=guest.state,
            disks=tuple(self._disk(facts) for facts in domain_xml.disks(root)),
            memory=domain_xml.memory_bytes(root),
            vcpus=domain_xml.vcpus(root),
            persistent=guest.persistent,
            autostart=guest.autostart,
        )

    def _disk(self, facts: domain_xml.DiskFacts) -> Disk:
        size = self.sizes.get(facts.source, _DISK_SIZE)
        return Disk(facts.target, facts.source, facts.format, size, facts.bus, facts.refusal)

    def _guest(self, name: str) -> _Guest:
        if name not in self._guests:
            raise NotFound("machine", name, known=sorted(self._guests))
        return self._guests[name]

    def state(self, name: str) -> MachineState:
        return self._guest(name).state

    def definition(self, name: str) -> str:
        return self._guest(name).definition

    def live_definition(self, name: str) -> str:
        root = domain_xml.parse(self._guest(name).definition)
        for number, disk in enumerate(root.iterfind("devices/disk")):
            ET.SubElement(disk, "alias", {"name": f"virtio-disk{number}"})
        return ET.tostring(root, encoding="unicode")

    def create(self, definition: str, *, paused: bool = False) -> None:
        self._put(definition, persistent=False)
        self._boot(_name(definition), paused)

    def define(self, definition: str) -> None:
        guest = self._put(definition, persistent=True)
        guest.persistent = True
        self._tell(_name(definition), "defined")

    def _put(self, definition: str, *, persistent: bool) -> _Guest:
        name = _name(definition)
        if name in self._guests:
            if not persistent and self._guests[name].state in _RUNNING:
                raise HypervisorRefused(f"{name}: already running", machine=name)
            self._guests[name].definition = definition
        return self._guests.setdefault(name, _Guest(definition, persistent))

    def undefine(self, name: str) -> None:
        guest = self._guest(name)
        guest.persistent = False
        if guest.state not in _RUNNING:
            del self._guests[name]
        self._tell(name, "undefined")

    def set_autostart(self, name: str, on: bool) -> None:
        guest = self._guest(name)
        if not guest.persistent:
            raise HypervisorRefused(f"{name}: a transient machine has no autostart", machine=name)
        guest.autostart = on

    def start(self, name: str) -> None:
        if self._guest(name).state not in _RUNNING:
            self._boot(name, paused=False)

    def _boot(self, name: str, paused: bool) -> None:
        guest = self._guest(name)
        guest.state = MachineState.PAUSED if paused else MachineState.RUNNING
        facts = domain_xml.disks(domain_xml.parse(self.live_definition(name)))
        disks = {disk.alias: (f"{disk.alias}-format", self._disk(disk).size) for disk in facts}
        guest.qemu = MemoryQemu(disks, self.taps, status="paused" if paused else "running")
        self._tell(name, "started")

    def shutdown(self, name: str) -> None:
        if self._guest(name).state in _RUNNING and name not in self.deaf:
            self._off(name)

    def destroy(self, name: str) -> None:
        if name in self._guests and self._guests[name].state in _RUNNING:
            self._off(name)

    def _off(self, name: str) -> None:
        guest = self._guests[name]
        guest.state, guest.qemu = MachineState.SHUT_OFF, None
        if not guest.persistent:
            del self._guests[name]
        self._tell(name, "stopped")

    def suspend(self, name: str) -> None:
        self._running(name).status = "paused"
        self._guests[name].state = MachineState.PAUSED
        self._tell(name, "suspended")

    def resume(self, name: str) -> None:
        self._running(name).status = "running"
        self._guests[name].state = MachineState.RUNNING
        self._tell(name, "resumed")

    def _running(self, name: str) -> MemoryQemu:
        qemu = self._guest(name).qemu
        if qemu is None:
            raise HypervisorRefused(f"{name}: the machine is not running", machine=name)
        return qemu

    def qemu(self, name: str) -> MemoryQemu:
        """The model behind a running machine, for a test to break."""
        return self._running(name)

    def monitor(self, name: str, sent: dict[str, Any]) -> Any:
        return self._running(name)(sent)

    def agent(self, name: str, sent: dict[str, Any], *, timeout_seconds: int = 5) -> Any:
        self._running(name)
        if name not in self.agents:
            raise HypervisorRefused(f"{name}: the guest's agent is not connected", machine=name)
        return self.agents[name](sent)

    def source_node(self, name: str, target: str) -> str:
        self._running(name)
        facts = domain_xml.disks(domain_xml.parse(self.live_definition(name)))
        for disk in facts:
            if disk.target == target:
                return f"{disk.alias}-format"
        raise NotFound("disk", f"{name}.{target}", known=[disk.target for disk in facts])

    def block_pull(self, name: str, target: str, *, bytes_per_second: int = 0) -> None:
        self.source_node(name, target)
        self._guest(name).pulls[target] = BlockProgress(0, 2)

    def block_progress(self, name: str, target: str) -> BlockProgress | None:
        """Each look is a step of the job."""
        pulls = self._guest(name).pulls
        found = pulls.get(target)
        if found is None or found.done + 1 >= found.total:
            pulls.pop(target, None)
            return None
        pulls[target] = BlockProgress(found.done + 1, found.total)
        return pulls[target]

    def block_abort(self, name: str, target: str) -> None:
        self._guest(name).pulls.pop(target, None)

    def watch(self, callback: Callable[[str, str], None]) -> None:
        self._callbacks.append(callback)

    def _tell(self, name: str, event: str) -> None:
        for callback in self._callbacks:
            callback(name, event)

    def close(self) -> None:
        self._callbacks.clear()


def _name(definition: str) -> str:
    return domain_xml.parse(definition).findtext("name") or ""
