"""`drctl certificate`: the appliances' certificates: until when they hold, and new ones.

The CA's key stays on the operator's machine: an appliance makes a request, it is signed here, and goes back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import Answer, ask, ask_all, in_parallel
from drctl.cli.options import DryRun, Format, Output, Yes, begin, examples, noun
from drctl.errors import CertificateRejected, DrctlError, PreconditionFailed, Refused
from drctl.model.site import Host

if TYPE_CHECKING:  # cryptography takes long to import, and `list` needs none of it
    from drctl.appliance.install.roster import Roster

app = noun("Certificates of the appliances.")


@dataclass(slots=True)
class _Renewal:
    """One host: what its appliance told, and what came of it."""

    host: Host
    told: dict[str, Any]
    problem: DrctlError | None = None


@app.command("list", epilog=examples("drctl certificate list", "drctl certificate list --output json"))
def list_(ctx: typer.Context, output: Output = Format.TEXT) -> int:
    """List the appliances' certificates. Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    answers = ask_all(context, "certificate.show")
    rows = [_row(answer) for answer in answers]
    if context.screen.as_json:
        context.document("certificates", certificates=rows)
    else:
        columns = ("host", "appliance", "valid until", "renew from", "authority's copy", "problem")
        lines = [
            (
                row["host"],
                render.word(row["appliance"]),
                render.moment(row["not_after"]),
                render.moment(row["renewal"]),
                render.moment(row["authority"]["kept"]) if row["authority"] else "-",
                row["problem"] or "-",
            )
            for row in rows
        ]
        context.screen.table(columns, lines, "the configuration names no host")
    return 3 if any(answer.failed for answer in answers) else 0


@app.command(
    epilog=examples(
        "drctl certificate renew --all",
        "drctl certificate renew --all --yes    # once a day by cron",
        "drctl certificate renew a1 --force",
    )
)
def renew(
    ctx: typer.Context,
    host: Annotated[list[str] | None, typer.Argument(metavar="HOST", help="Hosts of drctl.toml.")] = None,
    site: Annotated[str, typer.Option("--site", metavar="SITE", help="All hosts of this site.")] = "",
    everywhere: Annotated[bool, typer.Option("--all", help="All hosts.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Renew also what holds for long.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Renew the certificates of appliances that have lived two thirds of their time.

    Each appliance makes a new key, which never leaves it; the certificate is signed here, with the CA's key (ca/ beside
    drctl.toml; $DRCTL_CA_PASSPHRASE_FILE names a file with its passphrase). Streams go on; nothing is restarted. An
    expired certificate is renewed as well. Exits with 3 when an appliance could not be reached or refused."""
    context = begin(ctx)
    hosts = _chosen(context, host, site, everywhere=everywhere)
    answers = in_parallel(lambda one: ask(context, one, "certificate.show"), hosts)
    for answer in answers:
        if answer.error:
            context.screen.say(f"{answer.host.name}: {answer.error.message}")
    due = [_Renewal(one.host, one.result) for one in answers if not one.failed and (force or one.result.get("due"))]
    for answer in answers:
        if not answer.failed and not any(one.host is answer.host for one in due):
            context.screen.line(f"{answer.host.name}: holds until {render.moment(answer.result['not_after'])}")
    steps = [f"renew the certificate of {one.host.name}, {_until(one.told)}" for one in due]
    missed = 3 if any(answer.failed for answer in answers) else 0
    if not due or not propose(context.screen, steps, dry_run=dry_run, yes=yes, question="Renew?"):
        return missed
    roster = _roster(context)
    uuids = roster.known()
    for one in due:
        _renew(context, one, roster, uuids.get(one.host.name, ""))
    return 3 if any(one.problem for one in due) else missed


@app.command(
    epilog=examples("drctl certificate seal --all", "DRCTL_CA_PASSPHRASE_FILE=~/ca-pass drctl certificate seal a1 b1")
)
def seal(
    ctx: typer.Context,
    host: Annotated[list[str] | None, typer.Argument(metavar="HOST", help="Hosts of drctl.toml.")] = None,
    site: Annotated[str, typer.Option("--site", metavar="SITE", help="All hosts of this site.")] = "",
    everywhere: Annotated[bool, typer.Option("--all", help="All hosts.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int:
    """Keep sealed copies of the authority (ca/) at hosts of both sites, in case the operator's machine is lost.

    The key travels and lies there encrypted, never open: with the passphrase that it has, or, where ca-key.pem is not
    encrypted, with the first line of the file that $DRCTL_CA_PASSPHRASE_FILE names. Keep that passphrase where neither
    site's end takes it along. An old copy is replaced. Exits with 3 when a host could not be reached or refused."""
    from drctl.replication.authority import seal as sealed
    from drctl.replication.identity import PASSPHRASE, read_passphrase

    context = begin(ctx)
    hosts = _chosen(context, host, site, everywhere=everywhere)
    _roster(context)
    file = os.environ.get(PASSPHRASE)
    files = sealed(_authority(context), read_passphrase(Path(file)) if file else None)
    steps = [f"keep a sealed copy of the authority at {one.site}/{one.name}" for one in hosts]
    if not propose(context.screen, steps, dry_run=dry_run, yes=yes, question="Send them?"):
        return 0
    failed = False
    for one in hosts:
        try:
            told = context.call(one, "authority.keep", files=files)
            context.screen.line(f"{one.name}: keeps a sealed copy of authority {told['fingerprint'][:16]}")
        except DrctlError as exc:
            failed = True
            context.screen.say(f"{one.name}: {exc.message}" + (f" ({exc.hint})" if exc.hint else ""))
    return 3 if failed else 0


@app.command(epilog=examples("drctl certificate unseal b1 ca/"))
def unseal(
    ctx: typer.Context,
    host: Annotated[str, typer.Argument(metavar="HOST", help="A host that keeps a copy.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it; not there yet, or empty.")],
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Fetch a host's sealed copy of the authority, and make a ca/ of it.

    Its key stays encrypted: $DRCTL_CA_PASSPHRASE_FILE has to name a file with its passphrase where it shall sign."""
    from drctl.replication.authority import unpack

    context = begin(ctx)
    named = context.config.host(host)
    if propose(
        context.screen, [f"write {directory} from the copy at {named.site}/{named.name}"], dry_run=dry_run, yes=yes
    ):
        unpack(directory, context.call(named, "authority.fetch")["files"])
        context.screen.line(f"{directory}: the authority, its key encrypted; next: drctl certificate renew --all")


def _renew(context: Context, one: _Renewal, roster: Roster, uuid: str) -> None:
    """One appliance; a problem there must not keep the others from theirs."""
    name = one.host.name
    try:
        _demand_known(one, uuid)
        asked = context.call(one.host, "certificate.request")
        certificate = roster.sign(str(asked["request"]), uuid)
        told = context.call(one.host, "certificate.install", certificate=certificate)
        context.screen.line(f"{name}: renewed, holds until {render.moment(told['not_after'])}")
    except DrctlError as exc:
        one.problem = exc
        context.screen.say(f"{name}: not renewed: {exc.message}" + (f" ({exc.hint})" if exc.hint else ""))


def _demand_known(one: _Renewal, uuid: str) -> None:
    """A host may ask for its own name alone. Raises CertificateRejected."""
    if not uuid:
        raise CertificateRejected(
            f"{one.host.name} is not in ca/appliances.json", hint="drctl appliance install enrols it", reason="unknown"
        )
    if one.told.get("appliance") != uuid:
        raise CertificateRejected(
            f"{one.host.name} says that it is appliance {one.told.get('appliance')}; ca/appliances.json has {uuid}",
            hint="is it the host that it was?",
            reason="foreign",
        )


def _roster(context: Context) -> Roster:
    """Raises PreconditionFailed without a CA's key, SetupFailed when it can't be used."""
    from drctl.appliance.install.roster import Roster

    return Roster(_authority(context))


def _authority(context: Context) -> Path:
    directory: Path | None = context.config.directory
    if directory is None:
        raise PreconditionFailed("there is no drctl.toml", hint="the CA's key lies beside it: --config DIR")
    return directory / "ca"


def _chosen(context: Context, names: list[str] | None, site: str, *, everywhere: bool) -> list[Host]:
    if sum(map(bool, (names, site, everywhere))) != 1:
        raise Refused("name hosts, a site, or all", hint="drctl certificate renew HOST, or --site SITE, or --all")
    if everywhere:
        return list(context.config.hosts)
    if site:
        return list(context.config.site(site).hosts)
    return [context.config.host(name) for name in dict.fromkeys(names or ())]


def _until(told: dict[str, Any]) -> str:
    return f"which can't be read: {told['problem']}" if told["problem"] else f"until {render.moment(told['not_after'])}"


def _row(answer: Answer) -> dict[str, Any]:
    told = answer.result if isinstance(answer.result, dict) else {}
    wanted = ("appliance", "not_before", "not_after", "renewal", "due", "authority")
    problem = str(answer.error) if answer.error else told.get("problem", "")
    return {"host": answer.host.name, **{key: told.get(key) for key in wanted}, "problem": problem}
