"""The operator's configuration of a lab, and each appliance's own."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import tomlkit

from drctl.lab.layout import SITES, Layout, Site, State
from drctl.replication import identity


def write(layout: Layout, state: State) -> None:
    """Writes drctl.toml, groups/web.toml and each site's home/appliance.toml. Files that exist are left as they are:
    they are the operator's."""
    (layout.directory / "groups").mkdir(exist_ok=True)
    _write(layout.directory / "drctl.toml", operator_config(layout, state))
    _write(layout.directory / "groups" / "web.toml", group_config(state))
    for site in layout.sites:
        site.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(site.home / "appliance.toml", appliance_config(layout, state, site))


def host_name(site: str) -> str:
    return f"{site}-1"


def link(state: State, site: str) -> str:
    return f"127.0.0.1:{state.links[site]}"


def operator_config(layout: Layout, state: State) -> tomlkit.TOMLDocument:
    document = tomlkit.document()
    document.add(tomlkit.comment("Two sites of a lab on this machine; made by `drctl lab up`."))
    sites, hosts = tomlkit.aot(), tomlkit.aot()
    for site in layout.sites:
        sites.append(tomlkit.item({"name": site.name}))
        hosts.append(
            tomlkit.item(
                {
                    "name": host_name(site.name),
                    "site": site.name,
                    "kind": "libvirt",
                    "uri": site.uri,
                    "control": f"unix:{site.control}",
                    "link": link(state, site.name),
                }
            )
        )
    document.add("site", sites)
    document.add("host", hosts)
    document.add("defaults", tomlkit.item({"checkpoint_interval": "5s"}))
    return document


def group_config(state: State) -> tomlkit.TOMLDocument:
    document = tomlkit.document()
    document.add(tomlkit.comment("The lab's guests, protected from alpha to beta."))
    document.add("name", tomlkit.item("web"))
    document.add("source", tomlkit.item(SITES[0]))
    document.add("recovery", tomlkit.item(SITES[1]))
    document.add("machines", tomlkit.item([guest.name for guest in state.guests]))
    document.add("checkpoint_interval", tomlkit.item("5s"))
    return document


def appliance_config(layout: Layout, state: State, site: Site) -> tomlkit.TOMLDocument:
    others = [other for other in layout.sites if other.name != site.name]
    document = tomlkit.document()
    for key, value in (
        ("site", site.name),
        ("host", host_name(site.name)),
        ("uri", site.uri),
        ("link", link(state, site.name)),
        ("uuid", appliance(state, site.name)),
        ("run", str(site.appliance_run)),
    ):
        document.add(key, tomlkit.item(value))
    peers = tomlkit.aot()
    for other in others:
        peers.append(
            tomlkit.item(
                {
                    "site": other.name,
                    "host": host_name(other.name),
                    "link": link(state, other.name),
                    "uuid": appliance(state, other.name),
                }
            )
        )
    document.add("peer", peers)
    return document


def appliance(state: State, site: str) -> str:
    """The UUID of a site's appliance: the same whenever the same lab is asked."""
    return str(uuid.uuid5(uuid.UUID(state.lab), site))


def write_identities(layout: Layout, state: State) -> None:
    """A CA of the lab's own, and a certificate and the list of its peer for each appliance that has none yet."""
    ca = layout.directory / "ca"
    if not (ca / "ca.pem").exists():
        identity.create_ca(ca)
        names = {host_name(site): appliance(state, site) for site in SITES}
        (ca / "appliances.json").write_text(json.dumps(names))
    for site in layout.sites:
        tls = site.home / "tls"
        if not (tls / "cert.pem").exists():
            identity.issue(ca, appliance(state, site.name), tls)
        others = [other.name for other in layout.sites if other.name != site.name]
        identity.write_peers(tls, {appliance(state, name): identity.Peer(name, host_name(name)) for name in others})


def _write(path: Path, document: tomlkit.TOMLDocument) -> None:
    if not path.exists():
        path.write_text(tomlkit.dumps(document))
