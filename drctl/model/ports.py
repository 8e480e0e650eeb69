"""The interfaces between rooms: what each needs from the other, and how it may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from drctl.model.extent import Extent
from drctl.model.machine import Machine, MachineState


class Clock(Protocol):
    """Wall time in seconds since the epoch (UTC), and monotonic time in seconds. Tests own it."""

    def time(self) -> float: ...

    def monotonic(self) -> float: ...


class BlockSource(Protocol):
    """A disk that can be read at any place, e.g. a view. Raises IntegrityError rather than serve a wrong byte."""

    size: int

    def read(self, offset: int, length: int) -> bytes | memoryview: ...

    def extents(self, offset: int, length: int) -> Iterator[tuple[Extent, bool]]:
        """The range in order as (extent, is data); what is not data reads as zeroes."""
        ...


@dataclass(frozen=True, slots=True)
class TapTarget:
    """Where one disk's writes go: the tap's unix socket and the name of the export there."""

    machine: str
    target: str
    socket: str
    export: str


@dataclass(frozen=True, slots=True)
class BlockProgress:
    """How far a hypervisor's own job on a disk is, in the job's units (bytes for a pull)."""

    done: int
    total: int


class MirrorState(Protocol):
    """One look at a disk's mirror job (all facts from one query)."""

    @property
    def present(self) -> bool: ...

    @property
    def healthy(self) -> bool: ...


class AddressBook(Protocol):
    """Reservations of DHCP on a host's networks, by MAC address. Raises NotFound for a network that is not there,
    HypervisorRefused when it has no DHCP, or has given the address to another."""

    def reserved(self, network: str, mac: str) -> str:
        """The IPv4 address that is reserved; "" for none."""
        ...

    def reserve(self, network: str, mac: str, ip: str, *, lasting: bool) -> None:
        """`lasting`: also after the network was started anew."""
        ...

    def release(self, network: str, mac: str, ip: str) -> None:
        """Nothing happens when it is not reserved."""
        ...


class Hypervisor(Protocol):
    """One hypervisor host. Methods block; failures are HostUnreachable or HypervisorRefused, never others."""

    def version(self) -> str: ...

    def machines(self) -> Sequence[Machine]: ...

    def machine(self, name: str) -> Machine:
        """Raises NotFound."""
        ...

    def definition(self, name: str) -> str:
        """The persistent definition (libvirt: inactive, secure XML)."""
        ...

    def create(self, definition: str, *, paused: bool = False) -> None:
        """Start a transient machine from a definition."""
        ...

    def define(self, definition: str) -> None: ...

    def undefine(self, name: str) -> None: ...

    def start(self, name: str) -> None: ...

    def shutdown(self, name: str) -> None:
        """Ask the guest to power off; returns at once."""
        ...

    def destroy(self, name: str) -> None:
        """Pull the plug; no error when it is not running."""
        ...

    def suspend(self, name: str) -> None:
        """Stop the guest's processors; no error when they are stopped."""
        ...

    def resume(self, name: str) -> None:
        """Let them run; no error when they do."""
        ...

    def set_autostart(self, name: str, on: bool) -> None: ...

    def live_definition(self, name: str) -> str:
        """The definition of the machine as it runs."""
        ...

    def capabilities(self) -> str:
        """What can run here (libvirt: capabilities XML)."""
        ...

    def monitor(self, name: str, sent: dict[str, Any]) -> Any:
        """One QMP command to a running machine's QEMU, and what it returned."""
        ...

    def agent(self, name: str, sent: dict[str, Any], *, timeout_seconds: int = 5) -> Any:
        """One command to the guest's agent, and what it returned."""
        ...

    def source_node(self, name: str, target: str) -> str:
        """The root node in QEMU of a running machine's disk. Raises NotFound."""
        ...

    def block_pull(self, name: str, target: str, *, bytes_per_second: int = 0) -> None:
        """Begin to copy a disk's backing chain into its top file while the machine runs (0: no limit)."""
        ...

    def block_progress(self, name: str, target: str) -> BlockProgress | None:
        """How far the hypervisor's job on a disk is; None when there is none."""
        ...

    def block_abort(self, name: str, target: str) -> None: ...

    def state(self, name: str) -> MachineState: ...

    def watch(self, callback: Callable[[str, str], None]) -> None:
        """Call back (machine, event) for each lifecycle event, from another thread."""
        ...

    def close(self) -> None: ...
