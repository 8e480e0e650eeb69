"""`drctl checkpoint export` and `serve`: the recovery side's disks for any other tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from drctl.cli import points, render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.image_export import (
    ImageFormat,
    Target,
    demand_directory,
    demand_room,
    demand_tool,
    export_image,
    needed,
)
from drctl.cli.inventory import side
from drctl.cli.options import CheckpointName, DryRun, Format, GroupName, Output, Yes, begin, examples, seconds
from drctl.cli.serving import Served, served
from drctl.errors import PreconditionFailed
from drctl.model.site import Host

Disks = Annotated[
    list[str] | None,
    typer.Option("--disk", "-d", metavar="MACHINE.TARGET", help="Only this disk; may be repeated."),
]


def install(app: typer.Typer) -> None:
    """Add the commands to `drctl checkpoint`."""
    app.command(
        epilog=examples(
            "drctl checkpoint export web latest --output /backup/web",
            "drctl checkpoint export web tag:before-upgrade --format qcow2 --disk db.vda --output /backup/web",
        )
    )(export)
    app.command(
        epilog=examples(
            "drctl checkpoint serve web -10m --for 2h", "drctl checkpoint serve web '#123' --port 10809 --disk db.vda"
        )
    )(serve)


def export(
    ctx: typer.Context,
    group: GroupName,
    checkpoint: CheckpointName,
    directory: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the image files are made; never overwritten.")
    ],
    form: Annotated[
        ImageFormat,
        typer.Option("--format", "-f", metavar="raw|qcow2|vmdk", help="Of the image files.", show_default=True),
    ] = ImageFormat.RAW,
    disk: Disks = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Copy the disks of a group, as they were at a checkpoint, into image files.

    Each file is sparse, read back and compared, and has its name only when it is whole. The checkpoint is held
    meanwhile; replication goes on. To be run on the recovery host: no disk travels over SSH."""
    context = begin(ctx)
    host = _here(context, group, "export")
    found = points.pick(context, host, group, checkpoint)
    what = ", ".join(disk) if disk else "all disks"
    if not propose(
        context.screen, [f"export {what} of {group} as of #{found.number} to {directory}"], dry_run=dry_run, yes=yes
    ):
        return
    demand_tool()
    demand_directory(directory)
    with served(context, host, group=group, checkpoint=f"#{found.number}", disks=disk or []) as service:
        rows = _export(context, service, directory, form)
    for row in rows:
        context.screen.line(f"{row['file']}: {render.size(row['size'])}, {render.size(row['taken'])} of it taken")


def _export(context: Context, service: Served, directory: Path, form: ImageFormat) -> list[dict[str, Any]]:
    disks = service.facts["disks"]
    targets = [Target(directory / f"{disk['name']}.{form.value}", form) for disk in disks]
    for target in targets:
        target.demand_absent()
    demand_room(directory, sum(needed(service.uri(disk["name"])) for disk in disks))
    rows = []
    for disk, target in zip(disks, targets, strict=True):
        with context.screen.bar(f"export {disk['name']}") as update:

            def tell(share: float, word: str, size: int = disk["size"], update: render.Update = update) -> None:
                update(share * size, size, word)

            taken = export_image(
                service.uri(disk["name"]),
                target,
                lambda share: tell(share, "copied"),
                lambda share: tell(share, "compared"),
            )
        service.check()
        rows.append({**disk, "file": str(target.file), "taken": taken})
    return rows


def serve(
    ctx: typer.Context,
    group: GroupName,
    checkpoint: CheckpointName = "latest",
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="PORT",
            min=0,
            max=65535,
            help="Also on this port of 127.0.0.1 (0: any): open to every user of that host.",
        ),
    ] = None,
    disk: Disks = None,
    lasts: Annotated[
        float | None, typer.Option("--for", parser=seconds, metavar="DURATION", help="End by itself after this time.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Serve the disks of a group, as they were at a checkpoint, as read-only NBD exports until Ctrl-C.

    They are on a unix socket of the recovery host, for the appliance's user and root alone. The checkpoint is held
    meanwhile; replication goes on."""
    context = begin(ctx, output)
    host = side(context, group, "recovery")
    found = points.pick(context, host, group, checkpoint)
    order = {"group": group, "checkpoint": f"#{found.number}", "disks": disk or [], "port": port, "seconds": lasts or 0}
    try:
        with served(context, host, **order) as service:
            _tell(context, host, group, service)
            service.wait()
    except KeyboardInterrupt:
        pass
    context.screen.say(f"#{found.number} of {group} is not served any more")


def _tell(context: Context, host: Host, group: str, service: Served) -> None:
    facts = service.facts
    rows = [{**disk, "uri": service.uri(disk["name"])} for disk in facts["disks"]]
    if facts["address"]:
        rows = [{**row, "tcp": f"nbd://{facts['address']}/{row['name']}"} for row in rows]
    if context.screen.as_json:
        number = facts["checkpoint"]["number"]
        context.document(
            "service",
            group=group,
            number=number,
            host=host.name,
            socket=facts["socket"],
            address=facts["address"],
            disks=rows,
        )
        return
    context.screen.table(
        ("disk", "size", "at"),
        [(row["name"], render.size(row["size"]), row.get("tcp", row["uri"])) for row in rows],
        "",
    )
    where = f"at {host.site}/{host.name}" if host.login else "here"
    context.screen.say(f"served {where}, read-only, until Ctrl-C")
    if host.login:
        context.screen.say(f"from here: ssh -N -L /tmp/{group}.sock:{facts['socket']} {host.login}")


def _here(context: Context, group: str, verb: str) -> Host:
    """The recovery host, which must be this machine. Raises PreconditionFailed."""
    host = side(context, group, "recovery")
    if host.login is not None:
        raise PreconditionFailed(
            f"{host.name}, which keeps {group}, is another machine: its disks are not sent over SSH",
            hint=f"run it there: ssh {host.login} sudo drctl checkpoint {verb} {group} …",
        )
    return host
