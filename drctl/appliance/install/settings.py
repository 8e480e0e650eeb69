"""The files that an appliance is told by: `appliance.toml`, `peers.json`, and those of the system. Pure text."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from drctl.errors import ConfigInvalid
from drctl.model.site import Host


@dataclass(frozen=True, slots=True)
class Member:
    """A host and its appliance's UUID."""

    host: Host
    uuid: str


def appliance_toml(own: Member, others: Sequence[Member], run: str, qemu_group: str, old: str | None) -> str:
    """The file's text. Keys that an operator added to the old one are kept; one that says the same stays as it is.

    Raises ConfigInvalid when the old one is not TOML."""
    peers = [
        {"site": other.host.site, "host": other.host.name, "link": other.host.link, "uuid": other.uuid}
        for other in others
    ]
    wanted: dict[str, Any] = {
        "site": own.host.site,
        "host": own.host.name,
        "uri": own.host.uri,
        "link": own.host.link,
        "uuid": own.uuid,
        "run": run,
    }
    if qemu_group:
        wanted["qemu_group"] = qemu_group
    present = _toml(old, own.host.name)
    kept = {key: value for key, value in present.items() if key not in wanted and key != "peer"}
    merged = {**wanted, **kept, "peer": peers}
    return old if old is not None and present == merged else render(merged)


def _toml(text: str | None, host: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text or "")
    except tomllib.TOMLDecodeError as exc:
        hint = "mend it there, or remove it: it will be written anew"
        raise ConfigInvalid(f"appliance.toml of {host}", 0, "", f"not TOML: {exc}", hint=hint) from exc


def render(values: Mapping[str, Any]) -> str:
    """TOML of plain values, and of arrays of tables of such. A JSON string is a basic string of TOML."""
    lines = ["# Written by drctl appliance install; keys that you add are kept.\n"]
    for key, value in values.items():
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}\n")
    for key, value in values.items():
        if isinstance(value, list) and all(isinstance(row, dict) for row in value):
            for row in value:
                lines.append(f"\n[[{key}]]\n")
                lines += [f"{name} = {json.dumps(inner, ensure_ascii=False)}\n" for name, inner in row.items()]
    return "".join(lines)


def peers_json(others: Sequence[Member], old: str | None) -> str:
    """The list of appliances that may speak to this one. What an operator narrowed (`groups`) stays narrow."""
    try:
        present = json.loads(old or "{}")
    except ValueError:
        present = {}
    peers = {
        other.uuid: {
            "site": other.host.site,
            "host": other.host.name,
            "groups": present.get(other.uuid, {}).get("groups", "*"),
        }
        for other in others
    }
    return old if old is not None and present == peers else json.dumps(peers, indent=2) + "\n"


def system_file(name: str, **values: str) -> str:
    """One of the files that come with drctl, its @PLACES@ filled in."""
    text = resources.files(__package__).joinpath(f"files/{name}").read_text("utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key.upper()}@", value)
    return text
