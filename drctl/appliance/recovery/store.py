"""The groups replicated to this host, as recovery sees them: store/GROUP read beside its receiver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from drctl.appliance.recovery.ports import Recoverable, RecoverableMachine
from drctl.appliance.source.guest_files import files_from
from drctl.errors import IntegrityError, NotFound, PreconditionFailed
from drctl.model.checkpoint import Checkpoint
from drctl.model.extent import GiB
from drctl.model.group import GroupDisk, GroupSpec
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore
from drctl.store.reader import disks_of
from drctl.store.view import ViewDisk


class GroupStores:
    """All stores under one directory. Opens one anew for each question, so any thread may ask."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def groups(self) -> list[str]:
        return sorted(path.parent.name for path in self._directory.glob("*/group.json"))

    def choose(self, group: str, selector: str, now: float) -> Checkpoint:
        with self.open(group) as store:
            return store.choose(selector, now)

    def recoverable(self, group: str, checkpoint: int) -> Recoverable:
        """Raises PreconditionFailed when no definition came with the checkpoint: then only its disks can be had."""
        with self.open(group) as store:
            definition = store.definition(checkpoint)
        if definition is None:
            raise PreconditionFailed(
                f"{group}: checkpoint #{checkpoint} has no machine definitions",
                hint="its disks can be exported: drctl checkpoint export",
            )
        return recoverable_from(definition)

    def newest(self, group: str) -> Recoverable | None:
        with self.open(group) as store:
            definition = store.definition()
        return recoverable_from(definition) if definition is not None else None

    def generation(self, group: str) -> int:
        with self.open(group) as store:
            return store.info.generation

    def reign(self, group: str, generation: int) -> None:
        """The receiver sees it before its next batch. The generation first: between the two the old source, which is
        of a lower one, is refused already."""
        with self.open(group) as store:
            store.set_generation(generation)
            store.set_mode(StoreMode.FAILED_OVER)

    def give_back(self, group: str, generation: int) -> None:
        """The generation first, as in `reign`: whoever is refused by the mode meanwhile is refused by it afterwards."""
        with self.open(group) as store:
            store.set_generation(generation)
            store.set_mode(StoreMode.JOURNAL)

    def pin(self, group: str, pin: str, checkpoint: int, epoch: str) -> None:
        with self.open(group) as store:
            store.pin(pin, checkpoint, epoch)

    def unpin(self, group: str, pin: str) -> None:
        with self.open(group) as store:
            store.unpin(pin)

    def allocated(self, group: str, checkpoint: int) -> Mapping[str, int]:
        with self.open(group) as store, closing(store.open_view(checkpoint)) as view:
            return {disk.name: _allocated(view.disk(disk.name)) for disk in view.disks}

    @contextmanager
    def open(self, group: str) -> Iterator[GroupStore]:
        """The group's store, for reading. Raises NotFound."""
        root = self._directory / group
        if group in ("", ".", "..") or "/" in group or not (root / "group.json").exists():
            raise NotFound("group", group, known=self.groups())
        with closing(GroupStore.open(root)) as store:
            yield store


def _allocated(disk: ViewDisk) -> int:
    # In steps, because a list of all extents of a large disk would not be small.
    return sum(
        extent.length
        for offset in range(0, disk.size, GiB)
        for extent, data in disk.extents(offset, min(GiB, disk.size - offset))
        if data
    )


def recoverable_from(definition: Mapping[str, Any]) -> Recoverable:
    """The payload of a DEFINITION frame. Raises IntegrityError when it is not one."""
    try:
        disks = disks_of(dict(definition))
        machines = [_machine(machine, disks) for machine in definition["machines"]]
        spec = msgspec.convert(definition["spec"], GroupSpec)
    except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as exc:
        raise IntegrityError(f"the group's definition is not one: {exc!r}") from exc
    site, host = definition.get("source_site", ""), definition.get("source_host", "")
    return Recoverable(spec, tuple(machines), str(site), str(host))


def _machine(fields: Mapping[str, Any], disks: Sequence[GroupDisk]) -> RecoverableMachine:
    name = str(fields["name"])
    own = tuple(disk for disk in disks if disk.machine == name)
    files = files_from(fields.get("files"))
    return RecoverableMachine(name, str(fields["uuid"]), str(fields["definition"]), own, files)
