"""The `uri` of an appliance that serves an ESX host: `esx://USER@HOST:PORT?identity=FILE&known_hosts=FILE`. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, urlsplit

from drctl.errors import ConfigInvalid
from drctl.model.site import Login

SCHEME = "esx"
#: What may stand behind the `?`. `domain` is the kind of the machines' definitions for libvirt: `kvm`, or `qemu` where
#: the recovery site has no KVM. `datastore` is where machines are recovered (by name or UUID).
_KEYS = ("identity", "known_hosts", "domain", "datastore")


@dataclass(frozen=True, slots=True)
class EsxAddress:
    login: Login
    domain: str = "kvm"
    datastore: str = ""


def is_esx(uri: str) -> bool:
    return urlsplit(uri).scheme == SCHEME


def parse(uri: str) -> EsxAddress:
    """Raises ConfigInvalid."""
    parts = urlsplit(uri)
    words = parse_qs(parts.query)
    unknown = sorted(set(words) - set(_KEYS))
    try:
        port = parts.port or 22
    except ValueError:
        port = 0
    if parts.scheme != SCHEME or not parts.hostname or not port or unknown or parts.path not in ("", "/"):
        hint = "write esx://root@HOST?identity=/etc/drctl/esx_ecdsa&known_hosts=/etc/drctl/known_hosts"
        raise ConfigInvalid("appliance.toml", 0, "uri", f"{uri!r} is no address of an ESX host", hint=hint)
    identity, known_hosts, domain, datastore = (words.get(key, [""])[0] for key in _KEYS)
    login = Login(parts.hostname, parts.username or "root", port, identity, known_hosts)
    return EsxAddress(login, domain or "kvm", datastore)


def render(login: Login, domain: str = "kvm", datastore: str = "") -> str:
    """The `uri` of a host that is reached so."""
    words = {"identity": login.identity, "known_hosts": login.known_hosts, "domain": "" if domain == "kvm" else domain}
    words["datastore"] = datastore
    query = "&".join(f"{key}={quote(value, safe='/')}" for key, value in words.items() if value)
    return f"{SCHEME}://{login}" + (f"?{query}" if query else "")
