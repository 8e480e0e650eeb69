"""All machines, disks and datastores of an ESX host, in a few round trips however many there are.

Read from the files that hostd reads: one vim-cmd for each machine would take minutes on a real host."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from drctl.errors import UnsupportedFormat
from drctl.hypervisor import vmdk, vmx
from drctl.hypervisor.esx import answers, value
from drctl.hypervisor.esx.answers import Filesystem, Row
from drctl.hypervisor.esx.session import Session
from drctl.hypervisor.vmdk import Descriptor
from drctl.hypervisor.vmx import Vmx, VmxDisk
from drctl.model.machine import Disk, Machine, MachineState

VOLUMES = "/vmfs/volumes"
#: Files named in one command line: far below any shell's limit.
_FILES = 100
#: ESXi itself refuses more layers than 32.
_LAYERS = 34


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a disk's chain."""

    path: str
    descriptor: Descriptor


@dataclass(frozen=True, slots=True)
class EsxDisk:
    """A disk with its layers, the newest first; without any when its files can't be read."""

    disk: Disk
    layers: tuple[Layer, ...]

    @property
    def has_snapshots(self) -> bool:
        return len(self.layers) > 1


@dataclass(frozen=True, slots=True)
class EsxMachine:
    """A machine as this host has it. `id` is the host's own number, `vmx` a path by the datastore's UUID.

    `remarks` say what stands in the way of its protection."""

    id: str
    machine: Machine
    vmx: str
    definition: Vmx
    disks: tuple[EsxDisk, ...]
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def has_snapshots(self) -> bool:
        return any(disk.has_snapshots for disk in self.disks)


@dataclass(frozen=True, slots=True)
class Inventory:
    """One look at a host. `invalid` are ids of machines whose .vmx hostd can't read."""

    version: Mapping[str, str]
    filesystems: tuple[Filesystem, ...]
    machines: tuple[EsxMachine, ...]
    invalid: tuple[str, ...]
    maintenance: bool

    @property
    def datastores(self) -> list[Filesystem]:
        return [one for one in self.filesystems if one.is_datastore]


@dataclass
class _Files:
    """Small files that were read, by path; what could not be read is not in it."""

    texts: dict[str, str] = field(default_factory=dict)

    def read(self, session: Session, paths: Sequence[str]) -> None:
        """One round trip for all of them."""
        wanted = sorted({path for path in paths if path not in self.texts})
        if odd := next((path for path in wanted if "\n" in path), None):
            raise UnsupportedFormat(f"a path with a line end: {odd!r}")
        chunks = [wanted[at : at + _FILES] for at in range(0, len(wanted), _FILES)]
        if not chunks:
            return
        for chunk, answer in zip(chunks, session.run(*(["grep", "-H", "", *chunk] for chunk in chunks)), strict=True):
            self.texts |= split_files(answer.out, chunk)


def split_files(text: str, paths: Sequence[str]) -> dict[str, str]:
    """What `grep -H '' PATHS` printed, by file: each line stands behind its file's name. Raises UnsupportedFormat."""
    found: dict[str, list[str]] = {}
    waiting, current = list(paths), ""
    for line in text.split("\n")[:-1]:
        while not current or not line.startswith(f"{current}:"):
            if not waiting:
                raise UnsupportedFormat(f"a line is of no file that was asked for: {line[:60]!r}")
            current = waiting.pop(0)
        found.setdefault(current, []).append(line[len(current) + 1 :])
    if text and not text.endswith("\n"):
        raise UnsupportedFormat("the text of a file is cut")
    return {path: "\n".join(lines) + "\n" for path, lines in found.items()}


def gather(session: Session) -> Inventory:
    """Look at the whole host. Raises HostUnreachable, HypervisorRefused, UnsupportedFormat."""
    told = session.run(
        ["esxcli", "system", "version", "get"],
        ["esxcli", "storage", "filesystem", "list"],
        ["esxcli", "vm", "process", "list"],
        ["esxcli", "system", "maintenanceMode", "get"],
        ["vim-cmd", "vmsvc/getallvms"],
    )
    version, filesystems, processes, maintenance, listed = (session.checked(answer) for answer in told)
    places = tuple(answers.filesystems(filesystems.out))
    rows = _rows(session, listed.out, [place.name for place in places if place.mounted and place.name])
    running = answers.processes(processes.out)
    files = _Files()
    paths = {row.id: _row_path(row, places) for row in rows}
    files.read(session, list(paths.values()))
    definitions = {row.id: vmx.parse(files.texts.get(paths[row.id], "")) for row in rows}
    _read_layers(session, files, [(paths[row.id], definitions[row.id]) for row in rows], places)
    machines = tuple(_machine(row, paths[row.id], definitions[row.id], files, running, places) for row in rows)
    return Inventory(
        answers.version(version.out),
        places,
        tuple(sorted(machines, key=lambda one: (one.name, int(one.id)))),
        tuple(answers.invalid_machines(listed.err)),
        maintenance.out.strip() == "Enabled",
    )


def _rows(session: Session, text: str, datastores: Sequence[str]) -> list[Row]:
    """The table's rows; where it can't be taken apart, what each machine's summary says: a call for each."""
    try:
        return answers.machines(text, datastores)
    except UnsupportedFormat:
        ids = sorted(set(re.findall(r"^(\d+) ", text, re.MULTILINE)))
        if not ids:
            raise
    rows = []
    told = session.run(*(["vim-cmd", "vmsvc/get.summary", each] for each in ids))
    for vmid, answer in zip(ids, told, strict=True):
        if (found := value.fault(answer.out)) and found.kind.endswith("NotFound"):
            continue  # a line of a note that looked like a machine, or one that is gone
        summary = value.struct(session.checked(answer).out, "vim.vm.Summary")
        store, file = answers.split_path(summary.text("config.vmPathName"), datastores)
        rows.append(Row(vmid, summary.text("config.name"), store, file, "", "", summary.text("config.annotation")))
    return rows


def _row_path(row: Row, places: Sequence[Filesystem]) -> str:
    uuids = [place.uuid for place in places if place.name == row.datastore and place.mounted]
    if len(uuids) != 1:
        raise UnsupportedFormat(f"datastore {row.datastore!r} is there {len(uuids)} times")
    return f"{VOLUMES}/{uuids[0]}/{row.file}"


def resolve(name: str, beside: str, places: Sequence[Filesystem]) -> str:
    """A file that a .vmx or descriptor names, as a path by UUID: relative ones lie beside it, labels are resolved."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(beside), name))
    parts = path.split("/")
    if len(parts) > 4 and path.startswith(f"{VOLUMES}/"):
        parts[3] = next((place.uuid for place in places if place.name == parts[3]), parts[3])
    return "/".join(parts)


def _read_layers(
    session: Session, files: _Files, machines: Sequence[tuple[str, Vmx]], places: Sequence[Filesystem]
) -> None:
    """The descriptors of all disks, newest layers first: a round trip for each depth of snapshots."""
    wanted = [resolve(disk.file, path, places) for path, definition in machines for disk in definition.disks()]
    likely = [name for path in wanted for name in _likely(path)]
    for _ in range(_LAYERS):
        if not wanted:
            return
        files.read(session, [*wanted, *likely])
        likely = []
        wanted = [
            parent
            for path in wanted
            if (layer := _descriptor(path, files)) and layer.parent
            if (parent := resolve(layer.parent, path, places)) not in files.texts
        ]


def _likely(path: str) -> Iterator[str]:
    """Layers that may lie below a redo log, by the way ESXi counts: asked for at once, they save round trips."""
    if match := re.fullmatch(r"(.+)-(\d{6})\.vmdk", path):
        yield f"{match[1]}.vmdk"
        for number in range(max(1, int(match[2]) - 3), int(match[2]) + 2):
            yield f"{match[1]}-{number:06d}.vmdk"


def _descriptor(path: str, files: _Files) -> Descriptor | None:
    try:
        return vmdk.parse(files.texts.get(path, ""))
    except UnsupportedFormat:
        return None


def _layers(top: str, files: _Files, places: Sequence[Filesystem]) -> Iterator[Layer]:
    path = top
    for _ in range(_LAYERS):
        descriptor = _descriptor(path, files)
        if descriptor is None:
            return
        yield Layer(path, descriptor)
        if not descriptor.parent:
            return
        path = resolve(descriptor.parent, path, places)


def _machine(
    row: Row, path: str, definition: Vmx, files: _Files, running: Mapping[str, int], places: Sequence[Filesystem]
) -> EsxMachine:
    remarks = [*_remarks(definition)]
    if path not in files.texts:
        remarks.append("its .vmx can't be read")
    disks = tuple(_disk(disk, path, files, places, remarks) for disk in definition.disks())
    if any(disk.has_snapshots for disk in disks):
        remarks.append("it has snapshots")
    if path in running:
        state = MachineState.RUNNING
    else:
        state = MachineState.PAUSED if definition.get("checkpoint.vmState") else MachineState.SHUT_OFF
    machine = Machine(
        row.name,
        format_uuid(definition.get("uuid.bios", "")),
        state,
        tuple(disk.disk for disk in disks),
        memory=_number(definition, "memSize", 0) * 1024 * 1024,
        vcpus=_number(definition, "numvcpus", 1),
    )
    return EsxMachine(row.id, machine, path, definition, disks, tuple(remarks))


def _number(definition: Vmx, key: str, default: int) -> int:
    text = definition.get(key, "")
    return int(text) if text.isdigit() else default


def _remarks(definition: Vmx) -> Iterator[str]:
    if definition.is_on("vtpm.present"):
        yield "it has a virtual TPM, whose secrets stay on this host"
    if any(key.lower().startswith(("encryption.", "dataFileKey".lower())) for key in definition):
        yield "it is encrypted"


def _disk(disk: VmxDisk, path: str, files: _Files, places: Sequence[Filesystem], remarks: Sequence[str]) -> EsxDisk:
    top = resolve(disk.file, path, places)
    layers = tuple(_layers(top, files, places))
    size = layers[0].descriptor.size if layers else 0
    refusal = _refusal(disk, layers) or next((r for r in remarks if "TPM" in r or "encrypted" in r), "")
    bus = disk.controller or disk.bus
    return EsxDisk(Disk(disk.device, top, "vmdk", size, bus, refusal), layers)


def _refusal(disk: VmxDisk, layers: Sequence[Layer]) -> str:
    """Why a disk can't be replicated by snapshots; empty when it can."""
    if not layers or layers[-1].descriptor.parent:
        return "its descriptor, or one below it, can't be read"
    if any(layer.descriptor.kind == vmdk.PHYSICAL_RDM for layer in layers):
        return "a physical raw device mapping: it can't be snapshotted"
    if disk.mode.startswith("independent"):
        return f"its mode is {disk.mode}: snapshots leave it out"
    if disk.sharing and disk.sharing != "none":
        return f"it is shared ({disk.sharing})"
    return ""


def format_uuid(text: str) -> str:
    """`56 4d … -… c1` of a .vmx as other programs write a UUID; empty when it is none."""
    digits = re.sub(r"[^0-9a-fA-F]", "", text).lower()
    if len(digits) != 32:
        return ""
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
