"""A libvirt host: machines, their life, their monitors. Imports libvirt, as only `libvirt_connection` does beside it.

Methods block and may be called from any thread; they raise HostUnreachable, NotFound or HypervisorRefused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Self

import libvirt
import libvirt_qemu

from drctl.errors import HypervisorRefused, NotFound, SetupFailed
from drctl.hypervisor import domain_xml, libvirt_host
from drctl.hypervisor.block_graph import MirrorName, MirrorState, source_node
from drctl.hypervisor.domain_xml import DiskFacts
from drctl.hypervisor.libvirt_connection import Connection
from drctl.hypervisor.libvirt_files import LibvirtFiles
from drctl.hypervisor.libvirt_networks import LibvirtNetworks
from drctl.hypervisor.libvirt_screen import take_screenshot
from drctl.hypervisor.mirror import Mirror, find
from drctl.hypervisor.qmp import command, unpack
from drctl.model.extent import SECTOR
from drctl.model.machine import Disk, Machine, MachineState
from drctl.model.ports import BlockProgress

#: Debian 12's, the oldest that drctl is tested with; libvirt counts 1,000,000 × major + 1,000 × minor.
OLDEST_LIBVIRT: Final = 9_000_000
OLDEST_QEMU: Final = 7_002_000
#: From here on a client that leaves an NBD export of a disk with an I/O thread does not end QEMU. Measured: 7.2.22 does
#: (`nbd_blockdev_client_closed: Assertion qemu_in_main_thread()`), at the first client that leaves.
IOTHREAD_EXPORT_QEMU: Final = 9_000_000

_STATES: Final = {
    libvirt.VIR_DOMAIN_RUNNING: MachineState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: MachineState.RUNNING,
    libvirt.VIR_DOMAIN_SHUTDOWN: MachineState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: MachineState.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: MachineState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTOFF: MachineState.SHUT_OFF,
    libvirt.VIR_DOMAIN_CRASHED: MachineState.CRASHED,
}
_UNDEFINE: Final = (
    libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
)


class LibvirtHypervisor:
    """One libvirt host. Survives libvirtd's restart: calls raise HostUnreachable until it is back."""

    def __init__(self, uri: str) -> None:
        """Connect. Raises HostUnreachable, or SetupFailed when libvirt or QEMU is too old."""
        self._connection = Connection(uri)
        try:
            self._check_versions()
        except BaseException:
            self.close()
            raise

    # -- the host ---------------------------------------------------------------------------------------------------

    def version(self) -> str:
        with self._connection.translated():
            connection = self._connection.get()
            kind, number = connection.getType(), connection.getVersion()
            return f"libvirt {_dotted(connection.getLibVersion())}, {kind} {_dotted(number)}"

    def capabilities(self) -> str:
        """libvirt's capabilities XML: which kinds of machine can run here."""
        with self._connection.translated():
            return self._connection.get().getCapabilities()

    def watch(self, callback: Callable[[str, str], None]) -> None:
        """Call back (machine, event) for each event, from another thread; it must hand over, not call back into here.

        Events: `started`, `stopped` (after `destroyed`, `saved` or `failed`, if it was that), `migrated`, `crashed`,
        `shutdown`, `suspended`, `resumed`, `defined`,
        `undefined`, `block-job:TARGET:completed|failed|canceled|ready` (libvirt's own jobs only),
        `agent:connected|disconnected`, `device-added:ALIAS`, `device-removed:ALIAS`, `io-error:ALIAS:REASON`,
        `job-completed`; with an empty machine `host-lost`, `host-back` (events in between are lost)."""
        self._connection.watch(callback)

    @property
    def addresses(self) -> LibvirtNetworks:
        """The reservations of its networks."""
        return LibvirtNetworks(self._connection)

    def files(self) -> LibvirtFiles:
        """Small files beside disks."""
        return LibvirtFiles(self._connection)

    def secrets(self) -> dict[str, tuple[str, str]]:
        """Type and usage of its secrets by UUID; never their values."""
        return libvirt_host.secrets(self._connection)

    def networks(self) -> frozenset[str] | None:
        """Names of its networks; None where its driver has none."""
        return libvirt_host.networks(self._connection)

    def processor_fits(self, arch: str, machine: str, kind: str, processor: str) -> bool | None:
        """Whether this host can give a guest this `<cpu>`; None where libvirt can't tell."""
        return libvirt_host.processor_fits(self._connection, (arch, machine, kind), processor)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_versions(self) -> None:
        with self._connection.translated():
            connection = self._connection.get()
            if connection.getLibVersion() < OLDEST_LIBVIRT:
                raise SetupFailed(f"libvirt {_dotted(connection.getLibVersion())} is too old; drctl needs 9.0")
            if self._is_qemu() and connection.getVersion() < OLDEST_QEMU:
                raise SetupFailed(f"QEMU {_dotted(connection.getVersion())} is too old; drctl needs 7.2")

    def _is_qemu(self) -> bool:
        return self._connection.get().getType() == "QEMU"

    # -- machines ---------------------------------------------------------------------------------------------------

    def machines(self) -> Sequence[Machine]:
        with self._connection.translated():
            every = self._connection.get().listAllDomains()
        found = []
        for domain in every:
            try:
                found.append(self._machine(domain))
            except NotFound:
                continue  # gone since the list was made
        return sorted(found, key=lambda machine: machine.name)

    def machine(self, name: str) -> Machine:
        """Raises NotFound."""
        return self._machine(self._domain(name))

    def state(self, name: str) -> MachineState:
        domain = self._domain(name)
        with self._connection.translated(name):
            return _state(domain.state())

    def moved_away(self, name: str) -> bool:
        """Whether the machine is off here because it was migrated; libvirtd forgets it when it restarts."""
        domain = self._domain(name)
        with self._connection.translated(name):
            return bool(domain.state() == [libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED])

    def ended_in_order(self, name: str) -> bool:
        """Whether the machine is off because its guest powered off; libvirtd forgets it when it restarts."""
        domain = self._domain(name)
        with self._connection.translated(name):
            return bool(domain.state() == [libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN])

    def definition(self, name: str) -> str:
        """The persistent definition, with secrets; of a transient machine what it was started from."""
        domain = self._domain(name)
        with self._connection.translated(name):
            return domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)

    def live_definition(self, name: str) -> str:
        """The definition of the machine as it runs, with device aliases."""
        domain = self._domain(name)
        with self._connection.translated(name):
            return domain.XMLDesc(0)

    def _domain(self, name: str) -> libvirt.virDomain:
        with self._connection.translated(name):
            return self._connection.get().lookupByName(name)

    def _machine(self, domain: libvirt.virDomain) -> Machine:
        with self._connection.translated():
            name = domain.name()
        with self._connection.translated(name):
            root = domain_xml.parse(domain.XMLDesc(0))
            return Machine(
                name=name,
                uuid=domain.UUIDString(),
                state=_state(domain.state()),
                disks=tuple(self._disk(domain, facts) for facts in domain_xml.disks(root)),
                memory=domain_xml.memory_bytes(root),
                vcpus=domain_xml.vcpus(root),
                persistent=bool(domain.isPersistent()),
                autostart=bool(domain.isPersistent()) and bool(domain.autostart()),
            )

    def _disk(self, domain: libvirt.virDomain, facts: DiskFacts) -> Disk:
        size, refusal = 0, facts.refusal
        try:
            size = domain.blockInfo(facts.target)[0] if facts.source else 0
        except libvirt.libvirtError as exc:
            refusal = refusal or f"its size is unknown: {exc.get_error_message()}"
        if size % SECTOR:
            refusal = refusal or f"its size, {size} bytes, is no multiple of {SECTOR}"
        return Disk(
            target=facts.target,
            source=facts.source,
            format=facts.format,
            size=size,
            bus=facts.bus,
            refusal=refusal or self._version_refusal(facts),
        )

    def _version_refusal(self, facts: DiskFacts) -> str:
        if facts.iothread and self._is_qemu() and self._connection.get().getVersion() < IOTHREAD_EXPORT_QEMU:
            return "has an I/O thread: QEMU older than 9.0 ends when the first sync's reader disconnects"
        return ""

    # -- life -------------------------------------------------------------------------------------------------------

    def create(self, definition: str, *, paused: bool = False) -> None:
        """Start a transient machine from a definition."""
        with self._connection.translated():
            self._connection.get().createXML(definition, libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

    def define(self, definition: str) -> None:
        with self._connection.translated():
            self._connection.get().defineXML(definition)

    def undefine(self, name: str) -> None:
        """Forget a machine with all that libvirt keeps of it. Its disks stay."""
        domain = self._domain(name)
        with self._connection.translated(name):
            domain.undefineFlags(_UNDEFINE if self._is_qemu() else 0)  # other drivers know none of the flags

    def set_autostart(self, name: str, on: bool) -> None:
        domain = self._domain(name)
        with self._connection.translated(name):
            domain.setAutostart(int(on))

    def start(self, name: str) -> None:
        """Start a defined machine; nothing happens when it runs."""
        domain = self._domain(name)
        with self._connection.translated(name):
            if not domain.isActive():
                domain.create()

    def shutdown(self, name: str) -> None:
        """Ask the guest to power off; returns at once."""
        domain = self._domain(name)
        with self._connection.translated(name):
            if domain.isActive():
                domain.shutdown()

    def destroy(self, name: str) -> None:
        """Pull the plug; no error when it is not running, or not there."""
        try:
            domain = self._domain(name)
            with self._connection.translated(name):
                if domain.isActive():
                    domain.destroy()
        except NotFound:
            return
        except HypervisorRefused:
            with self._connection.translated(name):
                if domain.isActive():
                    raise

    def suspend(self, name: str) -> None:
        """Stop the guest's processors; nothing happens when they are stopped."""
        domain = self._domain(name)
        with self._connection.translated(name):
            if domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
                domain.suspend()

    def resume(self, name: str) -> None:
        """Let the guest run; nothing happens when it does."""
        domain = self._domain(name)
        with self._connection.translated(name):
            if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
                domain.resume()

    # -- QEMU -------------------------------------------------------------------------------------------------------

    def monitor(self, name: str, sent: dict[str, Any]) -> Any:
        """One QMP command to the machine's QEMU, past libvirt. Raises HypervisorRefused with QEMU's words."""
        domain = self._domain(name)
        with self._connection.translated(name):
            answer = libvirt_qemu.qemuMonitorCommand(domain, json.dumps(sent), 0)
        return unpack(sent, json.loads(answer))

    def agent(self, name: str, sent: dict[str, Any], *, timeout_seconds: int = 5) -> Any:
        """One command to the guest's agent. Raises HypervisorRefused when there is none, or it does not answer."""
        domain = self._domain(name)
        with self._connection.translated(name):
            answer = libvirt_qemu.qemuAgentCommand(domain, json.dumps(sent), timeout_seconds, 0)
        return json.loads(answer).get("return")

    def source_node(self, name: str, target: str) -> str:
        """The root node in QEMU of a running machine's disk. Raises NotFound."""
        facts = domain_xml.disks(domain_xml.parse(self.live_definition(name)))
        for disk in facts:
            if disk.target == target and disk.alias:
                return source_node(self.monitor(name, command("query-block")), disk.alias)
        raise NotFound("disk", f"{name}.{target}", known=[disk.target for disk in facts])

    def mirror(self, machine: str, target: str, name: MirrorName) -> Mirror:
        """The mirror of a running machine's disk; not attached by this. Raises NotFound."""
        return Mirror(partial(self.monitor, machine), name, self.source_node(machine, target))

    def mirrors(self, machine: str) -> list[MirrorState]:
        """All of drctl's mirrors in a running machine."""
        return find(partial(self.monitor, machine))

    def screenshot(self, name: str) -> bytes:
        """The first screen of a running machine, PPM or PNG. Raises HypervisorRefused when it has no display."""
        return take_screenshot(self._connection, name)

    # -- localizing -------------------------------------------------------------------------------------------------

    def block_pull(self, name: str, target: str, *, bytes_per_second: int = 0) -> None:
        """Begin to copy a disk's backing chain into its top file while the machine runs (0: no limit)."""
        domain = self._domain(name)
        with self._connection.translated(name):
            domain.blockPull(target, bytes_per_second, libvirt.VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES)

    def block_progress(self, name: str, target: str) -> BlockProgress | None:
        """How far libvirt's job on a disk is; None when there is none (done, or never begun)."""
        domain = self._domain(name)
        with self._connection.translated(name):
            found = domain.blockJobInfo(target)
        return BlockProgress(found["cur"], found["end"]) if found else None

    def block_abort(self, name: str, target: str) -> None:
        """Stop a pull; what was copied stays, and a later one goes on from there."""
        domain = self._domain(name)
        with self._connection.translated(name):
            domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC)


def _state(found: Sequence[int]) -> MachineState:
    """Out of libvirt's state and reason. While it starts a domain it lets nothing else in: monitor commands wait."""
    if list(found) == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]:
        return MachineState.STARTING
    return _STATES.get(found[0], MachineState.UNKNOWN)


def _dotted(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
