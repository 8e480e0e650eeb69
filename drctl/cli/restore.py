"""`drctl restore`: single disks and files out of a checkpoint, while everything else goes on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from drctl.cli import guest_disk, guest_fish, guest_tree, points, render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.image_export import ImageFormat, Target, demand_directory, demand_room, demand_tool, export_image, needed
from drctl.cli.inventory import side
from drctl.cli.options import DryRun, Selector, Yes, begin, examples, noun
from drctl.cli.serving import served
from drctl.errors import PreconditionFailed, SetupFailed
from drctl.model.checkpoint import Checkpoint
from drctl.model.site import Host
from drctl.plan.output import tame_line

app = noun("Single disks and files out of a checkpoint.")

#: Of what was passed over, so much is said.
PASSED = 20

DiskName = Annotated[
    str, typer.Argument(metavar="DISK", help="GROUP/VM/DISK, e.g. web/db/vda (see: drctl group show).")
]


class Reader(StrEnum):
    """Who reads a guest's file system."""

    AUTO = "auto"
    LIBGUESTFS = "libguestfs"
    KERNEL = "kernel"


@dataclass(frozen=True, slots=True)
class _Source:
    """A disk of a checkpoint, at the recovery host that is this machine."""

    context: Context
    host: Host
    group: str
    disk: str
    checkpoint: Checkpoint

    @property
    def params(self) -> dict[str, object]:
        return {"group": self.group, "checkpoint": f"#{self.checkpoint.number}", "disks": [self.disk]}


def _source(context: Context, text: str, checkpoint: str) -> _Source:
    """Raises NotFound, PreconditionFailed when another machine keeps the group."""
    group, _, rest = text.partition("/")
    machine, _, target = rest.rpartition("/")
    if not (group and machine and target):
        raise typer.BadParameter(f"{text!r} is not GROUP/VM/DISK, e.g. web/db/vda")
    host = side(context, group, "recovery")
    if host.login is not None:
        raise PreconditionFailed(
            f"{host.name}, which keeps {group}, is another machine: its disks are not sent over SSH",
            hint=f"run it there: ssh {host.login} sudo drctl restore …",
        )
    return _Source(context, host, group, f"{machine}.{target}", points.pick(context, host, group, checkpoint))


@app.command(
    epilog=examples(
        "drctl restore disk web/db/vda --checkpoint '#57' --output /restore/db.raw",
        "drctl restore disk web/db/vdb --checkpoint -1d --format qcow2 --output /restore/db-data.qcow2 --yes",
    )
)
def disk(
    ctx: typer.Context,
    name: DiskName,
    file: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The image file that is made; never overwritten.")
    ],
    checkpoint: Selector = "latest",
    form: Annotated[
        ImageFormat,
        typer.Option("--format", "-f", metavar="raw|qcow2|vmdk", help="Of the image file.", show_default=True),
    ] = ImageFormat.RAW,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Copy one disk, as it was at a checkpoint, into an image file.

    The file is sparse, read back and compared, and has its name only when it is whole. Replication goes on, the source
    is not touched. To be run on the recovery host."""
    context = begin(ctx)
    source = _source(context, name, checkpoint)
    target = Target(file, form)
    target.demand_absent()
    steps = [f"copy {source.disk} of {source.group}, as of #{source.checkpoint.number}, to {file}"]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes):
        return
    demand_tool()
    demand_directory(file.parent)
    with served(context, source.host, **source.params) as service:
        uri = service.uri(source.disk)
        demand_room(file.parent, needed(uri))
        size = int(service.facts["disks"][0]["size"])
        with context.screen.bar(f"restore {source.disk}") as update:
            taken = export_image(
                uri,
                target,
                lambda share: update(share * size, size, "copied"),
                lambda share: update(share * size, size, "compared"),
            )
        service.check()
    context.screen.line(f"{file}: {render.size(size)}, {render.size(taken)} of it taken")


@app.command(
    epilog=examples(
        "drctl restore files web/db/vda --checkpoint '#57'",
        "drctl restore files web/db/vda /etc --list --partition 1",
        "drctl restore files web/db/vdb /var/lib/shop/orders.db /etc/shop --checkpoint -2h --output /restore --yes",
    )
)
def files(
    ctx: typer.Context,
    name: DiskName,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Files and directories, as the disk's file system has them."),
    ] = None,
    checkpoint: Selector = "latest",
    directory: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where they are put; none is overwritten.")
    ] = None,
    partition: Annotated[
        str,
        typer.Option("--partition", metavar="N", help="Where there are several; 0: no table; a name: /dev/vg/root."),
    ] = "",
    listing: Annotated[bool, typer.Option("--list", help="Only show what is there.")] = False,
    scratch: Annotated[
        Path, typer.Option("--scratch", metavar="DIR", help="Where the layer over the disk is, until the end.")
    ] = Path("/var/tmp"),
    reader: Annotated[
        Reader,
        typer.Option("--by", metavar="auto|libguestfs|kernel", help="Who reads the file system.", show_default=True),
    ] = Reader.AUTO,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Copy files out of a disk, as it was at a checkpoint; without PATH show its file systems and what is at the top.

    The disk is mounted read-only, below a layer that is thrown away: its file system may replay its journal as after a
    power cut. Links are followed as the guest would, never out of its disk; devices are passed over, set-user-ID bits
    dropped. Where libguestfs is installed a small machine of its own reads the file system, and LVM and RAID are looked
    into, too; else, or where it can't start, this host's kernel does, as root: for a guest that may have been broken
    into use a host that can be spared. To be run on the recovery host."""
    context = begin(ctx)
    wanted = list(paths or [])
    listing = listing or not wanted
    if not listing and directory is None:
        raise typer.BadParameter("--output DIR says where they go; --list only shows them")
    source = _source(context, name, checkpoint)
    if not listing:
        what = ", ".join(tame_line(path) for path in wanted)
        steps = [f"copy {what} of {source.disk}, as of #{source.checkpoint.number}, into {directory}"]
        if not propose(context.screen, steps, dry_run=dry_run, yes=yes):
            return
    fish = reader is Reader.LIBGUESTFS or (reader is Reader.AUTO and guest_fish.present())
    (guest_fish if fish else guest_disk).demand_tools()
    if directory is not None:
        demand_directory(directory)
    order = _Order(context, wanted, None if listing else directory, partition, scratch)
    with served(context, source.host, **source.params) as service:
        uri = service.uri(source.disk)
        if not fish or not order.by_libguestfs(uri, must=reader is Reader.LIBGUESTFS):
            order.by_kernel(uri)
        service.check()


@dataclass(frozen=True, slots=True)
class _Order:
    """What is wanted of a disk; without a `directory` it is shown."""

    context: Context
    wanted: list[str]
    directory: Path | None
    partition: str
    scratch: Path

    def by_libguestfs(self, uri: str, *, must: bool) -> bool:
        """False when its machine can't start and it need not be. Raises SetupFailed when it `must`."""
        try:
            found = guest_fish.file_systems(uri)
        except SetupFailed as exc:
            if must:
                raise
            self.context.screen.say(f"{exc.message}; this host's kernel reads the disk instead")
            guest_disk.demand_tools()
            return False
        if not self.wanted:
            rows = [(tame_line(one.name), tame_line(one.kind)) for one in found]
            self.context.screen.table(("partition", "file system"), rows, "nothing is on it")
            self.context.screen.line()
        with guest_fish.mounted(uri, guest_fish.pick(found, self.partition).name, self.scratch) as root:
            self._carry_out(root)
        return True

    def by_kernel(self, uri: str) -> None:
        number = int(self.partition) if self.partition.isdigit() else None
        if self.partition and number is None:
            raise PreconditionFailed(
                f"only libguestfs knows {self.partition}; this host's kernel is asked by a partition's number",
                hint=f"install: {guest_fish.PACKAGES}",
            )
        with guest_disk.opened(uri, self.scratch) as file:
            found = guest_disk.volumes(file)
            if not self.wanted:
                _show_volumes(self.context, found)
            with guest_disk.mounted(file, guest_disk.pick(found, number), self.scratch) as root:
                self._carry_out(root)

    def _carry_out(self, root: Path) -> None:
        if self.directory is None:
            _show(self.context, root, self.wanted or ["/"])
        else:
            _copy(self.context, root, self.wanted, self.directory)


def _show_volumes(context: Context, found: list[guest_disk.Volume]) -> None:
    rows = [
        (str(volume.number), render.size(volume.size), volume.kind or "-", tame_line(volume.label) or "-")
        for volume in found
    ]
    context.screen.table(("partition", "size", "file system", "label"), rows, "nothing is on it")
    context.screen.line()


def _show(context: Context, root: Path, wanted: list[str]) -> None:
    for path in wanted:
        rows = [
            (
                f"{entry.mode:04o}",
                str(entry.owner),
                render.size(entry.size) if entry.kind == "file" else entry.kind,
                render.moment(entry.modified),
                tame_line(entry.name) + (f" -> {tame_line(entry.target)}" if entry.target else ""),
            )
            for entry in guest_tree.entries(guest_tree.resolve(root, path))
        ]
        context.screen.table(("mode", "owner", "size", "modified", "name"), rows, f"{path} is empty")


def _copy(context: Context, root: Path, wanted: list[str], directory: Path) -> None:
    for path in wanted:
        place = guest_tree.resolve(root, path)
        name = place.name if place != root else "root"
        copied = guest_tree.copy(place, directory / name)
        context.screen.line(f"{directory / name}: {copied.files} files, {render.size(copied.bytes)}")
        for passed, reason in copied.passed[:PASSED]:
            shown = tame_line(f"/{Path(passed).relative_to(root)}")
            context.screen.say(f"  passed over: {shown}: {reason}")
        if len(copied.passed) > PASSED:
            context.screen.say(f"  passed over: {len(copied.passed) - PASSED} more")
