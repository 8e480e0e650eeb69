"""`drctl init`: writes a configuration to start from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from drctl.cli.config import FILE, NAME, load_config
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.options import DryRun, Yes, examples, noun
from drctl.errors import AlreadyExists
from drctl.toml.table import parse_toml

app = noun("Write a configuration to start from.")

_HEAD = """\
# drctl: sites, hosts, and the defaults of protection groups. All keys: docs/configuration.md.
# Groups are in groups/NAME.toml; keep both under version control.
"""
_SITE = """
[[site]]
name = "{site}"

[[host]]
name = "{site}1"
site = "{site}"
kind = "libvirt"
uri = "qemu:///system"
# How it is reached: as root, or as somebody whose sudo asks no password. Its key must be in known_hosts.
ssh = "root@{site}1.example"
# Where the other site's appliances reach this one, ADDRESS:PORT.
link = "{site}1.example:7077"
"""
_DEFAULTS = """
[defaults]
checkpoint_interval = "5s"
history = "7d"
journal_limit = "64 GiB"
"""


@app.command(epilog=examples("drctl init", "drctl init dr/ --site oslo --site bergen --yes"))
def init(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")] = Path(),
    site: Annotated[list[str] | None, typer.Option("--site", metavar="NAME", help="A site; may be repeated.")] = None,
    ca_passphrase_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Encrypt the authority's key with the first line of this file ($DRCTL_CA_PASSPHRASE_FILE).",
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Write a commented drctl.toml, a directory for groups, and the project's own certificate authority.

    The authority's key (ca/ca-key.pem) signs the appliances' certificates; keep it from others and out of version
    control. With a passphrase it is encrypted, and $DRCTL_CA_PASSPHRASE_FILE has to name the file wherever it signs
    (appliance install). What is there already is not touched."""
    context = ctx.obj
    assert isinstance(context, Context)
    file = directory / FILE
    if file.exists():
        raise AlreadyExists(f"{file} is there already", hint="edit it, or name another directory")
    text = template(site or ["alpha", "beta"])
    authority = directory / "ca"
    steps = [f"write {file}", f"make {directory / 'groups'}/", f"make the certificate authority {authority}/"]
    if propose(context.screen, steps, dry_run=dry_run, yes=yes):
        (directory / "groups").mkdir(parents=True, exist_ok=True)
        _authority(authority, ca_passphrase_file)
        file.write_text(text, "utf-8")
        load_config(file)
        context.screen.line(f"{file}: name your hosts there, then: drctl --config {directory} appliance install HOST")


def _authority(directory: Path, passphrase_file: Path | None) -> None:
    """Make the project's CA, and keep its key out of git."""
    if directory.exists():
        return
    from drctl.replication.identity import PASSPHRASE, create_ca, read_passphrase

    file = passphrase_file or os.environ.get(PASSPHRASE)
    create_ca(directory, read_passphrase(Path(file)) if file else None)
    (directory / ".gitignore").write_text("ca-key.pem\n", "utf-8")


def template(sites: list[str]) -> str:
    """The file's text. Raises ConfigInvalid when a name can't be one."""
    for site in sites:
        parse_toml(f"site = {site!r}", "--site").text("site", pattern=NAME.replace("31", "30"), example="alpha")
    return _HEAD + "".join(_SITE.format(site=site) for site in sites) + _DEFAULTS
