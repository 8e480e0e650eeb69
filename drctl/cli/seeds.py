"""Pre-seeded copies, as `replicate start --seed` names them: which file is which disk's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.inventory import Inventory, side
from drctl.errors import NotFound
from drctl.model.site import Host

#: A copy takes as long as its bytes; it is waited for as long as something moves.
SEED_TIMEOUT = 24 * 3600.0
_ENDINGS = (".raw", ".img", ".qcow2", ".qcow", ".vmdk", ".vdi", ".vhdx", ".vhd")
_WAYS = {
    "move": "moved into the replica, no copy",
    "clone": "shared with the replica by the file system, no copy",
    "copy": "copied into the replica",
}

Seed = Annotated[
    list[str] | None,
    typer.Option(
        "--seed",
        metavar="[DISK=]PATH",
        help="A file at the recovery site that holds a disk (MACHINE.TARGET) as it once was; again for each disk.",
    ),
]
MoveSeeds = Annotated[
    bool, typer.Option("--move-seeds", help="Use the files up where that saves a copy: raw, on the replica's disk.")
]


@dataclass(frozen=True, slots=True)
class Sown:
    """Seeds that the recovery site has looked at, and could take."""

    host: Host
    order: dict[str, Any]
    found: dict[str, Any]

    def steps(self) -> list[str]:
        lines = [
            f"take {one['path']} at {self.host.site}/{self.host.name} as {one['disk']} "
            f"({render.size(one['bytes'])}, {way(one)})"
            for one in self.found["seeds"]
        ]
        if self.found["unseeded"]:
            lines.append(f"send {', '.join(self.found['unseeded'])} in full: no seed is named for that")
        return lines

    def carry_out(self, context: Context) -> None:
        """Let the recovery site take them. Given again, it goes on."""
        with context.screen.bar("seeds") as update:

            def draw(step: dict[str, Any]) -> None:
                done, total = int(step.get("done_bytes") or 0), step.get("total_bytes")
                update(done, total, f"{step.get('disk')}, {render.size(done)} of {render.size(total)}")

            context.call(self.host, "replicate.seed", on_progress=draw, timeout=SEED_TIMEOUT, **self.order)


def way(seed: dict[str, Any]) -> str:
    """How a seed becomes a base, in words."""
    return _WAYS.get(str(seed.get("way")), render.word(seed.get("way")))


def plan(context: Context, inventory: Inventory, group: str, named: Sequence[str], *, move: bool) -> Sown:
    """Ask both sides. Raises what is wrong with a seed; then nothing was done."""
    source, target = side(context, group, "source", inventory), side(context, group, "recovery", inventory)
    place = inventory.find(group, "source")
    machines = set(place.spec.get("machines", ())) if place is not None else set()
    told = [one for one in context.call(source, "machine.list") if one["name"] in machines]
    pairs = [(one["name"], disk) for one in told for disk in one["disks"]]
    disks = [
        {"number": number, "machine": machine, "target": disk["target"], "size": disk["size"]}
        for number, (machine, disk) in enumerate(pairs)
    ]
    names = [f"{disk['machine']}.{disk['target']}" for disk in disks]
    wanted = [dict(zip(("disk", "path"), which(one, names), strict=True)) for one in named]
    order: dict[str, Any] = {"group": group, "disks": disks, "seeds": wanted, "give_up": move}
    found = context.call(target, "replicate.seed", timeout=60, dry_run=True, **order)
    return Sown(target, order, found)


def which(named: str, disks: Sequence[str]) -> tuple[str, str]:
    """(disk, path) of DISK=PATH, or of a path whose file is named as the disk, or that is the only disk's.

    Raises NotFound for a disk that the group does not have."""
    disk, equals, path = named.partition("=")
    if not equals or "/" in disk:
        path, disk = named, _stem(named)
        if disk not in disks and len(disks) == 1:
            disk = disks[0]
    if disk not in disks:
        raise NotFound("disk", disk, known=list(disks), hint=f"write --seed MACHINE.TARGET={path}; {_known(disks)}")
    return disk, path


def _stem(path: str) -> str:
    name = PurePosixPath(path).name
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def _known(disks: Sequence[str]) -> str:
    return f"the group's disks: {', '.join(disks) or 'none are known'}"
