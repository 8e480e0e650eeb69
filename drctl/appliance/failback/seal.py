"""The site that a group comes back to: its old disks are sealed as a checkpoint, and the store takes the stream.

Each step looks at what is true before it acts, so any prefix of them may be repeated. Order, and why: the record first,
so that nothing is done that no file knows of; the disks, then the checkpoint of them; only then the old machines go,
and at last the generation is raised, which lets the other site's stream in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.failback.record import (
    CROWDED,
    KEEP_AT_LEAST,
    KEEP_SECONDS,
    TAG,
    Failback,
    FailbackFiles,
    FailbackPhase,
    Hold,
    LeftOut,
    OldDisk,
)
from drctl.appliance.replica.held_store import HeldStores
from drctl.appliance.replica.seed_files import SeedFile, Seeding, Way, demand_room, look, same_size, way_of
from drctl.appliance.replica.seed_service import based, pristine
from drctl.appliance.source.guest_files import NVRAM_LIMIT
from drctl.appliance.source.guest_reader import GuestHost
from drctl.errors import DrctlError, NotFound
from drctl.hypervisor import domain_xml, guest_state
from drctl.model.group import GroupDisk, Retention
from drctl.model.machine import Machine
from drctl.replication.disk_connection import Export
from drctl.replication.seeding import OldDisks, Told, put
from drctl.store import atomic
from drctl.store.group_info import StoreMode, commit_lock, read_info
from drctl.store.group_store import GroupStore
from drctl.store.label import CheckpointKey, read_tags, write_tags

log = logging.getLogger(__name__)

#: The way of a disk that is compared with what the store holds of it.
COMPARE = "compare"

Progress = Callable[[dict[str, Any]], None]


class OldHost(GuestHost, Protocol):
    def machine(self, name: str) -> Machine: ...

    def undefine(self, name: str) -> None: ...


#: Serves old disks for reading meanwhile: {number: where}.
Serve = Callable[[str, Sequence[OldDisk]], AbstractContextManager[Mapping[int, Export]]]


class Finding:
    """What lies here of a group's disks, and how it would be used. Changes nothing."""

    def __init__(self, host: OldHost, root: Path) -> None:
        self._host = host
        self._root = root
        self._compares = (root / "group.json").exists() and not pristine(root)
        self.old: list[OldDisk] = []
        self.left_out: list[LeftOut] = []
        self.machines: list[str] = []
        self.wall_ns = 0

    def look(self, disks: Sequence[GroupDisk]) -> None:
        """Raises HostUnreachable."""
        for name in dict.fromkeys(disk.machine for disk in disks):
            try:
                machine = self._host.machine(name)
            except NotFound:
                continue
            self.machines.append(name)
            self._look_at(machine, [disk for disk in disks if disk.machine == name])
        found = {disk.name for disk in self.old} | {one.name for one in self.left_out}
        self.left_out += [LeftOut(disk.name, "nothing of it is here") for disk in disks if disk.name not in found]

    def _look_at(self, machine: Machine, disks: Sequence[GroupDisk]) -> None:
        sources = {disk.target: disk for disk in machine.disks}
        for disk in disks:
            if disk.target not in sources:
                continue
            try:
                seed = look(Path(sources[disk.target].source), sources[disk.target].format)
                same_size(seed, disk)
            except DrctlError as exc:
                self.left_out.append(LeftOut(disk.name, exc.message))
                continue
            self._take(disk, seed)

    def _take(self, disk: GroupDisk, seed: SeedFile) -> None:
        root = self._root
        while not root.exists():  # the store is not made yet: what is above it is the same file system
            root = root.parent
        way = COMPARE if self._compares else way_of(seed, root, give_up=True).value
        self.old.append(OldDisk(disk.number, disk.name, str(seed.path), seed.format, seed.size, seed.used, way))
        self.wall_ns = max(self.wall_ns, seed.path.stat().st_mtime_ns)

    def files(self) -> Iterator[str]:
        """The old disks, and what lies in the CD-ROM drives of the machines that are here."""
        yield from (disk.path for disk in self.old)
        for name in self.machines:
            yield from (medium.path for medium in guest_state.media(domain_xml.parse(self._host.definition(name))))

    def room_needed(self) -> int:
        """Bytes that the old disks take beside what is there; what differs from a store's history comes on top."""
        return sum(disk.used for disk in self.old if disk.way == Way.COPY)


class Sealing:
    """Does the steps of one group's failback here. One thread at a time."""

    def __init__(
        self,
        root: Path,
        files: FailbackFiles,
        record: Failback,
        tools: tuple[OldHost, HeldStores, Serve],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.record = record
        self._root = root
        self._files = files
        self._host, self._held, self._serve = tools
        self._stopped = stopped
        self.progress: Progress = lambda _: None

    def run(self, generation: int, retention: Retention, now: float) -> None:
        """From where the record is to `open`. `generation`: that of the old reign here, for a store that is made anew.

        Raises OutOfSpace, Locked, Interrupted, StepFailed; given again, it goes on."""
        record = self.record
        if record.phase is FailbackPhase.OPEN:
            return
        self._files.save(record)
        self._make_store(generation, retention)
        with self._held.held(record.group):
            self._seal(now)
            for name in record.machines:
                self._dismiss(name)
            with closing(GroupStore.open(self._root)) as store:
                store.set_generation(record.generation)
        record.phase = FailbackPhase.OPEN
        self._files.save(record)
        self._tell("open")

    def _tell(self, step: str, **more: Any) -> None:
        self.progress({"step": step, **more})

    def _make_store(self, generation: int, retention: Retention) -> None:
        if not (self._root / "group.json").exists():
            GroupStore.create(self._root, self.record.group, generation, self.record.disks, retention).close()

    # -- the old disks -----------------------------------------------------------------------------------------------

    def _seal(self, now: float) -> None:
        record = self.record
        if record.sealed:
            return
        self._adopt([disk for disk in record.old if disk.way != COMPARE])
        if pristine(self._root) and not record.old:
            return  # nothing lies here: a first sync, straight to the bases
        with closing(GroupStore.open(self._root)) as store:
            store.set_mode(StoreMode.JOURNAL)
        if record.old:
            record.differing = self._put([disk for disk in record.old if disk.way == COMPARE]).differing
            record.checkpoint = record.number
            with closing(GroupStore.open(self._root)) as store:
                store.tag(record.number, TAG)
            record.holds.append(Hold(record.epoch, record.number, now + KEEP_SECONDS))
        record.sealed = now
        self._files.save(record)
        self._tell("sealed", checkpoint=record.checkpoint)

    def _adopt(self, disks: Sequence[OldDisk]) -> None:
        """Make bases of them."""
        if not disks:
            return
        seeding = Seeding(self._root)
        group_disks = {disk.name: disk for disk in self.record.disks}
        demand_room(
            self._root, sum(d.used for d in disks if d.way == Way.COPY and not seeding.taken(d.name, Path(d.path)))
        )
        with atomic.lock(self._root / "lock", wait=False, what="a receiver"):
            for disk in disks:

                def tell(done: int, total: int, name: str = disk.name) -> None:
                    self._tell("disk", disk=name, done_bytes=done, total_bytes=total)

                seeding.take(group_disks[disk.name], Path(disk.path), disk.format, give_up=True, tell=tell)
            if pristine(self._root):
                based(self._root)

    def _put(self, disks: Sequence[OldDisk]) -> Told:
        record = self.record
        info = read_info(self._root)

        def tell(now: Told) -> None:
            told = {"done_bytes": now.done, "total_bytes": now.total, "differing_bytes": now.differing}
            self._tell("compare", **told)

        with self._serve(record.group, disks) as exports:
            sealed = {disk.number for disk in record.old}
            old = OldDisks(
                group=record.group,
                host=str(record.definition["source_host"]),
                generation=info.generation,
                epoch=record.epoch,
                number=record.number,
                wall_ns=record.wall_ns,
                definition=record.definition,
                disks=tuple(disk for disk in record.disks if disk.number in sealed),
                exports=exports,
            )
            return put(self._root, old, tell, self._stopped)

    # -- the old machines ---------------------------------------------------------------------------------------------

    def _dismiss(self, name: str) -> None:
        """Let the host forget a machine whose disks are in the store: it could not start, and may not. What it was is
        kept aside."""
        try:
            definition = self._host.definition(name)
        except NotFound:
            return
        kept = self._files.kept(self.record.group, f"{name}.xml")
        kept.write_text(definition)
        nvram = guest_state.variables(domain_xml.parse(definition))
        if nvram is not None and nvram.path:
            with suppress(DrctlError):  # it is in the sealed checkpoint as well
                variables = self._host.files().read(Path(nvram.path), NVRAM_LIMIT)
                self._files.kept(self.record.group, f"{name}.nvram").write_bytes(variables)
        self._host.undefine(name)
        self._tell("machine", machine=name, state="kept aside")


def let_go(root: Path, record: Failback, now: float) -> bool:
    """Take the tag from what was held long enough, or stands in the way; whether anything did."""
    early = _early(root, now) if record.holds else 0.0
    over = [hold for hold in record.holds if hold.until <= max(now, early)]
    if not over:
        return False
    with commit_lock(root):
        tags = read_tags(root)
        for hold in over:
            tags = tags.without(CheckpointKey(hold.epoch, hold.number), TAG)
        write_tags(root, tags)
    record.holds = [hold for hold in record.holds if hold not in over]
    if any(hold.until > now for hold in over):
        record.given_up = now
        log.warning("%s: checkpoint %s is given up early: the journal needs its room", record.group, TAG)
    else:
        log.info("%s: checkpoint %s is kept no longer", record.group, TAG)
    return True


def _early(root: Path, now: float) -> float:
    """Up to which end holds go before it: when the journal is nearly full those go that are older than its history. At
    the limit replication would stop for their sake, since no promotion passes them."""
    with closing(GroupStore.open(root)) as store:
        used, retention = store.used(), store.info.retention
    if used <= CROWDED * retention.journal_limit:
        return 0.0
    return now + KEEP_SECONDS - max(retention.history, retention.lock, KEEP_AT_LEAST)
