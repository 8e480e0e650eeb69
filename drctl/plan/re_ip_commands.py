"""Commands that give a guest's network cards their addresses: a shell script for Linux, netsh for Windows. Pure.

Which of Linux's ways is right only the guest knows, so the script looks: NetworkManager when it runs and has the card,
netplan when it has files, else `ip`, which lasts until the guest's next boot."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping, Sequence
from shlex import quote

from drctl.model.address import CardAddress

#: Read after the files of an installer (00, 50) and of cloud-init (50).
NETPLAN_FILE = "/etc/netplan/99-drctl-re-ip.yaml"
_DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}

_HEAD = """\
set -e
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
has() { command -v "$1" >/dev/null 2>&1; }
managed() {
  has nmcli && [ "$(nmcli -t -f RUNNING general 2>/dev/null)" = running ] || return 1
  case "$(nmcli -g GENERAL.STATE device show "$1" 2>/dev/null)" in ""|10|"10 "*) return 1;; esac
}
if managed %(first)s; then
  echo "way: nmcli"
%(nmcli)s
elif has netplan && ls /etc/netplan/*.yaml >/dev/null 2>&1; then
  echo "way: netplan"
%(netplan)s
else
  echo "way: ip"
%(ip)s
fi
"""


def linux_script(wanted: Mapping[str, CardAddress], macs: Mapping[str, str]) -> str:
    """A shell script for the interfaces of these names and MAC addresses. It may be run again."""
    parts = {"nmcli": list(_nmcli(wanted)), "netplan": list(_netplan(wanted, macs)), "ip": list(_ip(wanted))}
    text = {
        name: "\n".join(f"  {line}" if "\n" not in line else line for line in lines) for name, lines in parts.items()
    }
    return _HEAD % {"first": quote(next(iter(wanted))), **text}


def _nmcli(wanted: Mapping[str, CardAddress]) -> Iterator[str]:
    for name, card in wanted.items():
        device, fresh = quote(name), quote(f"drctl-{name}")
        yield f"con=$(nmcli -g GENERAL.CONNECTION device show {device} || :)"
        yield f'[ -n "$con" ] || {{ con={fresh}; nmcli connection add type ethernet ifname {device} con-name "$con"; }}'
        settings = ["connection.autoconnect", "yes"]
        for version in (4, 6):
            ips, gateway = card.of_family(version)
            if not ips:
                continue
            dns = [one for one in card.dns if ipaddress.ip_address(one).version == version]
            own = {"addresses": ips, "gateway": [gateway], "dns": dns, "dns-search": card.search}
            for key, values in own.items():
                settings += [f"ipv{version}.{key}", ",".join(values)]
            settings += [f"ipv{version}.method", "manual"]
        yield 'nmcli connection modify "$con" ' + " ".join(quote(word) for word in settings)
        yield f'nmcli connection up "$con" ifname {device}'


def netplan_text(wanted: Mapping[str, CardAddress], macs: Mapping[str, str]) -> str:
    """A netplan file (JSON is YAML, too) for interfaces of these names, which they keep: what had named them goes."""
    cards = {
        name: {"match": {"macaddress": macs[name]}, "set-name": name, "dhcp4": False, "dhcp6": False, **_settings(card)}
        for name, card in wanted.items()
    }
    return json.dumps({"network": {"version": 2, "ethernets": cards}}, indent=1)


def _settings(card: CardAddress) -> dict[str, object]:
    routes = [{"to": _DEFAULT[ipaddress.ip_address(one).version], "via": one} for one in card.gateway]
    servers = {key: list(values) for key, values in (("addresses", card.dns), ("search", card.search)) if values}
    settings: dict[str, object] = {"addresses": list(card.ip)}
    if routes:
        settings["routes"] = routes
    if servers:
        settings["nameservers"] = servers
    return settings


def _netplan(wanted: Mapping[str, CardAddress], macs: Mapping[str, str]) -> Iterator[str]:
    """What other files say of the card goes first: netplan would add their addresses to ours."""
    for name in wanted:
        escaped = name.replace(".", "\\.")
        yield f"netplan set {quote(f'ethernets.{escaped}=null')} || :"
    yield "umask 077"
    yield f"cat > {NETPLAN_FILE} <<'DRCTL'\n{netplan_text(wanted, macs)}\nDRCTL"
    yield "netplan apply"


def _ip(wanted: Mapping[str, CardAddress]) -> Iterator[str]:
    for name, card in wanted.items():
        device = quote(name)
        yield f"ip link set dev {device} up"
        for version in (4, 6):
            ips, gateway = card.of_family(version)
            if ips:
                yield f"ip -{version} addr flush dev {device} scope global"
                nodad = " nodad" if version == 6 else ""
                for one in ips:
                    yield f"ip -{version} addr add {one} dev {device}{nodad}"
            if gateway:
                yield f"ip -{version} route replace default via {gateway} dev {device}"
    lines = resolver_lines(list(wanted.values()))
    if lines:
        text = " ".join(quote(line) for line in lines)
        yield "if [ -L /etc/resolv.conf ]; then echo 'name servers: left to what keeps /etc/resolv.conf'"
        yield f"else printf '%s\\n' {text} > /etc/resolv.conf; fi"


def resolver_lines(cards: Sequence[CardAddress]) -> list[str]:
    """What a resolv.conf says for all of them."""
    servers = dict.fromkeys(one for card in cards for one in card.dns)
    domains = dict.fromkeys(one for card in cards for one in card.search)
    search = [f"search {' '.join(domains)}"] if domains else []
    return [*search, *(f"nameserver {one}" for one in servers)]


def windows_commands(wanted: Mapping[str, CardAddress]) -> list[tuple[str, ...]]:
    """netsh commands for the interfaces of these names.

    They may be run again; then those that add something fail, since it is there already."""
    return [command for name, card in wanted.items() for command in _netsh(name, card)]


def _netsh(name: str, card: CardAddress) -> Iterator[tuple[str, ...]]:
    own = f"name={name}"
    ips, gateway = card.of_family(4)
    for number, ip in enumerate(ips):
        place = ipaddress.IPv4Interface(ip)
        address = (f"address={place.ip}", f"mask={place.netmask}")
        if number:
            yield ("netsh", "interface", "ipv4", "add", "address", own, *address)
        else:
            way = (f"gateway={gateway or 'none'}",)
            yield ("netsh", "interface", "ipv4", "set", "address", own, "source=static", *address, *way)
    for ip in (card.of_family(6))[0]:
        yield ("netsh", "interface", "ipv6", "add", "address", f"interface={name}", f"address={ip}")
    if gateway := card.of_family(6)[1]:
        yield ("netsh", "interface", "ipv6", "add", "route", "prefix=::/0", f"interface={name}", f"nexthop={gateway}")
    for version in (4, 6):
        servers = [one for one in card.dns if ipaddress.ip_address(one).version == version]
        for number, one in enumerate(servers):
            verb = ("add", "dnsservers", own, f"address={one}", f"index={number + 1}", "validate=no")
            if not number:
                verb = ("set", "dnsservers", own, "source=static", f"address={one}", "validate=no")
            yield ("netsh", "interface", f"ipv{version}", *verb)
