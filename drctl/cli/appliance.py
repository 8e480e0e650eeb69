"""`drctl appliance`: the replication service of a host: install, list, upgrade, uninstall, run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drctl.cli import render
from drctl.cli.confirm import confirm_name, propose
from drctl.cli.context import Context
from drctl.cli.inventory import ask_all
from drctl.cli.options import DryRun, Format, Output, Yes, begin, examples, noun
from drctl.cli.retention import demand_unlocked
from drctl.errors import DrctlError, NotFound, PreconditionFailed, Refused
from drctl.model.extent import format_bytes
from drctl.model.site import Host, HostKind

if TYPE_CHECKING:  # the installer and paramiko take long to import; `list` and `run` need neither
    from drctl.appliance.install.bundle import Bundle
    from drctl.appliance.install.campaign import Progress, Target
    from drctl.appliance.install.roster import Roster

app = noun("The replication service of a host.")

Hosts = Annotated[list[str] | None, typer.Argument(metavar="HOST", help="Hosts of drctl.toml; or name a --site.")]
SiteName = Annotated[str, typer.Option("--site", metavar="SITE", help="All hosts of this site.")]
BundleDir = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="DIR", help="A bundle made before; else one is made of this drctl's environment."),
]
WheelDir = Annotated[
    Path | None,
    typer.Option("--wheels", metavar="DIR", help="Wheels for hosts with another Python or processor than here."),
]


@app.command(epilog=examples("drctl appliance run --home /var/lib/drctl"))
def run(ctx: typer.Context) -> int:
    """Run the appliance of this host in the foreground; systemd does that.

    --home names its directory (default: $DRCTL_HOME, /var/lib/drctl), which holds its appliance.toml."""
    from drctl.appliance.daemon import main

    context = ctx.obj
    assert isinstance(context, Context)
    return main(context.settings.home_directory)


@app.command("list", epilog=examples("drctl appliance list", "drctl appliance list --output json"))
def list_(ctx: typer.Context, output: Output = Format.TEXT) -> int:
    """List the appliances, and whether they answer. Exits with 3 when one does not."""
    context = begin(ctx, output)
    rows = []
    for answer in ask_all(context, "appliance.info"):
        info = answer.result or {}
        rows.append(
            {
                "host": answer.host.name,
                "site": answer.host.site,
                "state": "unreachable" if answer.failed else "running",
                "version": info.get("version"),
                "identity": info.get("appliance"),
                "control": f"ssh:{answer.host.login}" if answer.host.login else answer.host.control,
                "link": answer.host.link,
                "problem": str(answer.error) if answer.error else "",
            }
        )
    if context.screen.as_json:
        context.document("appliances", appliances=rows)
    else:
        columns = ("host", "site", "state", "version", "identity", "control", "link", "problem")
        context.screen.table(
            columns, [tuple(render.word(row[key]) or "-" for key in columns) for row in rows], "no hosts"
        )
    return 3 if any(row["problem"] for row in rows) else 0


@app.command(epilog=examples("drctl appliance bundle drctl-wheels", "drctl appliance bundle new --wheels wheels-3.13"))
def bundle(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it; must not hold another.")],
    wheels: WheelDir = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Put the wheels that appliances are installed from into a directory, with a list of their checksums.

    They are made of what is installed beside this drctl; nothing is downloaded, here or at a host."""
    from drctl.appliance.install.bundle import make_bundle

    context = ctx.obj
    assert isinstance(context, Context)
    if directory.exists() and any(directory.iterdir()):
        raise Refused(f"{directory} is not empty", hint="name a new directory")
    if not propose(context.screen, [f"put the wheels of drctl into {directory}"], dry_run=dry_run, yes=yes):
        return
    made = make_bundle(directory, wheels)
    context.screen.line(f"{directory}: {_describe(made)}")


@app.command(epilog=examples("drctl appliance build image", "drctl appliance build image --bundle wheels"))
def build(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it; an image there is replaced.")],
    bundle: BundleDir = None,
    wheels: WheelDir = None,
    mirror: Annotated[str, typer.Option("--mirror", metavar="URL", help="Debian's packages.")] = "",
    security: Annotated[str, typer.Option("--security-mirror", metavar="URL", help="Debian's security updates.")] = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Build the image of a machine that ESX hosts' appliances are installed on: Debian, with drctl inside.

    Needs root, mmdebstrap, e2fsprogs, qemu-utils and the network. Nobody has a password in it. The same packages
    and the same drctl make the same bytes; with a mirror of snapshot.debian.org also much later."""
    from drctl.appliance.install.image import MIRROR, SECURITY, Source, build_image

    context = ctx.obj
    assert isinstance(context, Context)
    epoch = context.settings.environment.get("SOURCE_DATE_EPOCH", "")
    source = Source(mirror or MIRROR, security or SECURITY, *([int(epoch)] if epoch.isdigit() else []))
    steps = [f"build an appliance's image in {directory}, of packages from {source.mirror}"]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes):
        return
    with _bundle(bundle, wheels) as made:
        image = build_image(directory, made, source, context.screen.say)
    size = format_bytes(image.vmdk.stat().st_size)
    context.screen.line(f"{directory}: {image.identity} on Debian {image.suite}, {size} to send, sha256 {image.sha256}")


@app.command(epilog=examples("drctl appliance install alpha1", "drctl appliance install --site alpha --yes"))
def install(
    ctx: typer.Context,
    host: Hosts = None,
    site: SiteName = "",
    bundle: BundleDir = None,
    wheels: WheelDir = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Install appliances over SSH, on all named hosts at once: user, program, identity, service.

    On an ESX host a machine is made first, of an image (drctl appliance build). All hosts are looked at before any is
    changed. Given again it goes on after a break, and changes nothing when all is as it should be. The hosts need no
    network but SSH. The CA's key (ca/ beside drctl.toml) must be here."""
    return _roll_out(begin(ctx), (host, site), (bundle, wheels), upgrade=False, dry_run=dry_run, yes=yes)


@app.command(epilog=examples("drctl appliance upgrade alpha1", "drctl appliance upgrade --site alpha --dry-run"))
def upgrade(
    ctx: typer.Context,
    host: Hosts = None,
    site: SiteName = "",
    bundle: BundleDir = None,
    wheels: WheelDir = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Bring appliances to this drctl's version: the new one is put beside the old, then switched to.

    Taps hand the guests' connections over to new ones, and replication goes on. Views go on with the old version, since
    guests hang on them. Older versions are removed when nothing runs them any more."""
    return _roll_out(begin(ctx), (host, site), (bundle, wheels), upgrade=True, dry_run=dry_run, yes=yes)


@app.command(epilog=examples("drctl appliance uninstall alpha1", "drctl appliance uninstall alpha1 --confirm alpha1"))
def uninstall(
    ctx: typer.Context,
    host: Annotated[str, typer.Argument(metavar="HOST", help="The host's name.")],
    delete_history: Annotated[
        bool, typer.Option("--delete-history", help="Delete the checkpoints that are kept there, too.")
    ] = False,
    typed: Annotated[str, typer.Option("--confirm", metavar="HOST", help="The host's name, typed before.")] = "",
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Not enough here: the host's name has to be typed.")] = False,
) -> None:
    """Remove an appliance and everything of it from a host.

    Refused while it protects a group, while tests or failovers are there, and while it keeps checkpoints
    (--delete-history); such as are under a retention lock stay until its date."""
    from drctl.appliance.install import campaign, preflight
    from drctl.appliance.install.removal import demand_empty

    del yes
    context = begin(ctx)
    [target] = _targets(context, [context.config.host(host)], _roster(context))
    preflight.demand(campaign.survey([target], None))
    held = campaign.held_by(target)
    demand_empty(host, held, delete_history=delete_history)
    for name in held.locked:
        demand_unlocked(context, target.host, name, 0.0, must=True)
    steps = [f"remove drctl from {host}: service, user, program, {campaign.HOME}"]
    steps += [f"delete the checkpoints of {name}" for name in held.stores]
    if not propose(context.screen, steps, dry_run=dry_run, yes=True):
        return
    confirm_name(context.screen, host, typed=typed, what="host")
    outcome = campaign.uninstall(target, _progress(context), delete_history=delete_history)
    context.screen.line(f"{host}: {'removed' if outcome.changes else 'already removed; nothing was there'}")


def _roll_out(
    context: Context,
    named: tuple[list[str] | None, str],
    sources: tuple[Path | None, Path | None],
    *,
    upgrade: bool,
    dry_run: bool,
    yes: bool,
) -> int:
    from drctl.appliance.install import campaign, preflight

    roster = _roster(context)
    targets = _targets(context, _chosen(context, *named), roster)
    with _bundle(*sources) as made:
        findings = campaign.survey(targets, made)
        for finding in findings:
            kind = "" if finding.error else "note: "
            context.screen.say(f"{finding.host}: {kind}{finding.message} ({finding.hint})")
        preflight.demand(findings)
        if upgrade and (missing := [target.host.name for target in targets if not target.version]):
            raise NotFound("appliance at", ", ".join(missing), hint="drctl appliance install")
        verb = "upgrade" if upgrade else "install"
        steps = [_step(verb, target, made) for target in targets]
        if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question=f"{verb.capitalize()}?"):
            return 0
        campaign.install(targets, context.config.hosts, made, roster, _progress(context), upgrade=upgrade)
    _tell(context, targets)
    _note(context, targets, verb)
    if error := campaign.failure(targets):
        raise error
    return 0


def _roster(context: Context) -> Roster:
    from drctl.appliance.install.roster import Roster

    if context.config.directory is None:
        raise PreconditionFailed("there is no drctl.toml", hint="drctl init writes one; or name it: --config DIR")
    return Roster(context.config.directory / "ca")


def _step(verb: str, target: Target, made: Bundle) -> str:
    place = f"{target.host.name} ({target.host.login})"
    if target.version and (verb == "install" or target.version == made.identity):
        return f"look whether all of {target.version} is as it should be on {place}, and make it so"
    if target.esx is not None and target.facts is None:
        machine = target.esx.vm.name
        return (
            f"make the machine {machine} on {target.host.name} ({target.host.login}), then {verb} {made.identity} on it"
        )
    instead = f" instead of {target.version}" if target.version else ""
    return f"{verb} {made.identity} on {place}{instead}, {format_bytes(made.size)} to send"


def _tell(context: Context, targets: Sequence[Target]) -> None:
    for target in targets:
        if target.outcome is None:
            continue
        changes = ", ".join(target.outcome.changes)
        context.screen.line(f"{target.host.name}: {changes or 'already as it should be; nothing was changed'}")
        for note in target.outcome.notes:
            context.screen.say(f"{target.host.name}: note: {note}")


def _note(context: Context, targets: Sequence[Target], verb: str) -> None:
    """What was done belongs into the history of the host that it was done to."""
    for target in targets:
        if target.outcome is not None and target.outcome.changes:
            with suppress(DrctlError):  # an older one knows no such method
                context.call(target.host, "appliance.note", timeout=5.0, what=verb, changes=target.outcome.changes)


def _targets(context: Context, hosts: Sequence[Host], roster: Roster) -> list[Target]:
    from drctl.appliance.install.campaign import EsxTarget, Target, esx_target
    from drctl.appliance.install.image import load_image

    def esx(host: Host) -> EsxTarget | None:
        if host.kind is not HostKind.ESX:
            return None
        directory = Path(host.machine.image) if host.machine else Path()
        return esx_target(host, context.shell(host), roster, cache(partial(load_image, directory)))

    def answers(host: Host) -> str:
        return str(context.call(host, "appliance.info", timeout=5.0).get("version"))

    targets = [Target(host, context.appliance_shell(host), partial(answers, host), esx(host)) for host in hosts]
    for target in targets:
        _ = target.place  # what drctl.toml lacks is told before any host is asked
    return targets


def _chosen(context: Context, names: list[str] | None, site: str) -> list[Host]:
    if bool(names) == bool(site):
        raise Refused("name hosts, or a site", hint="drctl appliance install HOST, or --site SITE")
    if site:
        return [host for host in context.config.site(site).hosts if host.kind is not HostKind.ESX or host.machine]
    return [context.config.host(name) for name in dict.fromkeys(names or ())]


@contextmanager
def _bundle(directory: Path | None, wheels: Path | None) -> Iterator[Bundle]:
    from drctl.appliance.install.bundle import load_bundle, make_bundle

    if directory is not None:
        yield load_bundle(directory)
        return
    with tempfile.TemporaryDirectory(prefix="drctl-bundle-") as temporary:
        yield make_bundle(Path(temporary), wheels)


def _describe(made: Bundle) -> str:
    size = format_bytes(made.size)
    return f"{made.identity}, {len(made.wheels)} wheels, {size}, for Python {made.python} on {made.machine}"


def _progress(context: Context) -> Progress:
    def told(host: str, step: int, steps: int, name: str) -> None:
        context.screen.say(f"{host}: {step}/{steps} {name}")

    return told
