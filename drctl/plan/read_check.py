"""`[[stage.vm.check]]` and `[[stage.check]]`: each kind has keys of its own, and refuses those of the others."""

from __future__ import annotations

from urllib.parse import urlsplit

from drctl.plan.plan import Check, CheckKind, OnFailure, Where
from drctl.plan.read_common import arguments, modes, on_failure, own_name
from drctl.toml.table import Table

#: Kinds that ask a guest need a machine; a stage has none of its own.
OF_MACHINE = (CheckKind.GUEST_AGENT, CheckKind.CONSOLE)


def read_check(table: Table, failure: OnFailure, *, of_machine: bool) -> Check:
    """One check. Raises ConfigInvalid."""
    kinds = [kind for kind in CheckKind if of_machine or kind not in OF_MACHINE]
    kind = CheckKind(table.choice("kind", kinds))
    fields = _FIELDS[kind](table)
    if not of_machine and fields.get("where") is Where.GUEST:
        raise table.error("where", "a stage has no guest of its own", hint="put the check below a [[stage.vm]]")
    check = Check(
        kind=kind,
        name=own_name(table, kind.value),
        retries=table.integer("retries", 30),
        interval=table.duration("interval", 2.0, minimum=0.1, maximum=3600.0),
        timeout=table.duration("timeout", 5.0, minimum=0.1, maximum=3600.0),
        on_failure=on_failure(table, failure),
        modes=modes(table),
        **fields,  # type: ignore[arg-type]
    )
    if check.retries > 100_000:
        raise table.error("retries", f"{check.retries} is above 100000", hint="lengthen interval instead")
    table.finish()
    return check


def _tcp(table: Table) -> dict[str, object]:
    port = table.integer("port", minimum=1)
    if port > 65535:
        raise table.error("port", f"{port} is no port", hint="1 to 65535")
    return {"host": _host(table, "host"), "test_host": _host(table, "test_host", ""), "port": port}


def _http(table: Table) -> dict[str, object]:
    status = table.integer("status", 200, minimum=100)
    if status > 599:
        raise table.error("status", f"{status} is no HTTP status", hint="100 to 599")
    return {
        "url": _url(table, "url"),
        "test_url": _url(table, "test_url", ""),
        "status": status,
        "text": table.text("text", ""),
        "insecure": table.boolean("insecure", False),
    }


def _command(table: Table) -> dict[str, object]:
    return {"run": arguments(table), "where": Where(table.choice("where", [*Where], Where.OPERATOR.value))}


def _guest_agent(_: Table) -> dict[str, object]:
    return {}


def _console(table: Table) -> dict[str, object]:
    text = table.text("text")
    if not text.strip():
        raise table.error("text", "is empty, so it would be found at once", hint='e.g. text = "login:"')
    return {"text": text}


_FIELDS = {
    CheckKind.TCP: _tcp,
    CheckKind.HTTP: _http,
    CheckKind.COMMAND: _command,
    CheckKind.GUEST_AGENT: _guest_agent,
    CheckKind.CONSOLE: _console,
}


def _host(table: Table, key: str, default: str | None = None) -> str:
    host = table.text(key) if default is None else table.text(key, default)
    if key in table and (not host or any(letter.isspace() or letter in "/@" for letter in host)):
        raise table.error(key, f"{host!r} is no address", hint="e.g. 10.1.0.5, db.example.org or fd00::5")
    return host


def _url(table: Table, key: str, default: str | None = None) -> str:
    url = table.text(key) if default is None else table.text(key, default)
    if key not in table:
        return url
    example = "e.g. https://shop.example.org/health"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise table.error(key, f"{url!r} is no URL: {exc}", hint=example) from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise table.error(key, f"{url!r} is no http or https URL", hint=example)
    if parts.username or parts.password:
        raise table.error(key, "holds a password, and plans are kept in the open", hint='use kind = "command" instead')
    if any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        raise table.error(key, "holds a blank or control character", hint=example)
    return url
