"""`drctl doctor`: looks for what would stand in the way of a recovery, before the disaster does."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from drctl import __version__
from drctl.cli.apply import differences
from drctl.cli.context import Context
from drctl.cli.diagnosis import (
    Finding,
    Severity,
    error,
    examine_coverage,
    examine_group,
    examine_host,
    exit_code,
    info,
    warning,
)
from drctl.cli.fencing import unusable
from drctl.cli.group_file import read_groups
from drctl.cli.inventory import ask, in_parallel, info_method, take_inventory
from drctl.cli.options import Format, Output, begin, examples, noun
from drctl.cli.status import draw
from drctl.cli.vm import find
from drctl.errors import ConfigInvalid, DrctlError
from drctl.model.site import Host

app = noun("Look for what would stand in the way of a recovery.")

#: The oldest versions that drctl is tested with (Debian 12).
NEEDED = {"qemu-system-x86_64": (7, 2), "virsh": (9, 0)}
_VERSION = re.compile(r"(\d+)\.(\d+)")
_ORDER = list(Severity)


@app.command(
    epilog=examples("drctl doctor", "drctl doctor --output json | jq '.findings[] | select(.severity==\"error\")'")
)
def doctor(ctx: typer.Context, output: Output = Format.TEXT) -> int:
    """Check configuration, appliances, versions, clocks, space, labels, certificates, links, recovery points, coverage.

    Exits with 3 when there are warnings, with 42 when there are errors (34 when all of them are about clocks, 35 when
    all are about certificates)."""
    context = begin(ctx, output)
    findings = sorted(examine(context), key=lambda finding: _ORDER.index(finding.severity))
    if context.screen.as_json:
        context.document("doctor", findings=[asdict(finding) for finding in findings])
    else:
        rows = [(one.severity.value, one.subject, one.message, one.hint or "-") for one in findings]
        context.screen.table(("severity", "about", "finding", "what to do"), rows, "nothing found: all is well")
    return exit_code(findings)


def examine(context: Context) -> list[Finding]:
    """Everything that can be found from here. Raises ConfigInvalid when not even the configuration can be read."""
    findings = _this_machine(NEEDED) + _authority(context.config.directory)
    looked = in_parallel(lambda host: _host(context, host), context.config.hosts)
    findings += [finding for found, _ in looked for finding in found]
    if not any(answered for _, answered in looked):
        return findings
    return [*findings, *_files(context), *_groups(context)]


def _host(context: Context, host: Host) -> tuple[list[Finding], bool]:
    before = context.clock.time()
    answer = ask(context, host, info_method(host))
    after = context.clock.time()
    if answer.error:
        who = "its appliance" if host.served else "it"
        found = [error(host.name, f"{who} does not answer: {answer.error.message}", answer.error.hint)]
        return [*found, *_fence(host)], False
    found = examine_host(host.name, answer.result, __version__, (before + after) / 2, (after - before) / 2)
    return [*found, *_fence(host)], True


def _fence(host: Host) -> list[Finding]:
    if problem := unusable(host.fence):
        return [
            error(f"{host.name}: fence", problem, "a failover could not fence this host: install it, or mend fence")
        ]
    return []


def _files(context: Context) -> list[Finding]:
    if context.config.directory is None:
        return [
            info("configuration", "there is none; only the local appliance was looked at", "name one: --config DIR")
        ]
    try:
        specs = read_groups(context.config)
        changes = differences(context, specs, take_inventory(context))
    except ConfigInvalid as exc:
        return [error("groups", exc.message, exc.hint)]
    except DrctlError as exc:
        return [warning("groups", exc.message, exc.hint)]
    return [
        warning(change.group, f"its file is not applied at {change.host.site}/{change.host.name}", "drctl apply")
        for change in changes
    ]


def _groups(context: Context) -> list[Finding]:
    inventory = take_inventory(context)
    pictures, failed = draw(context, inventory, inventory.groups)
    machines, _ = find(context)
    findings = [finding for one in pictures for finding in examine_group(one)]
    findings += [error(one.host.name, f"a group's status can't be told: {one.error}") for one in failed]
    return findings + examine_coverage(machines, pictures)


def _authority(directory: Path | None) -> list[Finding]:
    """The project's CA, where this machine has its key: whoever has it can be any appliance."""
    if directory is None or not (key := directory / "ca" / "ca-key.pem").exists():
        return []
    found = []
    if mode := stat.S_IMODE(key.stat().st_mode) & 0o077:
        found.append(error(str(key), f"may be read by others (mode {mode:03o})", f"chmod 600 {key}"))
    try:
        if b"ENCRYPTED" not in key.read_bytes():
            hint = "openssl pkcs8 -topk8; then $DRCTL_CA_PASSPHRASE_FILE names the passphrase's file (docs/security.md)"
            found.append(info(str(key), "has no passphrase: whoever copies it can be any appliance", hint))
    except OSError as exc:
        found.append(warning(str(key), f"can't be read: {exc.strerror}", "no certificate can be renewed from here"))
    return found


def _this_machine(needed: dict[str, tuple[int, int]]) -> list[Finding]:
    findings = []
    for program, oldest in needed.items():
        found = shutil.which(program)
        if found is None:
            findings.append(
                info(
                    "this machine", f"has no {program}: it can't be a hypervisor host", "fine for an operator's machine"
                )
            )
        elif (version := _version([found, "--version"])) and version < oldest:
            text = f"{program} is {version[0]}.{version[1]}, older than {oldest[0]}.{oldest[1]}"
            findings.append(error("this machine", text, "upgrade it before anything is protected here"))
    return findings


def _version(argv: Sequence[str]) -> tuple[int, int] | None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(done.stdout)
    return (int(match[1]), int(match[2])) if match else None
