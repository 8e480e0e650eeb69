"""`re_ip`, `[[stage.vm.address]]` and `[[stage.vm.test_address]]`: where a recovered machine is to be found."""

from __future__ import annotations

import re

from drctl.model.address import CardAddress, ReIp, check_addresses
from drctl.toml.table import Table

#: A machine has no more cards than its PCI buses have places.
MOST_CARDS = 256
#: Of a search domain and an interface's name: what a shell, a YAML file and a resolv.conf take for a word.
_DOMAIN = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?\.?")
INTERFACE = r"[A-Za-z][A-Za-z0-9_.-]{0,14}"


def read_re_ip(table: Table) -> tuple[ReIp | None, tuple[CardAddress, ...], tuple[CardAddress, ...]]:
    """How, and the addresses of moves and of tests. Raises ConfigInvalid."""
    way = ReIp(table.choice("re_ip", [*ReIp])) if "re_ip" in table else None
    if way is None:
        table.text("re_ip", "")
    real = _read_addresses(table, "address", way)
    test = _read_addresses(table, "test_address", way)
    if way is not None and not (real or test):
        hint = 'write [[stage.vm.address]] (moves) or [[stage.vm.test_address]] with ip = ["…"] below it'
        raise table.error("re_ip", "no address is given", hint=hint)
    return way, real, test


def _read_addresses(table: Table, key: str, way: ReIp | None) -> tuple[CardAddress, ...]:
    rows = table.tables(key)
    if rows and way is None:
        raise table.error(key, "re_ip is missing", hint=f"re_ip = one of {', '.join(ReIp)} says how it is given")
    found = [_read_card(row, way or ReIp.GUEST_AGENT) for row in rows]
    cards = [one.card for one in found]
    for row, one in zip(rows, found, strict=True):
        if cards.count(one.card) > 1:
            raise row.error("card", f"card {one.card} is there twice", hint="a card may have several addresses in ip")
    return tuple(found)


def _read_card(table: Table, way: ReIp) -> CardAddress:
    wanted = CardAddress(
        card=table.integer("card", 1, minimum=1),
        ip=table.strings("ip"),
        gateway=table.strings("gateway", []),
        dns=table.strings("dns", []),
        search=table.strings("search", []),
        interface=table.text("interface", "", pattern=INTERFACE, example="ens3"),
    )
    table.finish()
    if wanted.card > MOST_CARDS:
        raise table.error("card", f"{wanted.card} is above {MOST_CARDS}", hint="the machine's cards are counted from 1")
    if not wanted.ip:
        raise table.error("ip", "names no address", hint='e.g. ip = ["10.9.0.11/24"]')
    if problem := check_addresses(way, wanted):
        raise table.error("ip", problem)
    if bad := [one for one in wanted.search if not _DOMAIN.fullmatch(one)]:
        raise table.error("search", f"{bad[0]!r} is no domain", hint="e.g. shop.example.org")
    return wanted
