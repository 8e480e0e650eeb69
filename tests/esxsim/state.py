"""What a simulated host knows: its version's habits, datastores, machines, snapshots, questions, tasks, locks."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.esxsim import formats


@dataclass(frozen=True)
class Profile:
    """A version's habits. Sources: facts 1.0 (commas), 4.1 (tools), 4.2 (execInstalledOnly), 4.3 (SFTP), 3 (OSDATA)."""

    version: str
    update: int
    build: int
    comma: str = ","
    tr: bool = True
    sftp: bool = False
    osdata: str = ""
    executes_own_only: bool = False
    json: bool = True
    hardware: int = 14


PROFILES = {
    "6.7": Profile("6.7.0", 3, 17700523, json=False),
    "7.0U3": Profile("7.0.3", 3, 21930508, ", ", tr=False, osdata="VFFS", hardware=19),
    "8.0U3": Profile("8.0.3", 3, 24022510, tr=False, sftp=True, osdata="VMFSOS", executes_own_only=True, hardware=21),
}


@dataclass
class Switches:
    """What is not known of real hosts (facts 2 and 9), and what differs between them: both worlds can be had."""

    #: dd/cat of the frozen base of a running machine (refused: PegaProx #553; works: kuiper's `cp *`)
    raw_read_of_frozen_base: bool = True
    #: the same of a frozen redo log
    raw_read_of_frozen_delta: bool = True
    #: snapshot.create says so before (False) the snapshot is there, by `snapshot_seconds`
    create_waits: bool = True
    #: snapshot.remove returns while deltas are merged for `merge_seconds` more
    remove_waits: bool = True
    snapshot_seconds: float = 0.0
    merge_seconds: float = 0.0
    #: registervm prints the new id (VIM_SSH.pm: older hosts print nothing)
    register_prints_id: bool = True
    #: power.on of a machine that is on: `Power on failed`, or a fault (older)
    power_fault: bool = False
    #: power.on says that it failed although it did not (VIM_SSH.pm vm_power_on)
    power_on_lies: bool = False
    #: vmkfstools -i of a snapshot's base fails with 16392 (7.0U1c, ghettoVCB #226)
    clone_of_frozen_fails: bool = False
    #: getallvms pads its last column (captures lost the blanks: perhaps not everywhere)
    trailing_blanks: bool = True
    #: snapshots can be quiesced (needs Tools)
    quiesce_works: bool = True


@dataclass
class Question:
    id: str
    text: str
    choices: tuple[str, ...]
    default: int
    answered: threading.Event = field(default_factory=threading.Event)
    choice: int = -1


@dataclass
class Snapshot:
    id: int
    name: str
    description: str
    created: float
    state: str
    parent: int
    #: device → the frozen layer's descriptor, as the .vmx named it
    disks: dict[str, str]


@dataclass
class Vm:
    id: int
    vmx: Path
    config: dict[str, str]
    power: str = "off"
    invalid: bool = False
    question: Question | None = None
    snapshots: list[Snapshot] = field(default_factory=list)
    last_snapshot: int = 0
    tools: bool = False
    world: int = 0
    #: seconds between shutdown's order and its end
    shutdown_seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.config.get("displayname", "")

    def disks(self) -> dict[str, str]:
        """device → fileName, of what is a disk."""
        found = {}
        for key, value in self.config.items():
            device = key.removesuffix(".filename")
            present = self.config.get(f"{device}.present", "").upper() == "TRUE"
            if present and key.endswith(".filename") and value.endswith(".vmdk"):
                found[device] = value
        return found

    def place(self, name: str) -> Path:
        return self.vmx.parent / name

    def dependent(self) -> dict[str, str]:
        modes = {device: self.config.get(f"{device}.mode", "") for device in self.disks()}
        return {d: name for d, name in self.disks().items() if not modes[d].startswith("independent")}


@dataclass
class Datastore:
    name: str
    uuid: str
    type: str
    size: int
    mounted: bool = True
    read_only: bool = False


@dataclass
class Task:
    id: str
    vm: int
    state: str = "running"
    message: str = ""


class Fault(Exception):
    """A fault that vim-cmd prints."""

    def __init__(self, kind: str, message: str, **fields: str) -> None:
        super().__init__(message)
        self.kind, self.message, self.fields = kind, message, fields


class State:
    """All of a host but its SSH. Invariant: changed under `lock` only."""

    def __init__(self, root: Path, profile: Profile) -> None:
        self.root, self.profile, self.switches = root, profile, Switches()
        self.lock = threading.RLock()
        self._works: list[threading.Thread] = []
        self.datastores: list[Datastore] = []
        self.vms: dict[int, Vm] = {}
        #: microseconds that a machine stands still for a snapshot, by its log (virten.net 2015/10); 0: no log
        self.stun = 0
        self.tasks: dict[str, Task] = {}
        self.maintenance = False
        self.hostd_down = ""
        #: paths that somebody else holds
        self.held: set[Path] = set()
        #: program and first words → what it fails with the next time
        self.faults: dict[str, Fault] = {}
        self._task = 2800

    # -- places -----------------------------------------------------------------------------------------------------

    def real(self, path: str, cwd: str = "/") -> Path:
        """A path of the host as one of this machine; labels of datastores resolved."""
        whole = Path(cwd) / path
        return (self.root / str(whole).lstrip("/")).resolve()

    def inside(self, path: Path) -> str:
        """The other way: by UUID, as hostd's own programs tell it."""
        return f"/{path.relative_to(self.root.resolve())}"

    def bracket(self, path: Path) -> str:
        """`[datastore] dir/file`."""
        store = self.datastore_of(path)
        base = self.root.resolve() / "vmfs/volumes" / store.uuid
        return f"[{store.name}] {path.relative_to(base)}"

    def datastore_of(self, path: Path) -> Datastore:
        parts = path.relative_to(self.root.resolve() / "vmfs/volumes").parts
        return next(store for store in self.datastores if store.uuid == parts[0])

    def used(self, store: Datastore) -> int:
        base = self.root / "vmfs/volumes" / store.uuid
        return sum(path.lstat().st_blocks * 512 for path in base.rglob("*") if path.is_file())

    def free(self, store: Datastore) -> int:
        return max(0, store.size - self.used(store))

    # -- machines ---------------------------------------------------------------------------------------------------

    def vm(self, text: str) -> Vm:
        """By id, or by the path of its .vmx. Raises Fault."""
        for vm in self.vms.values():
            named = text.startswith("/") and self.real(text) == vm.vmx
            if (str(vm.id) == text or named) and not vm.invalid:
                return vm
        raise Fault("vim.fault.NotFound", f'Unable to find a VM corresponding to "{text}"')

    def register(self, vmx: Path) -> Vm:
        for vm in self.vms.values():
            if vm.vmx == vmx:
                raise Fault(
                    "vim.fault.AlreadyExists",
                    f"The specified key, name, or identifier '{vm.id}' already exists.",
                    name=str(vm.id),
                )
        vm = Vm(max(self.vms, default=0) + 1, vmx, read_vmx(vmx))
        self.vms[vm.id] = vm
        return vm

    def active(self, vm: Vm) -> set[Path]:
        """The extents that a running machine writes."""
        return {formats.extent(vm.place(name)) for name in vm.disks().values()}

    def locked(self, path: Path) -> str:
        """`exclusive`, `shared` (a frozen layer) or nothing."""
        if path in self.held:
            return "exclusive"
        for vm in self.vms.values():
            if vm.power == "off":
                continue
            if path in self.active(vm) or path.suffix in (".vswp", ".lck"):
                return "exclusive"
            frozen = [each for name in vm.disks().values() for each in formats.chain(vm.place(name))[1:]]
            if any(path == formats.extent(each) for each in frozen):
                return "shared"
        return ""

    def begin_task(self, vm: int, operation: str) -> Task:
        self._task += 1
        task = Task(f"haTask-{vm}-vim.VirtualMachine.{operation}-{self._task}", vm)
        self.tasks[task.id] = task
        return task

    def background(self, work: Callable[[], None]) -> None:
        """Go on with a task after the command that began it has returned."""
        thread = threading.Thread(target=work)
        self._works.append(thread)
        thread.start()

    def settle(self) -> None:
        """Wait for what still runs; before the host's directory goes."""
        for thread in self._works:
            thread.join(10)

    def task_ids(self, vm: int) -> Iterator[str]:
        return (task.id for task in self.tasks.values() if task.vm == vm and task.state == "running")

    # -- snapshots --------------------------------------------------------------------------------------------------

    def create_snapshot(self, vm: Vm, name: str, description: str, memory: bool) -> None:
        snapshot = Snapshot(vm.last_snapshot + 1, name, description, time.time(), vm.power, 0, vm.dependent())
        snapshot.state = "powered on" if memory and vm.power == "on" else "powered off"
        for device, file in snapshot.disks.items():
            kind = formats.field(vm.place(file).read_text(), "createType")
            if kind == "vmfsPassthroughRawDeviceMap":
                raise Fault("vim.fault.NotSupported", "The operation is not supported on the object.")
            vm.config[f"{device}.filename"] = self._new_layer(vm, file)
        vm.last_snapshot = snapshot.id
        snapshot.parent = vm.snapshots[-1].id if vm.snapshots else 0
        if vm.power == "on" and self.stun:
            now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
            with (vm.vmx.parent / "vmware.log").open("a") as log:
                log.write(f"{now}.{snapshot.id:03}Z| vmx| I120: SnapshotVMX_TakeSnapshot start\n")
                log.write(f"{now}.{snapshot.id:03}Z| vcpu-0| I120: Checkpoint_Unstun: vm stopped for {self.stun} us\n")
        vm.snapshots.append(snapshot)
        self.save(vm)

    def _new_layer(self, vm: Vm, parent: str) -> str:
        """A redo log on top of `parent`: seSparse on VMFS-6, vmfsSparse elsewhere (facts 5.1)."""
        below = vm.place(parent)
        stem = re.sub(r"-\d{6}$", "", Path(parent).stem)
        number = 1
        while vm.place(f"{stem}-{number:06d}.vmdk").exists():
            number += 1
        sparse = self.datastore_of(vm.vmx).type == "VMFS-6"
        name = f"{stem}-{number:06d}"
        extent = f"{name}-sesparse.vmdk" if sparse else f"{name}-delta.vmdk"
        total = formats.sectors(below)
        (formats.SeSparse if sparse else formats.VmfsSparse).create(vm.place(extent), total * 512)
        cid = formats.field(below.read_text(), "CID")
        kind = "seSparse" if sparse else "vmfsSparse"
        vm.place(f"{name}.vmdk").write_text(formats.descriptor(kind, total, extent, parent=(cid, parent)))
        return f"{name}.vmdk"

    def remove_snapshot(self, vm: Vm, snapshot: Snapshot) -> None:
        """Merge the layer above the snapshot's into it: what was above refers to it from then on."""
        for device, kept in snapshot.disks.items():
            top = vm.disks().get(device)
            if top is None:
                continue
            layers = formats.chain(vm.place(top))
            index = next((i for i, each in enumerate(layers) if each == vm.place(kept)), 0)
            if index:
                self._merge(vm, device, layers[index - 1], layers[index])
                if index > 1:
                    self._rebase(layers[index - 2], layers[index])
        vm.snapshots.remove(snapshot)
        for other in vm.snapshots:
            other.parent = snapshot.parent if other.parent == snapshot.id else other.parent
        self.save(vm)

    def _merge(self, vm: Vm, device: str, upper: Path, lower: Path) -> None:
        source, target = formats.layer(upper), formats.layer(lower)
        for at, _, data in source.read(0, formats.sectors(upper) * 512):
            if data is not None:
                formats.write(lower, at, data) if isinstance(target, formats.SeSparse) else target.write(at, data)
        formats.extent(upper).unlink()
        upper.unlink()
        if vm.config[f"{device}.filename"] == upper.name:
            vm.config[f"{device}.filename"] = lower.name
        for other in vm.snapshots:
            if other.disks.get(device) == upper.name:
                other.disks[device] = lower.name

    @staticmethod
    def _rebase(upper: Path, lower: Path) -> None:
        text = re.sub(r'parentFileNameHint="[^"]*"', f'parentFileNameHint="{lower.name}"', upper.read_text())
        cid = formats.field(lower.read_text(), "CID")
        upper.write_text(re.sub(r"parentCID=\w+", f"parentCID={cid}", text))

    def save(self, vm: Vm) -> None:
        """hostd rewrites .vmx and .vmsd."""
        write_vmx(vm.vmx, vm.config)
        lines = [f'snapshot.lastUID = "{vm.last_snapshot}"', f'snapshot.numSnapshots = "{len(vm.snapshots)}"']
        for index, one in enumerate(vm.snapshots):
            lines += [f'snapshot{index}.uid = "{one.id}"', f'snapshot{index}.displayName = "{escape(one.name)}"']
        vm.vmx.with_suffix(".vmsd").write_text('.encoding = "UTF-8"\n' + "\n".join(lines) + "\n")

    def location(self, vm: Vm) -> str:
        """uuid.location: it tells a machine that it was moved or copied."""
        raw = hashlib.md5(self.inside(vm.vmx).encode()).hexdigest()
        pairs = [raw[index : index + 2] for index in range(0, 32, 2)]
        return f"{' '.join(pairs[:8])}-{' '.join(pairs[8:])}"


def escape(text: str) -> str:
    return text.replace("|", "|7C").replace('"', "|22").replace("\n", "|0A")


def unescape(text: str) -> str:
    return re.sub(r"\|([0-9A-Fa-f]{2})", lambda found: chr(int(found[1], 16)), text)


def read_vmx(path: Path) -> dict[str, str]:
    """Keys in lower case: they know no case (facts 7)."""
    found = {}
    for line in path.read_text().splitlines():
        if match := re.match(r'\s*([^#=\s]+)\s*=\s*"(.*)"\s*$', line):
            found[match[1].lower()] = unescape(match[2])
    return found


def write_vmx(path: Path, config: dict[str, str]) -> None:
    lines = [f'{key} = "{escape(value)}"' for key, value in config.items() if key != ".encoding"]
    path.write_text('.encoding = "UTF-8"\n' + "\n".join(lines) + "\n")
