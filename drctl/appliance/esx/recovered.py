"""Recovered machines on an ESX host, as the steps of a recovery see a hypervisor. Ours lie below one directory.

Among machines of one name ours is the one that lies there; a stranger of that name is told, and never touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from drctl.appliance.esx.guests import STATE_SECONDS, EsxGuests
from drctl.errors import HypervisorRefused, NotFound
from drctl.hypervisor import vmx
from drctl.hypervisor.esx import answers
from drctl.hypervisor.esx.inventory import EsxMachine
from drctl.hypervisor.esx.replica import ReplicaDisks
from drctl.hypervisor.vmx import Vmx
from drctl.model.machine import Machine, MachineState
from drctl.model.ports import BlockProgress

#: All that is ours on a datastore lies in a directory of this name.
ROOT = "drctl-recovery"
#: Below it: what goes with its test.
TESTS = "tests"
#: Port groups change by somebody's hand only.
NETWORK_SECONDS = 30.0


def is_ours(path: str) -> bool:
    """Whether a path (by UUID) is below our directory of its datastore."""
    parts = path.split("/")
    return len(parts) > 6 and parts[:3] == ["", "vmfs", "volumes"] and parts[4] == ROOT and ".." not in parts


def packed(path: str, definition: Vmx) -> str:
    """A definition as the steps of a recovery pass it on: the .vmx's path, and its text."""
    return f"# {path}\n{vmx.render(definition)}"


def unpacked(text: str) -> tuple[str, str]:
    """(path, text). Raises HypervisorRefused."""
    first, _, rest = text.partition("\n")
    path = first.removeprefix("# ")
    if not is_ours(path) or not path.endswith(".vmx"):
        raise HypervisorRefused(f"{path!r} is no place for a machine that is recovered")
    return path, rest


class RecoveredOnEsx:
    """A Hypervisor for recoveries alone. Methods may be called from any thread."""

    def __init__(self, guests: EsxGuests, files: ReplicaDisks) -> None:
        self._guests = guests
        self._files = files
        self._networks: tuple[float, frozenset[str]] | None = None

    def find(self, name: str, age: float = 0.0) -> EsxMachine:
        """Ours of this name, else a stranger. Raises NotFound; HypervisorRefused when it can't be told which."""
        every = [one for one in self._guests.inventory(age).machines if one.name == name]
        found = [one for one in every if is_ours(one.vmx)] or every
        if not found:
            raise NotFound("machine", name)
        if len(found) > 1:
            paths = ", ".join(one.vmx for one in found)
            raise HypervisorRefused(f"{self._guests.host.name}: {len(found)} machines are named {name!r}: {paths}")
        return found[0]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What was seen before is not believed afterwards, whatever came of it."""
        try:
            yield
        finally:
            self._guests.forget()

    # -- what there is ----------------------------------------------------------------------------------------------

    def version(self) -> str:
        return self._guests.version()

    def machines(self) -> Sequence[Machine]:
        return [one.machine for one in self._guests.inventory().machines]

    def machine(self, name: str) -> Machine:
        return self.find(name).machine

    def state(self, name: str) -> MachineState:
        return self.find(name, STATE_SECONDS).machine.state

    def definition(self, name: str) -> str:
        """The machine's place, and all layers of its disks: enough to know whose it is."""
        found = self.find(name)
        layers = [layer.path for disk in found.disks for layer in disk.layers]
        return "\n".join([f"# {found.vmx}", *layers])

    def live_definition(self, name: str) -> str:
        raise self._cannot(f"the console of {name} can't be read")

    def capabilities(self) -> str:
        return ""

    def networks(self) -> frozenset[str]:
        """Names of the host's port groups."""
        if self._networks is None or time.monotonic() - self._networks[0] > NETWORK_SECONDS:
            command = ["esxcli", "network", "vswitch", "standard", "portgroup", "list"]
            (text,) = self._guests.host.session.ask(command)
            self._networks = (time.monotonic(), frozenset(row["Name"] for row in answers.table(text)))
        return self._networks[1]

    # -- changes ----------------------------------------------------------------------------------------------------

    def create(self, definition: str, *, paused: bool = False) -> None:
        """Let the host know the machine, and run it."""
        del paused
        with self._changing():
            self._guests.host.start(self._known(definition))

    def define(self, definition: str) -> None:
        with self._changing():
            self._known(definition)

    def _known(self, definition: str) -> EsxMachine:
        """The machine, registered; its .vmx is the host's own from then on, and not written again."""
        path, text = unpacked(definition)
        found = next((one for one in self._guests.inventory(0).machines if one.vmx == path), None)
        if found is None:
            self._files.put(path, text.encode())
            found = self._guests.host.register(path)
        return found

    def undefine(self, name: str) -> None:
        with self._changing():
            self._guests.host.unregister(self._ours(name))

    def start(self, name: str) -> None:
        with self._changing():
            self._guests.host.start(self._ours(name))

    def shutdown(self, name: str) -> None:
        with self._changing():
            self._guests.host.shutdown(self._ours(name))

    def destroy(self, name: str) -> None:
        """Pull the plug; a test's machine is forgotten with that, as a transient one of libvirt would be."""
        with self._changing():
            try:
                found = self._ours(name)
            except NotFound:
                return
            self._guests.host.stop(found)
            if found.vmx.split("/")[5] == TESTS:
                self._guests.host.unregister(found)

    def _ours(self, name: str) -> EsxMachine:
        found = self.find(name)
        if not is_ours(found.vmx):
            raise HypervisorRefused(f"{self._guests.host.name}: {name} at {found.vmx} is not ours: it is left alone")
        return found

    def close(self) -> None:
        """Nothing is held."""

    # -- what can't be had by SSH -----------------------------------------------------------------------------------

    def _cannot(self, what: str) -> HypervisorRefused:
        return HypervisorRefused(f"{self._guests.host.name} is an ESX host: {what} there by this version")

    def suspend(self, name: str) -> None:
        raise self._cannot(f"{name} can't be suspended")

    def resume(self, name: str) -> None:
        raise self._cannot(f"{name} can't be resumed")

    def set_autostart(self, name: str, on: bool) -> None:
        del on
        raise self._cannot(f"the autostart of {name} can't be set")

    def monitor(self, name: str, sent: dict[str, Any]) -> Any:
        del sent
        raise self._cannot(f"{name} has no monitor")

    def agent(self, name: str, sent: dict[str, Any], *, timeout_seconds: int = 5) -> Any:
        del sent, timeout_seconds
        raise self._cannot(f"no agent in {name} can be asked")

    def source_node(self, name: str, target: str) -> str:
        raise self._cannot(f"{name}.{target} has no node")

    def block_pull(self, name: str, target: str, *, bytes_per_second: int = 0) -> None:
        del bytes_per_second
        raise self._cannot(f"{name}.{target} has nothing to pull")

    def block_progress(self, name: str, target: str) -> BlockProgress | None:
        del name, target
        return None

    def block_abort(self, name: str, target: str) -> None:
        """No job runs."""

    def watch(self, callback: Callable[[str, str], None]) -> None:
        """The host tells no events."""


class NoAddresses:
    """The AddressBook of a host that has no DHCP."""

    def reserved(self, network: str, mac: str) -> str:
        del network, mac
        return ""

    def reserve(self, network: str, mac: str, ip: str, *, lasting: bool) -> None:
        del lasting, mac
        raise HypervisorRefused(f"{ip} can't be reserved on {network}: an ESX host has no DHCP")

    def release(self, network: str, mac: str, ip: str) -> None:
        """Nothing was reserved."""
