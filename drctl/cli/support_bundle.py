"""`drctl support-bundle`: everything that helps to find out what went wrong, in one file, without secrets."""

from __future__ import annotations

import errno
import io
import json
import os
import platform
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from drctl import __version__
from drctl.cli.context import Context
from drctl.cli.doctor import examine
from drctl.cli.inventory import Answer, in_parallel
from drctl.cli.options import begin, examples, noun
from drctl.cli.status import look
from drctl.errors import AlreadyExists, DrctlError, OutOfSpace, Refused
from drctl.model.redaction import redact
from drctl.model.site import Host

app = noun("Collect what helps to find out what went wrong.")

#: An appliance reads its logs for it; a host under load may take its time.
COLLECT_SECONDS = 60.0
#: Entries of each appliance's history.
HISTORY = 1000
#: No single text of a bundle is larger.
TEXT_LIMIT = 4 * 1024 * 1024

Entry = tuple[str, str]


@app.command(
    "support-bundle", epilog=examples("drctl support-bundle", "drctl support-bundle --output /tmp/case-17.tar.gz")
)
def support_bundle(
    ctx: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to; else drctl-support-TIME.tar.gz, here."),
    ] = None,
) -> int:
    """Collect versions, configuration, findings, statuses, histories, ends of logs, headers of rings and stores.

    Secrets are taken out: keys, passwords, tokens, the arguments of fence commands; guests' data are not touched. Look
    into the file before you give it away. Nothing is changed. Appliances that don't answer are named in it: exits with
    3 then."""
    context = begin(ctx)
    target = output or Path(f"drctl-support-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.tar.gz")
    if target.exists():
        raise AlreadyExists(f"{target} is there already", hint="name another file: --output FILE")
    hosts = context.config.hosts
    context.screen.say(f"asking {len(hosts)} appliances")
    collected = in_parallel(lambda host: _collect(context, host), hosts)
    silent = {answer.host.name: answer.error.as_dict() for answer in collected if answer.error}
    entries = [
        ("about.json", _json(_about(hosts, silent))),
        *_configuration(context),
        *_findings(context),
        *_of_hosts(context, collected),
    ]
    _write(target, entries)
    context.screen.line(f"{target}: {len(entries)} files of {len(hosts) - len(silent)} appliances and this machine")
    for name, error in silent.items():
        context.screen.say(f"no answer from {name}: {error['message']}")
    return 3 if silent else 0


def _about(hosts: Sequence[Host], silent: dict[str, Any]) -> dict[str, Any]:
    return {
        "made": datetime.now(UTC).isoformat(),
        "software": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "hosts": [host.name for host in hosts],
        "silent": silent,
    }


def _collect(context: Context, host: Host) -> Answer:
    try:
        return Answer(host, context.call(host, "support.collect", timeout=COLLECT_SECONDS))
    except DrctlError as exc:
        return _at_hand(context, host, exc)


def _at_hand(context: Context, host: Host, error: DrctlError) -> Answer:
    """Of a local appliance that does not run the files may be read all the same."""
    from drctl.appliance import config, support

    directory = context.settings.home_directory
    try:
        home = config.load(directory)
        if home.config.host == host.name:
            return Answer(host, {"files": support.collect(home), "problem": error.message})
    except (DrctlError, OSError):
        pass
    return Answer(host, error=error)


def _configuration(context: Context) -> Iterator[Entry]:
    """The operator's own files; never `ca/`."""
    root = context.config.directory
    if root is None:
        return
    for pattern in ("drctl.toml", "groups/*.toml", "plans/*.toml"):
        for path in sorted(root.glob(pattern)):
            yield f"config/{path.relative_to(root)}", _text(path)
    state = Path(os.environ.get("XDG_STATE_HOME") or Path(os.environ.get("HOME", "/")) / ".local/state")
    log = state / "drctl" / "errors.log"
    if log.exists():
        yield "errors.log", _text(log)


def _text(path: Path) -> str:
    try:
        return redact(path.read_text(errors="replace")[-TEXT_LIMIT:])
    except OSError as exc:
        return f"not read: {exc.strerror}\n"


def _findings(context: Context) -> Iterator[Entry]:
    """What `doctor` and `status` say; one that fails must not keep the other."""
    try:
        yield "doctor.json", _json([asdict(finding) for finding in examine(context)])
    except DrctlError as exc:
        yield "doctor.json", _json({"error": exc.as_dict()})
    try:
        pictures, silent = look(context, "")
        yield "status.json", _json({"groups": pictures, "unreachable": silent})
    except DrctlError as exc:
        yield "status.json", _json({"error": exc.as_dict()})


def _of_hosts(context: Context, collected: Sequence[Answer]) -> Iterator[Entry]:
    for answer in collected:
        place = f"hosts/{answer.host.name}"
        if answer.error:
            yield f"{place}/error.json", _json(answer.error.as_dict())
            continue
        for name, text in sorted(answer.result["files"].items()):
            # Said by another machine: a name may not lead out of its place.
            parts = [part for part in str(name).split("/") if part not in ("", ".", "..")]
            yield f"{place}/{'/'.join(parts)}", redact(str(text)[:TEXT_LIMIT])
        asked: dict[str, dict[str, Any]] = {"appliance.info": {}, "appliance.history": {"group": "", "limit": HISTORY}}
        for method, params in asked.items():
            try:
                told = context.call(answer.host, method, timeout=10.0, **params)
            except DrctlError as exc:
                told = {"error": exc.as_dict()}
            yield f"{place}/{method}.json", _json(told)


def _json(value: Any) -> str:
    return redact(json.dumps(value, indent=1, default=str) + "\n")


def _write(target: Path, entries: Sequence[Entry]) -> None:
    """The whole file or none, for its owner alone. Raises OutOfSpace, Refused."""
    fresh = target.with_name(f".{target.name}.new")
    root = target.name.removesuffix(".tar.gz").removesuffix(".tgz") or "drctl-support"
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, text in entries:
                _add(archive, f"{root}/{name}", text.encode(errors="replace"))
        fresh.replace(target)
    except OSError as exc:
        fresh.unlink(missing_ok=True)
        kind = OutOfSpace if exc.errno == errno.ENOSPC else Refused
        raise kind(f"{target}: {exc.strerror}", hint="name another place: --output FILE") from exc


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), time.time(), 0o600
    archive.addfile(member, io.BytesIO(data))
