"""The machine of an appliance on an ESX host: made from an image, registered, started, and taken away again.

Everything of it lies in one directory whose name has the appliance's UUID: nothing else on the host is ever touched.
Each step looks before it changes, and what a lost connection leaves is gone on from."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from drctl.appliance.install import vm_text
from drctl.appliance.install.image import Image
from drctl.appliance.install.vm_text import CONSOLE, SEED, SEED_SIZE, SYSTEM, Told
from drctl.errors import AlreadyExists, ConfigInvalid, HypervisorRefused, NotFound, OutOfSpace, Refused
from drctl.hypervisor import vmdk
from drctl.hypervisor.esx.disks import Disks
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.inventory import VOLUMES, EsxMachine, Inventory
from drctl.hypervisor.esx.session import Runner
from drctl.hypervisor.esx.upload import Uploads
from drctl.model.extent import GiB, format_bytes
from drctl.model.machine import MachineState
from drctl.model.site import ApplianceMachine

#: From power-on until sshd is up; emulated on a busy machine it takes minutes.
BOOT_SECONDS = 900.0
POLL_SECONDS = 2.0
#: Room that a thin system disk takes at first, beside the image itself.
_UNPACKED = GiB
_IMAGE = "image.vmdk"
#: Holds the image's SHA-256 once the system disk is whole.
_READY = "system.ready"
#: A file beside the directory, that says that an uninstallation has begun, and that all may go.
_REMOVING = ".removing"
_DIRECTORY = re.compile(rf"{VOLUMES}/[^/]+/drctl-appliance-[0-9a-f-]{{36}}")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class VmWanted:
    """What the machine shall be. `name` is its host's in drctl.toml, `uuid` the appliance's."""

    name: str
    uuid: str
    machine: ApplianceMachine
    authorized_key: str


@dataclass(slots=True)
class VmState:
    """The machine as it is; `directory` is where it lies, or would."""

    directory: str
    registered: EsxMachine | None = None
    removing: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.registered is not None and self.registered.machine.state is MachineState.RUNNING


class ApplianceVm:
    """One on one host. Methods raise DrctlError; given again they go on."""

    def __init__(
        self, host: EsxHost, shell: Runner, wanted: VmWanted, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._host = host
        self._session = host.session
        self._uploads = Uploads(host.session, shell)
        self._disks = Disks(host.session, sleep=sleep)
        self._wanted = wanted
        self._sleep = sleep

    @property
    def name(self) -> str:
        return vm_text.machine_name(self._wanted.name)

    def look(self, image: Image | None = None) -> VmState:
        """What is there, and what stands in the way of making it of `image`; changes nothing."""
        inventory = self._host.inventory()
        state = VmState(self._directory(inventory))
        vmx = f"{state.directory}/{self.name}.vmx"
        state.registered = next((one for one in inventory.machines if one.vmx == vmx), None)
        state.removing = self._is_there(f"{state.directory}{_REMOVING}")
        if twin := next((one for one in inventory.machines if one.name == self.name and one.vmx != vmx), None):
            text = f"another machine is called {self.name}: {twin.vmx}"
            raise AlreadyExists(f"{self._host.name}: {text}", hint="rename it, or remove it there")
        if image and not state.registered:
            self._demand_room(inventory, image)
        return state

    def _directory(self, inventory: Inventory) -> str:
        named = self._wanted.machine.datastore
        found = [one for one in inventory.datastores if one.name == named and one.mounted]
        if len(found) != 1:
            raise NotFound("datastore", named, known=[one.name for one in inventory.datastores])
        return f"{VOLUMES}/{found[0].uuid}/drctl-appliance-{self._wanted.uuid}"

    def _demand_room(self, inventory: Inventory, image: Image) -> None:
        if inventory.maintenance:
            hint = "let it leave that mode: vim-cmd hostsvc/maintenance_mode_exit"
            raise HypervisorRefused(f"{self._host.name} is in maintenance mode: no machine starts there", hint=hint)
        store = next(one for one in inventory.datastores if one.name == self._wanted.machine.datastore)
        needed = image.vmdk.stat().st_size + _UNPACKED
        if store.free < needed:
            text = f"datastore {store.name} has {format_bytes(store.free)} free, {format_bytes(needed)} are needed"
            raise OutOfSpace(f"{self._host.name}: {text}", hint="make room there, or name another one")
        if image.size > self._wanted.machine.disk:
            text = f"{format_bytes(image.size)} is the image's disk, machine.disk is less"
            raise ConfigInvalid("drctl.toml", 0, "disk", text, hint=f'disk = "{format_bytes(image.size)}" at least')

    # -- made ---------------------------------------------------------------------------------------------------------

    def ensure(self, image: Image, progress: Progress) -> list[str]:
        """The machine is there and runs. Returns what was changed."""
        state = self.look(image)
        if state.removing:
            hint = f"end it: drctl appliance uninstall {self._wanted.name}"
            raise Refused(f"{self._host.name}: an uninstallation was begun there", hint=hint)
        changes: list[str] = []
        if not state.registered:
            self._make(state.directory, image, progress)
            changes.append(f"machine {self.name} ({state.directory})")
        if not state.running:
            progress("start")
            self._host.start(state.registered or self._host.register(f"{state.directory}/{self.name}.vmx"))
            changes.append("powered on")
        return changes

    def _make(self, directory: str, image: Image, progress: Progress) -> None:
        own = self._wanted
        self._session.ask(["mkdir", "-p", directory])
        progress("image")
        self._system(directory, image)
        progress("definition")
        flat = SEED.replace(".vmdk", "-flat.vmdk")
        self._uploads.put_text(f"{directory}/{flat}", vm_text.seed(self.name, own.machine, own.authorized_key))
        self._uploads.put_text(f"{directory}/{SEED}", vm_text.descriptor(flat, SEED_SIZE).encode())
        text = vm_text.definition(self.name, own.uuid, own.machine)
        # hostd rewrites it from its registration on, which is the next step.
        self._uploads.put_text(f"{directory}/{self.name}.vmx", text.encode())
        self._host.register(f"{directory}/{self.name}.vmx")

    def _system(self, directory: str, image: Image) -> None:
        """The system disk: sent compressed, unpacked by the host's own program, of the size that is wanted."""
        ready, system, sent = (f"{directory}/{name}" for name in (_READY, SYSTEM, _IMAGE))
        (answer,) = self._session.run(["cat", ready])
        if answer.code == 0 and answer.out.strip() == image.sha256:
            self._session.ask(["rm", "-f", sent])
            return
        if answer.code == 0:  # of another image, and of no machine yet
            self._session.ask(["rm", "-f", ready])
            self._disks.delete(system)
        self._uploads.put(sent, image.vmdk)
        self._disks.clone(sent, system)
        (text,) = self._session.ask(["cat", system])
        if vmdk.parse(text).size < self._wanted.machine.disk:
            self._disks.grow(system, self._wanted.machine.disk)
        self._uploads.put_text(ready, f"{image.sha256}\n".encode())
        self._session.ask(["rm", "-f", sent])

    def console(self, progress: Progress, *, timeout: float = BOOT_SECONDS) -> Told:
        """What it told once it was up. Raises HypervisorRefused when it says nothing in time."""
        directory = self._directory(self._host.inventory())
        progress("boot")
        waited = 0.0
        while True:
            (answer,) = self._session.run(["cat", f"{directory}/{CONSOLE}"])
            told = vm_text.told(answer.out)
            if told.ready and told.keys:
                return told
            if waited >= timeout:
                lines = answer.out.strip().splitlines()
                last = f": {lines[-1][:120]!r} was its last word" if lines else ""
                hint = f"look at {directory}/{CONSOLE} there, then give the same command again"
                raise HypervisorRefused(f"{self._host.name}: {self.name} does not come up{last}", hint=hint)
            self._sleep(POLL_SECONDS)
            waited += POLL_SECONDS

    # -- taken away ---------------------------------------------------------------------------------------------------

    def remove(self, progress: Progress) -> list[str]:
        """Stop it, let the host forget it, delete its directory. Returns what was changed."""
        state = self.look()
        if not state.registered and not state.removing and not self._is_there(state.directory):
            return []
        if not _DIRECTORY.fullmatch(state.directory):
            raise Refused(f"{self._host.name}: {state.directory} is none of ours")
        # It goes last: as long as it is there the same command knows what it has to do.
        mark = f"{state.directory}{_REMOVING}"
        self._uploads.put_text(mark, b"drctl appliance uninstall\n")
        if state.registered:
            progress("machine")
            self._host.stop(state.registered)
            self._host.unregister(state.registered)
        progress("files")
        self._session.ask(["rm", "-rf", state.directory])
        self._session.ask(["rm", "-f", mark])
        return [f"machine {self.name}", state.directory]

    def _is_there(self, path: str) -> bool:
        return self._session.run(["test", "-e", path])[0].code == 0
